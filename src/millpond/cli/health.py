"""What `millpond doctor` finds out: versions, devices, codecs, models, and which extras are not installed.

It compiles and runs what it can only tell by running. Each finding is a `Check`; nothing is printed here.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from millpond.cli.errors import one_line
from millpond.ops.build import compiled

_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg2video", "mpeg4", "mjpeg", "prores")
_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts", "avi", "hls", "rtsp", "video4linux2,v4l2")


@dataclass(frozen=True)
class Check:
    """One line of `millpond doctor`. `good` is None for what is merely told, False for what is missing."""

    what: str
    found: str
    good: bool | None = None
    needed: bool = False


def checks() -> list[Check]:
    """Everything there is to say, most basic first."""
    return [*_versions(), *_devices(), *_decoders(), *_models(), _kernels(), _watching(), *_extras()]


def _versions() -> list[Check]:
    found = [
        Check("python", f"{platform.python_version()} on {platform.platform()}"),
        Check("millpond", version("millpond")),
    ]
    for wanted in map(Requirement, requires("millpond") or []):
        if wanted.marker is not None:
            continue  # of an extra
        name, bounds = wanted.name, wanted.specifier
        try:
            number = version(name)
        except PackageNotFoundError:
            found.append(Check(name, f"pip install {name}", False, needed=True))
            continue
        fits = bounds.contains(number, prereleases=True)
        told = number if fits else f"{number}, but it must be {bounds}: pip install '{name}{bounds}'"
        found.append(Check(name, told, fits, needed=True))
    return found


def _devices() -> list[Check]:
    import torch

    found = [Check("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads", True)]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(index)
        halves = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
        found.append(Check(f"cuda:{index}", f"{card.name}, {card.total_memory / 2**30:.0f} GiB, {halves}", True))
    if len(found) == 1:
        found.append(Check("cuda", "no device; models run on the CPU", False))
    flash = importlib.util.find_spec("flash_attn") is not None
    found.append(Check("attention", "sdpa, eager" + (", flash_attention_2" if flash else ""), True))
    return found


def _decoders() -> list[Check]:
    try:
        import av
    except ImportError as error:
        return [Check("video", f"PyAV does not load: {error}", False, needed=True)]
    there = [name for name in _CODECS if name in av.codecs_available]
    lacking = [name for name in _CODECS if name not in av.codecs_available]
    formats = {part for name in _FORMATS if name in av.formats_available for part in name.split(",")}
    formats |= {name for names in _FORMATS for name in names.split(",") if name in av.formats_available}
    libraries = ", ".join(
        f"{name} {'.'.join(map(str, number))}" for name, number in sorted(av.library_versions.items())
    )
    cameras = sorted(str(path) for path in Path("/dev").glob("video*"))
    return [
        Check("ffmpeg", libraries),
        Check("decoders", ", ".join(there) or "none", bool(there), needed=True),
        *([Check("decoders", ", ".join(lacking), False)] if lacking else []),
        Check("video files", ", ".join(sorted(formats & {"mp4", "mov", "matroska", "webm", "mpegts", "avi"})), True),
        Check("network", ", ".join(sorted(formats & {"rtsp", "hls"})) or "none", "rtsp" in formats),
        Check("cameras", ", ".join(cameras) or "no /dev/video*", bool(cameras)),
    ]


def _models() -> list[Check]:
    from millpond import models, policies

    return [
        Check("model families", ", ".join(row.model_type for row in models.supported()), True, needed=True),
        Check("policies", ", ".join(policy.name for policy in policies.available()), True, needed=True),
    ]


def _kernels() -> Check:
    """Whether the compiled inner loops are built and give what torch gives; without them everything works, slower."""
    import torch

    from millpond import ops

    what = "compiled kernels"
    sources = ops.sources()
    for source in sources:
        library, why = compiled(source)
        if library is None:
            return Check(what, f"{source.name} {why}; torch does its work, several times slower", False)
    best = ops.best(torch.tensor([[1.0, 3.0, 2.0]]), 2)
    if best.tolist() != [[1, 2]]:
        return Check(what, "they are built, but give wrong numbers: set MILLPOND_NATIVE=0", False, needed=True)
    return Check(what, f"they run ({len(sources)} libraries)", True)


def _watching() -> Check:
    """A film of eight frames, written, decoded and asked about with the model that ships."""
    what = "watching"
    try:
        import numpy as np

        from millpond import Session, frames
        from millpond.cli.watch import silence

        silence()
        with tempfile.TemporaryDirectory(prefix="millpond-") as folder:
            path = Path(folder) / "film.mp4"
            pixels = np.zeros((64, 64, 3), np.uint8)
            frames.write_mp4(path, ((index / 2, pixels) for index in range(8)), fps=2)
            session = Session.from_pretrained("minnow", budget="2MiB", device="cpu")
            with frames.open(path) as source:
                seen = session.feed(source)
            session.ask("How many objects appeared?", max_new_tokens=2)
    except Exception as error:  # whatever it is, the user is to be told
        return Check(what, f"it does not work: {type(error).__name__}: {one_line(error)}", False, needed=True)
    return Check(what, f"{seen} frames of a written MP4, decoded and asked about", seen == 8, needed=True)


def _extras() -> list[Check]:
    """The optional parts of millpond, from its own metadata."""
    wanted: dict[str, list[str]] = {}
    for one in map(Requirement, requires("millpond") or []):
        if one.name != "millpond":
            for extra in re.findall(r"extra == \"(.+?)\"", str(one.marker)):
                wanted.setdefault(extra, []).append(one.name)
    found = []
    for extra, packages in sorted(wanted.items()):
        lacking = [package for package in packages if not _installed(package)]
        hint = f"pip install 'millpond[{extra}]' for {', '.join(lacking)}" if lacking else ", ".join(packages)
        found.append(Check(f"extra {extra}", hint, not lacking))
    return found


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False
