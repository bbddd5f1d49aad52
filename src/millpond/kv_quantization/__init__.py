"""Keys and values in few bits: the quantizer, and how many tokens a policy keeps in them."""

from millpond.kv_quantization.quantizer import BITS, KVQuantizer
from millpond.kv_quantization.tier import QuantizedTier

__all__ = ["BITS", "KVQuantizer", "QuantizedTier"]
