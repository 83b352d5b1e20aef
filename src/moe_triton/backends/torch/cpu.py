"""The products that are fast for one expert's rows on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

ROW_QUANTUM = 16
HAS_AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")

# oneDNN's fp32 product, which torch otherwise uses only in compiled graphs. On CPUs with AVX-512 that are not Intel's
# it runs at about twice the speed of torch.mm (MKL); without AVX-512 it is the slower one (benchmarks/NOTES.md).
_ONEDNN_LINEAR = (
    torch.ops.mkldnn._linear_pointwise.default
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise") and HAS_AVX512
    else None
)
_COMPILES_PER_SHAPE = torch.backends.mkldnn.is_available() and HAS_AVX512


def padded(num_rows: int) -> int:
    """The number of rows to compute for `num_rows`: oneDNN compiles a kernel per shape, so shapes are made to recur."""
    if num_rows <= ROW_QUANTUM or not _COMPILES_PER_SHAPE:
        return num_rows
    return -(-num_rows // ROW_QUANTUM) * ROW_QUANTUM


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
