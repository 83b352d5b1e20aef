"""What is compiled for quantised projections: products over their codes, and the kernel that decodes them to memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moe_triton_kernels.launch import HOPPER
from moe_triton_kernels.operands import WeightArgument
from moe_triton_kernels.quantized import DECODE_BLOCK, FORMATS, VALUES, ScalesArgument, decode_kernel
from moe_triton_kernels.tools.case import Case
from moe_triton_kernels.tools.product_cases import d_hidden_cases, down_cases, up_cases
from moe_triton_kernels.tools.shipped import Shipped

BLOCKS = {"mxfp4": (1, 32), "nvfp4": (1, 16), "fp8": (128, 128), "int8": (1, 128), "int4": (1, 32)}  # along out, in
OPS = {"up_gated": "_swiglu", "down": "_k", "d_hidden_gated": "_swiglu", "d_rows": "_columns"}


def codes_type(format: str, *, by_k: bool, has_zeros: bool = False) -> WeightArgument:
    """The types of quantised matrices [k, columns], whose codes lie along k or along the columns."""
    value, per_byte, zero = FORMATS[format]
    along = slice(None, None, -1 if by_k else 1)
    scales = ScalesArgument(
        "*fp32" if format in ("fp8", "int4", "int8") else "*u8",
        "*u8" if has_zeros else None,
        "*fp32" if format == "nvfp4" else None,
        "i32",
        *(1, "i32")[:: 1 if by_k else -1],
        VALUES[value].value,
        zero,
        *(1, per_byte)[along],
        *BLOCKS[format][along],
    )
    return WeightArgument(
        data="*u8",
        scales=scales,
        stride_e="i32",
        stride_k=1 if by_k else "i32",
        stride_n="i32" if by_k else 1,
        ALIGNMENT=1,
        UNIT=1,
        K_CONTIGUOUS=by_k,
    )


def over_codes(case: Case, format: str, *, by_k: bool, has_zeros: bool = False) -> Case:
    """The same product by a quantised projection."""
    zeros = "_zeros" if has_zeros else ""
    multiples = ("weight.scales.data", "weight.scales.zeros", "weight.scales.global_scale")
    weight = codes_type(format, by_k=by_k, has_zeros=has_zeros)
    pointers = [name for name, part in zip(multiples, weight.scales, strict=False) if part is not None]
    return replace(
        case,
        name=f"{case.name}_{format}{zeros}",
        signature={**case.signature, "weight": weight, "descriptor": None},
        aligned=[*(case.aligned or ()), *pointers],
    )
