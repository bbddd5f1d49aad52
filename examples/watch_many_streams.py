"""Watch several films at once inside one number of bytes: python examples/watch_many_streams.py [VIDEO ...]"""

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import millpond
from millpond import frames
from millpond.eval import streams


def main(*videos: str | Path, model: str = "minnow") -> None:
    # Room for two at a time: the others are in their files meanwhile.
    with millpond.Engine(model, stream_memory="1152KiB", queue_memory="128KiB", share="fixed") as engine:

        def watch(video: str | Path) -> str:
            session = engine.open(str(video), budget="512KiB")
            with frames.open(video, fps=2) as source:
                session.feed(source)
            return f"{Path(video).name}: {session.ask('Which object is there now?', max_new_tokens=16)}"

        with ThreadPoolExecutor(2) as threads:
            for line in threads.map(watch, videos):
                print(line)
        # The first ones come back from their files, and know what they have seen.
        for session in engine:
            print(Path(session.name).name, session.ask("Which object appeared first?", max_new_tokens=16).text)
        usage = engine.usage
        print(f"{usage.sessions} films; {usage.held_bytes} of {usage.total_bytes} bytes, {usage.wakings} times back")


if __name__ == "__main__":
    if sys.argv[1:]:
        main(*sys.argv[1:])
    else:
        with tempfile.TemporaryDirectory() as folder:
            films = [Path(folder) / f"drawn-{seed}.mp4" for seed in range(4)]
            for seed, film in enumerate(films):
                streams.generate(seed, groups=48, level="plain").write(film)
            main(*films)
