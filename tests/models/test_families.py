"""Every adapter against its model's own forward: streamed in blocks = one shot, for features, logits and greedy answers."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from millpond.models import NO_GRID_POSITION, Family, Tokens
from millpond.positions import Clock
from tests.models.tiny import FAMILIES, tiny

QUESTION = "which one"
SECOND = 1_000_000


def video(count: int, height: int = 56, width: int = 70, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 255, (height, width, 3), dtype=np.uint8) for _ in range(count)]


def times(count: int, fps: float = 2.0) -> list[int]:
    return [round(index / fps * SECOND) for index in range(count)]


def streamed(
    family: Family, frames: list[np.ndarray], at: list[int], blocks: list[int]
) -> tuple[torch.Tensor, Clock, Any]:
    """Prompt, frames in blocks of the given sizes, question; the hidden state of every token, in order."""
    cache, clock, hidden = DynamicCache(), Clock(), []
    parts = [family.embed(family.opening())]
    first = 0
    for size in blocks:
        parts.append(family.encode([family.prepare(f) for f in frames[first : first + size]], at[first : first + size]))
        first += size
    parts.append(family.question(QUESTION, after_video=True))
    for part in parts:
        hidden.append(family.forward(part, family.assign_positions(part, clock), cache))
    return torch.cat(hidden), clock, cache


def one_shot(
    family: Family, name: str, frames: list[np.ndarray], at: list[int], answer: tuple[int, ...] = ()
) -> torch.Tensor:
    """The whole conversation, with the answer so far, through the model's own forward: logits [n, vocabulary]."""
    prepared = [family.prepare(f) for f in frames]
    if name.startswith("qwen"):
        pixels, grid = family.patches(prepared)
        inputs: dict[str, Any] = {"pixel_values_videos": pixels, "video_grid_thw": grid}
    else:
        inputs = {"pixel_values_videos": family.pixels(prepared)}
    tokens = family.encode(prepared, at)
    clock = Clock()
    parts = [family.embed(family.opening()), tokens, family.question(QUESTION, after_video=True)]
    parts += [family.embed([token]) for token in answer]
    positions = torch.cat([family.assign_positions(part, clock) for part in parts], dim=1)
    after = family.chat.after_video(QUESTION)
    if name == "qwen3_vl":
        after = after[1:]
        stamps = [(at[i] + at[min(i + 1, len(at) - 1)]) / 2e6 for i in range(0, len(at), 2)]
        size = int(tokens.visual.sum()) // len(stamps)
        shown: list[int] = []
        for stamp in stamps:
            shown += [*family.chat.text_ids(f"<{stamp:.1f} seconds>"), *family.chat.text_ids("<|vision_start|>")]
            shown += [family.video_id] * size + family.chat.text_ids("<|vision_end|>")
    else:
        shown = [family.video_id] * (len(tokens) + (name == "llava_onevision"))
    ids = torch.tensor([[*family.opening(), *shown, *after, *answer]])
    assert ids.shape[1] == positions.shape[1]
    with torch.no_grad():
        # With a cache, so that the jumps of the positions are not taken for packed sequences.
        own = positions if len(positions) == 1 else positions[:, None]
        logits: torch.Tensor = family.model(
            input_ids=ids, position_ids=own, past_key_values=DynamicCache(), **inputs
        ).logits[0]
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("blocks", [[8], [2, 6], [2, 2, 2, 2], [4, 2, 2]])
@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_in_blocks_equals_one_shot(name: str, blocks: list[int], attn: str) -> None:
    family = tiny(name, attn_implementation=attn)
    frames, at = video(8), times(8)
    hidden, _, _ = streamed(family, frames, at, blocks)
    whole = one_shot(family, name, frames, at)
    assert (family.logits(hidden) - whole).abs().max() <= 1e-4


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("name", FAMILIES)
def test_odd_frame_counts_and_one_frame(name: str, count: int) -> None:
    family = tiny(name)
    frames, at = video(count), times(count, fps=1.3)
    hidden, _, _ = streamed(family, frames, at, [2] * (count // 2) + [1] * (count % 2))
    whole = one_shot(family, name, frames, at)
    assert (family.logits(hidden) - whole).abs().max() <= 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_frames_in_blocks_give_the_same_features_as_the_whole_video(name: str) -> None:
    family = tiny(name)
    frames, at = [family.prepare(f) for f in video(8)], times(8)
    whole = family.encode(frames, at)
    parts = [family.encode(frames[i : i + 2], at[i : i + 2]) for i in range(0, 8, 2)]
    assert torch.allclose(torch.cat([part.embeds for part in parts]), whole.embeds, atol=1e-5)
    assert torch.equal(torch.cat([part.grid_position for part in parts]), whole.grid_position)
    assert torch.equal(torch.cat([part.time_us for part in parts]), whole.time_us)
    for layer, features in enumerate(whole.deepstack):
        assert torch.allclose(torch.cat([part.deepstack[layer] for part in parts]), features, atol=1e-5)
    assert (len(whole.deepstack) > 0) == (name == "qwen3_vl")


@pytest.mark.parametrize("name", FAMILIES)
def test_places_go_row_by_row_group_after_group(name: str) -> None:
    family = tiny(name)
    grid = family.grid(56, 70)
    tokens = family.encode([family.prepare(f) for f in video(4)], times(4))
    once = [[row, col] for row in range(grid.rows) for col in range(grid.cols)]
    groups = 4 // family.frames_per_group
    assert tokens.grid_position[tokens.visual].tolist() == once * groups
    assert (tokens.grid_position[~tokens.visual] == NO_GRID_POSITION).all()
    begun = [0, SECOND] if groups == 2 else times(4)
    assert tokens.time_us.unique_consecutive().tolist() == begun


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_answers_are_equal(name: str) -> None:
    """The streamed answer, token after token, against the model's own forward over everything so far, anew for every token."""
    family = tiny(name)
    frames, at = video(6), times(6)
    hidden, clock, cache = streamed(family, frames, at, [2, 4])
    answer: list[int] = []
    for _ in range(6):
        answer.append(int(family.logits(hidden[-1]).argmax()))
        token = family.embed(answer[-1:])
        hidden = family.forward(token, family.assign_positions(token, clock), cache)
    greedy: list[int] = []
    for _ in range(6):
        greedy.append(int(one_shot(family, name, frames, at, tuple(greedy))[-1].argmax()))
    assert greedy == answer


@pytest.mark.parametrize("name", FAMILIES)
def test_a_question_between_frames_equals_the_whole_conversation(name: str) -> None:
    """Frames, a turn, frames again, one token a forward: the same hidden states as in large pieces."""
    family = tiny(name)
    frames, at = [family.prepare(f) for f in video(4)], times(4)
    parts = [
        family.embed(family.opening()),
        family.encode(frames[:2], at[:2]),
        family.question(QUESTION, after_video=True),
        family.embed([5, 6, *family.reopening()]),
        family.encode(frames[2:], at[2:]),
        family.question(QUESTION, after_video=True),
        family.embed([7]),
        family.question(QUESTION, after_video=False),
    ]
    clock, cache = Clock(), DynamicCache()
    whole = [family.forward(part, family.assign_positions(part, clock), cache) for part in parts]
    last = int(family.assign_positions(family.embed([1]), clock).max())
    clock, cache = Clock(), DynamicCache()
    for part, want in zip(parts, whole, strict=True):
        if bool(part.visual.any()):
            assert torch.allclose(family.forward(part, family.assign_positions(part, clock), cache), want, atol=1e-5)
            continue
        single = [
            Tokens(part.embeds[i, None], part.grid_position[i, None], part.time_us[i, None], part.visual[i, None])
            for i in range(len(part))
        ]
        got = torch.cat([family.forward(one, family.assign_positions(one, clock), cache) for one in single])
        assert torch.allclose(got, want, atol=1e-5)
    assert clock.next == last


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_kept_on_the_model(name: str) -> None:
    """Two streams on one model, in turns, do not see each other; rope_deltas stay untouched, whatever they say."""
    family = tiny(name)
    alone, _, _ = streamed(family, video(4), times(4), [2, 2])
    if name.startswith("qwen"):
        assert family.model.model.rope_deltas is None
        family.model.model.rope_deltas = torch.tensor([[1234]])
    clocks, caches = (Clock(), Clock()), (DynamicCache(), DynamicCache())
    opening = family.embed(family.opening())
    blocks = [family.encode([family.prepare(f) for f in video(4)[i : i + 2]], times(4)[i : i + 2]) for i in (0, 2)]
    hidden = []
    for part in (opening, *blocks, family.question(QUESTION, after_video=True)):
        family.forward(opening, family.assign_positions(opening, clocks[1]), caches[1])
        hidden.append(family.forward(part, family.assign_positions(part, clocks[0]), caches[0]))
    assert torch.equal(torch.cat(hidden), alone)
    if name.startswith("qwen"):
        assert family.model.model.rope_deltas.tolist() == [[1234]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    family, exact = tiny(name, dtype=dtype), tiny(name)
    hidden, _, cache = streamed(family, video(4), times(4), [2, 2])
    want, _, _ = streamed(exact, video(4), times(4), [2, 2])
    assert hidden.dtype == cache.layers[0].keys.dtype == family.geometry.dtype == dtype
    assert ((hidden.float() - want).norm(dim=-1) <= 0.1 * want.norm(dim=-1).clamp(min=1)).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_can_be_written_in_place_afterwards(name: str) -> None:
    _, _, cache = streamed(tiny(name), video(2), times(2), [2])
    for layer in cache.layers:
        assert not layer.keys.is_inference()
        assert not layer.keys.requires_grad


class Copying(DynamicCache):
    """Says that it copies what it is given; that it does not shows what the forward ran in."""

    copies = True


def test_only_a_cache_that_copies_is_given_tensors_of_inference_mode_and_what_comes_out_never_is_one() -> None:
    family, cache = tiny("qwen2_5_vl"), Copying()
    tokens = family.encode([family.prepare(frame) for frame in video(2)], times(2))
    hidden = family.forward(tokens, family.assign_positions(tokens, Clock()), cache)
    want = family.forward(tokens, family.assign_positions(tokens, Clock()), DynamicCache())
    assert cache.layers[0].keys.is_inference()
    assert torch.equal(hidden, want)
    assert not hidden.is_inference()
    assert not want.is_inference()


def roped(family: Family, raw: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[n, D] keys roped by the model's own rotary embedding at [axes, n] positions."""
    own = positions if len(positions) == 1 else positions[:, None]
    cos, sin = family.decoder.rotary_emb(raw[None], own)
    low, high = raw.chunk(2, dim=-1)
    return raw * cos.reshape(raw.shape) + torch.cat([-high, low], dim=-1) * sin.reshape(raw.shape)


@pytest.mark.parametrize("name", FAMILIES)
def test_turned_keys_equal_keys_roped_at_the_new_position(name: str) -> None:
    """Turned along all axes at once, and along each alone."""
    family = tiny(name)
    axes = family.geometry.axes
    random = torch.Generator().manual_seed(0)
    raw = torch.randn(50, family.geometry.head_dim, generator=random)
    # Low positions: the model's own rotary, in float32, is itself off by 1e-5 at a few hundred radians.
    before = torch.randint(0, 20, (axes, 50), generator=random)
    for turned in (list(range(axes)), *([axis] for axis in range(axes))):
        delta = torch.zeros(axes, 50, dtype=torch.long)
        delta[turned] = torch.randint(1, 20, (len(turned), 50), generator=random)
        keys = roped(family, raw, before)
        assert (keys - roped(family, raw, before + delta)).abs().max() > 0.1
        family.rope.rotate_(keys, delta.T)
        assert (keys - roped(family, raw, before + delta)).abs().max() <= 1e-5
        family.rope.rotate_(keys, -delta.T)
        assert (keys - roped(family, raw, before)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_turned_keys_are_exact_over_the_whole_range(name: str) -> None:
    """Against the same rotation in float64, where the angles are right at any position."""
    family = tiny(name)
    rope, axes = family.rope, family.geometry.axes
    random = torch.Generator().manual_seed(1)
    raw = torch.randn(50, family.geometry.head_dim, generator=random, dtype=torch.float64)

    def exactly(positions: torch.Tensor) -> torch.Tensor:
        angle = positions[rope.axis].T.double() * rope.inv_freq.double()
        low, high = raw.chunk(2, dim=-1)
        return torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], dim=-1)

    before = torch.randint(0, rope.limit, (axes, 50), generator=random)
    after = torch.randint(0, rope.limit, (axes, 50), generator=random)
    keys = exactly(before).float()
    rope.rotate_(keys, (after - before).T)
    assert (keys - exactly(after)).abs().max() <= 1e-5
    assert rope.limit == 32768


def positions_of(family: Family, blocks: list[tuple[int, list[int]]]) -> tuple[torch.Tensor, Clock]:
    clock = Clock(next=5)
    placed = [
        family.assign_positions(family.encode([family.prepare(f) for f in video(count)], at), clock)
        for count, at in blocks
    ]
    return torch.cat(placed, dim=1), clock


def test_qwen2_5_counts_in_real_time_at_any_rate() -> None:
    family = tiny("qwen2_5_vl")  # 2 positions a second
    at = [0, SECOND // 2, SECOND, 2 * SECOND, 10 * SECOND, 11 * SECOND]
    positions, clock = positions_of(family, [(4, at[:4]), (2, at[4:])])
    assert positions[0].unique_consecutive().tolist() == [5, 7, 25]
    assert positions[1].unique().tolist() == [5, 6, 7, 8]
    assert positions[2].unique().tolist() == [5, 6, 7, 8, 9]
    assert clock.next == 26


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_beyond_16_bits(name: str) -> None:
    family = tiny(name)
    tokens = family.encode([family.prepare(frame) for frame in video(4)], times(4))
    near, far = (family.assign_positions(tokens, Clock(next=first)) for first in (7, 2**31))
    assert torch.equal(far - near, torch.full_like(near, 2**31 - 7))


def test_qwen2_counts_groups() -> None:
    positions, clock = positions_of(tiny("qwen2_vl"), [(4, times(4, 0.1)), (2, [90 * SECOND, 95 * SECOND])])
    assert positions[0].unique_consecutive().tolist() == [5, 6, 7]
    assert clock.next == 10  # the grid is five wide


@pytest.mark.parametrize("fps", ["0.5", "0.8", "1", "1.7", "2", "7.5", "30"])
def test_qwen2_5_positions_at_any_constant_rate(fps: str) -> None:
    """The rule, in exact numbers, and the model's own counter where a group takes whole seconds: some supported versions of
    transformers cut the seconds of a group down to an integer."""
    family = tiny("qwen2_5_vl")
    rate = Fraction(fps)
    frames, at = [family.prepare(f) for f in video(12, 28, 42)], times(12, float(rate))
    clock = Clock()
    blocks = [family.encode(frames[i : i + 4], at[i : i + 4]) for i in range(0, 12, 4)]
    got = torch.cat([family.assign_positions(tokens, clock) for tokens in blocks], dim=1)
    assert got[0].tolist() == [math.floor(2 * group * 2 / rate) for group in range(6) for _ in range(2 * 3)]
    if (2 / rate).denominator == 1:
        ids = torch.full((1, got.shape[1]), family.video_id)
        seconds = torch.tensor([2 / float(rate)])
        own, _ = family.model.model.get_rope_index(
            ids, torch.full_like(ids, 2), video_grid_thw=torch.tensor([[6, 4, 6]]), second_per_grid_ts=seconds
        )
        assert torch.equal(got, own[:, 0])


def test_groups_of_one_time_are_groups_still() -> None:
    """A source may stand still: two groups with the same time are two steps for Qwen2-VL and one place for Qwen2.5-VL."""
    at = [0, SECOND, SECOND, SECOND, SECOND, 2 * SECOND]
    positions, clock = positions_of(tiny("qwen2_vl"), [(6, at)])
    assert positions[0].unique_consecutive(return_counts=True)[1].tolist() == [20, 20, 20]
    assert clock.groups == 3
    positions, _ = positions_of(tiny("qwen2_5_vl"), [(6, at)])
    assert positions[0].unique_consecutive(return_counts=True)[1].tolist() == [20, 40]


def test_text_after_video_goes_on_at_maximum_plus_one_where_transformers_does_not() -> None:
    """Golden, from the rule that the weights were trained with: five tokens of prompt, forty frames at one a second, a grid of
    2 x 2, two positions a second. The last of the 20 groups lies at 5 + 19 x 2 x 2 = 81, so text goes on at 82.
    """
    family = tiny("qwen2_5_vl")
    frames, at = [family.prepare(f) for f in video(40, 28, 28)], times(40, fps=1)
    clock = Clock()
    family.assign_positions(family.embed([1] * 5), clock)
    tokens = family.encode(frames, at)
    placed = family.assign_positions(tokens, clock)
    assert int(placed.max()) == 81
    assert family.assign_positions(family.embed([1, 2]), clock).tolist() == [[82, 83]] * 3
    ids = torch.tensor([[1] * 5 + [family.video_id] * len(tokens) + [1, 2]])
    kinds = (ids == family.video_id).int() * 2
    own, _ = family.model.model.get_rope_index(
        ids, kinds, video_grid_thw=torch.tensor([[20, 4, 4]]), second_per_grid_ts=torch.tensor([2.0])
    )
    assert torch.equal(own[:, 0, 5:-2], placed)
    assert own[0, 0, -2] == 7  # the library's own counter forgets how long the video was
    pixels, grid = family.patches(frames)
    inputs = {"input_ids": ids, "pixel_values_videos": pixels, "video_grid_thw": grid, "mm_token_type_ids": kinds}
    where = torch.cat([own[:, 0, :5], placed, torch.tensor([[82, 83]] * 3)], dim=1)
    with torch.no_grad():
        here = family.model(**inputs, position_ids=where[:, None], past_key_values=DynamicCache()).logits[0, -1]
        there = family.model(**inputs, position_ids=own, past_key_values=DynamicCache()).logits[0, -1]
    assert (here - there).abs().max() > 1e-3


def test_qwen3_positions_equal_the_models_own() -> None:
    family = tiny("qwen3_vl")
    frames, at = [family.prepare(f) for f in video(6, 56, 84)], times(6)
    tokens = family.encode(frames, at)
    ids = torch.where(tokens.visual, family.video_id, 1)[None]
    own, _ = family.model.model.get_rope_index(
        ids, (ids == family.video_id).int() * 2, video_grid_thw=torch.tensor([[3, 8, 12]])
    )
    assert torch.equal(family.assign_positions(tokens, Clock()), own[:, 0])


def test_qwen3_says_the_time_in_text() -> None:
    family = tiny("qwen3_vl")
    text = family.embed(family.chat.text_ids("<0.2 seconds>")).embeds
    tokens = family.encode([family.prepare(f) for f in video(3)], [0, SECOND // 2, 3 * SECOND])
    assert torch.allclose(tokens.embeds[: len(text)], text)
    assert tokens.time_us.unique().tolist() == [0, 3 * SECOND]
    assert len(tokens) <= 2 * family.grid(56, 70).tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes_change_in_mid_stream(name: str) -> None:
    family = tiny(name)
    cache, clock = DynamicCache(), Clock()
    for index, (height, width) in enumerate([(56, 56), (28, 90), (140, 20), (1, 3), (300, 400)]):
        frames = [family.prepare(f) for f in video(2, height, width)]
        grid = family.grid(height, width)
        assert frames[0].shape == (grid.height, grid.width, 3)
        tokens = family.encode(frames, times(2))
        assert int(tokens.visual.sum()) == grid.rows * grid.cols * (2 // family.frames_per_group)
        family.forward(tokens, family.assign_positions(tokens, clock), cache)
        assert tokens.grid_position[tokens.visual].amax(0).tolist() == [grid.rows - 1, grid.cols - 1]
        assert cache.get_seq_length() > index
