"""What is compiled for fp8: the products of codes at their configurations, and the kernels that make the codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import triton.language as tl

from moe_triton_kernels.activations import GATED_CASES, UNGATED_CASES
from moe_triton_kernels.d_hidden import d_hidden_kernel
from moe_triton_kernels.d_weight import d_bias_kernel
from moe_triton_kernels.down import down_kernel
from moe_triton_kernels.fp8 import (
    ColumnsArgument,
    RowsArgument,
    ScalesArgument,
    WrittenArgument,
    fp8_supported,
    makes_codes,
)
from moe_triton_kernels.fp8_d_weight import fp8_d_weight_kernel, tile_offsets_kernel
from moe_triton_kernels.heuristics import hidden_beside_adapter
from moe_triton_kernels.launch import BLACKWELL, HOPPER
from moe_triton_kernels.mxfp8 import BLOCK_K as MX_BLOCK_K
from moe_triton_kernels.mxfp8 import BLOCK_ROWS as MX_BLOCK_ROWS
from moe_triton_kernels.mxfp8 import mxfp8_rows_kernel, quantize_mx_kernel
from moe_triton_kernels.operands import WeightArgument
from moe_triton_kernels.quantize import (
    BLOCK_COLUMNS,
    BLOCK_ROWS,
    quantize_columns_kernel,
    quantize_rows_kernel,
    quantize_weight_kernel,
)
from moe_triton_kernels.tools.case import Case, pointers_of
from moe_triton_kernels.tools.lora_cases import RANKS, with_adapter
from moe_triton_kernels.tools.product_cases import (
    TILES,
    bias_type,
    only_of_down,
    product_case,
    rows_type,
    sizes_type,
    weight_types,
)
from moe_triton_kernels.tools.shipped import CODES, Shipped, shipped_configs
from moe_triton_kernels.up import up_kernel

STORED = "*bf16"  # the rows' dtype
ROWS = RowsArgument(codes="*fp8e4nv", scales="*fp32", width="i32")
COLUMNS = ColumnsArgument(*ROWS, sums=None)
SUMMED = COLUMNS._replace(sums="*fp32")


def fp8_cases(arch: str) -> list[Case]:
    """Every configuration of a product of codes, and the kernels that make codes."""
    if not fp8_supported(arch):
        return []
    entries = shipped_configs(arch, CODES)
    gated = next(entry for entry in entries if entry.op == "up_gated")
    cases = [fp8_case(entry, arch) for entry in entries]
    hidden = next(entry for entry in entries if entry.op == "d_hidden_gated")
    cases += [fp8_case(gated, arch, is_even=False)]
    cases += [fp8_case(entry, arch, is_concatenated=False) for entry in (gated, hidden)]
    if makes_codes(arch, by_rows=False):
        cases.append(fp8_case(hidden, arch, has_bias=True))
    if arch in BLACKWELL:
        cases.append(mxfp8_case(next(entry for entry in entries if entry.op == "d_rows"), arch))
        cases += [quantize_mx_case(by_k) for by_k in (True, False)]
    return [*cases, *fp8_adapter_cases(entries, arch), *quantize_cases()]


def fp8_adapter_cases(entries: Sequence[Shipped], arch: str) -> Iterator[Case]:
    """up and d_hidden beside an adapter of each rank; d_hidden then writes numbers, which adapters read."""
    for entry in entries:
        if not entry.op.startswith(("up", "d_hidden")):
            continue
        is_hidden = entry.op.startswith("d_hidden")
        beside = replace(entry, config=hidden_beside_adapter(entry.config)) if is_hidden else entry
        for is_concatenated in (True, False) if entry.op.endswith("_gated") else (True,):
            plain = fp8_case(beside, arch, is_concatenated=is_concatenated, only_numbers=True)
            yield from (with_adapter(plain, rank) for rank in (RANKS if arch in HOPPER else (16,)))


def mxfp8_case(entry: Shipped, arch: str) -> Case:
    plain = replace(entry, op="mxfp8_rows", config=replace(entry.config, descriptors=False, num_stages=3))
    signature: dict[str, Any] = dict.fromkeys(("rows", "weight"), "*fp8e4nv") | {"out": STORED, "tiles": TILES}
    signature |= dict.fromkeys(("row_scales", "weight_scales"), "*u8")
    return product_case(mxfp8_rows_kernel, plain, arch, variant="e8m0", signature=signature, sample=True)


def quantize_mx_case(by_k: bool) -> Case:
    """Of rows that lie along k, and of a transpose, both in bf16."""
    strides = {"stride_r": "i32", "stride_k": 1} if by_k else {"stride_r": 1, "stride_k": "i32"}
    sizes = dict.fromkeys(("num_rows", "size_k", "stride_m"), "i32") | strides
    signature = {"x": STORED, "codes": "*fp8e4nv", "scales": "*u8", **sizes}
    return Case(
        name=f"quantize_mx_{'rows' if by_k else 'columns'}",
        fn=quantize_mx_kernel,
        signature=signature,
        constexprs={"BLOCK_R": MX_BLOCK_ROWS, "BLOCK_K": MX_BLOCK_K},
        aligned=[*pointers_of(signature), "size_k", "stride_m", "stride_r" if by_k else "stride_k"],
        sample=by_k,
    )


def fp8_case(
    entry: Shipped,
    arch: str,
    *,
    is_even: bool = True,
    is_concatenated: bool = True,
    has_bias: bool = False,
    only_numbers: bool = False,
) -> Case:
    """A product of codes; `is_even`: 128 divides the columns. Large blocks of gated experts are in the sample.

    has_bias: d_hidden makes the sums for a bias's gradient. only_numbers: it makes no codes.
    """
    variant = "bias" if has_bias else "uneven" if not is_even else "even" if is_concatenated else "pairs"
    options: dict[str, Any] = {"variant": variant, "sample": entry.op not in ("up", "d_hidden") and is_even}
    if entry.op == "d_weight":
        return product_case(fp8_d_weight_kernel, entry, arch, signature=gradient_types(entry), **options)
    scales = ScalesArgument(
        rows="*fp32", weight="*fp32", stride_e="i32", stride_k="i32", stride_n=1, EVEN=is_even, DTYPE=tl.bfloat16
    )
    is_gated = entry.op.endswith("_gated")
    halves = 2 if entry.op == "up_gated" and is_concatenated else 1
    block_n = entry.config.block_n * (2 if entry.op == "up_gated" and not is_concatenated else 1)
    signature: dict[str, Any] = {"source": "*i32", "tiles": TILES, "sizes": sizes_type(is_even=True), "scales": scales}
    signature |= weight_types(entry, addresses=False, by_k=True, halves=halves, block_n=block_n) | {"adapter": None}
    if entry.op in ("down", "d_rows"):
        block = [entry.config.block_m, entry.config.block_k]
        signature |= {"a": "*fp8e4nv", "a_descriptor": rows_type(entry, block), "out": STORED, **only_of_down(entry.op)}
        signature["bias"] = bias_type(STORED[1:]) if entry.op == "down" else None
        return product_case(down_kernel, entry, arch, signature=signature, **options)
    options |= {"TOP_K": 8, "ACTIVATION": (GATED_CASES if is_gated else UNGATED_CASES)[0]}
    options["CONCATENATED"] = is_concatenated
    if entry.op.startswith("up"):
        signature |= {"x": "*fp8e4nv", "a": None, "a_codes": ROWS, "h": STORED, "bias": None}
        return product_case(up_kernel, entry, arch, signature=signature, **options)
    signature |= {"grad_out": "*fp8e4nv", "h": STORED}
    signature |= dict.fromkeys(("router_weights", "shares"), "*fp32")
    by_rows, by_columns = (
        not only_numbers
        and makes_codes(arch, by_rows=by_rows, pairs=not is_concatenated, sums=has_bias, gated=is_gated)
        for by_rows in (True, False)
    )
    written = WrittenArgument(None, None, COLUMNS) if by_columns else WrittenArgument(STORED, None, None)
    signature["weighted_a"] = written
    written = WrittenArgument(None, ROWS, written.columns) if by_rows else written._replace(numbers=STORED)
    signature["grad_h"] = written._replace(columns=SUMMED) if has_bias else written
    return product_case(d_hidden_kernel, entry, arch, signature=signature, **options)


def gradient_types(entry: Shipped) -> dict[str, Any]:
    config = entry.config
    return {
        **dict.fromkeys(("left", "right"), "*fp8e4nv"),
        **dict.fromkeys(("left_scales", "right_scales", "partials"), "*fp32"),
        **dict.fromkeys(("pieces", "state"), "*i32"),
        "left_descriptor": rows_type(entry, [config.block_m, config.block_k]),
        "right_descriptor": rows_type(entry, [config.block_n, config.block_k]),
        "out": STORED,
    }


def quantize_cases() -> Iterator[Case]:
    """Of rows in bf16 and of weights in fp32, with sizes that are multiples of 16."""
    codes, scales = "*fp8e4nv", "*fp32"
    weight = WeightArgument(
        data="*fp32",
        decoding=0,
        stride_e="i32",
        stride_k=1,
        stride_n="i32",
        ALIGNMENT=16,
        UNIT=1,
        K_CONTIGUOUS=True,
        QUANTIZED=False,
    )
    columns = {"x": STORED, "source": "*i32", "columns_out": COLUMNS, "tiles": TILES, "size": "i32"}
    signatures: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
        "quantize_rows": (
            quantize_rows_kernel,
            {"x": STORED, "out": ROWS, "num_rows": "i32", "size": "i32"},
            {"BLOCK_R": BLOCK_ROWS},
        ),
        "quantize_columns": (
            quantize_columns_kernel,
            columns | {"position": None, "router_weights": None, "rows_out": None},
            {"TOP_K": 8, "CHOICES": 8, "BLOCK_C": BLOCK_COLUMNS},
        ),
        "quantize_both": (
            quantize_columns_kernel,
            columns | {"position": "*i32", "router_weights": "*fp32", "columns_out": SUMMED, "rows_out": ROWS},
            {"TOP_K": 8, "CHOICES": 8, "BLOCK_C": 128},
        ),
        "quantize_weight": (
            quantize_weight_kernel,
            {"weight": weight, "forward": codes, "backward": codes, "scales": scales}
            | dict.fromkeys(("size_k", "size_columns"), "i32"),
            {"DTYPE": tl.float32},
        ),
        "fp8_d_bias_rows": (  # and of dO
            d_bias_kernel,
            {"values": "*fp32", "router_weights": None, "source": "*i32", "out": STORED, "partials": "*fp32"}
            | {"pieces": "*i32", "state": "*i32", "size": "i32"},
            {"TOP_K": 8, "BLOCK_R": 32, "BLOCK_C": 128},
        ),
        "tile_offsets": (
            tile_offsets_kernel,
            {"offsets": "*i32", "tile_offsets": "*i32", "num_experts": "i32"},
            {"BLOCK_E": 128},
        ),
    }
    for name, (fn, signature, constants) in signatures.items():
        sizes: list[str] = [size for size in ("size", "size_k", "size_columns") if size in signature]
        sizes += [
            f"{name}.width"
            for name in ("out", "columns_out", "rows_out")
            if isinstance(signature.get(name), RowsArgument | ColumnsArgument)
        ]
        yield Case(
            name=name,
            fn=fn,
            signature=signature,
            constexprs=constants,
            num_warps=8 if name in ("quantize_weight", "quantize_both") else 4,
            aligned=[
                *pointers_of(signature),
                *sizes,
                *(["weight.stride_e", "weight.stride_n"] * ("weight" in signature)),
            ],
        )
