"""Train recurrent models inside an activation budget: memory-efficient backpropagation through time.

    outputs, state = recompute.bptt(step, inputs, state, budget="64MiB")
    plan = recompute.plan(length=1000, budget="64MiB", hidden_bytes=..., internal_bytes=...)

After Gruslys, Munos, Danihelka, Lanctot and Graves, "Memory-Efficient Backpropagation Through Time" (NIPS 2016).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from millpond.errors import RecomputeError
from millpond.recompute.plans import Plan, plan
from millpond.recompute.timeline import Stay, Timeline

if TYPE_CHECKING:
    from millpond.recompute.backprop import bptt
    from millpond.recompute.probe import StepSize, measure

__all__ = ["Plan", "RecomputeError", "Stay", "StepSize", "Timeline", "bptt", "measure", "plan"]

# Loaded on first use: they import torch, and a plan on the command line needs none.
_LATER = {
    "StepSize": "millpond.recompute.probe",
    "bptt": "millpond.recompute.backprop",
    "measure": "millpond.recompute.probe",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'millpond.recompute' has no attribute {name!r}")
