"""Train recurrent models inside an activation budget: memory-efficient backpropagation through time.

    outputs, state = recompute.bptt(step, inputs, state, budget="64MiB")
    plan = recompute.plan(length=1000, budget="64MiB", hidden_bytes=..., internal_bytes=...)

After Gruslys, Munos, Danihelka, Lanctot and Graves, "Memory-Efficient Backpropagation Through Time" (NIPS 2016).
"""

from millpond.recompute.backprop import bptt
from millpond.recompute.errors import RecomputeError
from millpond.recompute.plans import Plan, plan
from millpond.recompute.probe import StepSize, measure
from millpond.recompute.timeline import Stay, Timeline

__all__ = ["Plan", "RecomputeError", "Stay", "StepSize", "Timeline", "bptt", "measure", "plan"]
