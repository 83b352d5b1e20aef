"""Integer weights as GPTQ and AWQ save them, brought into the layout of `QuantizedWeight`.

Both pack eight codes of four bits (four of eight) into an int32 and store a layer as [in, out], one layer per expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_triton.checks import check_choice, check_tensor
from moe_triton.quantization import formats
from moe_triton.quantization.weight import QuantizedWeight

# AWQ interleaves the eight columns of an int32 in this order, for a fast conversion on GPUs.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def from_gptq(
    qweight: Sequence[Tensor],
    qzeros: Sequence[Tensor],
    scales: Sequence[Tensor],
    *,
    bits: int = 4,
    g_idx: Sequence[Tensor] | None = None,
    version: int = 1,
) -> QuantizedWeight:
    """Take GPTQ's layers of E experts.

    Args:
        qweight: int32 [in * bits / 32, out] each, the first row of every eight in the lowest bits.
        qzeros: int32 [in / group, out * bits / 32] each.
        scales: [in / group, out] each, fp16 or another float dtype.
        bits: 4 or 8.
        g_idx: int32 [in] each, the group of every row. Only rows in order are taken (desc_act=False).
        version: of the format; 1 stores zero points minus one, 2 as they are.

    Raises ValueError for rows that are not in order, and for shapes that do not fit together.
    """
    _check(qweight, qzeros, scales, bits)
    if version not in (1, 2):
        raise ValueError(f"version: got {version}, wanted 1 or 2")
    group = qweight[0].shape[0] * 32 // bits // scales[0].shape[0]
    for expert, rows in enumerate(g_idx or ()):
        if not torch.equal(rows.long(), torch.arange(len(rows), device=rows.device) // group):
            raise ValueError(f"g_idx: got reordered rows for expert {expert} (desc_act=True), wanted rows in order")
    codes = [_unpacked(packed.T, bits) for packed in qweight]  # [out, in]
    zeros = [_unpacked(packed, bits).T + (version == 1) for packed in qzeros]  # [out, in / group]
    return _integers(codes, zeros, scales, bits)


def from_awq(qweight: Sequence[Tensor], qzeros: Sequence[Tensor], scales: Sequence[Tensor]) -> QuantizedWeight:
    """Take AWQ's layers of E experts (version "gemm", four bits).

    Args:
        qweight: int32 [in, out / 8] each. qzeros: int32 [in / group, out / 8] each. scales: [in / group, out] each.

    Raises ValueError for shapes that do not fit together.
    """
    _check(qweight, qzeros, scales, 4)
    back = [AWQ_ORDER.index(column) for column in range(8)]

    def in_order(packed: Tensor) -> Tensor:
        return _unpacked(packed, 4).unflatten(1, (-1, 8))[..., back].flatten(1)

    codes = [in_order(packed).T for packed in qweight]
    zeros = [in_order(packed).T for packed in qzeros]
    return _integers(codes, zeros, scales, 4)


def _check(qweight: Sequence[Tensor], qzeros: Sequence[Tensor], scales: Sequence[Tensor], bits: int) -> None:
    check_choice("bits", str(bits), ("4", "8"))
    if not len(qweight) == len(qzeros) == len(scales) or not len(qweight):
        got = f"{len(qweight)} layers, {len(qzeros)} qzeros and {len(scales)} scales"
        raise ValueError(f"qweight: got {got}, wanted E of each")
    for name, given in (("qweight", qweight), ("qzeros", qzeros)):
        for packed in given:
            check_tensor(name, packed, shape=("rows", "columns"), dtypes=(torch.int32,))
    for layer in scales:
        check_tensor("scales", layer, shape=("in / group", "out"), dtypes=formats.FLOAT_SCALES)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """The codes [rows, columns * 32 / bits] uint8 of int32 [rows, columns], the lowest bits first."""
    shifts = torch.arange(0, 32, bits, device=packed.device, dtype=torch.int32)
    return (packed[..., None] >> shifts & (1 << bits) - 1).flatten(1).to(torch.uint8)


def _integers(codes: Sequence[Tensor], zeros: Sequence[Tensor], scales: Sequence[Tensor], bits: int) -> QuantizedWeight:
    stacked = torch.stack(list(codes))
    return QuantizedWeight(
        format=f"int{bits}",
        codes=formats.pack(stacked) if bits == 4 else stacked.contiguous(),
        scales=torch.stack([given.T for given in scales]),
        zeros=torch.stack(list(zeros)).contiguous(),
    )
