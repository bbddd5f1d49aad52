"""Watch a file inside a memory budget and ask about it: python examples/watch_a_file.py [VIDEO [MODEL]]"""

import sys
import tempfile
from pathlib import Path

import millpond
from millpond import frames
from millpond.eval import streams


def main(video: str | Path, model: str = "minnow") -> None:
    session = millpond.Session.from_pretrained(model, budget="512KiB" if model == "minnow" else "512MiB")
    with frames.open(video, fps=2) as source:
        session.feed(source)
    for question in ("Which object appeared first?", "Which object is there now?"):
        print(question, session.ask(question, max_new_tokens=16).text)
    usage = session.usage
    print(
        f"{usage.frames_seen} frames; {usage.peak_bytes} of {usage.budget_bytes} bytes at most, {usage.full_cache_bytes} uncapped"
    )


if __name__ == "__main__":
    if sys.argv[1:]:
        main(*sys.argv[1:])
    else:
        with tempfile.TemporaryDirectory() as folder:
            film = Path(folder) / "drawn.mp4"
            streams.generate(7, groups=96, level="plain").write(film)
            main(film)
