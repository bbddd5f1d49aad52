"""What `millpond doctor` finds out: versions, devices, codecs, models, and which extras are not installed.

Only looks; each finding is a `Check`. Knows nothing about printing.
"""

from __future__ import annotations

import importlib.util
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from millpond.cli.inspect import Check

__all__ = ["checks"]

_PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "numpy", "pillow", "av", "typer", "rich", "tqdm")
_CODECS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg2video", "mpeg4", "mjpeg", "prores")
_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts", "avi", "hls", "rtsp", "video4linux2,v4l2")


def checks() -> list[Check]:
    """Everything there is to say, most basic first."""
    return [
        *_versions(),
        *_devices(),
        *_decoders(),
        *_models(),
        *_extras(),
    ]


def _versions() -> list[Check]:
    found = [
        Check("python", f"{platform.python_version()} on {platform.platform()}"),
        Check("millpond", version("millpond")),
    ]
    for package in _PACKAGES:
        try:
            found.append(Check(package, version(package), True, needed=True))
        except PackageNotFoundError:
            found.append(Check(package, f"pip install {package}", False, needed=True))
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
    from millpond import families, policies

    return [
        Check("model families", ", ".join(row.model_type for row in families.supported()), True, needed=True),
        Check("policies", ", ".join(policy.name for policy in policies.available()), True, needed=True),
    ]


def _extras() -> list[Check]:
    """The optional parts of millpond, from its own metadata."""
    wanted: dict[str, list[str]] = {}
    for line in requires("millpond") or []:
        match = re.match(r"\s*([A-Za-z0-9._-]+)[^;]*;.*extra\s*==\s*['\"]([^'\"]+)['\"]", line)
        if match and match.group(1) != "millpond":
            wanted.setdefault(match.group(2), []).append(match.group(1))
    found = []
    for extra, packages in sorted(wanted.items()):
        lacking = [package for package in packages if not _installed(package)]
        hint = f"pip install 'millpond[{extra}]' for {', '.join(lacking)}" if lacking else ", ".join(packages)
        found.append(Check(f"extra {extra}", hint, not lacking))
    return found


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
