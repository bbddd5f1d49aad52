"""Minnow's shape: the Qwen2.5-VL configuration, its tokenizer and chat template, and the codes that objects are named by.

The codes are fixed orthonormal vectors in the language model's embedding space, one for each kind of object, colour, digit and cell. The
vision tower learns to put out their sums, so that the language model can learn from codes while the tower still learns to see.
Knows nothing about training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig

from millpond.eval.streams.drawing import CELLS, COLOURS, OBJECTS

__all__ = [
    "HIDDEN",
    "IMAGE_NUMBERS",
    "TOKENS_PER_SECOND",
    "Codes",
    "configuration",
    "match_words",
    "name_words",
    "tokenizer",
]

HIDDEN = 128
TOKENS_PER_SECOND = 1
IMAGE_NUMBERS: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 8,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 64 * 64,
    "max_pixels": 64 * 64,
    "size": {"shortest_edge": 64 * 64, "longest_edge": 64 * 64},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": 3,
}
_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|video_pad|>",
    "<|image_pad|>",
)
_TEXT = (
    "system user assistant what which where when how many times did was is were there now a an the it appear appeared first last "
    "before after object colour color digit shown in this video stream or and of to at be show see you are no yes nothing "
    "early middle late once twice ? . , then turn whole so far seen"
)
_SLOW = 5  # frequencies that turn by less than 0.002 a position
_MATCH, _SHOWS, _CARRY = 0.8, 9.0, 0.1
_PLACES = "top-left top-right bottom-left bottom-right"
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _words() -> list[str]:
    words = [*_SPECIAL, "<|unknown|>", "\n", *_TEXT.split(), *OBJECTS, *COLOURS, *_PLACES.split(), *map(str, range(10))]
    return list(dict.fromkeys(words))


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, from a closed list; lower case; unknown words become one token."""
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(_words())}, unk_token="<|unknown|>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n|[?.,]"), "isolated"),
            pre_tokenizers.Split(" ", "removed"),
        ]
    )
    core.add_special_tokens(list(_SPECIAL))
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", unk_token="<|unknown|>"
    )
    made.chat_template = _TEMPLATE
    return made


def configuration() -> Qwen2_5_VLConfig:
    """The whole model: a vision tower of 3 layers and a decoder of 4, 16 tokens to a pair of 64 x 64 frames."""
    names = _words()
    ids = {name: names.index(name) for name in _SPECIAL}
    text: dict[str, Any] = {
        "vocab_size": len(names),
        "hidden_size": HIDDEN,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,  # what it is trained on: prompt, 64 groups and a turn, in whole 32s
        "tie_word_embeddings": True,
        # Half of the frequencies read time: with fewer the slowest would wrap within 64 groups.
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [8, 4, 4]},
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision: dict[str, Any] = {
        "depth": 3,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_heads": 4,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
        "out_hidden_size": HIDDEN,
        "window_size": 64,
        "fullatt_block_indexes": [0, 1, 2],
        "tokens_per_second": TOKENS_PER_SECOND,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        video_token_id=ids["<|video_pad|>"],
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
    )


@dataclass(frozen=True, eq=False)
class Codes:
    """Orthonormal vectors, float32: `kind` [9, 128], `colour` [6, 128], `digit` [10, 128], `cell` [16, 128]."""

    kind: Tensor
    colour: Tensor
    digit: Tensor
    cell: Tensor

    @classmethod
    def make(cls) -> Codes:
        """The codes that Minnow is trained with; always the same."""
        counts = (len(OBJECTS), len(COLOURS), 10, CELLS)
        square = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(20))
        basis = torch.linalg.qr(square.double()).Q.T[: sum(counts)].float()
        return cls(*basis.split(counts))

    def embed(self, labels: Tensor) -> Tensor:
        """Labels of whole groups, int64 [..., 16, 3] (kind, colour, digit; -1 for none) -> float32 [..., 16, 128]."""
        return self.at(labels, torch.arange(CELLS))

    def at(self, labels: Tensor, cells: Tensor) -> Tensor:
        """Labels int64 [..., 3] of tokens in `cells` -> float32 [..., 128]."""
        made = self.cell[cells].expand(*labels.shape[:-1], HIDDEN).clone()
        for index, table in enumerate((self.kind, self.colour, self.digit)):
            padded = torch.cat([table, table.new_zeros(1, HIDDEN)])
            made += padded[labels[..., index]]
        return made


def name_words(table: Any, words: PreTrainedTokenizerFast, codes: Codes) -> None:
    """Set the embeddings of words for things that can be seen to the codes of those things: "star" to that of stars, "red" to red's.

    Args:
        table: the embedding module, changed in place.
        words: the tokenizer whose ids index it.
    """
    named = dict(zip(OBJECTS, codes.kind, strict=True)) | dict(zip(COLOURS, codes.colour, strict=True))
    named |= {str(value): code for value, code in enumerate(codes.digit)}
    for place in _PLACES.split():
        top, left = 0 if place.startswith("top") else 2, 0 if place.endswith("left") else 2
        named[place] = sum(codes.cell[(top + y) * 4 + left + x] for y in (0, 1) for x in (0, 1)) / 2
    with torch.no_grad():
        for word, code in named.items():
            table.weight[words.convert_tokens_to_ids(word)] = code


def match_words(attention: Any, codes: Codes) -> None:
    """Start an attention layer so that a word looks at the vision tokens that show what it names, and takes over what else they show.

    The first key head matches kinds and carries colour, cell and digit; the second matches colours and carries kind and cell. Matching
    uses the ten slowest components, which rotary positions hardly turn. One component more favours tokens that show something over
    the word's own, which would match best.

    Args:
        attention: the first decoder layer's, changed in place.
        codes: what tokens and words are made of.
    """
    width, half, per_key = attention.head_dim, attention.head_dim // 2, attention.num_key_value_groups
    slow = [*range(half - _SLOW, half), *range(width - _SLOW, width)]
    kinds, colours = codes.kind, codes.colour
    heads = (
        (kinds, torch.cat([colours, codes.digit]).sum(0), torch.cat([colours, codes.cell, codes.digit])),
        (colours, kinds.sum(0), torch.cat([kinds, codes.cell])),
    )
    with torch.no_grad():
        for key_head, (matched, shows, carried) in enumerate(heads):
            at = [key_head * width + component for component in slow]
            attention.k_proj.weight[at] = 0
            attention.k_proj.weight[at[: len(matched)]] = _MATCH * matched
            attention.k_proj.weight[at[-1]] = _MATCH * shows
            values = slice(key_head * width, key_head * width + len(carried))
            attention.v_proj.weight[values] = carried
            for query_head in range(key_head * per_key, (key_head + 1) * per_key):
                at = [query_head * width + component for component in slow]
                attention.q_proj.weight[at] = 0
                attention.q_proj.weight[at[: len(matched)]] = _MATCH * matched
                attention.q_proj.bias[at[-1]] = _SHOWS
                out = slice(query_head * width, query_head * width + len(carried))
                attention.o_proj.weight[:, out] = _CARRY * carried.T
