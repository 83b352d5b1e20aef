"""Argument checks. Each error names the argument, what it got and what it wanted; none of them costs a host sync."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
MASKS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
THREADS_PER_CORE = 16


def check_tensor(
    name: str,
    value: object,
    *,
    shape: Sequence[int | str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """`value` as a Tensor; a str in `shape` stands for any size and is only used to say what was wanted."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a Tensor")
    if shape is not None:
        found = value.shape
        if found != shape and not _fits(found, shape):
            wanted = ", ".join(str(w) for w in shape)
            raise ValueError(f"{name}: got shape {list(found)}, wanted [{wanted}]")
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: got layout {value.layout}, wanted {torch.strided}")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name}: got dtype {value.dtype}, wanted {' or '.join(str(d) for d in dtypes)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: got device {value.device}, wanted {device}")
    return value


def _fits(shape: Sequence[int], wanted: Sequence[int | str]) -> bool:
    if len(shape) != len(wanted):
        return False
    for size, want in zip(shape, wanted, strict=True):  # noqa: SIM110 -- all() takes twice as long
        if size != want and type(want) is not str:
            return False
    return True


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(allowed)}")


def check_int(name: str, value: object, *, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {value!r}, wanted an int")
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}: got {value}, wanted {wanted}")


def check_threads(name: str, value: object) -> None:
    """At least 1, and at most `THREADS_PER_CORE` on each core: starting many more ends the process."""
    check_int(name, value, low=1)
    check_int(name, value, low=1, high=THREADS_PER_CORE * (os.cpu_count() or 1))


def check_number(name: str, value: object, *, above: float | None = None, low: float | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {value!r}, wanted a number")
    # Not math.isfinite: torch.compile cannot trace it on a symbolic float, and an int may be beyond every float.
    is_finite = -sys.float_info.max <= value <= sys.float_info.max
    if not is_finite or (above is not None and value <= above) or (low is not None and value < low):
        bound = f"number > {above}" if above is not None else "finite number" if low is None else f"number >= {low}"
        raise ValueError(f"{name}: got {value}, wanted a {bound}")
