"""The operands of the grouped products: how a kernel is given matrices, and how its main loop reads them.

A kernel's arguments, made on the host: `PerExpert` is a parameter of every expert, one stacked tensor or a table of
addresses; beside it may be a tensor descriptor (see `descriptors`), an argument of its own: the launcher makes
descriptors of arguments only, not of what is within a tuple.

In a kernel an operand is a record: `Rows` is the left side of a product, in order or gathered, `Columns` the right one.
Their `start_*` gives a cursor, a block of pointers or a coordinate, to which a step of the main loop adds; their
`load_*` loads the block at a cursor. By pointers, sizes and strides that are multiples of 16 bytes are copied to shared
memory asynchronously, 16 bytes at a time; others work, but slowly: their copies go through registers one element at a
time. By TMA one thread asks for a whole block, so that the loop computes no addresses and keeps none in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.address_tables import address_table
from moe_triton_kernels.launch import Config, constant

if TYPE_CHECKING:
    from moe_triton_kernels.lora import Adapter
    from moe_triton_kernels.quantized import Decoding

ExpertParameter = Tensor | Sequence[Tensor]


def unit_of(itemsize: int, *sizes: int) -> int:
    """Elements in 16 bytes, where they divide every size; 1 where they do not, or where Triton sees that 16 does."""
    unit, together = 16 // itemsize, 0
    for size in sizes:
        together |= size  # a power of two divides it where it divides every size
    return unit if together % 16 and not together % unit else 1


class WeightArgument(NamedTuple):
    """The experts' matrices [k, columns] among a kernel's arguments.

    data          pointer to the stacked tensor, or to the int64 addresses of the experts' own
    decoding      what makes numbers of `data` where that is codes (a DecodingArgument of `quantized`), else 0
    stride_e      elements from one expert to the next (0 for addresses)
    ALIGNMENT     bytes that divide every address
    UNIT          elements that divide stride_e and the stride between rows or columns (see `unit_of`)
    K_CONTIGUOUS  stride_k is 1
    QUANTIZED     `data` is codes
    """

    data: Any
    decoding: Any
    stride_e: Any
    stride_k: Any
    stride_n: Any
    ALIGNMENT: Any
    UNIT: Any
    K_CONTIGUOUS: Any
    QUANTIZED: Any


class BiasArgument(NamedTuple):
    """The experts' biases [columns] among a kernel's arguments; the fields are those of `WeightArgument`."""

    data: Any
    stride_e: Any
    stride_n: Any
    ALIGNMENT: Any
    UNIT: Any


class SizesArgument(NamedTuple):
    """The sizes of a product [rows, k] by [k, columns] among a kernel's arguments.

    UNIT    elements that divide both (see `unit_of`)
    EVEN_K  BLOCK_K divides k
    """

    k: Any
    columns: Any
    UNIT: Any
    EVEN_K: Any


def sizes_argument(rows: Tensor, size_k: int, size_columns: int, config: Config) -> SizesArgument:
    """The sizes of a product of these rows, or of rows like these."""
    return _sizes_argument(rows.element_size(), size_k, size_columns, config.block_k)


@lru_cache(maxsize=4096)
def _sizes_argument(itemsize: int, size_k: int, size_columns: int, block_k: int) -> SizesArgument:
    unit = unit_of(itemsize, size_k, size_columns)
    return SizesArgument(size_k, size_columns, constant(unit), constant(size_k % block_k == 0))


@dataclass(frozen=True, eq=False)
class Layout:
    """How a parameter of every expert lies in memory. One record for equal ones, from `layout_of`: looked up as itself.

    stride_e   elements from one expert to the next (0 for a table)
    strides    the strides of one expert's tensor, in elements
    alignment  bytes that divide every address of a table
    itemsize   bytes of an element
    """

    stride_e: int
    strides: tuple[int, ...]
    alignment: int
    itemsize: int

    @cached_property
    def transposed(self) -> Layout:
        return layout_of(self.stride_e, self.strides[::-1], self.alignment, self.itemsize)

    @cached_property
    def of_weight(self) -> tuple[Any, ...]:
        """The fields of a WeightArgument from stride_e to K_CONTIGUOUS."""
        stride_k, stride_n = self.strides
        step = stride_n if stride_k == 1 else stride_k  # it may be 1 too, of a matrix with a single row or column
        return self.stride_e, stride_k, stride_n, *self._constants(step), constant(stride_k == 1)

    @cached_property
    def of_bias(self) -> tuple[Any, ...]:
        """The fields of a BiasArgument but its data."""
        (stride_n,) = self.strides
        return self.stride_e, stride_n, *self._constants()

    def _constants(self, *steps: int) -> tuple[tl.constexpr, tl.constexpr]:
        """ALIGNMENT and UNIT, which divides these strides and that from one expert to the next."""
        return constant(self.alignment), constant(unit_of(self.itemsize, self.stride_e, *steps))


layout_of = lru_cache(maxsize=4096)(Layout)


class PerExpert(NamedTuple):
    """A parameter of every expert as a kernel reads it: one stacked tensor, or a table of addresses.

    data       the stacked tensor [E, ...], or an int64 [E] tensor of addresses on the device
    layout     how the experts' tensors lie in memory
    held       the tensors that the addresses point to, kept alive with this record
    adapter    what is added to a product by these matrices, or None
    decoding   what makes numbers of the tensor where that is codes, or None
    scales     where these are codes of 8 bits, their scales: [E, blocks of k, blocks of columns] (see `fp8`)
    addresses  of a table, on the host
    """

    data: Tensor
    layout: Layout
    held: tuple[Tensor, ...]
    adapter: Adapter | None = None
    scales: Tensor | None = None
    decoding: Decoding | None = None
    addresses: tuple[int, ...] = ()

    @property
    def strides(self) -> tuple[int, ...]:
        return self.layout.strides

    @property
    def is_table(self) -> bool:
        return self.data.dtype == torch.int64

    def transposed(self) -> PerExpert:
        """The same matrices with their two dimensions swapped; nothing moves."""
        decoding = None if self.decoding is None else self.decoding.transposed()
        return PerExpert(self.data, self.layout.transposed, self.held, self.adapter, None, decoding, self.addresses)

    def weight(self) -> WeightArgument:
        decoding, kind = (NOTHING, NUMBERS) if self.decoding is None else (self.decoding.argument(), CODES)
        return tuple.__new__(WeightArgument, (self.data, decoding, *self.layout.of_weight, kind))

    def bias(self) -> BiasArgument:
        return BiasArgument(self.data, *self.layout.of_bias)


NOTHING, NUMBERS, CODES = constant(0), constant(False), constant(True)  # of a WeightArgument: decoding, QUANTIZED


def stacked(parameter: Any, layout: Layout) -> PerExpert:
    """A single tensor [E, ...] that is known to lie so."""
    return tuple.__new__(PerExpert, (parameter, layout, (parameter,), None, None, None, ()))


def per_expert(parameter: ExpertParameter, *, transposed: bool = False) -> PerExpert:
    """Make a stacked parameter [E, ...] or a sequence of E equal-shaped tensors readable by a kernel.

    transposed: as matrices with their two dimensions swapped. Nothing is copied, except the members of a sequence whose
    strides differ, which are made contiguous.
    """
    if isinstance(parameter, Tensor):
        stride_e, *strides = parameter.stride()
        itemsize = parameter.element_size()
        layout = layout_of(stride_e, tuple(strides), itemsize, itemsize)
        return stacked(parameter, layout.transposed if transposed else layout)
    held = tuple(parameter)
    if any(tensor.stride() != held[0].stride() for tensor in held):
        held = tuple(tensor.contiguous() for tensor in held)
    addresses = tuple(tensor.data_ptr() for tensor in held)
    aligned = all(address % 16 == 0 for address in addresses)
    itemsize = held[0].element_size()
    layout = layout_of(0, held[0].stride(), 16 if aligned else itemsize, itemsize)
    table = address_table(addresses, held[0].device)
    return PerExpert(table, layout.transposed if transposed else layout, held, addresses=addresses)


@triton.jit
def in_units(size, UNIT: tl.constexpr):
    """`size`, a multiple of UNIT, in a form that shows it to the compiler."""
    if UNIT == 1:
        return size
    else:
        return size // UNIT * UNIT


@triton.jit
def expert_base(parameter, expert, DTYPE: tl.constexpr):
    """Pointer to one expert's tensor; `parameter` is a WeightArgument or a BiasArgument."""
    if parameter.data.dtype.element_ty == tl.int64:
        base = tl.load(parameter.data + expert).to(tl.pointer_type(DTYPE))
        return tl.multiple_of(base, parameter.ALIGNMENT)
    else:
        return parameter.data + expert.to(tl.int64) * in_units(parameter.stride_e, parameter.UNIT)


@triton.jit
def add_bias(value, bias, base, columns, column_mask):
    """value [rows, columns] + one expert's bias [columns], at `base`; value itself where there is no bias."""
    if bias is None:
        return value
    else:
        return value + tl.load(base + columns * bias.stride_n, mask=column_mask, other=0.0).to(tl.float32)[None, :]


class Rows(NamedTuple):
    """The left operand [BLOCK_M, k] of a product, contiguous in k, in a kernel.

    pointers    [BLOCK_M] to the rows, in any order; each must be readable: a row that does not count points at some
                row that exists
    descriptor  of the matrix, or None; the rows are then those from `first` on, and the pointers are not used
    """

    pointers: Any
    descriptor: Any
    first: Any


class Columns(NamedTuple):
    """The right operand [k, HALVES * WIDTH] of a product in a kernel: columns of one expert's matrix.

    With HALVES 1 the matrix is [k, size], and its columns are WIDTH from `first` on. With HALVES 2 it is [k, 2 * size],
    and they are taken of both halves, side by side. Columns past `size` are 0.

    weight      the WeightArgument
    descriptor  that of `descriptors.weight_descriptor`, or None
    """

    weight: Any
    descriptor: Any
    expert: Any
    first: Any
    size: Any
    HALVES: Any
    WIDTH: Any


@triton.jit
def start_rows(rows, BLOCK_K: tl.constexpr):
    """The cursor of `load_rows` at k = 0; a step of the contraction adds 1 to it."""
    if rows.descriptor is not None:
        return tl.full([], 0, tl.int32)
    else:
        return rows.pointers[:, None] + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def load_rows(rows, cursor, inside, EVEN_K: tl.constexpr):
    """[BLOCK_M, BLOCK_K] at the cursor; 0 where k is not `inside` [BLOCK_K]. EVEN_K: all of it is."""
    if rows.descriptor is not None:
        return rows.descriptor.load([rows.first, cursor])
    elif EVEN_K:
        return tl.load(cursor)
    else:
        return tl.load(cursor, mask=inside[None, :], other=0.0)


@triton.jit
def number_columns(columns, BY: tl.constexpr = 1):
    """The columns' numbers in the expert's matrix, and which of them count.

    BY: of blocks of so many columns instead. A block does not reach from one half into the other.
    """
    WIDTH: tl.constexpr = columns.WIDTH // BY if columns.WIDTH > BY else 1
    wide = tl.arange(0, columns.HALVES * WIDTH)
    first, size = columns.first // BY, tl.cdiv(columns.size, BY)
    if columns.HALVES == 1:
        numbers = first + wide
        return numbers, numbers < size
    else:
        inner = first + wide % WIDTH
        return wide // WIDTH * size + inner, inner < size


@triton.jit
def start_columns(columns, numbers, DTYPE: tl.constexpr, BLOCK_K: tl.constexpr):
    """The cursor of `load_columns` at k = 0, and what BLOCK_K steps of the contraction add to it."""
    if columns.descriptor is not None:
        return tl.full([], 0, tl.int32), BLOCK_K
    else:  # no name for columns.weight: Triton makes numbers of the constants in a tuple that is assigned
        if columns.weight.K_CONTIGUOUS:
            stride_k, stride_n = columns.weight.stride_k, in_units(columns.weight.stride_n, columns.weight.UNIT)
        else:
            stride_k, stride_n = in_units(columns.weight.stride_k, columns.weight.UNIT), columns.weight.stride_n
        first = expert_base(columns.weight, columns.expert, DTYPE) + numbers.to(tl.int64) * stride_n
        k = tl.arange(0, BLOCK_K).to(tl.int64)
        return first[None, :] + k[:, None] * stride_k, tl.full([], BLOCK_K, tl.int64) * stride_k


@triton.jit
def load_columns(columns, cursor, inside, column_mask, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_K, HALVES * WIDTH] at the cursor; 0 where k is not `inside` [BLOCK_K]. EVEN_K: all of it is."""
    if columns.descriptor is not None:
        if columns.weight.K_CONTIGUOUS:
            block = columns.descriptor.load([columns.expert, 0, columns.first, cursor])
            return tl.trans(block.reshape(columns.HALVES * columns.WIDTH, BLOCK_K))
        else:
            return columns.descriptor.load([columns.expert, 0, cursor, columns.first]).reshape(BLOCK_K, columns.WIDTH)
    elif EVEN_K:
        return tl.load(cursor, mask=column_mask[None, :], other=0.0)
    else:
        return tl.load(cursor, mask=inside[:, None] & column_mask[None, :], other=0.0)
