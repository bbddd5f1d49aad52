"""Who is in memory, with how many bytes: arrivals, shrinking, hibernation and waking. The sum never passes the engine's bytes.

A session that is in use is never hibernated, and may be shrunk between two of its frames or answers. Arrivals and wakings are made one
at a time; sessions that are in memory go on meanwhile.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from time import monotonic

from millpond.answer import Usage
from millpond.engine.resident import Resident
from millpond.engine.shares import Claim, Grants, Share, refusal, share_out
from millpond.errors import BudgetError, MillpondError
from millpond.frames import Source
from millpond.models.base import Family
from millpond.session import Session
from millpond.stream.exclusive import Exclusive

_WORTH_GROWING = 8  # a share of this much more is taken; less is not worth a move of the memory


class Residency:
    """The sessions of an engine and their bytes.

    Args:
        family: that they run on. total: bytes. share: how they are split.
        patience: seconds that an arrival or a waking waits for sessions that are in use.

    Attributes:
        grants: bytes by session. wakings: how often a session came back from its file.
    """

    def __init__(self, family: Family, total: int, share: Share, patience: float) -> None:
        self._family, self._share, self._patience = family, share, patience
        self.grants = Grants(total)
        self.residents: dict[str, Resident] = {}
        self.wakings = 0
        self._closed = False
        self._state = threading.Condition(threading.RLock())  # held for moments
        self._arriving = Exclusive()  # held while room is made and taken
        self._uses = itertools.count(1)

    # --- coming and going ---------------------------------------------------------------------------------------

    def open(self, resident: Resident, make: Callable[[int], Session]) -> None:
        """Make room for a new session, and make it with the budget that it gets.

        Raises:
            BudgetError: there is no room; names the least that it needs, and what is free. Nobody was harmed.
            MillpondError: there is a session of that name.
        """
        with self._arriving.held():
            self._check_new(resident)
            self._move_in(resident, self._claim(resident, arriving=True), make)
            self._register(resident)

    def fork(self, resident: Resident, other: Resident) -> None:
        """A new session on a copy of one's memory, with as many bytes as that one has.

        Raises:
            BudgetError, MillpondError: as for `open`.
        """
        with self._used_by_arrival(resident) as session, resident.sizing:
            self._check_new(other)
            size = self.grants.of(resident.name)
            claim = Claim(other.name, other.weight, size, size)
            self._move_in(other, claim, lambda _: session.fork(), unchanged=resident)
            self._register(other)

    def _check_new(self, resident: Resident) -> None:
        with self._state:
            if self._closed:
                raise MillpondError("the engine is closed")
            if resident.name in self.residents:
                raise MillpondError(f"there is a session {resident.name!r} already")

    def _register(self, resident: Resident) -> None:
        with self._state:
            resident.last_used = next(self._uses)
            self.residents[resident.name] = resident

    def close(self, resident: Resident) -> None:
        """Let go of a session and its file, behind whoever is at it; sources that are being fed to it are closed."""
        with self._state:
            if self.residents.get(resident.name) is not resident:
                return
            resident.closed = True
            sources = list(resident.sources)
        for source in sources:
            source.close()
        with self._state:
            self._state.wait_for(lambda: not resident.users and not resident.moving)
            resident.session = None
            self.grants.set(resident.name, 0)
            self.residents.pop(resident.name, None)
            self._state.notify_all()
        with suppress(OSError):
            resident.path.unlink()

    # --- use ----------------------------------------------------------------------------------------------------

    def enter(self, resident: Resident, use: object) -> Session:
        """Begin to use a session, which is woken up if need be; until `leave` it stays in memory.

        Args:
            use: stands for this use of it, which is to be left whether or not `enter` returned.

        Raises:
            BudgetError: no room came free in time. SnapshotError: its file cannot be read.
            MillpondError: it was closed.
        """
        session = self._in_memory(resident, use)
        if session is None:
            with self._arriving.held():
                session = self._in_memory(resident, use) or self._wake(resident, use)
        if self._share != "fixed":
            self._grow(resident, session)
        return session

    def leave(self, resident: Resident, use: object) -> None:
        """End what `enter` began, if it did."""
        with self._state:
            if use in resident.users:
                resident.last_used = next(self._uses)
            self._let_go(resident, use)

    def _let_go(self, resident: Resident, use: object) -> None:
        with self._state:
            resident.users.discard(use)
            self._state.notify_all()

    @contextmanager
    def used(self, resident: Resident) -> Iterator[Session]:
        """`enter` and `leave`."""
        use = object()
        try:
            yield self.enter(resident, use)
        finally:
            self.leave(resident, use)

    @contextmanager
    def _used_by_arrival(self, resident: Resident) -> Iterator[Session]:
        """`used`, for what takes room itself: nobody else arrives meanwhile."""
        use = object()
        with self._arriving.held():
            try:
                yield self._in_memory(resident, use) or self._wake(resident, use)
            finally:
                self.leave(resident, use)

    def _in_memory(self, resident: Resident, use: object) -> Session | None:
        """The session, in use from now on, if it is in memory."""
        with self._state:
            self._state.wait_for(lambda: not resident.moving)
            if resident.closed:
                raise MillpondError(f"the session {resident.name!r} is closed")
            if resident.session is not None:
                resident.users.add(use)
            return resident.session

    def watch(self, resident: Resident, source: Source) -> None:
        """A source is being fed to a session from now on, which closes it when it is closed itself."""
        with self._state:
            resident.sources.add(source)
            closed = resident.closed
        if closed:
            source.close()

    def unwatch(self, resident: Resident, source: Source) -> None:
        """Not any more."""
        with self._state:
            resident.sources.discard(source)

    def usage(self, resident: Resident) -> Usage:
        """Of a session in memory; of a hibernated one, as it went to its file.

        Raises:
            MillpondError: it was closed.
        """
        use = object()
        try:
            session = self._in_memory(resident, use)
            if session is not None:
                return session.usage
            assert resident.usage is not None
            return resident.usage
        finally:
            self._let_go(resident, use)

    @property
    def held_bytes(self) -> int:
        """What all sessions hold at this instant, by their ledgers."""
        sessions = [one.session for one in list(self.residents.values())]
        return sum(session.held_bytes for session in sessions if session is not None)

    def clear(self) -> None:
        """Let go of all of them; nobody arrives any more."""
        with self._state:
            self._closed = True
            self.residents.clear()

    # --- the budget of one --------------------------------------------------------------------------------------

    def resize(self, resident: Resident, budget: int) -> None:
        """Change the most that a session takes, and what it has now.

        Raises:
            BudgetError: no room for more, or less than what works; nothing changes.
        """
        with self._used_by_arrival(resident) as session, resident.sizing:
            before = self.grants.of(resident.name)
            size = budget + resident.beside
            if size > before:
                self._make_room(replace(self._claim(resident), least=size, most=size), resident)
            try:
                session.resize(budget)
            except Exception:
                self._grant(resident, before if session.config.budget != budget else size)
                raise
            self._grant(resident, size)
            resident.config = replace(resident.config, budget=budget)
            resident.least = min(resident.least, budget)

    def _grow(self, resident: Resident, session: Session) -> None:
        """Take what has come free of a session's share, if that is worth it."""
        if not resident.sizing.acquire(blocking=False):
            return
        try:
            with self._state:
                have = self.grants.of(resident.name)
                try:
                    target = share_out(self.grants.total, [self._claim(one) for one in self._here()])[resident.name]
                except BudgetError:
                    return
                size = min(target, have + self.grants.free)
                if size < have + have // _WORTH_GROWING:
                    return
                self.grants.set(resident.name, size)
            # What stands in the way, a machine that has no more or a policy that fails, is no matter of who wants to use it now.
            with suppress(Exception):
                session.resize(size - resident.beside)
            self._grant(resident, size if session.config.budget == size - resident.beside else have)
        finally:
            resident.sizing.release()

    def _grant(self, resident: Resident, size: int) -> None:
        with self._state:
            self.grants.set(resident.name, size)
            self._state.notify_all()

    # --- making room --------------------------------------------------------------------------------------------

    def _here(self) -> list[Resident]:
        return [one for one in self.residents.values() if self.grants.of(one.name)]

    def _claim(self, resident: Resident, *, arriving: bool = False) -> Claim:
        """What a session asks of the whole."""
        have = self.grants.of(resident.name)
        if self._share == "fixed":
            size = resident.most if arriving else have
            assert size is not None
            return Claim(resident.name, 1.0, size, size)
        weight = 1.0 if self._share == "equal" else resident.weight
        least = resident.least + resident.beside
        return Claim(resident.name, weight, least if arriving else min(least, have), resident.most)

    def _move_in(
        self, resident: Resident, claim: Claim, make: Callable[[int], Session], unchanged: Resident | None = None
    ) -> None:
        size = self._make_room(claim, resident, unchanged)
        try:
            session = make(size - resident.beside)
        except BaseException:
            self._grant(resident, 0)
            raise
        with self._state:
            resident.session = session

    def _wake(self, resident: Resident, use: object) -> Session:
        """Back from its file, with the budget that it had; in use from now on."""
        size = resident.asleep_bytes
        with self._state:
            resident.users.add(use)  # nobody may hibernate it as soon as it is there
        self._move_in(resident, Claim(resident.name, 1.0, size, size), lambda _: resident.load(self._family))
        self.wakings += 1
        assert resident.session is not None
        return resident.session

    def _make_room(self, claim: Claim, arriving: Resident, unchanged: Resident | None = None) -> int:
        """Shrink others and hibernate idle ones until a claim fits; it is granted then. Returns the bytes.

        Raises:
            BudgetError: it does not fit, by name.
        """
        deadline, use = monotonic() + self._patience, object()
        stuck: dict[str, Exception] = {}  # those that could not go to their file
        floors: dict[str, int] = {}  # bytes below which a session turned out not to go
        if unchanged is not None:
            floors[unchanged.name] = self.grants.of(unchanged.name)
        while True:
            with self._state:
                others = [one for one in self._here() if one is not arriving]
                claims = [
                    replace(one, least=max(one.least, floors.get(one.name, 0))) for one in map(self._claim, others)
                ]
                try:
                    targets = share_out(self.grants.total, [*claims, claim])
                except BudgetError:
                    targets = {}
                if targets:
                    size = targets[claim.name]
                    if size - self.grants.of(claim.name) <= self.grants.free:
                        self.grants.set(claim.name, size)
                        return size
                    larger = [one for one in others if self.grants.of(one.name) > targets[one.name]]
                    victim = min(larger, key=lambda one: (len(one.users), one.last_used))
                    victim.users.add(use)
                else:
                    idle = [one for one in others if self._may_sleep(one) and one.name not in stuck]
                    names = {one.name for one in idle}
                    staying = sum(one.least for one in claims if one.name not in names)
                    if not idle or claim.least + staying > self.grants.total:  # it would be in vain
                        busy = any((one.users or one.moving) and one is not unchanged for one in others)
                        busy = busy and claim.least <= self.grants.total
                        if not busy or not self._state.wait(max(0.0, deadline - monotonic())):
                            raise refusal(claim, claims, self.grants, stuck.values())
                        continue
                    victim = min(idle, key=lambda one: one.last_used)
                    victim.moving = True
            if targets:
                try:
                    floors[victim.name] = self._shrink(victim, targets[victim.name])
                finally:
                    self._let_go(victim, use)
            else:
                try:
                    self._sleep(victim)
                except Exception as error:
                    stuck[victim.name] = error

    @staticmethod
    def _may_sleep(resident: Resident) -> bool:
        return resident.session is not None and not resident.users and not resident.moving and not resident.closed

    def _shrink(self, resident: Resident, size: int) -> int:
        """Shrink a session, which is in use for that. Returns the bytes below which it does not go."""
        assert resident.session is not None
        with resident.sizing:
            have = self.grants.of(resident.name)
            try:
                resident.session.resize(size - resident.beside)
            except BudgetError as error:
                least = have if error.minimum is None else error.minimum + resident.beside
                return least if size < least <= have else have
            except Exception:  # its policy fails, which is no matter of the newcomer's
                return have
            self._grant(resident, size)
            return 0

    # --- hibernation --------------------------------------------------------------------------------------------

    def hibernate(self, resident: Resident) -> None:
        """Write a session to its file and let go of its memory, behind whoever is at it; one that is there already stays.

        Raises:
            SnapshotError: it cannot be written; it stays in memory.
        """
        with self._state:
            self._state.wait_for(lambda: not resident.users and not resident.moving)
            if resident.session is None:
                return
            resident.moving = True
        self._sleep(resident)

    def _sleep(self, resident: Resident) -> None:
        """Save, then let go, then the bytes are free. The session is `moving`."""
        try:
            usage = resident.save()
            with self._state:
                resident.session, resident.usage = None, usage
                resident.asleep_bytes = self.grants.of(resident.name)
                resident.hibernations += 1
                self.grants.set(resident.name, 0)
        finally:
            with self._state:
                resident.moving = False
                self._state.notify_all()
