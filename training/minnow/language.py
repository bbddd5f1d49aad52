"""Teaching the language model: several questions about one stream at a time, isolated from each other over the shared video.

Positions are those that millpond's sessions use: prompt 0..P-1; a group at t seconds stands at P + floor(t x tokens_per_second), its tokens at P
+ row and P + column; text after the video goes on at maximum + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from millpond.eval.streams.drawing import CELLS
from millpond.eval.streams.questions import Question
from training.minnow.architecture import TOKENS_PER_SECOND

__all__ = ["Asked", "Layout", "answer_loss", "keep_tokens", "layout", "place"]

_IGNORE = -100


@dataclass(frozen=True, eq=False)
class Layout:
    """How a tokenizer's chat format surrounds a video and its questions."""

    tokenizer: Any
    before: tuple[int, ...]

    def turn(self, question: Question) -> tuple[list[int], list[int]]:
        """Ids from the end of the video through the answer, and what each of them should predict (-100: anything)."""
        ids: list[int] = self._after(question)
        answer = self.tokenizer(question.answer, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        targets = [_IGNORE] * (len(ids) - 1) + [*answer, end]
        return ids + answer, targets

    def _after(self, question: Question) -> list[int]:
        turns = [] if question.earlier is None else [question.earlier]
        text = "<|vision_end|>"
        for asked, answered in turns:
            text += f"{asked}<|im_end|>\n<|im_start|>assistant\n{answered}<|im_end|>\n<|im_start|>user\n"
        text += f"{question.text}<|im_end|>\n<|im_start|>assistant\n"
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def layout(tokenizer: Any) -> Layout:
    """The layout of Minnow's own chat template."""
    return Layout(
        tokenizer, tuple(tokenizer("<|im_start|>user\n<|vision_start|>", add_special_tokens=False)["input_ids"])
    )


@dataclass(frozen=True, eq=False)
class Asked:
    """A batch of streams with the same number of tokens and of questions.

    Attributes:
        video: float32 [B, n, 128] embeddings of the vision tokens that are kept.
        groups, cells: int64 [B, n], the second and the cell of each.
        questions: B lists of equally many questions.
    """

    video: Tensor
    groups: Tensor
    cells: Tensor
    questions: Sequence[Sequence[Question]]


def place(groups: Tensor, cells: Tensor, base: int) -> Tensor:
    """Positions of vision tokens at whole seconds `groups` in `cells`, int64 [..., n] each -> [3, ..., n]."""
    return torch.stack([groups * TOKENS_PER_SECOND, cells // 4, cells % 4]) + base


def answer_loss(model: Any, layout: Layout, asked: Asked) -> tuple[Tensor, NDArray[np.bool_]]:
    """Mean cross-entropy of answers and their end marks; and for each question whether its answer is right, bool [B, Q]."""
    batch, kept, _ = asked.video.shape
    turns = [[layout.turn(question) for question in row] for row in asked.questions]
    count, width = len(turns[0]), max(len(ids) for row in turns for ids, _ in row)
    ids = torch.zeros(batch, count, width, dtype=torch.long)
    targets = torch.full((batch, count, width), _IGNORE)
    for b, row in enumerate(turns):
        for q, (tokens, expected) in enumerate(row):
            ids[b, q, : len(tokens)] = torch.tensor(tokens)
            targets[b, q, : len(expected)] = torch.tensor(expected)
    table = model.model.language_model.embed_tokens
    base = len(layout.before)
    before = torch.tensor(layout.before)
    embeds = torch.cat(
        [table(before).expand(batch, -1, -1), asked.video, table(ids).flatten(1, 2)],
        dim=1,
    )
    video_at = place(asked.groups, asked.cells, base)
    after = video_at.amax((0, 2))[:, None] + 1 + torch.arange(width)  # [B, width], the same for every question
    positions = torch.cat(
        [
            torch.arange(base).expand(3, batch, -1),
            video_at,
            after.repeat(1, count).expand(3, -1, -1),
        ],
        dim=2,
    )
    mask = _mask(base + kept, count, width)
    hidden = model.model.language_model(
        inputs_embeds=embeds, position_ids=positions, attention_mask={"full_attention": mask}, use_cache=False
    ).last_hidden_state[:, base + kept :]
    truth = targets.flatten(1)
    picked = truth != _IGNORE
    logits = model.lm_head(hidden[picked])
    loss = F.cross_entropy(logits, truth[picked])
    right = torch.ones(batch, count * width, dtype=torch.bool)
    right[picked] = logits.argmax(-1) == truth[picked]
    return loss, right.view(batch, count, width).all(-1).numpy()


def _mask(shared: int, count: int, width: int) -> Tensor:
    """Causal over the shared prefix; each question sees the prefix and itself: float32 [1, 1, T, T] of 0 and -inf."""
    total = shared + count * width
    block = torch.cat([torch.full((shared,), -1), torch.arange(count).repeat_interleave(width)])
    seen = (block[:, None] == block) | (block == -1)
    seen &= torch.ones(total, total, dtype=torch.bool).tril()
    return torch.zeros(total, total).masked_fill_(~seen, float("-inf"))[None, None]


def keep_tokens(rng: np.random.Generator, shown: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    """Which of a stream's tokens to keep, as if others had been evicted: all that show something, the last group, and others.

    Args:
        shown: bool [groups, 16].
        count: how many to keep; more if those that must stay are more.

    Returns:
        int64 [count], ascending.
    """
    weight = rng.random(shown.size)
    flat = shown.flatten()
    weight[flat] += 2
    weight[-CELLS:] += 1
    return np.sort(np.argsort(-weight, kind="stable")[:count])
