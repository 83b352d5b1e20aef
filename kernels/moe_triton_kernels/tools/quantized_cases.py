"""What is compiled for quantised projections: products over their codes, and the kernel that decodes them to memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moe_triton_kernels.activations import GATED
from moe_triton_kernels.heuristics import over_codes
from moe_triton_kernels.launch import HOPPER
from moe_triton_kernels.operands import WeightArgument
from moe_triton_kernels.quantized import DECODE_BLOCK, FORMATS, DecodingArgument, decode_kernel
from moe_triton_kernels.tools.case import Case, pointers_of
from moe_triton_kernels.tools.product_cases import d_hidden_cases, down_cases, up_cases
from moe_triton_kernels.tools.shipped import Shipped

BLOCKS = {"mxfp4": (1, 32), "nvfp4": (1, 16), "fp8": (128, 128), "int8": (1, 128), "int4": (1, 32)}  # along out, in
# (op, rows of its tiles, format, has zero points): every format and op, decode tiles, and those of 32 and of 128 rows
VARIANTS = (
    ("up_gated", 16, "mxfp4", False),
    ("up_gated", 32, "mxfp4", False),
    ("up_gated", 128, "mxfp4", False),
    ("down", 16, "nvfp4", False),
    ("down", 16, "int4", True),
    ("down", 128, "fp8", False),
    ("d_hidden_gated", 64, "int4", False),
    ("d_hidden_gated", 128, "mxfp4", False),
    ("d_rows", 32, "int8", False),
    ("d_rows", 128, "fp8", False),
)


def quantized_cases(arch: str, shipped: Sequence[Shipped]) -> list[Case]:
    """Each of VARIANTS in the first configuration that has as many rows; `decode` in both directions.

    By default two of them on Hopper, and one elsewhere.
    """
    shipped = [replace(entry, config=over_codes(entry.op, entry.config)) for entry in shipped]
    products = [*up_cases(arch, shipped), *down_cases(arch, shipped), *d_hidden_cases(arch, shipped)]
    cases = []
    for op, rows, format, has_zeros in VARIANTS:
        ending = f"_{GATED[0]}" if op.endswith("gated") else "_k" if op == "down" else "_columns"
        found = next(
            case for case in products if case.name.startswith(f"{op}_bf16_{rows}x") and case.name.endswith(ending)
        )
        case = by_codes(found, format, arch, by_k=op in ("up_gated", "down"), has_zeros=has_zeros)
        cases.append(
            replace(case, sample=(op, rows) in (("up_gated", 16), ("d_hidden_gated", 128))[: 1 + (arch in HOPPER)])
        )
    return [*cases, *(decode_case(format) for format in ("mxfp4", "fp8"))]


def decode_case(format: str) -> Case:
    """The kernel of `decode`; fp8 with its codes along the columns."""
    by_k = format != "fp8"
    block_k, block_n = DECODE_BLOCK if by_k else DECODE_BLOCK[::-1]
    weight = codes_type(format, by_k=by_k)
    return Case(
        name=f"decode_{format}",
        fn=decode_kernel,
        signature={
            "out": "*bf16",
            "weight": weight,
            "stride_k": 1 if by_k else "i32",
            "stride_n": "i32" if by_k else 1,
            "size_k": "i32",
            "size_columns": "i32",
        },
        constexprs={"BLOCK_K": block_k, "BLOCK_N": block_n},
        sample=by_k,
    )


def codes_type(format: str, *, by_k: bool, has_zeros: bool = False) -> WeightArgument:
    """The types of quantised matrices [k, columns], whose codes lie along k or along the columns."""
    value, per_word, _ = FORMATS[format]
    block = BLOCKS[format][::-1] if by_k else BLOCKS[format]
    data = "*fp32" if format in ("fp8", "int4", "int8") else "*u8"
    has_global = format == "nvfp4"
    decoding = DecodingArgument(
        data=data,
        zeros="*u8" if has_zeros else data,
        zero="i32",
        global_scale="*fp32" if has_global else data,
        stride_e="i32",
        stride_k=1 if by_k else "i32",
        stride_n="i32" if by_k else 1,
        VALUE=value.value,
        PER_K=per_word if by_k else 1,
        PER_N=1 if by_k else per_word,
        BLOCK_K=block[0],
        BLOCK_N=block[1],
        HAS_ZEROS=has_zeros,
        HAS_GLOBAL=has_global,
    )
    return WeightArgument(
        data="*i32",
        decoding=decoding,
        stride_e="i32",
        stride_k=1 if by_k else "i32",
        stride_n="i32" if by_k else 1,
        ALIGNMENT=4,
        UNIT=1,
        K_CONTIGUOUS=by_k,
        QUANTIZED=True,
    )


def by_codes(case: Case, format: str, arch: str, *, by_k: bool, has_zeros: bool = False) -> Case:
    """The same product by a quantised projection."""
    weight = codes_type(format, by_k=by_k, has_zeros=has_zeros)
    signature = {**case.signature, "weight": weight, "descriptor": None}
    has_rows = signature.get("a_descriptor") is not None
    wants = [want for want in case.wants if want != "tma" or has_rows]
    return replace(
        case,
        name=f"{case.name}_{format}{'_zeros' * has_zeros}",
        signature=signature,
        aligned=sorted({*(case.aligned or ()), *pointers_of({"weight": weight})}),
        wants=list(dict.fromkeys([*wants, "cp_async"] if arch in HOPPER else wants)),  # codes come by pointers
    )
