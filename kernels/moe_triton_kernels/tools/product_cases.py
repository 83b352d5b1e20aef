"""What is compiled of the grouped products: every shipped configuration, and a sample of their other arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_triton_kernels.activations import GATED_CASES, UNGATED_CASES
from moe_triton_kernels.d_hidden import d_hidden_kernel
from moe_triton_kernels.d_router_weights import d_router_weights_kernel
from moe_triton_kernels.d_weight import d_bias_kernel, d_weight_kernel
from moe_triton_kernels.descriptors import descriptor_block
from moe_triton_kernels.down import down_kernel
from moe_triton_kernels.fp8 import WrittenArgument
from moe_triton_kernels.launch import BLACKWELL, pipeline_stages, tile_of
from moe_triton_kernels.operands import BiasArgument, SizesArgument, WeightArgument
from moe_triton_kernels.tiles import TilesArgument
from moe_triton_kernels.tools.case import Case, integers_of, leaves, pointers_of
from moe_triton_kernels.tools.shipped import Shipped
from moe_triton_kernels.up import up_kernel

TILES = TilesArgument(table="*i32", num_tiles="*i32", offsets="*i32")


def main_loop_instructions(shipped: Shipped, arch: str, num_descriptors: int) -> list[str]:
    """What the main loop has to compile to: matrix instructions for 16-bit types, asynchronous copies before Blackwell.

    wgmma takes 64 rows at least. On Blackwell the copies by pointers depend on `pipeline_stages`.
    """
    wants = ["tma"] if num_descriptors else []
    if arch.startswith("sm_") and arch not in BLACKWELL and num_descriptors < 2:
        wants.append("cp_async")
    if shipped.dtype != "fp32":
        wants.append("wgmma" if arch == "sm_90" and shipped.config.block_m >= 64 else "mma")
    if shipped.dtype == "fp8e4nv":
        wants.append("fp8")
    return wants


def product_case(
    fn: Any,
    shipped: Shipped,
    arch: str,
    *,
    variant: str,
    signature: dict[str, Any],
    sample: bool = False,
    **constants: Any,
) -> Case:
    """A grouped kernel at a shipped configuration: sizes, and the strides of weights, are multiples of 16."""
    config = shipped.config
    signature = {**signature, "TILE": tile_of(arch, config)}
    numbers = integers_of(fn, signature, constants)
    kinds = [(name, kind) for arg, value in signature.items() for name, _, kind in leaves(arg, value, ())]
    aligned = pointers_of(signature)
    aligned += [name for name, kind in kinds if name.startswith(("weight.stride_", "sizes.")) and kind == "i32"]
    aligned += [name for name, _ in kinds if name.endswith(".width")]
    aligned += [name for name in numbers if name.startswith("size_")]
    return Case(
        name=f"{shipped.op}_{shipped.dtype}_{config.block_m}x{config.block_n}x{config.block_k}_{variant}",
        fn=fn,
        signature={**signature, **dict.fromkeys(numbers, "i32")},
        constexprs=constants,
        num_warps=config.num_warps,
        num_stages=pipeline_stages(arch, config),
        maxnreg=config.maxnreg,
        aligned=aligned,
        sample=sample,
        wants=main_loop_instructions(shipped, arch, sum(str(kind).startswith("tensordesc") for _, kind in kinds)),
    )


def weight_types(
    shipped: Shipped, *, addresses: bool, by_k: bool, block_n: int, halves: int = 1
) -> dict[str, WeightArgument | str | None]:
    """The types of a weight of aligned sizes and of its descriptor: what a launch on a GPU makes of it."""
    weight = WeightArgument(
        data="*i64" if addresses else f"*{shipped.dtype}",
        decoding=0,
        stride_e="i32",
        stride_k=1 if by_k else "i32",
        stride_n="i32" if by_k else 1,
        ALIGNMENT=16,
        UNIT=1,
        K_CONTIGUOUS=by_k,
        QUANTIZED=False,
    )
    if addresses or not shipped.config.descriptors or not (by_k or halves == 1):
        return {"weight": weight, "descriptor": None}
    block = descriptor_block(shipped.config, by_k, halves, block_n)
    return {"weight": weight, "descriptor": f"tensordesc<{shipped.dtype}{block}>"}


def rows_type(shipped: Shipped, block: Sequence[int]) -> str | None:
    """The type of the descriptor of aligned rows, of which a load brings this block."""
    return f"tensordesc<{shipped.dtype}{list(block)}>" if shipped.config.descriptors else None


def bias_type(dtype: str, addresses: bool = False) -> BiasArgument:
    data = "*i64" if addresses else f"*{dtype}"
    return BiasArgument(data=data, stride_e="i32", stride_n=1, ALIGNMENT=16, UNIT=1)


def sizes_type(*, is_even: bool) -> SizesArgument:
    return SizesArgument(k="i32", columns="i32", UNIT=1, EVEN_K=is_even)


def up_cases(arch: str, shipped: Sequence[Shipped]) -> list[Case]:
    """Every configuration; the first of each op also with every activation and weight layout."""
    cases = []
    for op, activations in (("up_gated", GATED_CASES), ("up", UNGATED_CASES)):
        entries = [entry for entry in shipped if entry.op == op]
        # (configuration, activation, is_transposed, is_concatenated, bias, addresses instead of a stacked tensor)
        variants = [(entry, activations[0], False, True, False, False) for entry in entries]
        variants += [(entries[0], activation, False, True, True, False) for activation in activations]
        variants += [(entries[0], activations[-1], True, False, True, True)]
        if op == "up_gated":
            variants += [(entries[0], activations[0], True, True, False, False)]
            variants += [(entries[0], activations[0], False, False, False, True)]
        for number, (entry, activation, transposed, concatenated, bias, addresses) in enumerate(variants):
            flags = "_T" * transposed + "_pairs" * (not concatenated) + "_bias" * bias + "_addresses" * addresses
            weight = weight_types(
                entry,
                addresses=addresses,
                by_k=not transposed,
                halves=2 if op == "up_gated" and concatenated else 1,
                block_n=entry.config.block_n * (1 if op == "up" or concatenated else 2),
            )
            case = product_case(
                up_kernel,
                entry,
                arch,
                variant=str(activation) + flags,
                signature={
                    **dict.fromkeys(("x", "a", "h"), f"*{entry.dtype}"),
                    "source": "*i32",
                    "tiles": TILES,
                    "sizes": sizes_type(is_even=not transposed),
                    "adapter": None,
                    "scales": None,
                    "a_codes": None,
                    "bias": bias_type(entry.dtype, addresses) if bias else None,
                    **weight,
                },
                sample=number == 0,
                TOP_K=8,
                ACTIVATION=activation,
                CONCATENATED=concatenated,
            )
            cases.append(case)
    return cases


def down_cases(arch: str, shipped: Sequence[Shipped]) -> list[Case]:
    """Every configuration of down (bias, router weights) and of d_rows; the first also in the other layout."""
    cases = []
    for op in ("down", "d_rows"):
        entries = [entry for entry in shipped if entry.op == op]
        columns_contiguous = op == "d_rows"  # the default layout is [columns, k] for down, [k, columns] for d_rows
        # (configuration, columns are contiguous, addresses instead of a stacked tensor)
        variants = [(entry, columns_contiguous, False) for entry in entries]
        variants += [(entries[0], not columns_contiguous, True)]
        for number, (entry, contiguous, addresses) in enumerate(variants):
            stored, is_down = f"*{entry.dtype}", op == "down"
            weight = weight_types(entry, addresses=addresses, by_k=not contiguous, block_n=entry.config.block_n)
            case = product_case(
                down_kernel,
                entry,
                arch,
                variant=("columns" if contiguous else "k") + "_addresses" * addresses,
                signature={
                    "a": stored,
                    "out": stored,
                    "bias": bias_type(entry.dtype, addresses) if is_down else None,
                    **only_of_down(op),
                    "tiles": TILES,
                    "sizes": sizes_type(is_even=not addresses),
                    "adapter": None,
                    "scales": None,
                    "a_descriptor": rows_type(entry, [entry.config.block_m, entry.config.block_k]),
                    **weight,
                },
                sample=number == 0,
            )
            cases.append(case)
    return cases


def only_of_down(op: str) -> dict[str, str | None]:
    """What the kernel of down and d_rows takes for down only."""
    return {"router_weights": "*fp32", "source": "*i32"} if op == "down" else {"router_weights": None, "source": None}


def d_hidden_cases(arch: str, shipped: Sequence[Shipped]) -> list[Case]:
    """Every configuration; the first of each op also with every activation and weight layout."""
    cases = []
    for op, activations in (("d_hidden_gated", GATED_CASES), ("d_hidden", UNGATED_CASES)):
        entries = [entry for entry in shipped if entry.op == op]
        # (configuration, activation, is_transposed, is_concatenated, addresses instead of a stacked tensor)
        variants = [(entry, activations[0], False, True, False) for entry in entries]
        variants += [(entries[0], activation, False, True, False) for activation in activations[1:]]
        variants += [(entries[0], activations[-1], True, op == "d_hidden", True)]
        for number, (entry, activation, transposed, concatenated, addresses) in enumerate(variants):
            case = product_case(
                d_hidden_kernel,
                entry,
                arch,
                variant=str(activation) + "_T" * transposed + "_pairs" * (not concatenated) + "_addresses" * addresses,
                signature={
                    **dict.fromkeys(("grad_out", "h"), f"*{entry.dtype}"),
                    **dict.fromkeys(("router_weights", "shares"), "*fp32"),
                    **dict.fromkeys(("weighted_a", "grad_h"), WrittenArgument(f"*{entry.dtype}", None, None)),
                    "source": "*i32",
                    "tiles": TILES,
                    "sizes": sizes_type(is_even=not addresses),
                    "adapter": None,
                    "scales": None,
                    **weight_types(entry, addresses=addresses, by_k=transposed, block_n=entry.config.block_n),
                },
                sample=number == 0,
                TOP_K=8,
                ACTIVATION=activation,
                CONCATENATED=concatenated,
            )
            cases.append(case)
    shares = Case(
        name="d_router_weights",
        fn=d_router_weights_kernel,
        signature={
            "shares": "*fp32",
            "grad_out": "*bf16",
            "source": "*i32",
            "bias": bias_type("bf16"),
            "grad_weights": "*fp32",
            "tiles": TILES,
            "num_shares": "i32",
            "size_d": "i32",
            "num_slots": "i32",
        },
        constexprs={"TOP_K": 8, "BLOCK_M": 16, "BLOCK_D": 128},
    )
    return [*cases, shares]


def d_weight_cases(arch: str, shipped: Sequence[Shipped]) -> list[Case]:
    """Every configuration with the right operand gathered; the first also with the left one; bias gradients."""
    entries = [entry for entry in shipped if entry.op == "d_weight"]
    variants = [(entry, False) for entry in entries] + [(entries[0], True)]
    cases = [
        product_case(
            d_weight_kernel,
            entry,
            arch,
            variant="gather_left" if gather_left else "gather_right",
            signature=dict.fromkeys(("left", "right", "out"), f"*{entry.dtype}")
            | {"partials": "*fp32", "source": "*i32", "pieces": "*i32", "state": "*i32"}
            | {
                "ordered": rows_type(
                    entry, [entry.config.block_k, entry.config.block_n if gather_left else entry.config.block_m]
                )
            },
            sample=number == 0 or gather_left,
            TOP_K=8,
            GATHER_LEFT=gather_left,
            EVEN_I=not gather_left,
            EVEN_J=not gather_left,
            UNIT=1,
            NARROW=True,
        )
        for number, (entry, gather_left) in enumerate(variants)
    ]
    biases = [
        Case(
            name=f"d_bias_{'gathered' if gathered else 'rows'}",
            fn=d_bias_kernel,
            signature={
                "values": "*bf16",
                "router_weights": "*fp32" if gathered else None,
                "out": "*bf16",
                "partials": "*fp32",
                "source": "*i32",
                "pieces": "*i32",
                "state": "*i32",
                "size": "i32",
            },
            constexprs={"TOP_K": 8, "BLOCK_R": 32, "BLOCK_C": 128},
        )
        for gathered in (False, True)
    ]
    return cases + biases
