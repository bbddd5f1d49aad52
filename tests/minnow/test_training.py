"""The training code: the batched tower is transformers' own, questions do not see each other, positions are a session's, runs resume."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from transformers import Qwen2VLImageProcessorPil

from millpond.eval.accuracy import wilson
from millpond.eval.streams import QUESTION_TYPES, digits, generate
from millpond.minnow import SUPPORTED
from millpond.models import adapt
from millpond.models.base import Tokens
from millpond.positions import Clock
from training.minnow.architecture import IMAGE_NUMBERS, Codes, tokenizer
from training.minnow.curriculum import LESSONS, TYPE_WEIGHTS, Lesson, coded_batch, pick, stream_batch
from training.minnow.digits import arrays
from training.minnow.evaluate import evaluate
from training.minnow.language import answer_loss, keep_tokens, layout, place
from training.minnow.loop import Stage, train
from training.minnow.sight import features, patches, round_trip, sight_batch, sight_loss
from training.minnow.train import build, export, stages

LESSON = Lesson(8, 48, 2, 5, (1.0, 1.0))


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    return build(0).eval()


def _frames(groups: int) -> np.ndarray:
    return np.stack([pixels for _, pixels in generate(1, groups=max(groups, 4)).frames()])[: 2 * groups]


def test_the_batched_tower_equals_transformers_own(model) -> None:  # type: ignore[no-untyped-def]
    pixels = patches(_frames(3))
    with torch.no_grad():
        ours = features(model.model.visual, pixels)
        theirs = model.model.visual(pixels.reshape(-1, 384), grid_thw=torch.tensor([[3, 8, 8]])).pooler_output
    assert torch.allclose(ours.reshape(-1, 128), theirs, atol=1e-5)


def test_patches_are_those_of_the_family_and_of_the_pil_processor(model) -> None:  # type: ignore[no-untyped-def]
    frames = _frames(2)
    family = adapt(model, tokenizer(), IMAGE_NUMBERS)
    flat, grid = family.patches([family.prepare(frame) for frame in frames])
    assert grid.tolist() == [[2, 8, 8]]
    assert torch.allclose(patches(frames).reshape(-1, 384), flat, atol=1e-6)
    still = np.repeat(frames[:1], 2, axis=0)  # the image processor repeats a still to fill its group
    numbers = {k: v for k, v in IMAGE_NUMBERS.items() if k not in ("image_processor_type", "min_pixels", "max_pixels")}
    theirs = Qwen2VLImageProcessorPil(**numbers)(images=[frames[0]], return_tensors="pt")
    assert theirs["image_grid_thw"].tolist() == [[1, 8, 8]]
    assert torch.allclose(patches(still).reshape(-1, 384), theirs["pixel_values"], atol=1e-5)


def test_positions_are_those_of_a_session(model) -> None:  # type: ignore[no-untyped-def]
    family, clock = adapt(model, tokenizer(), IMAGE_NUMBERS), Clock()
    base = len(clock.text(4))
    group, cell = torch.arange(6).repeat_interleave(16), torch.arange(16).repeat(6)
    tokens = Tokens(
        embeds=torch.zeros(96, 128),
        grid_position=torch.stack([cell // 4, cell % 4], dim=-1).to(torch.int16),
        time_us=group * 1_000_000,
        visual=torch.ones(96, dtype=torch.bool),
        deepstack=(),
    )
    assert torch.equal(family.assign_positions(tokens, clock), place(group, cell, base))
    assert clock.next == int(place(group, cell, base).max()) + 1


def test_questions_asked_together_are_answered_as_if_alone(model) -> None:  # type: ignore[no-untyped-def]
    batch = coded_batch(np.random.default_rng(0), LESSON, Codes.make(), TYPE_WEIGHTS)
    chat = layout(tokenizer())
    with torch.no_grad():
        together, right = answer_loss(model, chat, batch)
        alone = [
            answer_loss(model, chat, replace(batch, questions=[[row[index]] for row in batch.questions]))
            for index in range(LESSON.asked)
        ]
    assert float(together) == pytest.approx(sum(float(loss) for loss, _ in alone) / len(alone), abs=1e-4)
    assert np.array_equal(right, np.concatenate([marks for _, marks in alone], axis=1))


def test_one_stream_can_be_learnt_by_heart() -> None:
    model, chat = build(1), layout(tokenizer())
    batch = coded_batch(np.random.default_rng(3), replace(LESSON, streams=1), Codes.make(), TYPE_WEIGHTS)
    optimizer = torch.optim.AdamW(model.model.language_model.parameters(), lr=3e-3)
    for _ in range(30):
        loss, right = answer_loss(model, chat, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert right.all()


def test_eviction_spares_what_shows_and_the_last_group() -> None:
    shown = np.zeros((10, 16), dtype=bool)
    shown[2, 5] = shown[7, 0] = True
    kept = keep_tokens(np.random.default_rng(0), shown, 30)
    assert len(kept) == 30
    assert (np.diff(kept) > 0).all()
    assert {2 * 16 + 5, 7 * 16, *range(144, 160)} <= set(kept.tolist())


def test_perfect_sight_has_no_error_and_right_labels() -> None:
    _, labels = sight_batch(np.random.default_rng(0), 4)
    loss, scores = sight_loss(Codes.make().embed(labels), labels, Codes.make())
    blind, _ = sight_loss(torch.zeros(4, 16, 128), labels, Codes.make())
    assert set(scores.values()) == {1.0}
    assert float(loss) < float(blind) / 10


def test_the_round_trip_changes_pixels_a_little() -> None:
    frames = _frames(4)
    back = round_trip(frames, 23)
    assert back.shape == frames.shape
    assert 0 < np.abs(back.astype(int) - frames).mean() < 12


def test_drawn_streams_keep_their_tokens_in_step_with_their_embeddings(model) -> None:  # type: ignore[no-untyped-def]
    batch = stream_batch(np.random.default_rng(2), model.model.visual, TYPE_WEIGHTS)
    assert batch.video.shape[:2] == batch.groups.shape == batch.cells.shape
    assert {q.type for q in batch.questions[0]} <= set(TYPE_WEIGHTS)


def test_lessons_move_from_short_to_long() -> None:
    rng = np.random.default_rng(0)
    early = [pick(rng, LESSONS, 0.0).groups for _ in range(200)]
    late = [pick(rng, LESSONS, 1.0).groups for _ in range(200)]
    assert np.mean(early) * 2 < np.mean(late)


def test_supported_question_types_are_practised_and_exist() -> None:
    assert set(SUPPORTED) <= set(TYPE_WEIGHTS) <= set(QUESTION_TYPES)


def _tiny(run: Path, steps: int, seen: list[int]) -> torch.nn.Module:
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1)

    def loss(rng: np.random.Generator, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        seen.append(step)
        return module(torch.from_numpy(rng.normal(size=(4, 3))).float()).square().mean(), {"score": 1.0}

    stage = Stage("tiny", 1, module, [*module.parameters()], loss, 60, 1e-2, decay=0.5)
    train(stage, run, seed=5, until=steps)
    return module


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    whole = _tiny(tmp_path / "whole", 60, [])
    _tiny(tmp_path / "parts", 25, [])
    with (tmp_path / "parts" / "tiny.jsonl").open("a") as log:
        log.write('{"step": 30}\n')  # as if it had been stopped after the last save
    seen: list[int] = []
    parts = _tiny(tmp_path / "parts", 60, seen)
    assert seen == [*range(25, 60)]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "tiny.jsonl").read_text().splitlines()]
    assert steps == [20, 25, 40, 60]
    rows = [json.loads(line) for line in (tmp_path / "whole" / "tiny.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [20, 40, 60]
    assert rows[-1]["rate"] < rows[1]["rate"]


def test_the_digits_that_streams_show_are_scikit_learns() -> None:
    stored = np.load(digits.FILE)
    assert set(stored) == {"images", "labels"}
    for name, made in zip(("images", "labels"), arrays(), strict=True):
        assert stored[name].dtype == made.dtype
        assert np.array_equal(stored[name], made)


def test_stages_train_what_they_name(model) -> None:  # type: ignore[no-untyped-def]
    made = stages(model, {"sight": 1, "codes": 1, "streams": 1})
    assert [*made] == ["sight", "codes", "streams"]
    assert made["sight"].module is model.model.visual
    assert made["streams"].module is model.model.language_model


def test_an_exported_model_is_loaded_and_evaluated(tmp_path: Path, model) -> None:  # type: ignore[no-untyped-def]
    from millpond import models

    export(model, tmp_path)
    family = models.load(tmp_path)
    streams = [generate(0, groups=6, split="validation")]
    table = evaluate(family, streams, ("colour", "first"), through_mp4=True)
    assert set(table) == {"colour", "first", "all"}
    assert table["all"].asked == 2


@pytest.mark.parametrize(("right", "asked"), [(0, 10), (10, 10), (95, 100), (3, 7)])
def test_intervals_are_wilsons(right: int, asked: int) -> None:
    ours, theirs = wilson(right, asked), binomtest(right, asked).proportion_ci(method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-4)
