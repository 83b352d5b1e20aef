"""The values, the memories and the barriers of the Gluon emulator (see `gluon_emulator`), over NumPy arrays."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor


class Race(Exception):
    """A product of what cp.async wrote, with no proxy fence between; more arrivals than a barrier counts; something
    that reaches a CTA after its end."""


class Layout:
    """How a block lies over the two CTAs of a cluster: cga says which dimension is spread, if any."""

    def __init__(self, cga: Sequence[Sequence[int]] | None = None) -> None:
        self.cga = cga or []

    def without(self, dim: int) -> Layout:
        """Of a vector along the other dimensions."""
        return Layout([[*basis[:dim], *basis[dim + 1 :]] for basis in self.cga])

    def share(self, shape: Sequence[int], ctas: int) -> tuple[int, ...]:
        """What one of the CTAs has of a block of this shape, whose last dimensions are the layout's."""
        share = list(shape)
        for basis in self.cga if ctas > 1 else []:
            for dim, step in enumerate(basis, len(shape) - len(basis)):
                share[dim] //= ctas if step else 1
        return tuple(share)


ROWS_APART = Layout([[1, 0]])


class Tile(np.ndarray):
    """A block of values, with the methods of a Triton tensor that the kernels use; over CTAs it is spread by rows."""

    type = SimpleNamespace(layout=ROWS_APART)

    def to(self, dtype: Any) -> Tile:
        return self.astype(dtype)

    def permute(self, *order: int) -> Tile:
        return self.transpose(*order)

    def split(self) -> tuple[Tile, Tile]:
        return self[..., 0], self[..., 1]


class PointerType:
    """What an address is converted to."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype


class Scalar(int):
    """A loaded integer; of an address it makes a pointer into a megabyte of memory."""

    def __sub__(self, other: int) -> Scalar:
        return Scalar(int(self) - other)

    def __floordiv__(self, other: int) -> Scalar:
        return Scalar(int(self) // other)

    def to(self, dtype: Any) -> int | Pointer:
        if not isinstance(dtype, PointerType):
            return int(self)
        return Pointer(np.frombuffer((ctypes.c_byte * 2**20).from_address(self), dtype.dtype))


class Pointer:
    """Into a flat array of global memory; every access is checked."""

    def __init__(self, array: np.ndarray, offsets: Any = 0) -> None:
        self.array, self.offsets = array, offsets
        self.dtype = SimpleNamespace(element_ty=array.dtype.type)

    def __add__(self, offsets: Any) -> Pointer:
        return Pointer(self.array, self.offsets + offsets)

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.array, self.offsets[index])


def load(pointer: Pointer, mask: Any = None, other: float = 0) -> Any:
    if np.ndim(pointer.offsets) == 0:
        return Scalar(pointer.array[pointer.offsets])
    inside = np.broadcast_to(True if mask is None else mask, np.shape(pointer.offsets))
    result = np.full(np.shape(pointer.offsets), other, pointer.array.dtype)
    chosen = np.asarray(pointer.offsets)[inside]
    assert chosen.size == 0 or chosen.min() >= 0
    result[inside] = pointer.array[chosen]
    return result.view(Tile)


def store(pointer: Pointer, value: np.ndarray, mask: np.ndarray) -> None:
    inside = np.broadcast_to(mask, np.shape(value))
    chosen = np.asarray(np.broadcast_to(pointer.offsets, np.shape(value)))[inside]
    assert chosen.size == 0 or chosen.min() >= 0
    pointer.array[chosen] = np.asarray(value)[inside]


class Descriptor:
    """A matrix that TMA loads blocks of; outside of it there are zeros."""

    def __init__(self, matrix: np.ndarray, block: Sequence[int]) -> None:
        self.matrix, self.block = matrix, list(block)

    def read(self, at: Sequence[int], shape: Sequence[int]) -> np.ndarray:
        result = np.zeros(shape, self.matrix.dtype)
        part = self.matrix[tuple(slice(start, start + size) for start, size in zip(at, shape, strict=True))]
        result[tuple(slice(0, size) for size in part.shape)] = part
        return result


def view_of(base: Tensor, shape: Sequence[int], strides: Sequence[int]) -> np.ndarray:
    """A tensor's memory and what lies above it, as a descriptor sees it: the bounds of the tensor are not known."""
    array = base.numpy()
    return np.lib.stride_tricks.as_strided(array, shape, [stride * array.itemsize for stride in strides])


class Shared:
    """Shared memory as a CTA sees it: its content, and when cp.async last wrote each element (0: TMA did).

    copies: both of them in every CTA, where they lie at the same addresses. is_spread: the CTAs have other rows each.
    """

    def __init__(self, copies: Sequence[tuple[np.ndarray, np.ndarray]], cta: int, is_spread: bool) -> None:
        self.copies, self.cta, self.is_spread = copies, cta, is_spread
        self.data, self.written = copies[cta]
        self.shape = self.data.shape

    def view(self, part: Callable[[np.ndarray], np.ndarray]) -> Shared:
        return Shared([(part(data), part(written)) for data, written in self.copies], self.cta, self.is_spread)

    def seen_by(self, cta: int) -> Shared:
        return Shared(self.copies, cta, self.is_spread)

    def index(self, i: int) -> Shared:
        assert 0 <= i < self.shape[0]
        return self.view(lambda array: array[i])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        assert start + length <= self.shape[dim]
        where = (slice(None),) * dim + (slice(start, start + length),)
        return self.view(lambda array: array[where])

    def reshape(self, shape: Sequence[int]) -> Shared:
        return self.view(lambda array: array.reshape(shape))

    def permute(self, order: Sequence[int]) -> Shared:
        return self.view(lambda array: array.transpose(order))


class Barrier:
    """An mbarrier: a phase completes when `count` arrivals were made and all the expected bytes have come."""

    def __init__(self) -> None:
        self.count = self.arrivals = self.bytes = self.phases = 0
        self.fenced = self.completed_fenced = 0  # the latest proxy fence among the arrivals of this phase; of the last

    def init(self, count: int) -> None:
        self.__init__()
        self.count = count

    def arrive(self, count: int, fenced: int = 0) -> None:
        self.arrivals += count
        self.fenced = max(self.fenced, fenced)
        if self.arrivals > self.count:
            raise Race("more arrivals than the barrier counts")
        self.complete()

    def complete(self) -> None:
        if self.arrivals == self.count and self.bytes == 0:
            self.phases += 1
            self.arrivals, self.completed_fenced = 0, self.fenced

    def passed(self, parity: int) -> bool:
        """Whether the phase of this parity is the last one completed; on a fresh barrier that is the odd one."""
        return self.phases % 2 != parity


class Place:
    """A barrier as a CTA names it: the one in its own shared memory, or, where all have one in common, the first's."""

    def __init__(self, barriers: Sequence[Barrier], cta: int, is_common: bool) -> None:
        self.barriers, self.is_common = barriers, is_common
        self.owner = 0 if is_common else cta
        self.barrier, self.is_far = barriers[self.owner], cta != self.owner


class Barriers:
    """So many barriers in every CTA, as one of them sees them."""

    def __init__(self, members: Sequence[Sequence[Barrier]], cta: int, is_common: bool) -> None:
        self.members, self.cta, self.is_common = members, cta, is_common

    def index(self, i: int) -> Place:
        return Place([barriers[i] for barriers in self.members], self.cta, self.is_common)
