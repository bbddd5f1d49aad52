"""A large matrix times a few vectors, which is over when the matrix has been read: what a packed decoding step's linear layers are.

BLAS libraries are made for one vector or for many; for eight, the float32 product of MKL takes several times as long as for one.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from millpond.ops.c_functions import CFunction, contiguous
from millpond.ops.dispatch import DECLINED, Declined, operation

_C_PRODUCT = CFunction("few_rows.cpp", "few_rows", "pnpnnnnp")
FEW = 16
"""More vectors than this are a library's matter."""
LARGE = 2**20
"""Numbers of a matrix from which on a product waits for memory."""


@operation
def few_rows_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias: x [..., K], weight [N, K], bias [N] or None -> [..., N]."""
    return linear(x, weight, bias)


@few_rows_product.kernel("cpu")
def _few_rows_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | Declined:
    run, (rows, columns) = _C_PRODUCT.of(), weight.shape
    count = x.numel() // columns
    if run is None or not 1 < count <= FEW or weight.numel() < LARGE or rows % 2:
        return DECLINED
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or not contiguous(x, weight):
        return DECLINED
    out = torch.empty(*x.shape[:-1], rows)
    threads = torch.get_num_threads()
    piece = partial(_rows, run, (x.data_ptr(), count, weight.data_ptr(), rows, columns), out.data_ptr())
    bounds = list(pairwise(rows // 2 * part // threads * 2 for part in range(threads + 1)))
    if threads == 1:
        piece(bounds[0])
    else:
        list(_pool(threads).map(piece, bounds))
    return out if bias is None else out.add_(bias)


def _rows(run: Any, product: tuple[int, ...], out: int, bounds: tuple[int, int]) -> None:
    run(*product, *bounds, out)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="millpond-product")
