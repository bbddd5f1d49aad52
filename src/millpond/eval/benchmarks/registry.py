"""Benchmarks by name."""

from __future__ import annotations

from millpond.errors import MillpondError
from millpond.eval.benchmarks.base import Benchmark
from millpond.eval.benchmarks.ego_schema import EgoSchema
from millpond.eval.benchmarks.long_video_bench import LongVideoBench
from millpond.eval.benchmarks.mlvu import MLVU
from millpond.eval.benchmarks.ovo_bench import OVOBench
from millpond.eval.benchmarks.rvs import RVSEgo, RVSMovie
from millpond.eval.benchmarks.streaming_bench import StreamingBench
from millpond.eval.benchmarks.video_mme import VideoMME

_KINDS: tuple[type[Benchmark], ...] = (
    MLVU,
    VideoMME,
    LongVideoBench,
    EgoSchema,
    OVOBench,
    StreamingBench,
    RVSEgo,
    RVSMovie,
)
BENCHMARKS: dict[str, Benchmark] = {kind.name: kind() for kind in _KINDS}


def get(name: str) -> Benchmark:
    """The benchmark of this name.

    Raises:
        MillpondError: there is none; lists those that there are.
    """
    if name not in BENCHMARKS:
        raise MillpondError(f"no benchmark is called {name!r}; there are: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
