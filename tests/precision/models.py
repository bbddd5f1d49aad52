"""A tiny random text model with a tokenizer of one token a word, quantized once for all tests."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from millpond import precision

WORDS = 90


def text_model(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=100,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=WORDS,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():  # far enough from even that bit-widths matter
        parameter.data.mul_(3)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")


def text(count: int = 600, seed: int = 1) -> str:
    ids = torch.randint(1, WORDS, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{index}" for index in ids.tolist())


def runs(samples: int = 8, length: int = 32, seed: int = 1) -> Tensor:
    return precision.samples_of(tokenizer(), text(samples * length, seed), samples=samples, length=length)


def quantized(folder: Path) -> Path:
    precision.quantize(text_model(), tokenizer(), folder, runs(), source="tiny", quiet=True)
    return folder
