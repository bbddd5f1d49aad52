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
from millpond.standing import StandingEvent


def main(source: Iterable[frames.Frame], every: float = 60.0) -> None:
    session = millpond.Session.from_pretrained("minnow", budget="256KiB")

    def tell(event: StandingEvent) -> None:
        told = f"{event.text}, {event.kind}" if event.error is None else f"no answer: {event.error}"
        print(f"[{event.at_seconds:.1f} s] {told} ({session.usage.peak_bytes} bytes at most)", flush=True)

    session.every(every, "Which object is there now?", max_new_tokens=8, on_answer=tell)
    session.feed(source)  # ends with the source, or with Ctrl-C


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        if not sys.argv[1:]:  # no camera: three minutes of drawn film
            streams.generate(3, groups=180, level="standard").write(Path(folder) / "drawn.mp4")
        with frames.open(sys.argv[1] if sys.argv[1:] else Path(folder) / "drawn.mp4", fps=2) as source:
            main(source)
            print(f"{source.dropped} frames dropped, {source.losses.lost} losses of the connection")
