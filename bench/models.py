"""Random Qwen VL models built from config, for the benches: no download, real shapes where a bench asks for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from millpond.models import Family, adapt

__all__ = ["qwen2_5_vl", "qwen2_vl"]

_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<|image_pad|>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen2_5_vl(text: dict[str, Any], vision: dict[str, Any], seed: int = 0) -> Family:
    """A Qwen2.5-VL in float32 from entries of its text and vision configs."""
    return _build("Qwen2_5_VL", text, vision, torch.float32, seed)


def qwen2_vl(text: dict[str, Any], vision: dict[str, Any], dtype: torch.dtype, seed: int = 0) -> Family:
    """A Qwen2-VL from entries of its text and vision configs."""
    return _build("Qwen2VL", text, vision, dtype, seed)


def _build(name: str, text: dict[str, Any], vision: dict[str, Any], dtype: torch.dtype, seed: int) -> Family:
    tokenizer = _byte_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in _SPECIAL}
    ends = {"bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|im_end|>"]}
    config = getattr(transformers, f"{name}Config")(
        text_config={"vocab_size": len(tokenizer), **ends, **text},
        vision_config=vision,
        video_token_id=ids["<|video_pad|>"],
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # built in it: a float32 copy of large layers would double the memory
    try:
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    finally:
        torch.set_default_dtype(before)
    return adapt(model, tokenizer, {"min_pixels": 14 * 14, "max_pixels": 1024 * 1024})


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    tokenizer.chat_template = _TEMPLATE
    return tokenizer
