"""Many sessions on one device: one model, so many bytes for all of them, one thread that runs the model for whoever needs it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self, Unpack, get_args

from millpond import models
from millpond.config import SessionArguments, SessionConfig, configured
from millpond.device import DEFAULT_FRAME, load_for_streams, minimum_budget
from millpond.engine.backlog import Backlog
from millpond.engine.gateway import Gateway
from millpond.engine.handle import EngineSession, Shared
from millpond.engine.lanes import Pool
from millpond.engine.residency import Residency
from millpond.engine.scheduler import FORWARD_TOKENS, Scheduler
from millpond.engine.shares import Share
from millpond.errors import BudgetError, MillpondError, ModelError
from millpond.memory.available import check_memory
from millpond.memory.budget import Budget, format_bytes
from millpond.models.base import Family
from millpond.session import Session

_THREADS = 16
_QUEUE_SHARE = 8


@dataclass(frozen=True)
class EngineUsage:
    """The state of an engine in numbers.

    Attributes:
        total_bytes: for all sessions and waiting frames. free_bytes: that no session has.
        held_bytes: that sessions and waiting frames hold at this instant, by the ledgers.
        sessions, hibernated: how many there are, and how many of them are in their files. wakings: how often one came back.
        passes, requests: of the model so far, and what sessions asked of it: their ratio is how many ran together.
    """

    total_bytes: int
    free_bytes: int
    held_bytes: int
    sessions: int
    hibernated: int
    wakings: int
    passes: int
    requests: int

    def to_dict(self) -> dict[str, Any]:
        """The same names as plain numbers."""
        return asdict(self)


class Engine:
    """Watches many streams through one model, inside one number of bytes.

    Args:
        model: as for `millpond.Session.from_pretrained`, or an adapted model.
        stream_memory: bytes for what all sessions remember and for frames that wait, together.
        device_memory: in its place: bytes for weights, streams and one pass together. A quantized model is read at the bit-width that
            fits. Sets glibc's malloc for the whole process (`millpond.memory.heap.hold_nothing`).
        share: how sessions get them. "equal": alike; "weight": by their weight. A newcomer then shrinks the others, down to the `least` of
            each, and whoever is used grows into what comes free. "fixed": each has the budget that it was opened with, always.
            Where there is no room left, the sessions that have been idle longest are hibernated.
        state_dir: a folder for the files of hibernated sessions; by default the system's for temporary files.
        queue_frames: most offered frames of a session that wait. queue_memory: bytes for all frames that wait, out of `stream_memory`; by
            default an eighth.
        forward_tokens: most tokens that run through the model at once; with 1, sessions never share a pass, and every result is that of
            a `Session` alone, bit for bit.
        patience: seconds that an arrival, or a session that wakes up, waits for room while others are in use.
        frame_size: height and width in pixels of the largest frame to expect.
        load: `dtype`, `device`, `attn_implementation`, `max_pixels`, `target_bits`, as for `millpond.models.load`.

    Raises:
        ModelError: not found, or no supported family. BudgetError: more memory than there is. MillpondError: an argument is none.
    """

    def __init__(
        self,
        model: str | Path | tuple[Any, Any] | Family,
        *,
        stream_memory: str | int | None = None,
        device_memory: str | int | None = None,
        share: Share = "equal",
        state_dir: str | Path | None = None,
        queue_frames: int = 8,
        queue_memory: str | int | None = None,
        forward_tokens: int = FORWARD_TOKENS,
        patience: float = 30.0,
        frame_size: tuple[int, int] = DEFAULT_FRAME,
        **load: Any,
    ) -> None:
        if share not in get_args(Share):
            raise MillpondError(f"share must be one of {', '.join(get_args(Share))}, not {share!r}")
        for name, number in (("queue_frames", queue_frames), ("forward_tokens", forward_tokens)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise MillpondError(f"{name} must be a whole number from 1 on, not {number!r}")
        self._share, self._frame_size = share, frame_size
        if stream_memory is not None and device_memory is None:
            self._total, self._family = int(Budget(stream_memory)), _adapted(model, load)
        elif device_memory is None or stream_memory is not None:
            raise BudgetError("give an engine stream_memory or device_memory, one of the two")
        elif isinstance(model, Family):
            raise ModelError("device_memory is for a model that the engine loads, or a loaded (model, processor)")
        else:
            self._family, self._total = load_for_streams(model, device_memory, frame_size, forward_tokens, **load)
        queue = self._total // _QUEUE_SHARE if queue_memory is None else int(Budget(queue_memory))
        if queue >= self._total:
            raise BudgetError(f"a queue_memory of {format_bytes(queue)} leaves nothing of {format_bytes(self._total)}")
        check_memory(self._total, self._family.device)
        folder = Path(tempfile.mkdtemp(prefix="millpond-engine-", dir=state_dir))
        scheduler = Scheduler(self._family, forward_tokens)
        self._gateway = Gateway(self._family, scheduler)
        pool = Pool(_THREADS, scheduler.leave)
        residency = Residency(self._gateway, self._total - queue, share, patience)
        self._shared = Shared(residency, scheduler, pool, Backlog(pool, queue_frames, queue), folder)

    @property
    def family(self) -> Family:
        """The adapted model."""
        return self._family

    def open(
        self,
        name: str,
        config: SessionConfig | None = None,
        *,
        weight: float = 1.0,
        least: str | int | None = None,
        **arguments: Unpack[SessionArguments],
    ) -> EngineSession:
        """A new session.

        Args:
            name: unlike every other's.
            config, arguments: as for a `millpond.Session`. The budget is what it has, where bytes are "fixed", and otherwise the most that
                it takes, by default as much as it gets.
            weight: its share beside the others', where bytes go by "weight".
            least: bytes that its budget is never shrunk below to make room; by default the fewest that work.

        Raises:
            BudgetError: there is no room: says what is free and what the least would be. PolicyError: it does not go with a cap.
            MillpondError: there is a session of that name; or as for a `Session`.
        """
        config = configured(config, **arguments)
        if not config.policy.capped:
            raise BudgetError(f"the policy {config.policy.name!r} has no cap: no engine has room for it")
        if self._share == "fixed" and config.budget is None:
            raise BudgetError(f"the session {name!r} needs a budget: this engine shares its bytes as 'fixed'")
        if not weight > 0:
            raise MillpondError(f"a weight must be above 0, not {weight!r}")
        fewest = 1 if least is None else int(Budget(least))
        if self._share != "fixed":
            fewest = max(fewest, minimum_budget(self._family, self._family.grid(*self._frame_size), config))
        resident = self._shared.resident(name, config, weight, fewest)
        if config.budget is not None and config.budget < resident.least:
            raise BudgetError(
                f"the session {name!r} cannot have {resident.least} bytes at least and {config.budget} at most",
                minimum=resident.least,
            )
        self._shared.residency.open(resident, lambda budget: Session(self._gateway, replace(config, budget=budget)))
        return self._shared.add(resident)

    @property
    def sessions(self) -> tuple[EngineSession, ...]:
        """Those that are open, hibernated ones too, in the order of their names."""
        return self._shared.list()

    def __iter__(self) -> Iterator[EngineSession]:
        return iter(self.sessions)

    def __getitem__(self, name: str) -> EngineSession:
        found = self._shared.handles.get(name)
        if found is None:
            raise MillpondError(f"there is no session {name!r}")
        return found

    @property
    def usage(self) -> EngineUsage:
        """Bytes, sessions and passes now."""
        residency, scheduler = self._shared.residency, self._shared.scheduler
        sessions = list(residency.residents.values())
        here = [one.session for one in sessions]
        return EngineUsage(
            total_bytes=self._total,
            free_bytes=residency.grants.free,
            held_bytes=residency.held_bytes + self._shared.backlog.bytes,
            sessions=len(sessions),
            hibernated=sum(session is None for session in here),
            wakings=residency.wakings,
            passes=scheduler.passes,
            requests=scheduler.requests,
        )

    def close(self) -> None:
        """End every session, what has begun first; then no thread and no file is left. A second call does nothing."""
        for session in self.sessions:
            session.close()
        self._shared.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _adapted(model: str | Path | tuple[Any, Any] | Family, load: dict[str, Any]) -> Family:
    if isinstance(model, Family):
        return model
    return models.adapt(*model) if isinstance(model, tuple) else models.load(model, **load)
