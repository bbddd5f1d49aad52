"""Every adapter against its model's own forward: streamed in blocks = one shot, for features, logits and greedy answers."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from millpond import ModelError, SourceError
from millpond.families import Family, adapt, supported
from millpond.positions import Clock
from tests.families.tiny import FAMILIES, tiny

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
        hidden.append(family.forward(part, family.place(part, clock), cache))
    return torch.cat(hidden), clock, cache


def one_shot(family: Family, name: str, frames: list[np.ndarray], at: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The whole conversation through the model's own forward: logits [n, vocabulary] and the ids that went in."""
    prepared = [family.prepare(f) for f in frames]
    if name.startswith("qwen"):
        pixels, grid = family.patches(prepared)
        inputs: dict[str, Any] = {"pixel_values_videos": pixels, "video_grid_thw": grid}
    else:
        inputs = {"pixel_values_videos": family.pixels(prepared)}
    tokens = family.encode(prepared, at)
    clock = Clock()
    parts = [family.embed(family.opening()), tokens, family.question(QUESTION, after_video=True)]
    positions = torch.cat([family.place(part, clock) for part in parts], dim=1)
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
    ids = torch.tensor([[*family.opening(), *shown, *after]])
    assert ids.shape[1] == positions.shape[1]
    with torch.no_grad():
        # With a cache, so that the jumps of the positions are not taken for packed sequences.
        own = positions if len(positions) == 1 else positions[:, None]
        logits = family.model(input_ids=ids, position_ids=own, past_key_values=DynamicCache(), **inputs).logits[0]
    return logits, ids[0]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("blocks", [[8], [2, 6], [2, 2, 2, 2], [4, 2, 2]])
@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_in_blocks_equals_one_shot(name: str, blocks: list[int], attn: str) -> None:
    family = tiny(name, attn_implementation=attn)
    frames, at = video(8), times(8)
    hidden, _, _ = streamed(family, frames, at, blocks)
    whole, _ = one_shot(family, name, frames, at)
    assert (family.logits(hidden) - whole).abs().max() <= 1e-4


@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("name", FAMILIES)
def test_odd_frame_counts_and_one_frame(name: str, count: int) -> None:
    family = tiny(name)
    frames, at = video(count), times(count, fps=1.3)
    hidden, _, _ = streamed(family, frames, at, [2] * (count // 2) + [1] * (count % 2))
    whole, _ = one_shot(family, name, frames, at)
    assert (family.logits(hidden) - whole).abs().max() <= 1e-4


@pytest.mark.parametrize("name", FAMILIES)
def test_frames_in_blocks_give_the_same_features_as_the_whole_video(name: str) -> None:
    family = tiny(name)
    frames, at = [family.prepare(f) for f in video(8)], times(8)
    whole = family.encode(frames, at)
    parts = [family.encode(frames[i : i + 2], at[i : i + 2]) for i in range(0, 8, 2)]
    assert torch.allclose(torch.cat([part.embeds for part in parts]), whole.embeds, atol=1e-5)
    assert torch.equal(torch.cat([part.place for part in parts]), whole.place)
    assert torch.equal(torch.cat([part.time_us for part in parts]), whole.time_us)
    for layer, features in enumerate(whole.deepstack):
        assert torch.allclose(torch.cat([part.deepstack[layer] for part in parts]), features, atol=1e-5)
    assert (len(whole.deepstack) > 0) == (name == "qwen3_vl")


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_answers_are_equal(name: str) -> None:
    family = tiny(name)
    frames, at = video(6), times(6)
    hidden, clock, cache = streamed(family, frames, at, [2, 4])
    answer = []
    for _ in range(8):
        answer.append(int(family.logits(hidden[-1]).argmax()))
        token = family.embed(answer[-1:])
        hidden = family.forward(token, family.place(token, clock), cache)
    whole, ids = one_shot(family, name, frames, at)
    assert int(whole[-1].argmax()) == answer[0]
    # The rest by the model's own forward over everything so far, growing.
    cache, clock = DynamicCache(), Clock()
    parts = [family.embed(family.opening()), family.encode([family.prepare(f) for f in frames], at)]
    parts.append(family.question(QUESTION, after_video=True))
    for part in parts:
        state = family.forward(part, family.place(part, clock), cache)
    greedy = []
    for _ in range(8):
        greedy.append(int(family.model.lm_head(state[-1]).argmax()))
        token = family.embed(greedy[-1:])
        state = family.forward(token, family.place(token, clock), cache)
    assert greedy == answer
    assert len(ids) == cache.get_seq_length() - 8


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layout_is_what_the_template_renders(name: str) -> None:
    family = tiny(name)
    turn = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}]
    text = family.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = family.tokenizer(text)["input_ids"]
    at = ids.index(family.video_id)
    inner = (1, 1) if name == "qwen3_vl" else (0, 0)  # its tags stand around every group of frames instead
    assert family.opening() == ids[: at - inner[0]]
    question = family.question(QUESTION, after_video=True)
    newline = name == "llava_onevision"
    expected = family.embed(ids[at + 1 + inner[1] :]).embeds
    assert torch.equal(question.embeds[newline:], expected)
    if newline:
        assert torch.equal(question.embeds[0], family.model.model.image_newline)
    assert family.tokenizer.decode(family.reopening()).lower().count("user") == 1
    system = family.opening("Be brief.")
    assert "Be brief." in family.tokenizer.decode(system)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_question_cannot_smuggle_in_a_video(name: str) -> None:
    family = tiny(name)
    trick = family.tokenizer.convert_ids_to_tokens(family.video_id)
    with pytest.raises(Exception, match="must not contain"):
        family.question(f"look {trick}", after_video=True)


def roped(family: Family, raw: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[n, D] keys roped by the model's own rotary embedding at [axes, n] positions."""
    own = positions if len(positions) == 1 else positions[:, None]
    cos, sin = family.decoder.rotary_emb(raw[None], own)
    low, high = raw.chunk(2, dim=-1)
    return raw * cos.reshape(raw.shape) + torch.cat([-high, low], dim=-1) * sin.reshape(raw.shape)


@pytest.mark.parametrize("name", FAMILIES)
def test_turned_keys_equal_keys_roped_at_the_new_position(name: str) -> None:
    family = tiny(name)
    axes = family.geometry.axes
    random = torch.Generator().manual_seed(0)
    raw = torch.randn(50, family.geometry.head_dim, generator=random)
    before = torch.randint(0, 400, (axes, 50), generator=random)
    delta = torch.randint(-400, 400, (axes, 50), generator=random)
    keys = roped(family, raw, before)
    family.rope.rotate_(keys, delta.T)
    assert (keys - roped(family, raw, before + delta)).abs().max() <= 1e-4
    small = roped(family, raw, before // 40)
    family.rope.rotate_(small, delta.T // 40)
    assert (small - roped(family, raw, before // 40 + delta // 40)).abs().max() <= 1e-5


def positions_of(family: Family, blocks: list[tuple[int, list[int]]]) -> tuple[torch.Tensor, Clock]:
    clock = Clock(next=5)
    placed = [family.place(family.encode([family.prepare(f) for f in video(count)], at), clock) for count, at in blocks]
    return torch.cat(placed, dim=1), clock


def test_qwen2_5_counts_in_real_time_at_any_rate() -> None:
    family = tiny("qwen2_5_vl")  # 2 positions a second
    at = [0, SECOND // 2, SECOND, 2 * SECOND, 10 * SECOND, 11 * SECOND]
    positions, clock = positions_of(family, [(4, at[:4]), (2, at[4:])])
    assert positions[0].unique_consecutive().tolist() == [5, 7, 25]
    assert positions[1].unique().tolist() == [5, 6, 7, 8]
    assert positions[2].unique().tolist() == [5, 6, 7, 8, 9]
    assert clock.next == 26


def test_qwen2_counts_groups() -> None:
    positions, clock = positions_of(tiny("qwen2_vl"), [(4, times(4, 0.1)), (2, [90 * SECOND, 95 * SECOND])])
    assert positions[0].unique_consecutive().tolist() == [5, 6, 7]
    assert clock.next == 10  # the grid is five wide


def test_text_after_video_goes_on_at_maximum_plus_one_where_transformers_does_not() -> None:
    """Forty frames at 2 a second, a prompt of five tokens: the weights were trained with 5 + 2 x 19 + 1 + ... = 44."""
    family = tiny("qwen2_5_vl")
    frames, at = video(40, 56, 56), times(40)
    clock = Clock(next=5)
    tokens = family.encode([family.prepare(f) for f in frames], at)
    placed = family.place(tokens, clock)
    text = family.place(family.embed([1, 2]), clock)
    assert int(placed.max()) == 5 + 2 * 19
    assert text.tolist() == [[44, 45]] * 3
    ids = torch.tensor([[1] * 5 + [family.video_id] * len(tokens) + [1, 2]])
    kinds = (ids == family.video_id).int() * 2
    own, _ = family.model.model.get_rope_index(
        ids, kinds, video_grid_thw=torch.tensor([[20, 8, 8]]), second_per_grid_ts=torch.tensor([1.0])
    )
    assert torch.equal(own[:, 0, 5:-2], placed)
    assert own[0, 0, -2] == 9  # the library's own counter forgets how long the video was


def test_qwen3_positions_equal_the_models_own() -> None:
    family = tiny("qwen3_vl")
    frames, at = [family.prepare(f) for f in video(6, 56, 84)], times(6)
    tokens = family.encode(frames, at)
    ids = torch.where(tokens.visual, family.video_id, 1)[None]
    own, _ = family.model.model.get_rope_index(
        ids, (ids == family.video_id).int() * 2, video_grid_thw=torch.tensor([[3, 8, 12]])
    )
    assert torch.equal(family.place(tokens, Clock()), own[:, 0])


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
        family.forward(tokens, family.place(tokens, clock), cache)
        assert tokens.place[tokens.visual].amax(0).tolist() == [grid.rows - 1, grid.cols - 1]
        assert cache.get_seq_length() > index


def test_impossible_frames_and_models() -> None:
    with pytest.raises(SourceError, match="long and thin"):
        tiny("qwen2_vl").grid(4, 1000)
    family = tiny("qwen2_5_vl")
    family.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="chat template"):
        adapt(family.model, family.tokenizer)
    family.tokenizer.chat_template = "{% for m in messages %}no video here{% endfor %}"
    with pytest.raises(ModelError, match="does not show a video"):
        adapt(family.model, family.tokenizer)


def test_an_unsupported_family_lists_the_supported_ones() -> None:
    from tests.cache.text_model import text_model

    with pytest.raises(ModelError, match=r"'qwen2' is not supported; there are: qwen2_vl, qwen2_5_vl"):
        adapt(text_model(), None)
    assert [row.model_type for row in supported()] == list(FAMILIES)
