"""What a session gives back: answers, usage, and what it remembers. Plain typed objects."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Usage:
    """The state of a session in numbers. Bytes are those of the cap, not of the weights or the vision tower.

    Attributes:
        budget_bytes: the cap; None for the uncapped reference.
        live_bytes: what the live tokens take now, metadata included.
        allocated_bytes: storage, and waiting and recent frames held now.
        peak_bytes: the most held at once since the budget was last made smaller than that, scratch included; never above the budget.
        full_cache_bytes: what a plain cache of the same stream would take by now (keys and values alone).
        frames_seen, frames_dropped: raw frames taken in; dropped by a live source, or because a fault ended their block.
        frames_skipped, frames_reduced: of those taken in, which the admission left out, and which it thinned.
        timestamps_kept: distinct frame times that some head of some layer still remembers.
        memory_tokens: tokens remembered per head, quantized ones included, the prompt not counted.
        stream_tokens: tokens that went by, the prompt included.
        evicted_tokens: tokens per head that were forgotten, or left for host memory.
        compactions, reanchorings: passes so far.
        stream_seconds: time of the latest frame on the stream's own clock.
        seconds_source, seconds_vision, seconds_decoder, seconds_compaction, seconds_answers, seconds_total: wall time spent
            waiting for frames, in resizing and the vision tower, in the decoder on frames, in selection and compaction (and
            re-anchoring), on questions, and in all.
        host_budget_bytes, host_bytes: cap of host memory and what is allocated of it; None and 0 where nothing is retrieved.
        host_frames, host_frames_forgotten: frame groups there now, and those that left it because it was full.
        host_bytes_in, host_bytes_out: moved to host memory and from it so far.
        seconds_host: spent on that, within compaction and questions.
    """

    budget_bytes: int | None
    live_bytes: int
    allocated_bytes: int
    peak_bytes: int
    full_cache_bytes: int
    frames_seen: int
    frames_dropped: int
    frames_skipped: int
    frames_reduced: int
    timestamps_kept: int
    memory_tokens: int
    stream_tokens: int
    evicted_tokens: int
    compactions: int
    reanchorings: int
    stream_seconds: float
    seconds_source: float
    seconds_vision: float
    seconds_decoder: float
    seconds_compaction: float
    seconds_answers: float
    seconds_total: float
    host_budget_bytes: int | None = None
    host_bytes: int = 0
    host_frames: int = 0
    host_frames_forgotten: int = 0
    host_bytes_in: int = 0
    host_bytes_out: int = 0
    seconds_host: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """The same names as plain numbers."""
        return asdict(self)


@dataclass(frozen=True)
class Answer:
    """An answer to one question.

    Attributes:
        question, text: as asked, and as generated.
        token_ids: the generated ids, without the stop token.
        finish_reason: "stop" (the model ended it) or "length" (`max_new_tokens`, or the turn's reserve, was used up).
        at_seconds: time of the latest frame when the question was asked.
        first_token_seconds: wall time from the question to its first token.
        usage: of the session, after the answer.
    """

    question: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    at_seconds: float
    first_token_seconds: float
    usage: Usage

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, eq=False)
class LayerMemory:
    """What one layer remembers behind the prompt: for each of H heads and n tokens, when and where.

    Attributes:
        seconds: float64 [H, n], stream time of the token's frame group, or of the turn for text.
        row, column: int16 [H, n] on the frame's merged grid; -1 for text, -2 for a frame's separators and timestamps.
        quantized: how many of the n tokens are stored in few bits; they come first, in the order in which they were quantized.
    """

    seconds: np.ndarray
    row: np.ndarray
    column: np.ndarray
    quantized: int = 0

    @classmethod
    def of(cls, time_us: Tensor, grid_position: Tensor, quantized: int) -> LayerMemory:
        """From what a cache holds: int64 [H, n] and int16 [H, n, 2]."""
        row, column = (grid_position[:, :, axis].cpu().numpy().copy() for axis in range(2))
        return cls(time_us.cpu().numpy() / 1e6, row, column, quantized)
