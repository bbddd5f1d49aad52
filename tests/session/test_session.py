"""The session: equality with the plain model, questions that leave no trace, turns, threads, forks, faults."""

import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from millpond import BudgetError, MillpondError, ModelError, PolicyError, Session, SourceError
from millpond.frames import Frame
from millpond.models.base import Family
from millpond.positions import Clock
from tests.models.tiny import tiny
from tests.session.frames import moving

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava_next_video"]
QUESTION = "what is there now"


@pytest.fixture(scope="module")
def qwen() -> Family:
    return tiny("qwen2_5_vl")


def tight(family: Family, **options: object) -> Session:
    """A session whose budget is small enough to compact many times on 60 frames."""
    session = Session(family, budget="4GiB", **options)  # type: ignore[arg-type]
    group = session.plan_for(56, 56)
    slots = len(session._runner._opening) + 6 * group.group_tokens + 40
    return Session(family, budget=int(slots * family.geometry.bytes_per_token * 1.3) + group.waiting_bytes, **options)  # type: ignore[arg-type]


def state(session: Session) -> list[bytes]:
    """Everything that the stream's memory consists of, bit for bit."""
    pond = session._runner.pond
    parts = [
        t[:, : pond.length].contiguous().view(torch.uint8).numpy().tobytes()
        for layer in pond.layers
        for t in layer.tensors()
    ]
    parts.append(repr((session._runner.clock, pond.length, pond.recent, pond.compactions)).encode())
    parts += [frame.tobytes() for _, frame in session._ingest.at.waiting]
    return parts


def plain_answer(family: Family, frames: list[Frame], question: str, new: int) -> list[int]:
    """The same stream through the family and a plain DynamicCache in one go, without a session."""
    cache, clock = DynamicCache(), Clock()
    with torch.no_grad():
        video = family.encode([family.prepare(f.pixels) for f in frames], [round(f.seconds * 1e6) for f in frames])
        for part in (family.embed(family.opening()), video, family.question(question, after_video=True)):
            hidden = family.forward(part, family.assign_positions(part, clock), cache)
        ids: list[int] = []
        while len(ids) < new:
            token = int(family.logits(hidden[-1]).argmax())
            if token in family.stop_ids:
                break
            ids.append(token)
            part = family.embed([token])
            hidden = family.forward(part, family.assign_positions(part, clock), cache)
    return ids


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("count", [1, 9, 16])
def test_an_ample_budget_equals_the_plain_model_however_the_frames_arrive(name: str, count: int) -> None:
    family = tiny(name)
    frames = list(moving(count))
    expected = plain_answer(family, frames, QUESTION, 12)
    whole = Session(family, budget="64MiB")
    whole.feed(frames)
    assert list(whole.ask(QUESTION, max_new_tokens=12).token_ids) == expected
    single = Session(family, budget="64MiB")
    for frame in frames:
        single.feed(frame)
    assert list(single.ask(QUESTION, max_new_tokens=12).token_ids) == expected
    full = Session(family, budget="1KiB", policy="full")  # which has no cap: a budget says nothing to it
    for first in range(0, count, 5):
        full.feed(frames[first : first + 5])
        full.ask(QUESTION, max_new_tokens=2)
    assert list(full.ask(QUESTION, max_new_tokens=12).token_ids) == expected
    assert full.usage.budget_bytes is None
    assert single.usage.compactions == whole.usage.compactions == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("frames", [0, 1, 30, 31])
def test_asking_leaves_no_trace_and_gives_the_same_answer_twice(name: str, frames: int) -> None:
    session = tight(tiny(name))
    session.feed(list(moving(frames)))
    session.usage  # noqa: B018  opens the memory when no frame did
    before, seen = state(session), session.usage.stream_tokens
    first = session.ask(QUESTION, max_new_tokens=9)
    assert state(session) == before
    second = session.ask(QUESTION, max_new_tokens=9)
    assert (first.text, first.token_ids, first.finish_reason) == (second.text, second.token_ids, second.finish_reason)
    assert state(session) == before
    assert session.usage.stream_tokens == seen
    if frames > 20:
        assert session.usage.compactions > 2


def test_a_stream_goes_on_as_if_nobody_had_asked(qwen: Family) -> None:
    quiet, asked = tight(qwen), tight(qwen)
    for frame in moving(41):
        quiet.feed(frame)
        asked.feed(frame)
        asked.ask(QUESTION, max_new_tokens=3)
    assert state(quiet) == state(asked)


def test_pieces_join_to_the_answer_and_an_abandoned_answer_is_rolled_back(qwen: Family) -> None:
    session = tight(qwen)
    session.feed(list(moving(21)))
    before = state(session)
    pieces = session.stream(QUESTION, max_new_tokens=8)
    texts, answer = [], None
    while answer is None:
        try:
            texts.append(next(pieces))
        except StopIteration as done:
            answer = done.value
    assert "".join(texts) == answer.text == session.ask(QUESTION, max_new_tokens=8).text
    for remember in (False, True):
        open_answer = session.stream(QUESTION, max_new_tokens=8, remember=remember)
        next(open_answer)
        open_answer.close()
        assert remember or state(session) == before


def test_a_remembered_turn_stays_under_the_cap_and_changes_the_next_answer(qwen: Family) -> None:
    session = tight(qwen)
    session.feed(list(moving(21)))
    before = session.usage
    kept = session.ask("which one", max_new_tokens=4, remember=True)
    after = session.usage
    assert after.stream_tokens > before.stream_tokens
    assert session._runner.pond.free >= session.plan.reserve_tokens
    texts = [(layer.row == -1).sum(axis=1) for layer in session.memory()]
    assert all((count == texts[0][0]).all() and count[0] >= len(kept.token_ids) for count in texts)
    session.ask("and then", max_new_tokens=4)
    session.feed(list(moving(30, start=11)))
    session.ask("and now", max_new_tokens=4, remember=True)
    session.ask("once more", max_new_tokens=4, remember=True)
    session.feed(list(moving(9, start=60)))
    assert session.usage.peak_bytes <= session.plan.budget


def test_remembering_equals_a_conversation_without_a_cap(qwen: Family) -> None:
    """Two questions in a row, the first remembered: the same ids as one plain pass over the whole conversation."""
    frames = list(moving(8))
    session = Session(qwen, budget="64MiB")
    session.feed(frames)
    first = session.ask("which one", max_new_tokens=5, remember=True)
    second = session.ask("and then", max_new_tokens=5)
    cache, clock = DynamicCache(), Clock()
    with torch.no_grad():
        video = qwen.encode([qwen.prepare(f.pixels) for f in frames], [round(f.seconds * 1e6) for f in frames])
        parts = [qwen.embed(qwen.opening()), video, qwen.question("which one", after_video=True)]
        parts += [qwen.embed(list(first.token_ids)), qwen.question("and then", after_video=False)]
        for part in parts:
            hidden = qwen.forward(part, qwen.assign_positions(part, clock), cache)
        assert int(qwen.logits(hidden[-1]).argmax()) == second.token_ids[0]


@pytest.mark.slow
def test_two_sessions_on_one_model_in_two_threads_do_not_disturb_each_other(qwen: Family) -> None:
    def run(seed: int) -> list[tuple[int, ...]]:
        session = tight(qwen)
        answers = []
        for frame in moving(30, seed=seed):
            session.feed(frame)
            answers.append(session.ask(QUESTION, max_new_tokens=3).token_ids)
        return answers

    alone = [run(0), run(1)]
    together: list[object] = [None, None]

    def work(seed: int) -> None:
        together[seed] = run(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_asking_from_another_thread_waits_for_the_block_and_then_answers(qwen: Family) -> None:
    session = tight(qwen)
    answers: list[str] = []
    feeding = threading.Thread(target=lambda: [session.feed(frame) for frame in moving(60)])
    asking = threading.Thread(
        target=lambda: [answers.append(session.ask(QUESTION, max_new_tokens=2).text) for _ in range(8)]
    )
    feeding.start()
    asking.start()
    feeding.join()
    asking.join()
    assert len(answers) == 8
    assert session.usage.frames_seen == 60
    alone = tight(qwen)
    for frame in moving(60):
        alone.feed(frame)
    assert state(alone) == state(session)


def test_fork_goes_its_own_way(qwen: Family) -> None:
    session = tight(qwen)
    session.feed(list(moving(25)))
    other = session.fork()
    assert state(other) == state(session)
    before = state(session)
    other.feed(list(moving(20, seed=5, start=50)))
    other.ask(QUESTION, max_new_tokens=3, remember=True)
    assert state(session) == before
    session.feed(list(moving(20, seed=5, start=50)))
    assert session.usage.frames_seen == other.usage.frames_seen == 45


def test_a_broken_source_leaves_what_was_seen_answerable(qwen: Family) -> None:
    def breaks() -> Iterator[Frame]:
        yield from moving(7)
        raise SourceError("the cable was pulled")

    session = tight(qwen)
    with pytest.raises(SourceError, match="cable"):
        session.feed(breaks())
    whole = tight(qwen)
    whole.feed(list(moving(7)))
    assert state(session) == state(whole)
    assert session.usage.frames_seen == 7
    assert session.ask(QUESTION, max_new_tokens=3) is not None


def test_a_model_fault_in_the_middle_of_a_block_is_rolled_back(qwen: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    session = tight(qwen)
    session.feed(list(moving(20)))
    lengths = [layer.length for layer in session._runner.pond.layers]
    clock = replace(session._runner.clock)
    original = session._runner.pond.update

    def fails(keys: torch.Tensor, values: torch.Tensor, layer: int, *args: object, **kwargs: object) -> object:
        if layer == 1:
            raise RuntimeError("out of memory")
        return original(keys, values, layer, *args, **kwargs)

    monkeypatch.setattr(session._runner.pond, "update", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        session.feed(list(moving(2, start=10)))
    monkeypatch.undo()
    assert len({layer.length for layer in session._runner.pond.layers}) == 1
    assert session._runner.pond.length <= lengths[0]
    assert session._runner.clock == clock
    assert session.usage.frames_dropped == 2
    session.feed(list(moving(2, start=12)))
    assert session.ask(QUESTION, max_new_tokens=2) is not None


def test_frames_of_changing_size_and_rate(qwen: Family) -> None:
    session = Session(qwen, budget="1MiB")
    session.feed(list(moving(5)))
    session.feed(list(moving(6, height=84, width=56, start=3, fps=7)))
    session.feed(list(moving(3, height=28, width=112, start=9.5, fps=0.3)))
    session.feed(Frame(30.0, np.zeros((140, 112, 3), np.uint8)))
    session.feed(list(moving(8, start=31)))
    usage = session.usage
    assert usage.frames_seen == 23
    assert usage.peak_bytes <= 1 << 20
    assert session.ask(QUESTION, max_new_tokens=2) is not None


def test_a_frame_too_large_for_the_budget_is_refused_and_nothing_is_lost(qwen: Family) -> None:
    session = tight(qwen)
    session.feed(list(moving(20)))
    before = state(session)
    with pytest.raises(BudgetError, match="minimum that works") as caught:
        session.feed(Frame(50.0, np.zeros((560, 560, 3), np.uint8)))
    assert state(session) == before
    session.resize(caught.value.minimum)
    session.feed(Frame(50.0, np.zeros((560, 560, 3), np.uint8)))
    session.feed(Frame(50.5, np.zeros((560, 560, 3), np.uint8)))
    assert session.usage.frames_seen == 22


def test_clips_in_a_row_go_on_and_single_frames_must_ascend(qwen: Family) -> None:
    session = Session(qwen, budget="8MiB")
    session.feed(list(moving(4)))
    session.feed(list(moving(4, seed=1)))
    assert session.usage.stream_seconds == 3.5
    with pytest.raises(SourceError, match="ascend"):
        session.feed(Frame(1.0, np.zeros((56, 56, 3), np.uint8)))


def test_memory_tells_time_and_place_of_every_kept_token(qwen: Family) -> None:
    session = tight(qwen)
    session.feed(list(moving(40)))
    memory = session.memory()
    usage = session.usage
    assert len(memory) == qwen.geometry.layers
    times: set[float] = set()
    for layer in memory:
        assert (
            layer.seconds.shape
            == layer.row.shape
            == layer.column.shape
            == (qwen.geometry.kv_heads, usage.memory_tokens)
        )
        assert (np.diff(layer.seconds, axis=1) >= 0).all()
        grid = qwen.grid(56, 56)
        assert 0 <= layer.row.min() <= layer.row.max() < grid.rows
        assert 0 <= layer.column.min() <= layer.column.max() < grid.cols
        newest = layer.seconds == layer.seconds.max()
        assert (newest.sum(axis=1) == grid.tokens).all()
        times |= set(layer.seconds.ravel().tolist())
    assert len(times) == usage.timestamps_kept
    assert max(times) == 19.0


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["absolute", "contiguous"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_stream_longer_than_the_trained_range_stays_in_it(name: str, positions: str) -> None:
    family = tiny(name, max_position_embeddings=160)
    session = tight(family, positions=positions)
    for frame in moving(160, fps=1):
        session.feed(frame)
        assert session._runner.clock.next <= 160
    assert session.usage.reanchorings >= 1
    assert session.ask(QUESTION, max_new_tokens=3) is not None


def test_absolute_reanchoring_changes_no_answer() -> None:
    near, far = tight(tiny("qwen2_5_vl", max_position_embeddings=120)), tight(tiny("qwen2_5_vl"))
    for frame in moving(120, fps=1):
        near.feed(frame)
        far.feed(frame)
    assert near.usage.reanchorings >= 2
    assert far.usage.reanchorings == 0
    assert near.ask(QUESTION, max_new_tokens=8).token_ids == far.ask(QUESTION, max_new_tokens=8).token_ids


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"budget": "1 byte"}, BudgetError),
        ({"budget": "lots"}, BudgetError),
        ({"budget": None}, BudgetError),
        ({"budget": "1MiB", "positions": "relative"}, MillpondError),
        ({"budget": "1MiB", "policy": "nonesuch"}, MillpondError),
    ],
)
def test_bad_arguments_are_one_clear_line(qwen: Family, arguments: dict, error: type) -> None:
    with pytest.raises(error) as caught:
        Session(qwen, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [{"question": "  "}, {"question": "x", "max_new_tokens": 0}])
def test_bad_questions(qwen: Family, bad: dict) -> None:
    with pytest.raises(MillpondError):
        Session(qwen, budget="1MiB").ask(**bad)


def test_a_policy_that_knows_frames_only_refuses_what_is_none_before_it_is_in() -> None:
    session = Session(tiny("qwen2_vl"), budget="2MiB", policy="infinipot-v-released")
    session.feed(list(moving(16)))
    before = state(session)
    with pytest.raises(PolicyError, match="remembered turns do not go together: the policy knows frames only"):
        session.ask("what is there", remember=True)
    assert state(session) == before
    with pytest.raises(PolicyError, match="tokens between frames do not go together: the policy knows frames only"):
        Session(tiny("qwen3_vl"), budget="2MiB", policy="infinipot-v-released").feed(list(moving(4)))


def test_arguments_of_the_wrong_kind_are_refused_in_one_line() -> None:
    session = Session(tiny("qwen2_vl"), budget="2MiB")
    with pytest.raises(MillpondError, match="a question is text, not 3"):
        session.ask(3)  # type: ignore[arg-type]
    with pytest.raises(MillpondError, match=r"max_new_tokens must be at least 1, not 2\.5"):
        session.ask(QUESTION, max_new_tokens=2.5)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"not 'minnow': Session\.from_pretrained loads one"):
        Session("minnow", budget="2MiB")  # type: ignore[arg-type]
    for size in (7, (480,), (0, 64), ("480", "640")):
        with pytest.raises(MillpondError, match="frame_size must be a height and a width in pixels"):
            Session.from_pretrained("minnow", frame_size=size)  # type: ignore[arg-type]
