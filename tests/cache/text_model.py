"""A tiny random text model, and simple policies, for tests of the cache alone."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from millpond.policies.base import Policy, View, keep_top


def text_model(dtype: torch.dtype = torch.float32, attn: str = "sdpa", layers: int = 3) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    config._attn_implementation = attn
    return Qwen2ForCausalLM(config).eval().to(dtype)


@dataclass(frozen=True)
class Newest(Policy):
    """Keeps the newest tokens."""

    name: ClassVar[str] = "newest"
    source: ClassVar[str] = "tests"

    def keep(self, view: View, slots: int) -> torch.Tensor:
        return keep_top(torch.arange(view.tokens).float().repeat(view.heads, 1), view.protected, slots)


@dataclass(frozen=True)
class Scattered(Policy):
    """Keeps different tokens in every head and layer: the hardest case for whatever moves them."""

    name: ClassVar[str] = "scattered"
    source: ClassVar[str] = "tests"
    share: float = 0.25

    def recent(self, frames: int) -> int:
        return max(1, int(self.share * frames))

    def keep(self, view: View, slots: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(view.layer * 1000 + view.tokens)
        return keep_top(torch.rand(view.heads, view.tokens, generator=generator), view.protected, slots)
