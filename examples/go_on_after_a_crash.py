"""A session outlives its process: python examples/go_on_after_a_crash.py [VIDEO STATE]

Saves after every tenth frame to STATE, and begins where STATE stands when it is there: kill it at any moment and start it again. Without
arguments it does that to itself, on a drawn film.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import millpond
from millpond import frames, models
from millpond.eval import streams


def main(video: str | Path, state: str | Path) -> None:
    model = models.load("minnow")
    known = Path(state).exists()
    session = millpond.Session.load(state, model) if known else millpond.Session(model, budget="256KiB")
    seen, at = session.usage.frames_seen, session.usage.stream_seconds
    print(f"{seen} frames were seen before", flush=True)

    def saving(source: frames.Source) -> Iterator[frames.Frame]:
        for frame in source:
            if not seen or frame.seconds > at:
                yield frame
                if session.usage.frames_seen % 10 == 0:
                    session.save(state)

    with frames.open(video, fps=2) as source:
        session.feed(saving(source))
    print(f"{session.usage.frames_seen} frames: {session.ask('Which object appeared first?', max_new_tokens=16).text}")


if __name__ == "__main__":
    if sys.argv[1:]:
        main(*sys.argv[1:])
    else:
        with tempfile.TemporaryDirectory() as folder:
            film, saved = Path(folder) / "drawn.mp4", Path(folder) / "session.snapshot"
            streams.generate(7, groups=96, level="plain").write(film)
            with subprocess.Popen([sys.executable, __file__, film, saved]) as process:
                while not saved.exists():
                    time.sleep(0.01)
                process.kill()
            main(film, saved)
