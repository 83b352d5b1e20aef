"""bf16 and fp8 in Triton's interpreter, which keeps them as integers, and less time for each launch.

`compute_in_bf16` makes it compute with bf16 as the hardware does: a product has exact fp32 terms and an fp32 sum,
elementwise arithmetic widens its operands and rounds its result, and a conversion from fp32 rounds to the nearest, ties
to even. `convert_fp8` does so for conversions from fp32 to e4m3 and back, of which the interpreter's own are wrong at
ties, where a mantissa overflows, and for NaN; what is too large becomes the largest number, as on an NVIDIA GPU. A
fused multiply-add rounds once, which the interpreter's own does twice.
`spare_time` changes no result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
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


E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()  # the values of all codes


def encoded(values: np.ndarray) -> np.ndarray:
    """The codes of the e4m3 nearest to each fp32 value; the largest one for what is larger, a NaN for a NaN."""
    return torch.tensor(values).clamp(E4M3[0x80 | 0x7E], E4M3[0x7E]).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def convert_fp8() -> None:
    """Patch the interpreter of this process."""
    convert, dot = InterpreterBuilder.create_fp_to_fp, InterpreterBuilder.create_dot

    def decoded(handle: TensorHandle) -> TensorHandle:
        is_code = handle.dtype.scalar == tl.float8e4nv
        return TensorHandle(E4M3[handle.data], tl.float32) if is_code else handle

    def create_fp_to_fp(self: Any, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        types = (src.dtype.scalar, dst_type.scalar)
        if types == (tl.float8e4nv, tl.float32):
            return decoded(src)
        if types == (tl.float32, tl.float8e4nv):
            return TensorHandle(encoded(src.data), tl.float8e4nv)
        return convert(self, src, dst_type, rounding_mode)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return dot(self, decoded(a), decoded(b), *rest)

    def create_fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        with np.errstate(invalid="ignore", over="ignore"):
            total = (x.data.astype(np.float64) * y.data + z.data).astype(z.data.dtype)
        return TensorHandle(total, z.dtype.scalar)

    for patch in (create_fp_to_fp, create_dot, create_fma):
        setattr(InterpreterBuilder, patch.__name__, patch)


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


def spare_time() -> None:
    """Patch the interpreter of this process: it leaves out what it otherwise does again for each launch and value.

    By itself it searches triton.language for the functions to replace in each launch and in each call of a device
    function, makes a table of dtypes for each value, and computes whether integers overflow, which it reports only
    while it debugs: two thirds of a test's time. Results stay as they are.
    """
    search, find_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    dtypes: dict[str, np.dtype] = {}

    @cache
    def replacements() -> list[tuple[Any, str, Any]]:
        scope = search(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        found = [(owner, name, getattr(owner, name)) for owner, name, _ in scope._changes]
        scope.restore()
        return found

    def patch_lang(fn: Any) -> Any:
        scope = interpreter._LangPatchScope()
        owner, name, replacement = replacements()[0]
        if getattr(owner, name) is not replacement:  # a launch: within one they are in place
            for change in replacements():
                scope.set_attr(*change)
        return scope

    def get_np_dtype(dtype: Any) -> np.dtype:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = find_dtype(dtype)
        return dtypes[name]

    def unwrap_shape(shape: Any) -> list[int]:
        shape = shape.value if isinstance(shape, tl.constexpr) else shape
        return [size.value if isinstance(size, tl.constexpr) else size for size in shape]

    interpreter._patch_lang, interpreter._get_np_dtype, tl.core._unwrap_shape = patch_lang, get_np_dtype, unwrap_shape
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    share_types()


def share_types() -> None:
    """Patch triton.language of this process: equal types of blocks share their fields, and the tensors' of one type.

    Equal shapes are then one object, which spares most comparisons of shapes too.
    """
    make_block, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    equal, broadcast = tl.dtype.__eq__, TritonSemantic.broadcast_impl_value
    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}
    shapes: dict[tuple[int, ...], Any] = {}
    results: dict[tuple[int, int], Any] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        if type(self) is not tl.block_type:  # Gluon's, which have more fields
            return make_block(self, element_ty, shape)
        sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
        key = (element_ty.name, getattr(element_ty, "address_space", 0), sizes)
        if key not in blocks:
            make_block(self, element_ty, shape)
            self.shape = shapes.setdefault(sizes, self.shape)
            blocks[key] = self.__dict__
        self.__dict__ = blocks[key]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if "of_tensors" not in type.__dict__:
            make_tensor(self, None, type)
            type.of_tensors = dict(self.__dict__)
        self.__dict__.update(type.of_tensors)
        self.handle = handle

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        if type(lhs.type) is not tl.block_type or type(rhs.type) is not tl.block_type:
            return broadcast(self, lhs, rhs)
        left, right = lhs.type.shape, rhs.type.shape
        if left is right:
            return lhs, rhs
        if len(left) != len(right):
            return broadcast(self, lhs, rhs)
        key = (id(left), id(right))
        if key not in results:  # Triton itself says what fits
            results[key] = broadcast(self, lhs, rhs)[0].type.shape
        return tuple([spread(self, value, results[key]) for value in (lhs, rhs)])

    def spread(semantic: Any, value: Any, shape: Any) -> Any:
        if value.type.shape is shape:
            return value
        handle = semantic.builder.create_broadcast(value.handle, shape.values)
        return semantic.tensor(handle, tl.block_type(value.type.scalar, shape))

    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor
    tl.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    TritonSemantic.broadcast_impl_value = broadcast_impl_value
