"""What is compiled for adapters: the narrow products, their gradients, and the experts' products with more steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moe_triton_kernels.activations import GATED, UNGATED
from moe_triton_kernels.d_weight import d_weight_kernel
from moe_triton_kernels.heuristics import BUCKETS, adapter_tile, narrow_tile
from moe_triton_kernels.launch import HOPPER, Config
from moe_triton_kernels.lora import AdapterArgument, rank_block, step_block
from moe_triton_kernels.narrow import narrow_kernel
from moe_triton_kernels.operands import WeightArgument, unit_of
from moe_triton_kernels.tools.case import Case
from moe_triton_kernels.tools.product_cases import (
    TILES,
    d_hidden_cases,
    down_cases,
    product_case,
    sizes_type,
    up_cases,
    weight_types,
)
from moe_triton_kernels.tools.shipped import TYPES, Shipped

RANKS = (8, 16, 64)
VARIANTS = (f"_{GATED[0]}", f"_{UNGATED[0]}", "_k", "_columns")  # of product_cases: one of each configuration
SIZE = 2048  # of the wide side: a multiple of every block


def narrow_cases(arch: str, _shipped: Sequence[Shipped]) -> list[Case]:
    """Every tile of every rank, from tokens and from rows in expert order."""
    cases = []
    for dtype, name in TYPES.items():
        for rank in dict.fromkeys(map(rank_block, RANKS)):
            for bucket in reversed(BUCKETS):
                config = narrow_tile(SIZE, rank, dtype.itemsize, arch, bucket)
                for gathered in (True, False):
                    case = _case(
                        narrow_kernel,
                        "narrow_gathered" if gathered else "narrow_ordered",
                        name,
                        config,
                        arch,
                        variant=f"rank{rank}",
                        signature={
                            **dict.fromkeys(("x", "out"), f"*{name}"),
                            "source": "*i32" if gathered else None,
                            "tiles": TILES,
                            "sizes": sizes_type(is_even=True),
                            "scaling": "fp32",
                            "weight": weight_types(
                                Shipped(op="narrow", dtype=name, config=config),
                                addresses=False,
                                by_k=gathered,
                                block_n=config.block_n,
                            )["weight"],
                        },
                        sample=gathered and rank == 16 and bucket == BUCKETS[-1] and name == "bf16",
                        TOP_K=8,
                    )
                    cases.append(case)
    return list({case.name: case for case in cases}.values())


def adapter_cases(arch: str, shipped: Sequence[Shipped]) -> list[Case]:
    """The gradients of a and b; and up, down, d_rows and d_hidden, in each configuration, with one rank or, on Hopper,
    with all that are gated."""
    cases = []
    for dtype, name in TYPES.items():
        for rank in dict.fromkeys(map(rank_block, RANKS)):
            for of_a in (True, False):
                sizes = (rank, SIZE) if of_a else (SIZE, rank)
                for gathers in (True, False):
                    left, right = (gathers and not of_a), (gathers and of_a)
                    case = _case(
                        d_weight_kernel,
                        "d_adapter_gathered" if gathers else "d_adapter_ordered",
                        name,
                        adapter_tile(*sizes, dtype.itemsize, arch),
                        arch,
                        variant="a" if of_a else "b",
                        signature=dict.fromkeys(("left", "right", "out"), f"*{name}")
                        | {"partials": "*fp32", "pieces": "*i32", "state": "*i32", "ordered": None}
                        | {"source": "*i32" if left or right else None},
                        sample=of_a and gathers and rank == 16 and name == "bf16",
                        TOP_K=8,
                        GATHER_LEFT=left,
                        EVEN_I=True,
                        EVEN_J=True,
                        UNIT=1,
                        NARROW=True,
                    )
                    cases.append(case)
    products = [*up_cases(arch, shipped), *down_cases(arch, shipped), *d_hidden_cases(arch, shipped)]
    plain = {case.name: case for case in products if case.name.endswith(VARIANTS)}
    ranks = RANKS if arch in HOPPER else (16,)
    return cases + [with_adapter(case, rank) for case in plain.values() for rank in ranks]


def with_adapter(case: Case, rank: int) -> Case:
    """The same kernel with an adapter of this rank; 8 is 16, of which half are zeros."""
    dtype = case.signature["h" if case.name.startswith(("up", "d_hidden")) else "a"]
    is_forward = case.name.startswith(("up", "down"))
    unit = unit_of(2 if dtype == "*bf16" else 4, rank)
    factor = WeightArgument(
        data=dtype,
        decoding=0,
        stride_e="i32",
        stride_k=1 if is_forward else "i32",
        stride_n="i32" if is_forward else 1,
        ALIGNMENT=16,
        UNIT=unit if is_forward else 1,
        K_CONTIGUOUS=is_forward,
        QUANTIZED=False,
    )
    block = step_block(rank, 2 if dtype == "*bf16" else 4)
    steps = max(rank, block) // block
    adapter = AdapterArgument(t=dtype, factor=factor, rank="i32", UNIT=unit, BLOCK=block, STEPS=steps)
    multiples = ["t", "factor.data", "factor.stride_e"] + ([] if is_forward else ["factor.stride_k"])
    if rank % 16 == 0:
        multiples += ["rank"] + (["factor.stride_n"] if is_forward else [])
    return replace(
        case,
        name=f"{case.name}_rank{rank}",
        signature={**case.signature, "adapter": adapter},
        aligned=[*(case.aligned or ()), *(f"adapter.{field}" for field in multiples)],
        sample=rank == 16 and case.sample and case.name.startswith(("up_gated", "d_hidden_gated")),
    )


def _case(fn: Any, op: str, dtype: str, config: Config, arch: str, **options: Any) -> Case:
    return product_case(fn, Shipped(op=op, dtype=dtype, config=config), arch, **options)
