"""The CPU path's building blocks: memory on huge pages, and the products that are fast for one expert's rows."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

HUGE = 4 << 20  # bytes; from this size on numpy asks the kernel for huge pages
ALIGNMENT = 2 << 20  # bytes; one huge page, so that no edge of a tensor falls on small ones
ROW_QUANTUM = 16

# oneDNN's fp32 product, which torch otherwise uses only in compiled graphs. On CPUs with AVX-512 that are not Intel's
# it runs at about twice the speed of torch.mm (MKL). None in builds of torch without oneDNN.
_ONEDNN_LINEAR = (
    torch.ops.mkldnn._linear_pointwise.default
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    else None
)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """torch.empty on the CPU, on huge pages where it is large: faulting in 4 KiB pages costs as much as a product."""
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE:
        return torch.empty(shape, dtype=dtype)
    memory = np.empty(size + 2 * ALIGNMENT, dtype=np.uint8)  # what is never touched costs nothing
    start = -memory.ctypes.data % ALIGNMENT
    return torch.from_numpy(memory)[start : start + size].view(dtype).view(shape)


def padded(num_rows: int) -> int:
    """The number of rows to compute for `num_rows`: oneDNN compiles a kernel per shape, so shapes are made to recur."""
    return num_rows if num_rows <= ROW_QUANTUM else -(-num_rows // ROW_QUANTUM) * ROW_QUANTUM


def product(left_mk: Tensor, right_nk: Tensor, bias_n: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """left @ right.T + bias. With `out` the result is there too; what is returned may be a copy that is in cache."""
    if left_mk.dtype == torch.float32 and _ONEDNN_LINEAR is not None:
        y_mn = _ONEDNN_LINEAR(left_mk, right_nk, bias_n, "none", [], "")
        if out is not None:
            out.copy_(y_mn)
        return y_mn
    if bias_n is not None:
        return torch.addmm(bias_n, left_mk, right_nk.T, out=out)
    return torch.mm(left_mk, right_nk.T, out=out)
