"""Tensor descriptors (TMA) of operands, where the layout allows them.

Triton checks a descriptor when it is made, which takes microseconds: it is made once for each layout, without memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_triton_kernels.launch import BLACKWELL, Config, target_of
from moe_triton_kernels.operands import Layout, PerExpert


def weight_descriptor(
    weight: PerExpert, config: Config, *, size_k: int, size_columns: int, halves: int, block_n: int
) -> TensorDescriptor | None:
    """A weight, per expert [size_k, halves * size_columns], as a descriptor; None where it is read by pointers.

    A descriptor where the configuration asks for it and the layout allows it: a stacked tensor in which k or the
    columns are contiguous, all else in steps of 16 bytes, an expert's in steps of whole matrices. It is [E, halves,
    columns, k] or [E, 1, k, columns], so that what lies past an expert's columns is read as 0 and never as the next
    expert's.
    """
    data = weight.data
    if not config.descriptors or weight.is_table or weight.decoding is not None or data.data_ptr() % 16:
        return None
    architecture = target_of(data.device).architecture
    described = _weight_descriptor(
        weight.layout, data.shape[0], data.dtype, config, architecture, size_k, size_columns, halves, block_n
    )
    return None if described is None else _at(data, described)


@lru_cache(maxsize=1024)
def _weight_descriptor(
    layout: Layout,
    num_experts: int,
    dtype: torch.dtype,
    config: Config,
    architecture: str,
    size_k: int,
    size_columns: int,
    halves: int,
    block_n: int,
) -> TensorDescriptor | None:
    """The descriptor of an aligned stacked tensor of this layout, without memory."""
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
    shape, strides = (num_experts, halves, rows, width), (layout.stride_e, matrix, row_stride, 1)
    return _described(dtype, shape, strides, descriptor_block(config, by_k, halves, block_n))


def _at(data: Tensor, described: TensorDescriptor) -> TensorDescriptor:
    """The descriptor of the aligned memory of a tensor: Triton checks each layout once, which takes microseconds."""
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(described.__dict__, base=data)
    return made


def _described(
    dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], block: Sequence[int]
) -> TensorDescriptor:
    """A descriptor of this layout, without memory."""
    empty = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    return TensorDescriptor(empty, list(shape), list(strides), list(block))


def rows_descriptor(
    rows: Tensor, config: Config, *, block: list[int], size_k: int | None = None
) -> TensorDescriptor | None:
    """Contiguous rows [., size] as a descriptor that brings `block` of them; None where they are read by pointers.

    size_k is the contraction, where it is along a row. A block may reach past the rows that are meant: what it brings
    of rows that exist is theirs, and the rest is 0.
    """
    if not config.descriptors or rows.data_ptr() % 16 or rows.numel() == 0:
        return None
    architecture = target_of(rows.device).architecture
    described = _rows_descriptor(tuple(rows.shape), rows.dtype, config, architecture, tuple(block), size_k)
    return None if described is None else _at(rows, described)


@lru_cache(maxsize=1024)
def _rows_descriptor(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    config: Config,
    architecture: str,
    block: tuple[int, ...],
    size_k: int | None,
) -> TensorDescriptor | None:
    """The descriptor of aligned rows, without memory."""
    if not is_describable(dtype.itemsize, config, architecture, size_k, shape[1]):
        return None
    return _described(dtype, shape, (shape[1], 1), block)


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
