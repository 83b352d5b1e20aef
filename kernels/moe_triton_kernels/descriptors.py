"""Tensor descriptors (TMA) of operands, where the layout allows them.

Triton checks a descriptor when it is made, which takes microseconds: it is made once for each layout, without memory.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_triton_kernels.launch import BLACKWELL, Config, target_of
from moe_triton_kernels.operands import PerExpert


def describe_weight(
    weight: PerExpert, config: Config, *, size_k: int, size_columns: int, halves: int, block_n: int
) -> TensorDescriptor | None:
    """A weight, per expert [size_k, halves * size_columns], as a descriptor without memory for `at`.

    None where it is read by pointers.

    A descriptor where the configuration asks for it and the layout allows it: a stacked tensor in which k or the
    columns are contiguous, all else in steps of 16 bytes, an expert's in steps of whole matrices. It is [E, halves,
    columns, k] or [E, 1, k, columns], so that what lies past an expert's columns is read as 0 and never as the next
    expert's.
    """
    data, layout = weight.data, weight.layout
    if not config.descriptors or weight.is_table or weight.decoding is not None:
        return None
    architecture = target_of(data.device).architecture
    stride_k, stride_n = layout.strides
    by_k = stride_k == 1
    row_stride = stride_n if by_k else stride_k
    rows, width = (size_columns, size_k) if by_k else (size_k, size_columns)
    matrix = rows * row_stride  # a driver may want every stride to be a multiple of the next one
    if (
        not (by_k or (stride_n == 1 and halves == 1))
        or not is_describable(layout.itemsize, config, architecture, size_k, layout.stride_e, row_stride)
        or matrix == 0
        or row_stride < width
        or layout.stride_e % matrix != 0
        or layout.stride_e < halves * matrix
    ):
        return None
    shape, strides = (data.shape[0], halves, rows, width), (layout.stride_e, matrix, row_stride, 1)
    return _described(data.dtype, shape, strides, tuple(descriptor_block(config, by_k, halves, block_n)))


def at(data: Tensor, described: TensorDescriptor | None) -> TensorDescriptor | None:
    """The descriptor of a tensor's memory; None where it is not aligned, or not described."""
    if described is None or data.data_ptr() % 16:
        return None
    made = object.__new__(TensorDescriptor)
    made.__dict__ = fields = described.__dict__.copy()
    fields["base"] = data
    return made


@lru_cache(maxsize=1024)
def _described(
    dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]
) -> TensorDescriptor:
    """A descriptor of this layout, without memory; Triton checks each once."""
    empty = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    return TensorDescriptor(empty, list(shape), list(strides), list(block))


def describe_rows(
    rows: Tensor, config: Config, *, block: tuple[int, int], size_k: int | None = None
) -> TensorDescriptor | None:
    """Contiguous rows [., size] as a descriptor that brings `block` of them, without memory for `at`.

    None where they are read by pointers.

    size_k is the contraction, where it is along a row. A block may reach past the rows that are meant: what it brings
    of rows that exist is theirs, and the rest is 0.
    """
    if not config.descriptors or rows.numel() == 0:
        return None
    architecture = target_of(rows.device).architecture
    if not is_describable(rows.element_size(), config, architecture, size_k, rows.shape[1]):
        return None
    return _described(rows.dtype, tuple(rows.shape), (rows.shape[1], 1), block)


def rows_descriptor(
    rows: Tensor, config: Config, *, block: tuple[int, int], size_k: int | None = None
) -> TensorDescriptor | None:
    """The same at the rows' memory."""
    return at(rows, describe_rows(rows, config, block=block, size_k=size_k))


def is_describable(itemsize: int, config: Config, architecture: str, size_k: int | None, *steps: int) -> bool:
    """Whether an aligned tensor steps at multiples of 16 bytes, and its last block is right on this device.

    On Blackwell, products of a descriptor's block that reaches past the contraction are wrong (triton-lang/triton issue
    10927).
    """
    is_ragged = size_k is not None and size_k % config.block_k != 0
    return not any(step * itemsize % 16 for step in steps) and not (is_ragged and architecture in BLACKWELL)


def descriptor_block(config: Config, by_k: bool, halves: int, block_n: int) -> list[int]:
    """What one load of a weight's descriptor brings."""
    return [1, halves, block_n, config.block_k] if by_k else [1, 1, config.block_k, block_n]
