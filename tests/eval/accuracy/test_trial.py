"""A trial is what a session does: the same answers, one look at each frame group, a refusal where the budget is too small."""

import copy
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from millpond import Session, models
from millpond.eval import streams
from millpond.eval.accuracy import read_cells
from millpond.eval.accuracy.sharing import SharedStream
from millpond.eval.accuracy.trial import watch
from millpond.eval.streams import Stream
from millpond.minnow import SUPPORTED
from millpond.models.base import Family

pytestmark = pytest.mark.slow  # every test watches a whole stream


@pytest.fixture(scope="module")
def minnow() -> Family:
    return models.load("minnow")


@pytest.fixture(scope="module")
def stream() -> Stream:
    return streams.generate(3, groups=48, level="standard", split="train")


def test_groups_are_looked_at_once_and_alike(minnow: Family, stream: Stream) -> None:
    frames = [minnow.prepare(pixels) for _, pixels in stream.frames()][:8]
    times = [round(index * 5e5) for index in range(8)]
    once = SharedStream(minnow)
    looks: list[int] = []
    original = once._look
    once._look = lambda given, at: looks.append(len(given)) or original(given, at)  # type: ignore[assignment,func-returns-value]
    first, again = once.family.encode(frames, times), once.family.encode(frames[2:6], times[2:6])
    assert looks == [2] * 4
    plain = minnow.encode(frames, times)
    for name in ("grid_position", "time_us", "visual"):
        assert torch.equal(getattr(first, name), getattr(plain, name))
    assert torch.allclose(first.embeds, plain.embeds, atol=1e-5)
    per_group = len(plain) // 4
    assert torch.equal(again.embeds, first.embeds[per_group : 3 * per_group])
    assert minnow.encode.__self__ is minnow, "the family itself stays as it was"  # type: ignore[attr-defined]


def test_marks_are_the_answers_of_a_session(minnow: Family, stream: Stream) -> None:
    (cell,) = read_cells(["infinipot-v"], ["1/4"], "contiguous")
    (outcome,) = watch(minnow, stream, [cell], SUPPORTED)
    full = 48 * 16 * minnow.geometry.kv_bytes_per_token
    session = Session(minnow, budget=full // 4, policy="infinipot-v", positions="contiguous")
    session.feed(stream.frames())
    asked = [question for question in stream.questions if question.type in SUPPORTED]
    right = [session.ask(question.text, max_new_tokens=4).text.strip() == question.answer for question in asked]
    assert [mark.right for mark in outcome.marks] == right
    assert [mark.type for mark in outcome.marks] == [question.type for question in asked]
    ages = [None if q.event_seconds is None else q.ask_seconds - q.event_seconds for q in asked]
    assert [mark.age for mark in outcome.marks] == ages
    assert outcome.full_cache_bytes == full
    assert outcome.peak_bytes <= full // 4 == outcome.budget_bytes
    assert outcome.compactions == session.usage.compactions > 0


def test_the_last_frames_baseline_saw_nothing_else(minnow: Family, stream: Stream) -> None:
    (cell,) = read_cells(["last-4-frames"], ["1/4"], "absolute")
    (outcome,) = watch(minnow, stream, [cell], SUPPORTED)
    assert outcome.memory_tokens == 2 * 16
    assert outcome.budget_bytes is None


def test_frames_are_shown_again(minnow: Family, stream: Stream) -> None:
    (cell,) = read_cells(["keydiff"], ["1/4"], "contiguous", 4)
    (outcome,) = watch(minnow, stream, [cell], SUPPORTED)
    session = Session(minnow, budget=outcome.budget_bytes, policy="keydiff", recent_frames=4)
    session.feed(stream.frames())
    assert outcome.memory_tokens == session.usage.memory_tokens
    assert outcome.peak_bytes == session.usage.peak_bytes <= session.plan.budget  # type: ignore[operator]
    without = Session(minnow, budget=outcome.budget_bytes, policy="keydiff")
    without.feed(stream.frames())
    assert outcome.memory_tokens < without.usage.memory_tokens


def test_a_policy_that_recalls_is_given_host_memory(minnow: Family, stream: Stream) -> None:
    (cell,) = read_cells(["rekv"], ["1/4"], "contiguous")
    (outcome,) = watch(minnow, stream, [cell], SUPPORTED)
    assert outcome.refused is None
    assert outcome.marks
    assert outcome.budget_bytes is not None
    assert outcome.peak_bytes <= outcome.budget_bytes
    assert outcome.compactions > 0


def test_a_budget_too_small_is_told_not_hidden(minnow: Family, stream: Stream) -> None:
    (cell,) = read_cells(["recent"], ["1/32"], "absolute")
    (outcome,) = watch(minnow, stream, [cell], SUPPORTED)
    assert outcome.refused is not None
    assert "the minimum that works" in outcome.refused
    assert outcome.marks == []


def test_a_budget_too_small_for_a_policy_is_told_too(minnow: Family, stream: Stream) -> None:
    (cell,) = read_cells(["infinipot-v-released"], ["250KiB"], "contiguous")
    (outcome,) = watch(minnow, stream, [cell], SUPPORTED)
    assert outcome.refused is not None
    assert "the minimum that works is" in outcome.refused


def test_question_types_are_chosen(minnow: Family, stream: Stream) -> None:
    cells = read_cells(["full"], [], "absolute")
    (outcome,) = watch(minnow, stream, cells, ("colour", "then"))
    assert {mark.type for mark in outcome.marks} <= {"colour"}, "two-turn questions are not asked"
    assert np.isfinite(outcome.seconds_decoder)


FEW = ("full", "keydiff", "snapkv", "h2o", "mikv:base=keydiff")
MANY = (*FEW, "hermes", "rekv", "infinite-vggt", "last-4-frames")


@pytest.mark.parametrize("names", [FEW, pytest.param(MANY, marks=pytest.mark.nightly)], ids=len)
def test_cells_that_share_blocks_give_what_they_give_alone(
    names: tuple[str, ...], minnow: Family, stream: Stream
) -> None:
    """Policies that look at queries, at sums of attention and into low bits too; and only the first session runs what all have in common."""
    runs: list[int] = []
    counting = copy.copy(minnow)
    counting.forward = lambda *given: runs.append(len(given[0])) or minnow.forward(*given)  # type: ignore[assignment,func-returns-value,method-assign]
    cells = read_cells(names, ["1/2"], "contiguous")
    together = watch(counting, stream, cells, ["where", "now"])
    blocks, runs[:] = sum(count % 16 == 0 for count in runs), []
    alone = [outcome for cell in cells for outcome in watch(counting, stream, [cell], ["where", "now"])]
    for ours, own in zip(together, alone, strict=True):
        mine, theirs = asdict(ours), asdict(own)
        assert {key: mine[key] for key in mine if "seconds" not in key} == {
            key: theirs[key] for key in theirs if "seconds" not in key
        }
        assert mine["refused"] is None
    spared = sum(count % 16 == 0 for count in runs) - blocks  # whole groups
    assert spared >= 3 * (len(cells) - 1), "until its first compaction a cell runs nothing that another has run"


def test_shared_blocks_leave_the_same_memory_bit_for_bit(minnow: Family, stream: Stream) -> None:
    shared, frames = SharedStream(minnow), list(stream.frames())[:24]
    Session(shared.family, budget="700KiB", policy="keydiff").feed(frames)
    ran = len(shared._blocks)
    assert ran == 6
    assert shared.spared == 0.0
    for policy in ("snapkv", "h2o"):
        sessions = [Session(family, budget="700KiB", policy=policy) for family in (shared.family, minnow)]
        for session in sessions:
            session.feed(frames)
        assert len(shared._blocks) == ran, "not one block ran again"
        assert shared.spared != 0
        shared.spared = 0.0
        ponds = [session._runner.pond for session in sessions]
        assert ponds[0].compactions == ponds[1].compactions == 0
        for mine, theirs in zip(ponds[0].layers, ponds[1].layers, strict=True):
            for ours, plain in zip(mine.tensors(), theirs.tensors(), strict=True):
                assert torch.equal(ours[:, : mine.length], plain[:, : theirs.length])
        assert torch.equal(ponds[0].queries.rows, ponds[1].queries.rows)


def test_a_question_in_mid_stream_is_asked_when_it_is_due(minnow: Family, stream: Stream) -> None:
    early = stream.questions[0]
    middle = replace(stream, questions=(replace(early, ask_seconds=20.0), *stream.questions))
    names = sorted({question.type for question in stream.questions})
    (full, last) = watch(minnow, middle, read_cells(["full", "last-4-frames"], [], "contiguous"), names)
    frames = list(stream.frames())
    session = Session(minnow, policy="full")
    session.feed(frames[:40])
    right = session.ask(early.text, max_new_tokens=4).text.strip() == early.answer
    assert full.marks[0].right == right
    assert full.marks[0].age == (None if early.event_seconds is None else 20.0 - early.event_seconds)
    newest = Session(minnow, policy="full")
    newest.feed(frames[36:40])
    assert last.marks[0].right == (newest.ask(early.text, max_new_tokens=4).text.strip() == early.answer)
    # What comes later is as if nothing had been asked before.
    plain = watch(minnow, stream, read_cells(["full", "last-4-frames"], [], "contiguous"), names)
    assert [outcome.marks[1:] for outcome in (full, last)] == [outcome.marks for outcome in plain]
