"""CurveStream: frames where the stream of features bends are let in whole, where it runs on they are thinned or left out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cosine_similarity

from millpond.admission.base import Admission, Verdict
from millpond.errors import PolicyError


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Where the stream of features is, where it came from, and how it has bent so far.

    Attributes:
        feature: float32 [hidden], F[t]. step: float32 [hidden], F[t] - F[t-1]; None after the first group.
        count, mean, squares: of the curvatures so far (Welford): their number, mean and sum of squared deviations.
    """

    feature: Tensor
    step: Tensor | None = None
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0


@dataclass(frozen=True)
class CurveStream(Admission):
    """Judge a frame group by the curvature of the features' path at it, against mean and deviation of all before it.

        c[t] = 1 - cos(F[t-1] - F[t-2], F[t] - F[t-1]),    F[t] the mean vision feature of group t

    Clear above mean + k * sigma, dropped below mean - k * sigma, reduced between. Mean and sigma are those of c before t,
    updated online over the whole stream.

    Choices where what was read is silent: a group equal to the one before it has c = 0 (no bend); the first four
    groups are clear (two curvatures make the first sigma), and so is one whose feature is not finite; both bounds are strict,
    so that a stream of even curvature is reduced, never lost.

    Attributes:
        k: deviations between the mean and either bound. The published value was not in what was read; 1 is ours, untuned.
    """

    name: ClassVar[str] = "curvestream"
    source: ClassVar[str] = "Wang et al., CurveStream, 2026 (arXiv 2603.19571): abstract, and notes on the paper"
    state_types: ClassVar[tuple[type, ...]] = (Trajectory,)

    k: float = 1.0

    def __post_init__(self) -> None:
        if not self.k >= 0:
            raise PolicyError(f"curvestream: k must be at least 0, not {self.k!r}")

    def judge(self, feature: Tensor, state: Trajectory | None) -> tuple[Verdict, Trajectory | None]:
        if not bool(feature.isfinite().all()):
            return "clear", state
        if state is None:
            return "clear", Trajectory(feature)
        step = feature - state.feature
        if state.step is None:
            return "clear", Trajectory(feature, step)
        curvature = 1 - float(cosine_similarity(state.step, step, dim=0)) if bool(step.any()) else 0.0
        verdict: Verdict = "reduced"
        sigma = (state.squares / max(1, state.count)) ** 0.5
        if state.count < 2 or curvature > state.mean + self.k * sigma:
            verdict = "clear"
        elif curvature < state.mean - self.k * sigma:
            verdict = "drop"
        count, away = state.count + 1, curvature - state.mean
        mean = state.mean + away / count
        squares = state.squares + away * (curvature - mean)
        return verdict, replace(state, feature=feature, step=step, count=count, mean=mean, squares=squares)

    def state_bytes(self, hidden: int) -> int:
        return 2 * 4 * hidden
