"""The picture of a plan: what is stored when.

Time is counted in forward evaluations; a backward takes none. Knows actions; nothing about bytes or tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from millpond.errors import RecomputeError
from millpond.recompute.schedule import Action, Op


@dataclass(frozen=True)
class Stay:
    """A state kept from forward evaluation `since` to `until`.

    `step` is the position of a hidden state, or the step whose internal state it is.
    """

    kind: Literal["hidden", "internal"]
    step: int
    since: int
    until: int


@dataclass(frozen=True)
class Timeline:
    """What a plan stores and runs over time.

    Attributes:
        length: steps T.
        forwards: forward evaluations in all: the end of the time axis.
        forward_pass: forward evaluations until the first backward, when the loss is known.
        stays: every stored state, in the order of storing.
        runs: (since, first step, last step) of every stretch of steps that ran, in order.
    """

    length: int
    forwards: int
    forward_pass: int
    stays: tuple[Stay, ...]
    runs: tuple[tuple[int, int, int], ...]

    def text(self, width: int = 96, height: int = 24) -> str:
        """A drawing in characters: time to the right, steps downwards.

        `/` running, `h` a stored hidden state, `I` a kept internal state, `*` several kinds in one cell.
        """
        columns, rows = min(width, self.forwards), min(height, self.length)
        cells = [[" "] * columns for _ in range(rows)]

        def column(time: int) -> int:
            return min(time * columns // self.forwards, columns - 1)

        def row(step: int) -> int:
            return min(max(step - 1, 0) * rows // self.length, rows - 1)

        for stay in self.stays:
            mark = "I" if stay.kind == "internal" else "h"
            for c in range(column(stay.since), column(max(stay.until - 1, stay.since)) + 1):
                at = cells[row(stay.step)]
                at[c] = mark if at[c] in (" ", mark) else "*"
        for since, first, last in self.runs:
            for step in range(first, last + 1):
                at, c = cells[row(step)], column(since + step - first)
                if at[c] == " ":
                    at[c] = "/"
        margin = len(str(self.length))
        lines = [f"{i * self.length // rows + 1:>{margin}} |{''.join(cells[i]).rstrip()}" for i in range(rows)]
        axis = " " * margin + " +" + "-" * columns
        ticks = f"{'':>{margin}}  0{self.forwards:>{max(columns - 1, 1)}}"
        legend = "down: steps; right: forward evaluations; / runs, h hidden state stored, I internal state kept, * both"
        return "\n".join([*lines, axis, ticks, legend])

    def save_png(self, path: str | Path, title: str = "") -> None:
        """Draw with matplotlib.

        Raises:
            RecomputeError: matplotlib is not installed.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise RecomputeError("drawing a PNG needs matplotlib: pip install 'millpond[plots]'") from error
        figure = Figure(figsize=(11, 5.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for since, first, last in self.runs:
            axes.plot([since, since + last - first + 1], [first - 1, last], color="0.55", linewidth=0.8)
        for kind, colour in (("hidden", "tab:blue"), ("internal", "tab:orange")):
            stays = [stay for stay in self.stays if stay.kind == kind]
            axes.hlines(
                [stay.step for stay in stays],
                [stay.since for stay in stays],
                [stay.until for stay in stays],
                color=colour,
                linewidth=1.6,
                label=f"{kind} state stored",
            )
        axes.axvline(self.forward_pass, color="black", linewidth=0.8, linestyle=":", label="loss known")
        axes.set(xlabel="time (forward evaluations)", ylabel="step", title=title)
        axes.set_xlim(0, self.forwards)
        axes.set_ylim(self.length + 0.5, 0)
        axes.legend(loc="lower right")
        figure.savefig(path, dpi=130)


def draw(length: int, actions: Sequence[Action]) -> Timeline:
    """Follow a schedule and write down when each state comes and goes."""
    time, forward_pass = 0, 0
    since: dict[tuple[Literal["hidden", "internal"], int], int] = {}
    stays: list[Stay] = []
    runs: list[tuple[int, int, int]] = []

    def end(kind: Literal["hidden", "internal"], step: int) -> None:
        stays.append(Stay(kind, step, since.pop((kind, step)), time))

    for action in actions:
        if action.op in (Op.ADVANCE, Op.RUN):
            runs.append((time, action.at + 1, action.to))
            time += action.to - action.at
        if action.op is Op.RUN:
            since["internal", action.to] = time - 1
        elif action.op is Op.STORE:
            since["hidden", action.at] = time
        elif action.op is Op.DROP:
            end("hidden", action.at)
        elif action.op is Op.BACK:
            forward_pass = forward_pass or time
            end("internal", action.to)
    return Timeline(length, time, forward_pass, tuple(sorted(stays, key=lambda stay: stay.since)), tuple(runs))
