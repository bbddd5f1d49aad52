"""Jobs in order: of one lane one behind the other, of several side by side."""

import threading
from collections.abc import Iterator

import pytest

from millpond import MillpondError
from millpond.engine.lanes import Job, Lane, Pool


@pytest.fixture
def pool() -> Iterator[Pool]:
    pool = Pool(3, lambda: None)
    yield pool
    pool.close()


def put(pool: Pool, lane: Lane, job: Job) -> None:
    with pool.lock:
        pool.put(lane, job)


def test_a_lane_keeps_its_order_whoever_does_the_job(pool: Pool) -> None:
    lane, done, gate = Lane(), [], threading.Event()
    put(pool, lane, Job(gate.wait))
    for index in range(4):
        put(pool, lane, Job(lambda index=index: done.append(index)))
    placed = threading.Event()

    def own() -> None:
        with pool.turn(lane, placed.set):
            done.append("own")

    thread = threading.Thread(target=own)
    thread.start()
    placed.wait()
    put(pool, lane, Job(lambda: done.append("last")))
    gate.set()
    thread.join()
    with pool.turn(lane):
        assert done == [0, 1, 2, 3, "own", "last"]


def test_a_lane_that_hangs_holds_up_no_other(pool: Pool) -> None:
    stuck, gate = Lane(), threading.Event()
    put(pool, stuck, Job(gate.wait))
    put(pool, stuck, Job(lambda: None))
    ran = [threading.Event() for _ in range(5)]
    for event in ran:
        put(pool, Lane(), Job(event.set))
    assert all(event.wait(5) for event in ran)
    gate.set()


def test_a_turn_given_back_early_lets_the_next_go_and_one_given_up_is_passed_over(pool: Pool) -> None:
    lane = Lane()
    with pool.turn(lane) as end:
        with pytest.raises(TimeoutError), pool.turn(lane, seconds=0.01):
            raise AssertionError
        end()
        with pool.turn(lane):
            pass
    assert not lane.jobs
    assert lane.current is None


def test_a_closed_pool_tells_who_waits_and_takes_nothing_more(pool: Pool) -> None:
    lane, said = Lane(), []
    placed = threading.Event()

    def wait() -> None:
        try:
            with pool.turn(lane, placed.set):
                raise AssertionError
        except MillpondError as error:
            said.append(str(error))

    with pool.turn(lane):
        thread = threading.Thread(target=wait)
        thread.start()
        placed.wait()
        pool.close()
        thread.join()
    assert said == ["the engine was closed meanwhile"]
    with pytest.raises(MillpondError, match="the engine is closed"):
        put(pool, lane, Job(lambda: None))
