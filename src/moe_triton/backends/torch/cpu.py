"""The products that are fast for an expert's rows on a CPU, and how many rows they like."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_triton.torch_internals import onednn_has_bf16, onednn_linear

ROW_QUANTUM = 16
HAS_AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")

# oneDNN's fp32 product, which torch otherwise uses only in compiled graphs. On CPUs with AVX-512 that are not Intel's
# it runs at about twice the speed of torch.mm (MKL); without AVX-512 it is the slower one (benchmarks/NOTES.md).
_ONEDNN_LINEAR = onednn_linear() if HAS_AVX512 else None
_COMPILES_PER_SHAPE = torch.backends.mkldnn.is_available() and HAS_AVX512

# Up to how many rows an expert may share one batched product with its neighbours, forward and backward, by dtype; not
# at all in other dtypes. MKL's gives every thread products of its own, which is faster until they are long; backward,
# where more is done to the padding, the gain ends sooner. oneDNN's pays where the weights' bytes rule the time; without
# oneDNN a batched product in bf16 is a naive loop in torch.
_MOST_BATCHED_ROWS: dict[torch.dtype, tuple[int, int]] = {}
if onednn_has_bf16():
    _MOST_BATCHED_ROWS[torch.bfloat16] = (32, 32)
if torch.backends.mkl.is_available() and not HAS_AVX512:
    _MOST_BATCHED_ROWS[torch.float32] = (320, 48)


def most_batched_rows(dtype: torch.dtype, *, backward: bool) -> int:
    """The most rows an expert may have to go through a batched product; 0 where only single ones are fast."""
    if torch.get_num_threads() == 1 and not _COMPILES_PER_SHAPE:
        return 0  # without threads MKL's batches gain nothing that pays for padding
    return _MOST_BATCHED_ROWS.get(dtype, (0, 0))[backward]


def shapes_should_recur() -> bool:
    """Whether oneDNN makes the products, which compiles a kernel for every new shape."""
    return _COMPILES_PER_SHAPE


def padded(num_rows: int, *, batched: bool = False) -> int:
    """The number of rows to compute for `num_rows`, which recurs where shapes should."""
    if not _COMPILES_PER_SHAPE or (num_rows <= ROW_QUANTUM and not batched):
        return num_rows
    return -(-num_rows // ROW_QUANTUM) * ROW_QUANTUM


def product(left_mk: Tensor, right_nk: Tensor, bias_n: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """left @ right.T + bias. With `out` the result is there too; what is returned may be a copy that is in cache."""
    if _ONEDNN_LINEAR is not None and left_mk.dtype == torch.float32 and left_mk.numel() and right_nk.numel():
        y_mn = _ONEDNN_LINEAR(left_mk, right_nk, bias_n, "none", [], "")
        if out is not None:
            out.copy_(y_mn)
        return y_mn
    if bias_n is not None:
        return torch.addmm(bias_n, left_mk, right_nk.T, out=out)
    return torch.mm(left_mk, right_nk.T, out=out)


def batched_product(
    left_Cmk: Tensor, right_Cnk: Tensor, bias_Cn: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """`product` for each of C."""
    y_Cmn = torch.bmm(left_Cmk, right_Cnk.mT, out=out)
    return y_Cmn if bias_Cn is None else y_Cmn.add_(bias_Cn[:, None])
