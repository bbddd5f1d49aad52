"""The inner loops of selection, compaction, re-anchoring and low-bit reading: each one function, in torch and compiled.

The `.cpp` files beside this one are compiled once into the user's cache folder, where there is a C++ compiler. A module holds one group
of operations, each with its reference in torch and its kernels; `millpond.ops.dispatch` says which of them runs.
"""

from millpond.ops.attention import add_attention, attention_moments, attention_spread
from millpond.ops.bit_planes import nested_product, nested_rows
from millpond.ops.c_functions import sources, status
from millpond.ops.clustering import cluster_rows
from millpond.ops.compaction import check_selection, move_rows
from millpond.ops.decoding import attend_step
from millpond.ops.dequantization import dequantize
from millpond.ops.dispatch import OPERATIONS
from millpond.ops.few_rows import few_rows_product
from millpond.ops.infinipot_v import infinipot_v_selection
from millpond.ops.merging import distances, fold
from millpond.ops.metadata import write_metadata
from millpond.ops.ranking import best, best_and_protected
from millpond.ops.rerotation import rerotate
from millpond.ops.similarity import distinctiveness
from millpond.ops.width_choice import exceed

__all__ = [
    "OPERATIONS",
    "add_attention",
    "attend_step",
    "attention_moments",
    "attention_spread",
    "best",
    "best_and_protected",
    "check_selection",
    "cluster_rows",
    "dequantize",
    "distances",
    "distinctiveness",
    "exceed",
    "few_rows_product",
    "fold",
    "infinipot_v_selection",
    "move_rows",
    "nested_product",
    "nested_rows",
    "rerotate",
    "sources",
    "status",
    "write_metadata",
]
