"""A session's arguments, in one place: what each means, its default, and what goes with what.

Loads neither torch nor a policy before a config is made.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from millpond.errors import MillpondError, PolicyError
from millpond.memory.budget import Budget
from millpond.policies import DEFAULT_POLICY

if TYPE_CHECKING:
    from millpond.admission.base import Admission
    from millpond.policies.base import Policy

Positions = Literal["absolute", "contiguous"]
"""What happens to rotary positions near the trained limit."""


@dataclass(frozen=True, kw_only=True)
class SessionConfig:
    """The arguments of a session, read and held to each other. Each may be given as it is written, and is then what it means.

    Attributes:
        budget: bytes for everything the stream remembers: `"64MiB"`, `"2GB"` or an int. None only with the policy "full", or where a
            budget is still to be found.
        policy: a name (`millpond policies` lists them) or a `Policy`.
        positions: what happens to rotary positions near the trained limit. "contiguous" closes the gaps that evictions left, so
            that distances stay in the trained range; "absolute" keeps true distances in time and shifts all numbers. Measured
            in docs/accuracy/1024-groups.md.
        system: a system message, pinned with the prompt.
        reserve_tokens: slots kept free for a question and its answer; by default an eighth of all, 32 to 512.
        admission: what of each frame is let in at all, before the policy: a name ("curvestream") or an `Admission`. None lets
            every frame in whole. Frames still waiting for their group are shown to a question whole, whatever it is.
        recent_frames: that many of the latest frames, in whole groups, are kept as pixels, encoded again for each question, and
            shown to it in full behind the memory. 0: none.
        host_budget: bytes of host memory for what leaves the device, beside `budget`: for a policy that retrieves frames from there
            ("rekv"), which needs it. When it is full, the oldest frames are forgotten.
        host_path: a folder; host memory is then a mapped file in it, without a name, gone with the session.

    Raises:
        BudgetError: a budget that is no size.
        PolicyError: no such policy or admission, or the two do not go together; host memory that nothing uses.
        MillpondError: another argument is none of what it may be.
    """

    budget: int | None = None
    policy: Policy = DEFAULT_POLICY  # type: ignore[assignment]  # read below
    positions: Positions = "contiguous"
    system: str | None = None
    reserve_tokens: int | None = None
    admission: Admission | None = None
    recent_frames: int = 0
    host_budget: int | None = None
    host_path: Path | None = None

    def __post_init__(self) -> None:
        from millpond import admission, policies
        from millpond.admission.base import Admission
        from millpond.policies.base import Policy
        from millpond.policies.composition import ADMISSION, HOST_MEMORY, check

        if self.positions not in ("absolute", "contiguous"):
            raise MillpondError(f"positions must be 'absolute' or 'contiguous', not {self.positions!r}")
        self._read("policy", policies.read, str)
        policy = self.policy
        if not isinstance(policy, Policy):
            raise PolicyError(f"policy must be a name or a Policy, not {policy!r}")
        if self.host_budget is not None or self.host_path is not None:
            check(policy, HOST_MEMORY)
        self._read("budget", lambda size: int(Budget(size)), object)
        self._read("admission", admission.read, str)
        self._read("host_budget", lambda size: int(Budget(size)), object)
        self._read("host_path", Path, str)
        if self.admission is not None:
            if not isinstance(self.admission, Admission):
                raise PolicyError(f"admission must be a name or an Admission, not {self.admission!r}")
            check(policy, ADMISSION)
        for name, number in (("recent_frames", self.recent_frames), ("reserve_tokens", self.reserve_tokens)):
            if number is None and name == "reserve_tokens":
                continue
            if not isinstance(number, int) or isinstance(number, bool) or number < 0:
                raise MillpondError(f"{name} must be a whole number, at least 0, not {number!r}")
        if not isinstance(self.system, str | None):
            raise MillpondError(f"system must be text, not {self.system!r}")
        if not isinstance(self.host_path, Path | None):
            raise MillpondError(f"host_path must be a path, not {self.host_path!r}")

    def _read(self, name: str, read: Any, written: type) -> None:
        """Replace how a value was written by what it means."""
        value = getattr(self, name)
        if value is not None and isinstance(value, written):
            object.__setattr__(self, name, read(value))

    def to_dict(self) -> dict[str, Any]:
        """As plain values: policy and admission in one word, bytes as numbers.

        Raises:
            PolicyError: the policy or the admission cannot be written in one word that means the same.
        """
        from millpond import admission, policies

        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            **plain,
            "policy": policies.write(self.policy),
            "admission": None if self.admission is None else admission.write(self.admission),
            "host_path": None if self.host_path is None else str(self.host_path),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SessionConfig:
        """What `to_dict` gave.

        Raises:
            MillpondError: something else is among the values; and as when made.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise MillpondError(f"a session has no argument {unknown[0]!r}; it has: {', '.join(known)}")
        return cls(**values)


class SessionArguments(TypedDict, total=False):
    """How the fields of a `SessionConfig` may be written."""

    budget: str | int | None
    policy: str | Policy
    positions: Positions
    system: str | None
    reserve_tokens: int | None
    admission: str | Admission | None
    recent_frames: int
    host_budget: str | int | None
    host_path: str | Path | None


def configured(config: SessionConfig | None, **arguments: Unpack[SessionArguments]) -> SessionConfig:
    """A session's config: the one that was given, the arguments over it.

    Raises:
        MillpondError: `config` is none; and as when made.
    """
    if not isinstance(config, SessionConfig | None):
        raise MillpondError(f"give a session's arguments by name, or a SessionConfig first, not {config!r}")
    return replace(config or SessionConfig(), **arguments)  # type: ignore[arg-type]  # a config reads them
