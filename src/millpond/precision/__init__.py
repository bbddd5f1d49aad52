"""Weights that fit: one stored model, its precision chosen per layer and per decoding step.

    model = millpond.precision.load("folder", memory="90MiB", target_bits=4.0)
    model.set_target_bits(3.5)

After Kwon et al., "DP-LLM: Runtime Model Adaptation with Dynamic Layer-wise Precision Assignment" (NeurIPS 2025), on the nested weights of
Park et al., "Any-Precision LLM" (ICML 2024).
"""

from millpond.precision.calibrate import calibrate
from millpond.precision.loading import load
from millpond.precision.perplexity import perplexity
from millpond.precision.quantize import quantize
from millpond.precision.sensitivity import samples_of

__all__ = ["calibrate", "load", "perplexity", "quantize", "samples_of"]
