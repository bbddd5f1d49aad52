"""The contract of a model family: everything millpond must know about a transformers model, and nothing else.

frames -> prepare -> encode -> `Tokens` (embeddings with grid positions) -> `assign_positions` on the stream's clock -> `forward` into a
cache -> logits. A family knows its model, processor numbers and tokenizer; it never sees budgets, policies or sources.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from millpond.memory.geometry import Geometry
from millpond.models.query_recorder import See
from millpond.positions import Clock, Rope

NO_GRID_POSITION = -1
"""Row and column of a token that lies on no frame's grid (text, separators, timestamps)."""


@dataclass(frozen=True)
class Grid:
    """What one temporal group of frames becomes: its size in the model's eyes.

    Attributes:
        height, width: pixels after resizing.
        rows, cols: vision tokens on each axis, after merging.
        tokens: all tokens that a group adds to the stream (vision tokens and the family's separators or timestamps;
            an upper bound where a timestamp's text varies in length).
    """

    height: int
    width: int
    rows: int
    cols: int
    tokens: int


@dataclass(frozen=True, eq=False)
class Tokens:
    """A run of stream tokens, embedded and ready for the decoder.

    Attributes:
        embeds: [n, hidden] in the model's dtype, on its device.
        grid_position: int16 [n, 2], row and column on the merged grid; `NO_GRID_POSITION` for tokens without one. CPU.
        time_us: int64 [n], stream time of the frame (group) that the token comes from, in microseconds; for text the time at
            which it was said. CPU.
        visual: bool [n], True for the tokens that came out of the vision tower. CPU. (A separator or timestamp of a frame
            is not visual but carries its frame's time.)
        deepstack: per injection layer, [visual tokens, hidden] features that are added to the hidden states (Qwen3-VL);
            empty for other families.
    """

    embeds: Tensor
    grid_position: Tensor
    time_us: Tensor
    visual: Tensor
    deepstack: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def pick(self, index: Tensor) -> Tokens:
        """The tokens at `index`, int64 [m] on the CPU, ascending."""
        seen = (self.visual.cumsum(0) - 1)[index][self.visual[index]]
        return Tokens(
            embeds=self.embeds[index.to(self.embeds.device)],
            grid_position=self.grid_position[index],
            time_us=self.time_us[index],
            visual=self.visual[index],
            deepstack=tuple(layer[seen.to(layer.device)] for layer in self.deepstack),
        )

    @classmethod
    def join(cls, parts: Sequence[Tokens]) -> Tokens:
        """The runs `parts` one behind the other."""
        return cls(
            embeds=torch.cat([part.embeds for part in parts]),
            grid_position=torch.cat([part.grid_position for part in parts]),
            time_us=torch.cat([part.time_us for part in parts]),
            visual=torch.cat([part.visual for part in parts]),
            deepstack=tuple(
                torch.cat(layer) for layer in zip(*(part.deepstack for part in parts if part.deepstack), strict=True)
            ),
        )


class Family(ABC):
    """One adapter per model family; see the module docstring for the way through it.

    Args:
        model: a loaded transformers `...ForConditionalGeneration`, in eval mode, never modified.
        tokenizer: its tokenizer, with a chat template.
        image: processor numbers (`preprocessor_config.json` / `video_preprocessor_config.json` as a dict, or {}), missing
            entries fall back to the family's published defaults.
    """

    name: ClassVar[str]
    """What the family is called, for people."""
    model_types: ClassVar[tuple[str, ...]]
    """`config.model_type` values that this adapter serves."""
    any_size: ClassVar[bool] = False
    """Whether frames keep their shape, up to `max_pixels`; otherwise every frame is resized to one size."""
    frames_per_group: int
    """Frames that the vision tower folds into one temporal group (Qwen: temporal_patch_size, LLaVA: 1)."""
    geometry: Geometry
    rope: Rope
    hidden: int
    """Size of the decoder's hidden state."""
    stop_ids: frozenset[int]
    """Token ids that end an answer."""

    def __init__(self, model: Any, tokenizer: Any, image: dict[str, Any] | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    # --- frames -----------------------------------------------------------------------------------------------

    @abstractmethod
    def grid(self, height: int, width: int) -> Grid:
        """Size of a group of frames of `height` x `width` pixels, in pixels and tokens, after resizing.

        Raises:
            SourceError: the frame cannot be shown to this model (for example an aspect ratio that it refuses).
        """

    @abstractmethod
    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """Resize one raw frame, uint8 [H, W, 3] RGB, to the model's input size: uint8 [height, width, 3].

        Kept apart from `encode` so that frames waiting for their group are held at model resolution.
        """

    @abstractmethod
    def encode(self, frames: list[np.ndarray], times_us: list[int]) -> Tokens:
        """Run the vision tower over prepared frames of one size and lay their tokens out in stream order.

        Args:
            frames: prepared frames; the last group is completed by repeating its last frame (as the processors do).
            times_us: stream time of each frame in microseconds, not decreasing; a group carries its first frame's time.
        """

    def encode_several(self, blocks: Sequence[tuple[list[np.ndarray], list[int]]]) -> list[Tokens]:
        """`encode` for blocks of several streams, all frames of one size; in one run of the vision tower where a family can."""
        return [self.encode(frames, times_us) for frames, times_us in blocks]

    # --- text -------------------------------------------------------------------------------------------------

    @abstractmethod
    def opening(self, system: str | None = None) -> list[int]:
        """Token ids pinned at the start of a stream: everything before the first frame (system turn, user tag, vision start)."""

    @abstractmethod
    def question(self, text: str, *, after_video: bool) -> Tokens:
        """A question and the tag that opens the answer, embedded.

        With `after_video` it begins by closing the open video segment (vision end, a newline embedding, ...); without, it
        opens a new user turn. `time_us` is left 0 for the session to fill in.
        """

    @abstractmethod
    def reopening(self) -> list[int]:
        """Token ids from the end of a remembered answer to the next frame: end of turn, user tag, vision start."""

    def embed(self, ids: list[int]) -> Tokens:
        """Embed plain text ids, with no grid position; `time_us` is 0."""
        index = torch.tensor(ids, dtype=torch.long, device=self.device)
        count = len(ids)
        return Tokens(
            embeds=self.model.get_input_embeddings()(index),
            grid_position=torch.full((count, 2), NO_GRID_POSITION, dtype=torch.int16),
            time_us=torch.zeros(count, dtype=torch.long),
            visual=torch.zeros(count, dtype=torch.bool),
        )

    # --- positions --------------------------------------------------------------------------------------------

    @abstractmethod
    def assign_positions(self, tokens: Tokens, clock: Clock) -> Tensor:
        """Rotary positions of the next tokens of the stream, int64 [axes, n]; moves the clock past them.

        Runs of visual tokens follow the convention that the weights were trained with (real time for Qwen2.5-VL's
        temporal axis), text follows at maximum + 1.
        """

    # --- the decoder ------------------------------------------------------------------------------------------

    @abstractmethod
    def forward(self, tokens: Tokens, positions: Tensor, cache: Any) -> Tensor:
        """Run the decoder over the tokens into `cache` (a `transformers.Cache`) without the LM head.

        Args:
            positions: int64 [axes, n].

        Returns:
            The last hidden state, [n, hidden], after the final norm.
        """

    @abstractmethod
    def showing_queries(self, see: See, *, before: bool = False) -> AbstractContextManager[None]:
        """Within it, `forward` calls `see` behind each layer's attention, or `before` its keys reach the cache; nobody else's use of
        the model changes."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """LM head: hidden [..., hidden] -> [..., vocabulary]."""
