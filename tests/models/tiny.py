"""Tiny random models of every supported family, built from config; what everybody's tests run on."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from millpond.models import Family, adapt
from tests.models.tokenizers import tokenizer

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava_next_video")


def tiny(
    name: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    max_position_embeddings: int = 32768,
) -> Family:
    """A tiny random model of a family, adapted; the same seed gives the same weights."""
    text = {**TEXT, "max_position_embeddings": max_position_embeddings}
    made, image = _BUILDERS[name](text, seed)
    model: PreTrainedModel = made.eval().to(dtype)
    model.set_attn_implementation(attn_implementation)
    kind = {"llava_onevision": "onevision", "llava_next_video": "next"}.get(name, "qwen")
    return adapt(model, tokenizer(kind), image)


def _new(model: str, config: Any, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return getattr(transformers, f"{model}ForConditionalGeneration")(config)


def _ids(kind: str) -> dict[str, Any]:
    words = tokenizer(kind)
    find = words.convert_tokens_to_ids
    ids: dict[str, Any] = {
        "eos_token_id": words.eos_token_id,
        "bos_token_id": words.bos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    if kind == "qwen":
        ids["video_token_id"], ids["image_token_id"] = find("<|video_pad|>"), find("<|image_pad|>")
        ids["vision_start_token_id"], ids["vision_end_token_id"] = find("<|vision_start|>"), find("<|vision_end|>")
    else:
        ids["video_token_index"], ids["image_token_index"] = find("<video>"), find("<image>")
    return ids


def _special(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ids for the text config, and for the whole."""
    ids = _ids(kind)
    ends = {key: ids.pop(key) for key in ("eos_token_id", "bos_token_id", "pad_token_id")}
    return {**ends, "vocab_size": len(tokenizer(kind))}, ids


def _qwen2_vl(text: dict[str, Any], seed: int) -> tuple[PreTrainedModel, dict[str, Any]]:
    words, ids = _special("qwen")
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 7}
    config = transformers.Qwen2VLConfig(
        text_config={**text, **words, "rope_parameters": rope}, vision_config=vision, **ids
    )
    return _new("Qwen2VL", config, seed), {"min_pixels": 14 * 14, "max_pixels": 140 * 140}


def _qwen2_5_vl(text: dict[str, Any], seed: int) -> tuple[PreTrainedModel, dict[str, Any]]:
    words, ids = _special("qwen")
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 7,
        "out_hidden_size": 64,
        "window_size": 28,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config={**text, **words, "rope_parameters": rope}, vision_config=vision, **ids
    )
    return _new("Qwen2_5_VL", config, seed), {"min_pixels": 14 * 14, "max_pixels": 140 * 140}


def _qwen3_vl(text: dict[str, Any], seed: int) -> tuple[PreTrainedModel, dict[str, Any]]:
    words, ids = _special("qwen")
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "patch_size": 7,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    config = transformers.Qwen3VLConfig(
        text_config={**text, **words, "head_dim": 16, "rope_parameters": rope}, vision_config=vision, **ids
    )
    return _new("Qwen3VL", config, seed), {"min_pixels": 14 * 14, "max_pixels": 140 * 140}


def _llava_onevision(text: dict[str, Any], seed: int) -> tuple[PreTrainedModel, dict[str, Any]]:
    words, ids = _special("onevision")
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 42,
        "patch_size": 6,
        "vision_use_head": False,
    }
    config = transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **text, **words}, vision_config=vision, vision_feature_layer=-1, **ids
    )
    return _new("LlavaOnevision", config, seed), {}


def _llava_next_video(text: dict[str, Any], seed: int) -> tuple[PreTrainedModel, dict[str, Any]]:
    words, ids = _special("next")
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 48,
        "patch_size": 6,
        "projection_dim": 32,
    }
    config = transformers.LlavaNextVideoConfig(
        text_config={"model_type": "llama", **text, **words}, vision_config=vision, vision_feature_layer=-2, **ids
    )
    return _new("LlavaNextVideo", config, seed), {}


_BUILDERS = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "llava_onevision": _llava_onevision,
    "llava_next_video": _llava_next_video,
}
