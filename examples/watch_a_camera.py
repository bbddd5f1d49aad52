"""Watch a live source for as long as it lasts, a question a minute: python examples/watch_a_camera.py [ADDRESS]

ADDRESS is /dev/video0, rtsp://..., an HTTP stream, or a file, which plays from beginning to end.
"""

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import millpond
from millpond import frames
from millpond.eval import streams


def main(source: Iterable[frames.Frame], every: float = 60.0) -> None:
    session = millpond.Session.from_pretrained("minnow", budget="256KiB")
    due = every
    for frame in source:  # ends with the source, or with Ctrl-C
        session.feed(frame)
        if frame.seconds >= due:
            due += every
            answer = session.ask("Which object is there now?", max_new_tokens=8)
            print(f"[{frame.seconds:.1f} s] {answer.text} ({session.usage.peak_bytes} bytes at most)", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        if not sys.argv[1:]:  # no camera: three minutes of drawn film
            streams.generate(3, groups=180, level="standard").write(Path(folder) / "drawn.mp4")
        with frames.open(sys.argv[1] if sys.argv[1:] else Path(folder) / "drawn.mp4", fps=2) as source:
            main(source)
            print(f"{source.dropped} frames dropped, {source.losses.lost} losses of the connection")
