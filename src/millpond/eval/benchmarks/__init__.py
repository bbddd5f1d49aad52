"""Public benchmarks, from the files as they are published: questions at their times, answers on disk, the benchmark's own score.

    a benchmark's file -> base (videos and questions) -> watch (one pass over a video) -> run (resumable, sharded) -> report

One file for each published format; knows nothing about how a policy chooses.
"""

from millpond.eval.benchmarks.base import Annotations, Answered, Benchmark, Query, Score, Video
from millpond.eval.benchmarks.registry import BENCHMARKS, get

__all__ = ["BENCHMARKS", "Annotations", "Answered", "Benchmark", "Query", "Score", "Video", "get"]
