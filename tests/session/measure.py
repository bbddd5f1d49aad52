"""Independent measurements of what a session holds: by walking its objects, and by torch's own allocator events."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch

from millpond import Session


def held_bytes(session: Session, *also: Any, but: Any = None) -> int:
    """Bytes of every tensor and array reachable from a session, by storage; the shared model is not the session's.

    `also` names more objects to walk, for what is alive without being the session's (yet, or any more); `but` one to leave out.
    """
    storages: dict[int, int] = {}
    seen: set[int] = {id(but)}

    def walk(thing: Any) -> None:
        if id(thing) in seen or thing is session.family or thing is getattr(session.family, "rope", None):
            return
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, np.ndarray):
            owner = thing
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            storages[owner.ctypes.data] = owner.nbytes
        elif isinstance(thing, dict):
            for value in thing.values():
                walk(value)
        elif isinstance(thing, (list, tuple, set, frozenset)) or type(thing).__name__ == "deque":
            for value in thing:
                walk(value)
        elif is_dataclass(thing) and not isinstance(thing, type):
            for field in fields(thing):
                walk(getattr(thing, field.name))
        elif hasattr(thing, "__dict__") and not isinstance(thing, (type, torch.nn.Module)):
            walk(vars(thing))

    for thing in (session, *also):
        walk(thing)
    return sum(storages.values())


def transient_peak(run: Callable[[], Any]) -> int:
    """The most that torch's CPU allocator held beyond the start while `run` ran, in bytes.

    What was allocated before and is freed meanwhile is not subtracted: the profiler does not see it go.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    level = peak = 0
    # The allocator's own events, in order; those attached to operators leave out what is freed between them.
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "the allocator reported nothing"
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak
