"""An admission in front of a session: what it lets in, under the cap, at the right places."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from millpond import PolicyError, Session
from millpond.admission import Admission, Verdict
from millpond.admission.gate import filter_groups
from millpond.models.base import Family
from tests.models.tiny import FAMILIES, tiny
from tests.nightly import nightly
from tests.session.frames import moving
from tests.session.measure import held_bytes
from tests.session.test_session import state, tight


@dataclass(frozen=True)
class Scripted(Admission):
    """Says what it is told, over and over."""

    name: ClassVar[str] = "scripted"
    source: ClassVar[str] = "this test"
    says: Sequence[Verdict] = ("clear",)

    def judge(self, feature: Tensor, state: Any) -> tuple[Verdict, Any]:
        count = state or 0
        return self.says[count % len(self.says)], count + 1

    def state_bytes(self, hidden: int) -> int:
        return 0


QUESTION = "what is there now"


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_with_everything_clear_nothing_is_different(name: str) -> None:
    family = tiny(name)
    plain, gated = tight(family), tight(family, admission=Scripted())
    for session in (plain, gated):
        session.feed(list(moving(41)))
    assert state(plain) == state(gated)
    assert plain.ask(QUESTION, max_new_tokens=6).token_ids == gated.ask(QUESTION, max_new_tokens=6).token_ids
    assert gated.usage.compactions == plain.usage.compactions > 2


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_let_in_lies_where_it_would_have_lain(name: str) -> None:
    """Positions, times and places of a thinned stream are those of the whole one, for the tokens that are there."""
    family = tiny(name)
    says: Sequence[Verdict] = ("clear", "reduced", "drop", "reduced", "drop", "drop", "clear")
    whole, gated = Session(family, budget="64MiB"), Session(family, budget="64MiB", admission=Scripted(says=says))
    for session in (whole, gated):
        session.feed(list(moving(28)))
    sources = [session._runner.pond for session in (whole, gated)]
    start = sources[0].plan.prompt_tokens
    groups = 28 // family.frames_per_group
    live = slice(start, sources[0].length)
    _, group_of = sources[0].layers[0].time_us[0, live].unique_consecutive(return_inverse=True)
    expected = []
    for slot, group in enumerate(group_of.tolist(), start):
        row, column = sources[0].layers[0].grid_position[0, slot].tolist()
        verdict = says[group % len(says)]
        if verdict == "clear" or (verdict == "reduced" and (row < 0 or (row + column) % 2 == 0)):
            expected.append(slot)
    assert sources[1].length == start + len(expected)
    for mine, theirs in zip(sources[1].layers, sources[0].layers, strict=True):
        for field in ("time_us", "grid_position", "positions"):
            assert torch.equal(getattr(mine, field)[:, start : sources[1].length], getattr(theirs, field)[:, expected])
    # The first group saw the same past, so its keys are the same bits; the clock went on for what was left out.
    first = slice(start, start + int((group_of == 0).sum()))
    assert torch.equal(sources[1].layers[-1].keys[:, :, first], sources[0].layers[-1].keys[:, :, first])
    assert gated._runner.clock == whole._runner.clock
    usage = gated.usage
    span = family.frames_per_group
    counted = [says[group % len(says)] for group in range(groups)]
    assert (usage.frames_skipped, usage.frames_reduced) == (
        counted.count("drop") * span,
        counted.count("reduced") * span,
    )
    assert usage.stream_seconds == whole.usage.stream_seconds == 13.5
    assert usage.stream_tokens == whole.usage.stream_tokens
    assert gated.ask(QUESTION, max_new_tokens=3).text is not None


def test_a_reduced_frame_is_half_of_every_row_and_column(monkeypatch: pytest.MonkeyPatch) -> None:
    family = tiny("qwen3_vl")
    block = [family.prepare(frame.pixels) for frame in moving(4)]
    tokens = family.encode(block, [0, 500_000, 1_000_000, 1_500_000])
    admitted, verdicts, _ = filter_groups(Scripted(says=("reduced",)), tokens, None)
    assert verdicts == ("reduced", "reduced")
    taken = tokens.pick(admitted)
    grid = family.grid(56, 56)
    assert int(taken.visual.sum()) == grid.rows * grid.cols  # two groups, half of each
    assert int((~taken.visual).sum()) == int((~tokens.visual).sum())
    for axis in (0, 1):
        assert (taken.grid_position[taken.visual][:, axis].unique(return_counts=True)[1] == grid.cols).all()
    for whole, part in zip(tokens.deepstack, taken.deepstack, strict=True):
        assert torch.equal(part, whole[torch.isin(tokens.visual.nonzero()[:, 0], admitted)])


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("policy", nightly(["infinipot-v", "keydiff", "uniform", "recent"], but=["infinipot-v"]))
def test_the_cap_holds_with_any_policy(name: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family = tiny(name)
    budget = 150 * family.geometry.bytes_per_token + 120_000
    session = Session(family, budget=budget, policy=policy, admission="curvestream")
    forward = family.forward

    def watched(*args: Any) -> Tensor:
        assert held_bytes(session) <= session._runner.pond.ledger.held <= budget
        return forward(*args)

    monkeypatch.setattr(family, "forward", watched)
    session.feed(list(moving(90)))
    session.ask(QUESTION, max_new_tokens=3)
    usage = session.usage
    assert usage.compactions >= 2
    assert usage.peak_bytes <= budget
    assert 0 < usage.frames_reduced < 90
    assert session.plan.state_bytes == 2 * 4 * family.hidden
    assert held_bytes(session) <= usage.allocated_bytes


def test_a_dropped_start_and_a_block_of_nothing_are_fine() -> None:
    family = tiny("qwen2_5_vl")
    session = Session(family, budget="300KiB", admission=Scripted(says=("drop",)))
    session.feed(list(moving(20)))
    assert session.usage.memory_tokens == 0
    assert session.usage.frames_skipped == 20
    answer = session.ask(QUESTION, max_new_tokens=2, remember=True)
    assert answer.at_seconds == 9.5
    session.feed(list(moving(20, start=10)))
    assert session.usage.frames_skipped == 40


def test_a_fork_goes_on_by_itself(qwen: Family) -> None:
    session = tight(qwen, admission="curvestream")
    session.feed(list(moving(30)))
    fork = session.fork()
    before = fork.usage
    session.feed(list(moving(30, start=15, seed=3)))
    assert fork.usage.frames_seen == before.frames_seen
    assert (fork.usage.frames_skipped, fork.usage.frames_reduced) == (before.frames_skipped, before.frames_reduced)
    fork.feed(list(moving(30, start=15, seed=3)))
    assert state(fork) == state(session)
    assert fork.usage.frames_reduced == session.usage.frames_reduced
    assert fork._runner.pond.ledger.held == session._runner.pond.ledger.held


def test_a_block_that_fails_leaves_the_admission_as_it_was(qwen: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    session = tight(qwen, admission="curvestream")
    session.feed(list(moving(20)))
    before, seen = session._runner.admission_state, session.usage
    with monkeypatch.context() as patch:
        patch.setattr(qwen, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
        with pytest.raises(RuntimeError):
            session.feed(list(moving(8, start=10)))
    assert session._runner.admission_state is before
    assert session.usage.frames_reduced == seen.frames_reduced


def test_what_cannot_go_together_is_refused(qwen: Family) -> None:
    with pytest.raises(PolicyError, match="whole frames and an admission do not go together"):
        Session(qwen, budget="1MiB", policy="infinipot-v-released", admission="curvestream")
    with pytest.raises(PolicyError, match="no admission is called"):
        Session(qwen, budget="1MiB", admission="open")


@pytest.fixture(scope="module")
def qwen() -> Family:
    return tiny("qwen2_5_vl")
