"""Rows with a tail: what belongs to a row travels in its message, as bytes behind its elements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def as_bytes(part: Tensor) -> Tensor:
    """Return the bytes [R, .] uint8 of a part [R, .] of any strides, by row; a view of contiguous rows."""
    return part.contiguous().reshape(-1).view(torch.uint8).view(part.shape[0], part.shape[1] * part.dtype.itemsize)


class Part(NamedTuple):
    """What a part of a tail is for one row: so many elements of a dtype of 4 or 8 bytes."""

    width: int
    dtype: torch.dtype


def tail_of(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the bits of parts [R, .] as elements [R, t] of another dtype, padded to whole ones."""
    words = [_words(part) for part in parts]
    tail = words[0] if len(words) == 1 else torch.cat(words, 1)
    missing = tail.shape[1] % 2 if dtype.itemsize == 8 else 0
    return (F.pad(tail, (0, missing)) if missing else tail).view(dtype)


def _words(part: Tensor) -> Tensor:
    """The bits of a part [R, .] as int32 [R, .]; a view of contiguous rows."""
    if part.dtype == torch.int32:
        return part
    # torch calls any strides of no elements contiguous
    return (part.contiguous() if part.numel() else part.new_empty(part.shape)).view(torch.int32)


def tail_width(parts: Sequence[Part], dtype: torch.dtype) -> int:
    """Return t: how many elements the tail takes."""
    return -(-sum([part.width * part.dtype.itemsize for part in parts]) // dtype.itemsize)


def parts_of(tail: Tensor, parts: Sequence[Part]) -> list[Tensor]:
    """Return the parts [R, .] of a tail [R, t], whose rows have no gaps."""
    bytes_RB, found, start = tail.view(torch.uint8), [], 0
    for width, dtype in parts:
        end = start + width * dtype.itemsize
        # a copy is aligned, as fp64 has to be
        found.append(bytes_RB[:, start:end].clone(memory_format=torch.contiguous_format).view(dtype))
        start = end
    return found
