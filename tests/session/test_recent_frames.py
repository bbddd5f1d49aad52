"""The latest frames once more: what a question sees of them, that they leave no trace, and that every byte of them is planned."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from millpond import BudgetError, MillpondError, Session, policies
from millpond.frames import Frame
from millpond.models.base import Family, Tokens
from millpond.positions import Clock
from millpond.stream.runner import Runner
from tests.models.tiny import FAMILIES, tiny
from tests.nightly import nightly
from tests.session.frames import moving
from tests.session.measure import held_bytes
from tests.session.test_session import state

QUESTION = "what is there now"
N = 4


@pytest.fixture(scope="module")
def qwen() -> Family:
    return tiny("qwen2_5_vl")


def minimum(family: Family, **options: object) -> int:
    """The minimum budget for frames of 56 x 56."""
    found = 1
    for _ in range(2):  # for the prompt alone, then for frames
        with pytest.raises(BudgetError) as caught:
            Session(family, budget=found, **options).plan_for(56, 56)  # type: ignore[arg-type]
        found = caught.value.minimum or 0
    return found


def tight(family: Family, **options: object) -> Session:
    """A session that compacts many times on 60 frames."""
    options = {"recent_frames": N, **options}
    budget = minimum(family, **options) + 60 * family.geometry.bytes_per_token
    return Session(family, budget=budget, **options)  # type: ignore[arg-type]


def whole_state(session: Session) -> list[bytes]:
    """The memory, and the pixels that are kept of the latest frames."""
    kept = [frame.tobytes() for group in session._ingest.state().recent for _, frame in group]
    return state(session) + kept


def shown(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[Tokens]:
    """Every run of tokens that goes through the decoder of this session from now on."""
    parts: list[Tokens] = []
    forward = Runner._forward

    def noted(runner: Runner, tokens: Tokens, positions: torch.Tensor, **options: object) -> torch.Tensor:
        if runner is session._runner:
            parts.append(tokens)
        return forward(runner, tokens, positions, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Runner, "_forward", noted)
    return parts


def times_of(parts: list[Tokens]) -> list[float]:
    """Seconds of the frame groups shown, in order."""
    return [
        time / 1e6 for part in parts if bool(part.visual.any()) for time in part.time_us.unique_consecutive().tolist()
    ]


def plain(family: Family, blocks: list[list[Frame]], new: int) -> tuple[list[int], torch.Tensor]:
    """Blocks of frames and the question through the model and a plain cache, without a session: answer, first logits."""
    cache, clock = DynamicCache(), Clock()

    def run(part: Tokens) -> torch.Tensor:
        return family.forward(part, family.assign_positions(part, clock), cache)

    with torch.no_grad():
        run(family.embed(family.opening()))
        for block in blocks:
            times = [round(frame.seconds * 1e6) for frame in block]
            run(family.encode([family.prepare(frame.pixels) for frame in block], times))
        hidden = run(family.question(QUESTION, after_video=True))
        first = family.logits(hidden)
        ids: list[int] = []
        while len(ids) < new and (token := int(family.logits(hidden[-1]).argmax())) not in family.stop_ids:
            ids.append(token)
            hidden = run(family.embed([token]))
    return ids, first


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("count", [3, 12, 17])
def test_an_answer_is_the_plain_model_s_with_the_frames_given_twice(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = tiny(name)
    frames = list(moving(count))
    ran = count - count % family.frames_per_group
    latest = N if family.frames_per_group == 1 or ran == count else N - 1
    first = max(0, ran - -(-latest // family.frames_per_group) * family.frames_per_group)
    blocks = [block for block in (frames[:ran], frames[first:ran], frames[ran:]) if block]
    ids, logits = plain(family, blocks, 12)
    session = Session(family, budget=None, policy="full", recent_frames=N)
    for frame in frames:
        session.feed(frame)
    heard: list[torch.Tensor] = []
    ask = Runner.ask
    monkeypatch.setattr(Runner, "ask", lambda *given: heard.append(ask(*given)) or heard[-1])
    answer = session.ask(QUESTION, max_new_tokens=12)
    assert torch.allclose(family.logits(heard[0]), logits, atol=1e-4)
    assert list(answer.token_ids) == ids
    without = Session(family, budget=None, policy="full")
    without.feed(frames)
    without.ask(QUESTION, max_new_tokens=1)
    assert not torch.allclose(family.logits(heard[1]), logits, atol=1e-4), "what was shown again counts"


@pytest.mark.parametrize(
    ("wanted", "waiting", "seen"), [(1, 0, 1), (2, 0, 1), (3, 0, 2), (1, 1, 0), (2, 1, 1), (4, 1, 2)]
)
def test_whole_groups_of_the_latest_frames_are_shown_and_waiting_ones_count(
    qwen: Family, wanted: int, waiting: int, seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(qwen, budget="4MiB", recent_frames=wanted)
    session.feed(list(moving(20 + waiting)))
    parts = shown(session, monkeypatch)
    session.ask(QUESTION, max_new_tokens=1)
    assert times_of(parts) == [10.0 - seconds for seconds in range(seen, 0, -1)] + [10.0] * waiting
    plan = session.plan
    assert plan.recent_bytes == -(-wanted // 2) * plan.waiting_bytes // plan.block_groups


def arguments(name: str) -> dict[str, object]:
    return {"host_budget": "8MiB"} if policies.read(name).needs.retrieved_frames else {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy",
    nightly(
        [*(kind.name for kind in policies.available()), "keydiff+diversity", "mikv:bits=2"],
        but=[
            "full",
            "h2o",
            "infinipot-v",
            "infinipot-v-released",
            "kvmerger",
            "rekv",
            "keydiff+diversity",
            "mikv:bits=2",
        ],
    ),
)
def test_every_policy_answers_and_keeps_its_memory(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, more = tiny("llava_onevision"), arguments(policy)
    capped = policies.read(policy).capped
    make = tight if capped else lambda family, **rest: Session(family, budget=None, recent_frames=N, **rest)
    session = make(family, policy=policy, **more)
    session.feed(list(moving(41)))
    assert not capped or session.usage.compactions > 2
    before, tokens = whole_state(session), session.usage.stream_tokens
    parts = shown(session, monkeypatch)
    answer = session.ask(QUESTION, max_new_tokens=6)
    assert times_of(parts) == [18.5, 19.0, 19.5, 20.0]
    assert whole_state(session) == before
    assert session.ask(QUESTION, max_new_tokens=6).token_ids == answer.token_ids
    if policy == "infinipot-v-released":
        return  # knows frames only, no remembered turns
    parts.clear()
    kept = session.ask(QUESTION, max_new_tokens=3, remember=True)
    assert len(times_of(parts)) >= N
    question = len(family.question(QUESTION, after_video=True))
    assert session.usage.stream_tokens == tokens + question + len(kept.token_ids), "the turn alone stays"
    lengths = [layer.length for layer in session._runner.pond.layers]
    assert session._runner.pond.storage.ahead == [length - lengths[0] for length in lengths]
    for layer in session._runner.pond.layers:
        times = layer.time_us[:, session.plan.prompt_tokens : layer.length]
        assert bool((times[:, 1:] >= times[:, :-1]).all()), "what was left behind would break the order"
    session.feed(list(moving(16, start=40)))
    assert len(session.ask(QUESTION, max_new_tokens=3).token_ids) > 0
    assert not capped or session.usage.peak_bytes <= session.plan.budget  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "positions"),
    nightly(
        [*((name, "contiguous") for name in FAMILIES), ("qwen2_5_vl", "absolute"), ("llava_onevision", "absolute")],
        but=[("qwen2_5_vl", "contiguous"), ("llava_onevision", "absolute")],
    ),
)
def test_asking_leaves_no_trace_on_a_long_stream(name: str, positions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ranges of which a quarter has room for a turn: less than that is never kept free.
    limit, count = {"qwen2_vl": (160, 301), "qwen2_5_vl": (200, 131), "qwen3_vl": (600, 101)}.get(name, (400, 66))
    family = tiny(name, max_position_embeddings=limit)
    quiet, asked = tight(family, positions=positions), tight(family, positions=positions)
    grid_position, most = family.assign_positions, []

    def noted(tokens: Tokens, clock: Clock) -> torch.Tensor:
        found = grid_position(tokens, clock)
        most.append(int(found.max()))
        return found

    monkeypatch.setattr(family, "assign_positions", noted)
    for number, frame in enumerate(moving(count, fps=1)):
        quiet.feed(frame)
        asked.feed(frame)
        if number % 7 == 3:
            asked.ask(QUESTION, max_new_tokens=3)
    assert max(most) < family.rope.limit, "a turn with the frames in front of it stays in the trained range too"
    assert asked.usage.reanchorings > 0
    assert whole_state(asked) == whole_state(quiet)


@pytest.mark.parametrize("name", FAMILIES)
def test_admission_thins_the_memory_and_not_the_second_look(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = tiny(name)
    session = tight(family, admission="curvestream:k=0.2")
    session.feed(list(moving(60)))
    assert session.usage.frames_skipped + session.usage.frames_reduced > 10
    before, parts = whole_state(session), shown(session, monkeypatch)
    session.ask(QUESTION, max_new_tokens=2)
    again = [part for part in parts if bool(part.visual.any())]
    grid, groups = family.grid(56, 56), N // family.frames_per_group
    assert sum(int(part.visual.sum()) for part in again) == groups * grid.rows * grid.cols
    assert times_of(parts) == [30.0 - left / 2 for left in range(N, 0, -family.frames_per_group)]
    assert whole_state(session) == before


def test_a_remembered_turn_keeps_the_turn_alone(qwen: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(qwen, budget="4MiB", recent_frames=N)
    session.feed(list(moving(21)))
    pond, tokens = session._runner.pond, session.usage.stream_tokens
    length = pond.length
    memory = [tensor[:, :length].clone() for layer in pond.layers for tensor in layer.tensors()]
    answer = session.ask(QUESTION, max_new_tokens=5, remember=True)
    new = qwen.grid(56, 56).tokens + len(qwen.question(QUESTION, after_video=True)) + len(answer.token_ids)
    assert session.usage.stream_tokens == tokens + new, "the odd frame, the question and its answer"
    assert pond.length == length + new
    after = [tensor[:, :length] for layer in pond.layers for tensor in layer.tensors()]
    assert all(torch.equal(one, other) for one, other in zip(memory, after, strict=True))
    layer = pond.layers[0]
    assert layer.time_us[0, length : pond.length].tolist() == [10_000_000] * new
    along = layer.positions[0, : pond.length].amax(dim=1)
    assert int(along.max()) < session._runner.clock.next
    text = along[length + qwen.grid(56, 56).tokens :]
    assert bool((text[1:] == text[:-1] + 1).all())
    assert int(text[0]) > int(along[:length].max())


def test_behind_a_remembered_turn_the_video_is_opened_for_them_again(
    qwen: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(qwen, budget="4MiB", recent_frames=N)
    session.feed(list(moving(21)))
    session.ask("which one", max_new_tokens=2, remember=True)
    parts, before = shown(session, monkeypatch), whole_state(session)
    session.ask(QUESTION, max_new_tokens=1)
    assert len(parts[0]) == len(qwen.reopening())
    assert times_of(parts) == [9.0, 10.0], "the odd frame was shown with the turn, a group by itself"
    assert whole_state(session) == before
    session.ask(QUESTION, max_new_tokens=1, remember=True)
    session.feed(list(moving(3, start=11)))
    parts.clear()
    session.ask(QUESTION, max_new_tokens=1)
    assert times_of(parts) == [11.0, 12.0], "those in front of the turn stand in another video"


def test_without_them_nothing_is_planned_or_kept(qwen: Family) -> None:
    session = Session(qwen, budget="1MiB")
    session.feed(list(moving(20)))
    assert (session.plan.recent_tokens, session.plan.recent_bytes) == (0, 0)
    assert whole_state(session) == state(session)
    assert session._runner.pond.ledger.account("recent pixels") == 0


@pytest.mark.parametrize("count", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_next_video"])
def test_fewer_frames_than_wanted(name: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    family = tiny(name)
    session = Session(family, budget="8MiB", recent_frames=64)
    session.feed(list(moving(count)))
    parts = shown(session, monkeypatch)
    session.ask(QUESTION, max_new_tokens=2)
    size = family.frames_per_group
    ran = [first / 2 for first in range(0, count - count % size, size)]
    assert times_of(parts) == ran + [(count - 1) / 2] * (count % size)


def changing() -> Iterator[Frame]:
    for number, (height, width) in enumerate([(56, 56), (56, 56), (56, 56), (84, 56), (28, 112), (28, 112), (56, 56)]):
        yield Frame(number / 2, np.full((height, width, 3), 30 * number, np.uint8))


def test_frames_of_changing_size_are_shown_in_the_groups_in_which_they_ran(
    qwen: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(qwen, budget="4MiB", recent_frames=8)
    parts = shown(session, monkeypatch)
    session.feed(changing())
    watched = [part for part in parts if bool(part.visual.any())]
    parts.clear()
    session.ask(QUESTION, max_new_tokens=2)
    again = [part for part in parts if bool(part.visual.any())]
    assert times_of(again) == [*times_of(watched), 3.0] == [0.0, 1.0, 1.5, 2.0, 3.0]
    embeds = [torch.cat([part.embeds for part in seen]) for seen in (watched, again)]
    assert torch.allclose(embeds[1][: len(embeds[0])], embeds[0], atol=1e-5)
    assert held_bytes(session) <= session.usage.allocated_bytes


def test_a_source_that_begins_again_goes_on_in_time(qwen: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(qwen, budget="4MiB", recent_frames=N)
    session.feed(list(moving(10)))
    session.feed(list(moving(2, seed=3)))
    parts = shown(session, monkeypatch)
    session.ask(QUESTION, max_new_tokens=1)
    assert times_of(parts) == [4.0, 5.0]


def test_qwen3_says_the_frames_true_times(monkeypatch: pytest.MonkeyPatch) -> None:
    family = tiny("qwen3_vl")
    session = Session(family, budget="4MiB", recent_frames=N)
    session.feed(list(moving(20)))
    said: list[str] = []
    text_ids = family.chat.text_ids
    monkeypatch.setattr(family.chat, "text_ids", lambda text: said.append(text) or text_ids(text))
    session.ask(QUESTION, max_new_tokens=1)
    assert said == ["<8.2 seconds>", "<9.2 seconds>"]


def test_a_failed_block_is_not_shown_again(qwen: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(qwen, budget="4MiB", recent_frames=N)
    session.feed(list(moving(20)))

    def fails(*args: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(qwen, "forward", fails)
        with pytest.raises(RuntimeError):
            session.feed(list(moving(2, start=10)))
    before, parts = whole_state(session), shown(session, monkeypatch)
    session.ask(QUESTION, max_new_tokens=1)
    assert times_of(parts) == [8.0, 9.0]
    assert whole_state(session) == before


@pytest.mark.parametrize("bad", [-1, 1.5, "4"])
def test_bad_numbers_are_one_clear_line(qwen: Family, bad: object) -> None:
    with pytest.raises(MillpondError, match="recent_frames must be a whole number, at least 0") as caught:
        Session(qwen, budget="1MiB", recent_frames=bad)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("positions", ["absolute", "contiguous"])
def test_frames_far_apart_in_time_stand_behind_the_beginning_of_their_video(
    qwen: Family, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory holds fewer groups than are shown again, and its gaps were closed: their true distance would lead in front of it."""
    family = tiny("qwen2_5_vl", max_position_embeddings=300)
    session = tight(family, positions=positions, recent_frames=16)
    session.feed(list(moving(60, fps=0.05)))
    assert session.usage.reanchorings > 0
    before, grid_position, found = whole_state(session), family.assign_positions, []
    base = session._runner.clock.base

    def noted(tokens: Tokens, clock: Clock) -> torch.Tensor:
        found.append(grid_position(tokens, clock))
        return found[-1]

    monkeypatch.setattr(family, "assign_positions", noted)
    session.ask(QUESTION, max_new_tokens=1)
    assert whole_state(session) == before
    along = torch.cat([positions[0] for positions in found])
    assert bool((along[1:] >= along[:-1]).all())
    assert base is not None
    assert int(along[0]) >= base


def test_a_second_remembered_turn_stands_behind_the_first_in_time_too() -> None:
    session = Session(tiny("llava_onevision"), budget="1MiB", recent_frames=2)
    session.feed(list(moving(8)))
    for _ in range(2):  # the second opens the video again, only to show frames from before the first
        session.ask("which one", max_new_tokens=2, remember=True)
    for layer in session.memory():
        assert bool((layer.seconds[0][1:] >= layer.seconds[0][:-1]).all())
