"""First come, first served, whoever gives up on the way."""

import threading
import time
from collections.abc import Callable

import pytest

from millpond import MillpondError
from millpond.stream.exclusive import Exclusive, Once
from tests.session import faults


class Line:
    """Threads that come to a lock one after the other while it is held, and note when it is theirs."""

    def __init__(self, lock: Exclusive) -> None:
        self.lock, self.served, self._threads = lock, list[int](), list[threading.Thread]()

    def join(self, number: int) -> None:
        came = threading.Event()

        def come() -> None:
            with self.lock.held(waiting=came.set):
                self.served.append(number)

        self._threads.append(threading.Thread(target=come))
        self._threads[-1].start()
        assert came.wait(60)

    def end(self) -> list[int]:
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()
        return self.served


def test_those_who_wait_are_served_as_they_came() -> None:
    line = Line(Exclusive())
    with line.lock.held():
        for number in range(20):
            line.join(number)
        time.sleep(0.01)
        assert line.served == []
    assert line.end() == list(range(20))


def test_who_comes_again_at_once_goes_behind_those_who_wait() -> None:
    lock, other, turns = Exclusive(), threading.Event(), []

    def wait() -> None:
        with lock.held(waiting=other.set):
            turns.append("other")

    thread = threading.Thread(target=wait)
    for turn in range(2):
        with lock.held():
            turns.append("again")
            if not turn:
                thread.start()
                assert other.wait(60)
    thread.join(60)
    assert turns == ["again", "other", "again"]


def test_its_holder_takes_it_again_and_a_feed_does_not() -> None:
    lock, once = Exclusive(), Once("already")
    with lock.held(), lock.held():
        assert lock.mine
    assert not lock.mine
    with once.held(), pytest.raises(MillpondError, match="already"), once.held():
        pass
    with once.held():
        assert once.mine


def test_a_fault_at_any_line_lets_those_behind_go_on_and_nobody_too_early() -> None:
    def scene(strike: Callable[[Callable[[], None]], bool]) -> None:
        """One holds it, one waits and is struck, one waits behind that."""
        lock, freed, order = Exclusive(), threading.Event(), []
        came = [threading.Event(), threading.Event()]

        def hold() -> None:
            with lock.held():
                came[0].set()
                assert freed.wait(60)
                order.append("first")

        def enter() -> None:
            with lock.held(waiting=came[1].set):
                order.append("second")

        def behind() -> None:
            assert came[1].wait(60)
            with lock.held(waiting=freed.set):
                order.append("third")
                freed.set()

        threads = [threading.Thread(target=work) for work in (hold, behind)]
        for thread in threads:
            thread.start()
            assert came[0].wait(60)
        struck = strike(enter)
        came[1].set()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert order in (["first", "second", "third"], ["first", "third"])
        assert struck or "second" in order
        with lock.held():
            assert lock.mine

    lines: list[faults.Line] = []

    def record(enter: Callable[[], None]) -> bool:
        lines.extend(faults.lines_of(enter))
        return False

    scene(record)
    assert len(lines) > 10
    for line in lines:
        scene(lambda enter, line=line: faults.raise_at(line, KeyboardInterrupt, enter))  # type: ignore[misc]
