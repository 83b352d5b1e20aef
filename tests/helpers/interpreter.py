"""bf16 in Triton's interpreter, which keeps it as the 16 bits of an integer and computes with that integer.

`compute_in_bf16` makes it compute as the hardware does: a product has exact fp32 terms and an fp32 sum, elementwise
arithmetic widens its operands and rounds its result, and a conversion from fp32 rounds to the nearest, ties to even.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widened(bits: np.ndarray) -> np.ndarray:
    """The fp32 values of bf16's bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """The bits of the bf16 nearest to each fp32 value, the even one of two; a NaN stays one."""
    bits = values.astype(np.float32).view(np.uint32)
    nearest = bits + (0x7FFF + (bits >> 16 & 1))
    return (np.where(np.isnan(values), bits | 0x400000, nearest) >> 16).astype(np.uint16)


def is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def wide(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widened(handle.data), tl.float32) if is_bf16(handle) else handle


def compute_in_bf16() -> None:
    """Patch the interpreter of this process."""
    names = ("cast_impl", "unary_op", "binary_op", "create_dot")
    cast, unary, binary, dot = (getattr(InterpreterBuilder, name) for name in names)

    def cast_impl(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
        if dst_type.scalar == tl.bfloat16 and src.dtype.scalar == tl.float32:
            return TensorHandle(rounded(src.data), tl.bfloat16)
        return cast(self, wide(src), dst_type)

    def unary_op(self: Any, arg: TensorHandle, op: Callable[..., Any]) -> TensorHandle:
        found = unary(self, wide(arg), op)
        return TensorHandle(rounded(found.data), tl.bfloat16) if is_bf16(arg) else found

    def binary_op(self: Any, lhs: TensorHandle, rhs: TensorHandle, op: Callable[..., Any]) -> TensorHandle:
        if not is_bf16(lhs):
            return binary(self, lhs, rhs, op)
        result = op(widened(lhs.data), widened(rhs.data))
        return TensorHandle(result, tl.int1) if result.dtype == bool else TensorHandle(rounded(result), tl.bfloat16)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return dot(self, wide(a), wide(b), *rest)

    for patch in (cast_impl, unary_op, binary_op, create_dot):
        setattr(InterpreterBuilder, patch.__name__, patch)
