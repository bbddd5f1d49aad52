"""Accuracy against memory: policies and budgets on the same generated streams, compressed as a session really does it.

    cells -> trial (one stream through every cell) -> run (resumable, several processes) -> table, chart

Knows sessions and generated streams; nothing about how a policy chooses.
"""

from millpond.eval.accuracy.cell import Cell, read_budget, read_cells
from millpond.eval.accuracy.intervals import Accuracy, wilson
from millpond.eval.accuracy.run import Study, run
from millpond.eval.accuracy.table import summarise

__all__ = ["Accuracy", "Cell", "Study", "read_budget", "read_cells", "run", "summarise", "wilson"]
