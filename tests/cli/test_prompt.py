"""Asking at the prompt while the stream goes on."""

import threading
import time
from collections.abc import Iterator

import pytest

from millpond import Session
from millpond.cli.watching import Watch
from millpond.frames import Frame
from tests.models.tiny import tiny
from tests.session.frames import moving


def test_frames_go_on_while_an_answer_is_printed_at_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(tiny("qwen2_5_vl"), budget="1MiB")
    printing, typed = threading.Event(), iter(["what is there"])

    def source() -> Iterator[Frame]:
        yield from moving(4)
        assert printing.wait(60)
        yield from moving(8, start=10)

    def read(_: Watch) -> str | None:
        while session.usage.frames_seen < 4:
            time.sleep(0.01)
        return next(typed, None)

    def slow(text: str) -> None:
        """A terminal that takes an answer's first piece only when eight more frames have come."""
        if not text.endswith("\n  "):
            printing.set()
            end = time.monotonic() + 60
            while session.usage.frames_seen < 12:
                assert time.monotonic() < end
                time.sleep(0.01)

    monkeypatch.setattr(Watch, "_read_question", read)
    monkeypatch.setattr("millpond.cli.watching.say", slow)
    with Watch(session, source(), prompt=True, quiet=True, max_new_tokens=4) as watch:
        watch.run([], [])
    assert [answer.at_seconds for answer in watch.answers] == [1.5]
    assert session.usage.frames_seen == 12
