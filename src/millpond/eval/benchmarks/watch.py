"""One pass of one arm over one video: frames in, each question asked at its time of the frames before it. Knows nothing about files of answers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from millpond import frames
from millpond.answer import Answer, Usage
from millpond.config import SessionConfig
from millpond.errors import BudgetError, SourceError, first_line
from millpond.eval.benchmarks.base import Query, Video
from millpond.eval.benchmarks.settings import LAST_FRAMES, Arm, Settings
from millpond.frames import Frame
from millpond.memory.available import check_memory
from millpond.models.base import Family
from millpond.session import Session

_LAST = 4
# Stream times are kept in microseconds; a question at 17 s is asked of frames before the one at 17 s.
_TOLERANCE_SECONDS = 0.0005


@dataclass(frozen=True)
class Reply:
    """An answer: to which query, its text, how it ended, and the time of the latest frame that the model had been shown."""

    query: str
    text: str
    finish_reason: str
    at_seconds: float


@dataclass(frozen=True)
class Pass:
    """What one arm made of one video.

    Attributes:
        video, arm: which.
        replies: in the order of asking.
        broken: why the video could not be watched to the last question; None where it could.
        refused: why this arm did not watch it; None where it did.
        frames, seconds: taken in, and the time of the last of them.
        budget_bytes, peak_bytes, full_cache_bytes, memory_tokens, compactions: as the session counts them at the end.
        seconds_spent: wall time of the pass.
    """

    video: str
    arm: str
    replies: tuple[Reply, ...] = ()
    broken: str | None = None
    refused: str | None = None
    frames: int = 0
    seconds: float = 0.0
    budget_bytes: int | None = None
    peak_bytes: int = 0
    full_cache_bytes: int = 0
    memory_tokens: int = 0
    compactions: int = 0
    seconds_spent: float = 0.0

    @property
    def whole(self) -> bool:
        """Whether everything was asked."""
        return self.broken is None and self.refused is None

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Pass:
        """What `to_dict` gave; raises TypeError or KeyError for anything else."""
        return cls(**{**row, "replies": tuple(Reply(**reply) for reply in row["replies"])})


def watch(family: Family, video: Video, arm: Arm, settings: Settings) -> Pass:
    """Watch a video once and ask everything that is asked about it.

    A video that cannot be opened, or breaks off, is no error: what was asked before stays, and `broken` says why there is no more.
    An arm without a cap that does not fit into the memory there is refuses the video.

    Raises:
        BudgetError: the budget is too small for this model, policy and frame size, or the device's memory for a pass under it.
    """
    try:
        fps = _fps(video.path, settings)
        with frames.open(video.path, fps=fps) as source:
            if refused := _too_large(family, arm, source.info, fps):
                return Pass(video.id, arm.name, refused=refused)
            return _watch(family, video, arm, settings, source)
    except SourceError as error:
        return Pass(video.id, arm.name, broken=first_line(error))
    except torch.OutOfMemoryError as error:
        if arm.capped:
            raise BudgetError(
                f"{family.device} has no memory left for {arm.name} on {video.id}: {first_line(error)}"
            ) from error
        return Pass(video.id, arm.name, refused=f"out of memory on {family.device}")


def _fps(path: Path, settings: Settings) -> float:
    """The rate of sampling: lower where a video would give more than `max_frames`."""
    if settings.max_frames is None:
        return settings.fps
    with frames.open(path, fps=settings.fps) as source:
        length = source.info.duration
    return settings.fps if not length else min(settings.fps, settings.max_frames / length)


def _too_large(family: Family, arm: Arm, info: frames.SourceInfo, fps: float) -> str:
    """Why the whole video would not fit into memory, for arms that forget nothing; empty where it would, or nobody knows."""
    if arm.capped or arm.policy == LAST_FRAMES or not (info.duration and info.width and info.height):
        return ""
    groups = info.duration * fps / family.frames_per_group
    size = int(groups * family.grid(info.height, info.width).tokens * family.geometry.kv_bytes_per_token)
    try:
        check_memory(size, family.device)
    except BudgetError as error:
        return first_line(error)
    return ""


def _watch(family: Family, video: Video, arm: Arm, settings: Settings, source: frames.Source) -> Pass:
    stream = (_LastFrames if arm.policy == LAST_FRAMES else _Whole)(family, arm.config(settings))
    cut = _Cut(source)
    replies: list[Reply] = []
    texts: dict[str, str] = {}
    broken = None
    for query in video.queries:
        try:
            stream.feed(cut.before(query.seconds))
        except SourceError as error:
            broken = first_line(error)
            break
        if not cut.frames:
            broken = "it has no frames"
            break
        if query.after_yes is not None and "yes" not in texts[query.after_yes].lower():
            continue
        answer = stream.ask(query)
        texts[query.id] = answer.text
        replies.append(Reply(query.id, answer.text, answer.finish_reason, answer.at_seconds))
    usage = stream.usage
    told: dict[str, Any] = {}
    if usage is not None:
        names = ("budget_bytes", "peak_bytes", "full_cache_bytes", "memory_tokens", "compactions")
        told = {name: getattr(usage, name) for name in names}
    return Pass(video.id, arm.name, tuple(replies), broken, None, cut.frames, round(cut.seconds, 6), **told)


class _Cut:
    """A source, cut where questions are asked.

    Attributes:
        frames, seconds: handed out so far, and the time of the last of them.
    """

    def __init__(self, source: frames.Source) -> None:
        self._source = source
        self._held: Frame | None = None
        self.frames, self.seconds = 0, 0.0

    def before(self, seconds: float | None) -> Iterator[Frame]:
        """The frames before a time that have not been handed out yet; all that there are for None. The very first always comes."""
        while True:
            frame = self._held if self._held is not None else next(self._source, None)
            self._held = frame
            if frame is None:
                return
            if seconds is not None and self.frames and frame.seconds >= seconds - _TOLERANCE_SECONDS:
                return
            self._held = None
            self.frames, self.seconds = self.frames + 1, frame.seconds
            yield frame


class _Whole:
    """A session that is fed everything."""

    def __init__(self, family: Family, config: SessionConfig) -> None:
        self._session = Session(family, config)

    def feed(self, arrived: Iterator[Frame]) -> None:
        self._session.feed(arrived)

    def ask(self, query: Query) -> Answer:
        return self._session.ask(query.prompt, max_new_tokens=query.max_new_tokens)

    @property
    def usage(self) -> Usage | None:
        return self._session.usage


class _LastFrames:
    """The same model without a memory: a session of its own for each question, that is fed the latest frames."""

    def __init__(self, family: Family, config: SessionConfig) -> None:
        self._family, self._config = family, config
        self._last: deque[Frame] = deque(maxlen=_LAST)
        self.usage: Usage | None = None

    def feed(self, arrived: Iterator[Frame]) -> None:
        self._last.extend(arrived)

    def ask(self, query: Query) -> Answer:
        session = Session(self._family, self._config)
        session.feed(list(self._last))
        answer = session.ask(query.prompt, max_new_tokens=query.max_new_tokens)
        self.usage = session.usage
        return answer
