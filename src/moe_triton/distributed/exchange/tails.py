"""Rows with a tail: what belongs to a row travels in its message, as bytes behind its elements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def as_bytes(part: Tensor) -> Tensor:
    """Return the bytes [R, .] uint8 of a part [R, .] of any strides, by row; a view of contiguous rows."""
    return part.contiguous().reshape(-1).view(torch.uint8).view(part.shape[0], part.shape[1] * part.dtype.itemsize)


def tail_of(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the bytes of parts [R, .] as elements [R, t] of another dtype, padded to whole ones."""
    bytes_RB = torch.cat([as_bytes(part) for part in parts], dim=1)
    missing = -bytes_RB.shape[1] % dtype.itemsize
    return (F.pad(bytes_RB, (0, missing)) if missing else bytes_RB).view(dtype)


def tail_width(parts: Sequence[Tensor], dtype: torch.dtype) -> int:
    """Return t: how many elements the tail takes."""
    return -(-sum(part.shape[1] * part.dtype.itemsize for part in parts) // dtype.itemsize)


def parts_of(tail: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts [R, .] of a tail [R, t], whose rows have no gaps: they have the widths and dtypes of `like`."""
    bytes_RB, parts, start = tail.view(torch.uint8), [], 0
    for part in like:
        end = start + part.shape[1] * part.dtype.itemsize
        # a copy is aligned, as fp64 has to be
        parts.append(bytes_RB[:, start:end].clone(memory_format=torch.contiguous_format).view(part.dtype))
        start = end
    return parts
