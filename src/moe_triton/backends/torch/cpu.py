"""The products that are fast for an expert's rows on a CPU, and how many rows they like."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_triton.torch_internals import onednn_has_bf16, onednn_linear


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuPolicy:
    """Which products to use on a processor, and which blocks of rows suit them (measured in benchmarks/NOTES.md).

    shapes_recur        whether a product of a new shape costs the compilation of a kernel
    linear              by dtype, oneDNN's product where it is faster than torch.mm
    most_batched_rows   by dtype, up to how many rows (forward, backward) an expert may share one batched product with
                        its neighbours; not at all in other dtypes
    row_quantum         of what number the rows of a product are a multiple where shapes should recur
    shared_block_rows   the most rows of a block whose experts have products of their own
    batched_block_rows  the fewest and the most rows of a block with one batched product
    batched_overhead, alone_per_row, alone_overhead
                        MKL's cost of m rows, in rows of a batched product: m + batched_overhead in one, and
                        alone_per_row * m + alone_overhead in a product alone
    num_threads         None for torch's at the time of the call
    """

    shapes_recur: bool
    linear: Mapping[torch.dtype, Callable[..., Tensor]] = field(default_factory=dict)
    most_batched_rows: Mapping[torch.dtype, tuple[int, int]] = field(default_factory=dict)
    row_quantum: int = 16
    shared_block_rows: int = 256
    batched_block_rows: tuple[int, int] = (64, 1280)
    batched_overhead: int = 24
    alone_per_row: float = 1.1
    alone_overhead: int = 36
    num_threads: int | None = None

    @property
    def threads(self) -> int:
        return torch.get_num_threads() if self.num_threads is None else self.num_threads

    def most_batched(self, dtype: torch.dtype, *, backward: bool) -> int:
        """Return the most rows of an expert that goes through a batched product; 0 where only single ones are fast."""
        if self.threads == 1 and not self.shapes_recur:
            return 0  # without threads MKL's batches gain nothing that pays for padding
        return self.most_batched_rows.get(dtype, (0, 0))[backward]

    def padded(self, num_rows: int, *, batched: bool = False) -> int:
        """Return the number of rows to compute for `num_rows`, which recurs where shapes should."""
        if not self.shapes_recur or (num_rows <= self.row_quantum and not batched):
            return num_rows
        return -(-num_rows // self.row_quantum) * self.row_quantum

    def product(
        self, left_mk: Tensor, right_nk: Tensor, bias_n: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Compute left @ right.T + bias; with `out` it is there too, and what is returned may be a copy in cache."""
        linear = self.linear.get(left_mk.dtype)
        if linear is not None and left_mk.numel() and right_nk.numel():
            y_mn = linear(left_mk, right_nk, bias_n, "none", [], "")
            if out is not None:
                out.copy_(y_mn)
            return y_mn
        if bias_n is not None:
            return torch.addmm(bias_n, left_mk, right_nk.T, out=out)
        return torch.mm(left_mk, right_nk.T, out=out)


@functools.cache
def this_cpu() -> CpuPolicy:
    """Return the policy for the processor that this runs on.

    oneDNN's fp32 product, which torch otherwise uses only in compiled graphs, runs at about twice the speed of torch.mm
    (MKL) on CPUs with AVX-512 that are not Intel's; without AVX-512 it is the slower one. MKL's batched product gives
    every thread products of its own, which is faster until they are long; backward, where more is done to the padding,
    the gain ends sooner. oneDNN's pays where the weights' bytes rule the time; without oneDNN a batched product in bf16
    is a naive loop in torch.
    """
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    has_onednn = torch.backends.mkldnn.is_available()
    linear: dict[torch.dtype, Callable[..., Tensor]] = {}
    most_batched_rows: dict[torch.dtype, tuple[int, int]] = {}
    if has_avx512 and (product := onednn_linear()) is not None:
        linear[torch.float32] = product
    if onednn_has_bf16():
        most_batched_rows[torch.bfloat16] = (32, 32)
    if torch.backends.mkl.is_available() and not has_avx512:
        most_batched_rows[torch.float32] = (320, 48)
    return CpuPolicy(shapes_recur=has_onednn and has_avx512, linear=linear, most_batched_rows=most_batched_rows)


def batched_product(
    left_Cmk: Tensor, right_Cnk: Tensor, bias_Cn: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Compute left @ right.T + bias for each of C."""
    y_Cmn = torch.bmm(left_Cmk, right_Cnk.mT, out=out)
    return y_Cmn if bias_Cn is None else y_Cmn.add_(bias_Cn[:, None])
