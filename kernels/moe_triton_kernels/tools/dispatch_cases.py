"""What is compiled of the gate, address tables, routing, permutation, tiles, row pieces and combine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from moe_triton_kernels import (
    address_tables,
    combine,
    gate,
    permutation,
    routing,
    routing_backward,
    row_pieces,
    small_dispatch,
    small_route,
    tiles,
    topk_options,
)
from moe_triton_kernels.tools.case import Case


def gate_cases(arch: str) -> list[Case]:
    """Qwen3-30B's: its gradient of the hidden states, and the other two products where torch cannot make them."""
    types = {
        "values": "*fp32", "parts": "*bf16", "num_elements": "i32", "step": "fp32", "row_stride": "i32",
        "place_stride": "i32", "a": "*bf16", "b": "*bf16", "size_m": "i32", "size_k": "i32", "a_stride_m": "i32",
        "a_stride_k": "i32", "b_stride_k": "i32", "b_stride_n": "i32",
    }  # fmt: skip
    split = {"COLUMNS": 128, "ORDER": (0, 1, 0), "PLACES": 3, "BLOCK": gate.SPLIT_BLOCK}
    cases = [Case(name="gate_split_E128", fn=gate.split_kernel, signature=types, constexprs=split)]
    # name, out, addend, size_n, constant strides, aligned strides
    for name, out, addend, size_n, ones, aligned in (
        ("d_hidden", "*bf16", "*bf16", 2048, ("a_stride_k", "b_stride_n"), ("a_stride_m", "b_stride_k")),
        ("forward", "*fp32", None, 128, ("a_stride_k", "b_stride_k"), ("a_stride_m", "b_stride_n")),
        ("d_weight", "*fp32", None, 2048, ("a_stride_m", "b_stride_n"), ("a_stride_k", "b_stride_k")),
    ):
        constants = {
            "SIZE_N": size_n,
            "EVEN_K": name != "d_weight",
            **gate.blocks(size_n, arch),
            **dict.fromkeys(ones, 1),
        }
        cases.append(
            Case(
                name=f"gate_{name}_E128",
                fn=gate.product_kernel,
                signature=types | {"out": out, "addend": addend},
                constexprs=constants if addend else constants | {"addend": None},
                num_stages=gate.stages(arch),
                aligned=("a", "b", "out", *(("addend",) if addend else ()), *aligned),
                sample=name == "d_hidden",
            )
        )
    return cases


def address_cases() -> list[Case]:
    signature = {"table": "*i64", "start": "i32", "size": "i32", **dict.fromkeys(address_tables.ARGUMENTS, "i64")}
    return [Case(name="address_table", fn=address_tables.address_kernel, signature=signature, num_warps=1)]


def combine_cases() -> list[Case]:
    types = {"position": "*i32", "num_tokens": "i32", "row_stride": "i32"}
    return [
        Case(
            name=f"combine_{dtype}_d{hidden}_K{top_k}",
            fn=combine.combine_kernel,
            signature=types | {"rows": f"*{dtype}", "out": f"*{dtype}"},
            constexprs={"HIDDEN": hidden, "TOP_K": top_k, "BLOCK_T": combine.BLOCK_T, "BLOCK_D": combine.BLOCK_D},
            aligned=("rows", "position", "out", "row_stride"),
            sample=dtype == "bf16",
        )
        for dtype, hidden, top_k in (("bf16", 2048, 8), ("fp32", 768, 2), ("fp16", 7168, 16))
    ]


def permutation_cases() -> Iterator[Case]:
    types = {
        "experts": "*i32", "order": "*i64", "table": "*i32", "totals": "*i32", "kept": "*i32", "offsets": "*i32",
        "source": "*i32", "position": "*i32", "group_slots": "i32", "num_slots": "i32", "num_rows": "i32",
        "chunks": "i32", "blocks": "i32", "capacity": "i32",
    }  # fmt: skip
    scan = {"BLOCK_R": permutation.SCAN_ROWS, "BLOCK_C": permutation.SCAN_CHUNKS}
    yield Case(name="permutation_scan", fn=permutation.scan_kernel, signature=types, constexprs=scan)
    for num_experts, top_k in ((8, 2), (128, 8), (1024, 8)):
        sizes = {"NUM_EXPERTS": num_experts, "BLOCK": permutation.BLOCK}
        sizes["BLOCK_E"] = permutation.block_experts(num_experts)
        queue = {**sizes, "TOP_K": top_k, "BY_CHOICE": True, "order": None}
        for name, constants in (("count", queue), ("keep", queue), ("place", sizes)):
            yield Case(
                name=f"permutation_{name}_E{num_experts}",
                fn=getattr(permutation, f"{name}_kernel"),
                signature=types,
                constexprs=constants,
                sample=num_experts == 128,
            )
    by_key = {"NUM_EXPERTS": 128, "BLOCK": permutation.BLOCK, "BLOCK_E": 128, "TOP_K": 8, "BY_CHOICE": False}
    yield Case(name="permutation_keep_by_key", fn=permutation.keep_kernel, signature=types, constexprs=by_key)


FEW_ROWS = small_dispatch.FewRows(*["*i32"] * 5)


def small_dispatch_cases() -> list[Case]:
    sizes = {"SIZES": tiles.BLOCK_SIZES, "BLOCK": small_dispatch.BLOCK, "CHUNK": small_dispatch.CHUNK}
    return [
        Case(
            name=f"small_dispatch_E{num_experts}",
            fn=small_dispatch.small_dispatch_kernel,
            signature={"experts": "*i32", "counts": "*i32", "rows": FEW_ROWS, "num_slots": "i32"},
            constexprs=sizes | {"NUM_EXPERTS": num_experts, "BLOCK_E": permutation.block_experts(num_experts)},
            num_warps=small_dispatch.NUM_WARPS,
            sample=num_experts == 128,
        )
        for num_experts in (8, 128, 1024)
    ]


def routing_cases() -> Iterator[Case]:
    types: dict[str, Any] = {
        "bias": "*fp32", "noise": "*fp32", "token_mask": "*i1", "given": "*i32", "experts": "*i32", "weights": "*fp32",
        "partials": routing.PartialSums("*i32", "*fp32", "*fp32"), "num_tokens": "i32", "sequence_length": "i32",
        "scale": "fp32", "grad_weights": "*fp32", "grad_score_sums": "*fp32", "grad_z_sum": "*fp32",
        "counts": "*i32", "score_sums": "*fp32", "z_sums": "*fp32", "num_partials": "i32",
    }  # fmt: skip
    sums = {"NUM_EXPERTS": 128, "BLOCK_P": routing.SUM_PROGRAMS, "BLOCK_E": routing.SUM_EXPERTS}
    yield Case(
        name="topk_sums", fn=routing.sum_partials_kernel, signature=types, constexprs=sums, num_warps=routing.SUM_WARPS
    )
    # name, experts, choices, dtype, score, groups, top groups; the one with groups has bias, noise, mask and given ids
    for name, num_experts, top_k, dtype, score, num_groups, top_groups in (
        ("mixtral", 8, 2, "fp32", "softmax", 1, 1),
        ("qwen3", 128, 8, "bf16", "softmax", 1, 1),
        ("qwen3_fp32", 128, 8, "fp32", "softmax", 1, 1),
        ("gpt_oss", 32, 4, "bf16", "topk_softmax", 1, 1),
        ("deepseek_v3", 256, 8, "fp32", "sigmoid", 8, 4),
        ("deepseek_v4", 256, 6, "bf16", "sqrt_softplus", 1, 1),
        ("experts_1024", 1024, 16, "fp32", "softmax", 1, 1),
    ):
        router = topk_options.TopK(top_k, score, True, 1.0, num_groups, top_groups, "top2_sum")
        signature = types | {
            "logits": f"*{dtype}",
            "grad_logits": f"*{dtype}",
            "RULE": topk_options.rule_of(num_experts, router),
            "LIMIT": topk_options.limit_of(router),
            "LANES": topk_options.lanes_of(num_experts, top_k, num_groups),
        }
        if num_groups == 1:
            signature |= {"bias": None, "noise": None, "token_mask": None, "given": None}
        backward = signature | {"LANES": topk_options.lanes_of(num_experts, top_k)}
        options: dict[str, Any] = {"num_warps": topk_options.NUM_WARPS, "sample": name in ("qwen3", "deepseek_v3")}
        packed = {"PACKED": dtype != "fp32"}
        topk = Case(name=f"topk_{name}", fn=routing.topk_kernel, signature=signature, constexprs=packed, **options)
        yield topk
        few = signature | {"LANES": topk_options.lanes_of(num_experts, top_k, num_groups, topk_options.FEW_WARPS)}
        launch: dict[str, Any] = {"num_warps": topk_options.FEW_WARPS, "maxnreg": topk_options.FEW_REGISTERS}
        yield replace(topk, name=f"topk_few_{name}", signature=few, **launch)
        kernel = routing_backward.topk_backward_kernel
        yield Case(name=f"topk_backward_{name}", fn=kernel, signature=backward, **options)


def small_route_cases() -> Iterator[Case]:
    """The choices of `routing_cases`, with their rows placed in the same launch."""
    for case in routing_cases():
        if case.fn is routing.topk_kernel:
            places = small_route.place_constants(case.signature["RULE"].NUM_EXPERTS, case.num_warps)
            yield replace(
                case,
                name=case.name.replace("topk", "small_route"),
                fn=small_route.small_route_kernel,
                signature={**case.signature, "rows": FEW_ROWS},
                constexprs={**case.constexprs, **places},
                maxnreg=topk_options.FEW_REGISTERS,
            )


def row_pieces_cases() -> list[Case]:
    tables = dict.fromkeys(("offsets", "pieces", "splits", "state"), "*i32")
    sums = Case(
        name="sum_pieces",
        fn=row_pieces.sum_pieces_kernel,
        signature=tables | {"partials": "*fp32", "out": "*bf16", "size": "i32"},
        constexprs={"BLOCK": row_pieces.BLOCK_SUM},
        aligned=("partials", "out", "size"),
    )
    return [sums] + [
        Case(
            name=f"row_pieces_E{num_experts}",
            fn=row_pieces.row_pieces_kernel,
            signature=tables | {"num_experts": "i32", "piece_rows": "i32"},
            constexprs={"BLOCK_E": num_experts, "CHUNK": row_pieces.CHUNK},
            aligned=("offsets",),
            sample=num_experts == 128,
        )
        for num_experts in (8, 128, 1024)
    ]


def tiles_cases() -> list[Case]:
    signature = {"offsets": "*i32", "table": "*i32", "num_tiles": "*i32", "num_experts": "i32", "num_rows": "i32"}
    return [
        Case(
            name=f"tile_tables_E{num_experts}",
            fn=tiles.tile_tables_kernel,
            signature=signature,
            constexprs={"SIZES": tiles.BLOCK_SIZES, "BLOCK_E": num_experts, "CHUNK": tiles.CHUNK},
            sample=num_experts == 128,
        )
        for num_experts in (8, 128, 1024)
    ]
