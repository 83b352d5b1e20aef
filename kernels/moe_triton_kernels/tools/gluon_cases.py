"""What is compiled of the warp-specialized kernels, on Hopper: every schedule, and a sample of other arguments.

Of clusters nothing where this Triton has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from moe_triton_kernels.activations import GATED_CASES, UNGATED_CASES, Activation
from moe_triton_kernels.gluon import d_hidden, down, up
from moe_triton_kernels.gluon.cluster import matrix_in_memory, rows_in_memory
from moe_triton_kernels.gluon.launch import PlacesArgument, rows_block, tile_of, weight_block
from moe_triton_kernels.gluon.schedules import BLOCK_K, DERIVATIVES, SCHEDULES, STEPS, TYPES, available
from moe_triton_kernels.tools.case import Case, integers_of, pointers_of
from moe_triton_kernels.tools.product_cases import TILES, bias_type, only_of_down


def gluon_case(
    kernel: Any,
    op: str,
    schedule: str,
    *,
    dtype: torch.dtype,
    variant: str,
    width: int,
    parts: int,
    weight: Sequence[int],
    signature: Mapping[str, Any],
    sample: bool = False,
    is_even: bool = True,
    is_table: bool = False,
    **constants: Any,
) -> Case:
    """A kernel in one schedule: `weight` is the block of its descriptor; sizes are multiples of 16.

    is_even: BLOCK_K divides the contraction. is_table: the experts' matrices are tensors of their own.
    """
    stored, form = TYPES[dtype], SCHEDULES[schedule]
    is_gathered = op not in ("down", "d_rows")
    descriptors = {"weight": (weight, matrix_in_memory(form.ctas))}
    if not is_gathered:
        descriptors["a"] = rows_block(form), rows_in_memory(form.ctas)
    types: dict[str, Any] = {
        name: f"tensordesc<{stored}{list(block)},{layout!r}>" for name, (block, layout) in descriptors.items()
    }
    types |= {
        **signature,
        "places": PlacesArgument(table="*i64", first="i64", STEP=STEPS[0]) if is_table else None,
        "tiles": TILES,
        "TILE": tile_of(form, group=8, parts=parts, size_k=BLOCK_K if is_even else 16),
    }
    numbers = integers_of(kernel, types, constants)
    return Case(
        name=f"{op}_{stored}_{form.block_m}x{width}x{BLOCK_K}_{schedule}_{variant}"
        + "_tail" * (not is_even)
        + "_table" * is_table,
        fn=kernel,
        signature={**types, **dict.fromkeys(numbers, "i32")},
        constexprs=constants,
        num_warps=4,
        num_ctas=form.ctas,
        aligned=[
            *pointers_of(types),
            *(name for name in numbers if name != "num_slots"),
            *(["bias.stride_e"] if signature.get("bias") else []),
            *(["places.first"] if is_table else []),
        ],
        sample=sample,
        wants=[
            *("wgmma", "tma", "setmaxnreg", "proxy_fence"),
            *(["cp_async"] if is_gathered else []),
            *(["multicast"] if form.ctas > 1 else []),
        ],
    )


def gluon_cases() -> list[Case]:
    return [*down_cases(), *up_cases(), *d_hidden_cases()]


def down_cases() -> Iterator[Case]:
    """down (bias, router weights) and d_rows in every schedule, of tables too; one in the other layout and type."""
    for op in ("down", "d_rows"):
        default = op == "down"  # its k is contiguous: [columns, k]; the other way round for d_rows
        variants = [(name, default, torch.bfloat16, is_table) for is_table in (False, True) for name in available()]
        variants += [
            ("cooperative", not default, torch.bfloat16, False),
            ("cooperative", default, torch.float16, False),
        ]
        for schedule, by_k, dtype, is_table in variants:
            width, bias = SCHEDULES[schedule].block_n, bias_type(TYPES[dtype], is_table) if op == "down" else None
            yield gluon_case(
                down.down_kernel,
                op,
                schedule,
                dtype=dtype,
                variant="k" if by_k else "columns",
                width=width,
                parts=down.parts_of(SCHEDULES[schedule]),
                weight=weight_block(width, by_k),
                signature={"out": f"*{TYPES[dtype]}", "bias": bias, **only_of_down(op)},
                sample=op == "down" and by_k and dtype == torch.bfloat16 and not is_table,
                is_table=is_table,
                K_CONTIGUOUS=by_k,
            )


Variant = tuple[str, Activation, bool, torch.dtype]  # schedule, activation, k is contiguous, type


def forms_of(variants: Sequence[Variant], gated: bool) -> list[tuple[*Variant, bool, bool, bool]]:
    """Variants with whether gate and up lie apart, whether 64 divides k, and whether it is a table: not all of the
    product."""
    forms = [(*variant, True, True, False) for variant in variants]
    first = variants[0][1]
    forms += [(name, first, by_k, torch.bfloat16, True, False, False) for name in available() for by_k in (True, False)]
    forms += [(*variant, True, True, True) for variant in variants[: len(available())]]
    if gated:
        forms += [(*variant, False, True, False) for variant in variants]
    return forms


def up_cases() -> Iterator[Case]:
    """Both forms in every schedule; the first also with every activation in both types, and in the other layout."""
    for op, activations in (("up_gated", GATED_CASES), ("up", UNGATED_CASES)):
        gated = op == "up_gated"
        variants = [(name, activations[0], True, torch.bfloat16) for name in available()]
        variants += [("cooperative", activation, True, torch.bfloat16) for activation in activations[1:]]
        variants += [("cooperative", activation, True, torch.float16) for activation in activations]
        variants += [("cooperative", activations[0], False, torch.bfloat16)]
        forms = forms_of(variants, gated)
        for number, (schedule, activation, by_k, dtype, concatenated, is_even, is_table) in enumerate(forms):
            width, stored = SCHEDULES[schedule].block_n // (2 if gated else 1), TYPES[dtype]
            yield gluon_case(
                up.up_kernel,
                op,
                schedule,
                dtype=dtype,
                variant=str(activation) + "_pairs" * (not concatenated) + "_T" * (not by_k),
                width=width,
                parts=up.parts_of(SCHEDULES[schedule], gated, concatenated),
                weight=weight_block(width if concatenated else SCHEDULES[schedule].block_n, by_k),
                signature={
                    **dict.fromkeys(("x", "a", "h"), f"*{stored}"),
                    "source": "*i32",
                    "bias": bias_type(stored, is_table),
                },
                sample=gated and number < len(available()),
                is_even=is_even,
                is_table=is_table,
                TOP_K=8,
                ACTIVATION=activation,
                CONCATENATED=concatenated,
                K_CONTIGUOUS=by_k,
            )


def d_hidden_cases() -> Iterator[Case]:
    """Both forms in every schedule; the last also with every activation in both types, and in the other layout."""
    for op, gated in (("d_hidden_gated", True), ("d_hidden", False)):
        activations = [activation for activation in DERIVATIVES if activation.is_gated == gated]
        # the down projection's columns are contiguous: [d, n]
        variants = [(name, activations[0], False, torch.bfloat16) for name in available()]
        variants += [("ping_pong", activation, False, torch.bfloat16) for activation in activations[1:]]
        variants += [("ping_pong", activation, False, torch.float16) for activation in activations]
        variants += [("ping_pong", activations[0], True, torch.bfloat16)]
        forms = forms_of(variants, gated)
        for number, (schedule, activation, by_k, dtype, concatenated, is_even, is_table) in enumerate(forms):
            width, stored = SCHEDULES[schedule].block_n, TYPES[dtype]
            yield gluon_case(
                d_hidden.d_hidden_kernel,
                op,
                schedule,
                dtype=dtype,
                variant=str(activation) + "_pairs" * (not concatenated) + "_T" * by_k,
                width=width,
                parts=d_hidden.parts_of(SCHEDULES[schedule]),
                weight=weight_block(width, by_k),
                signature={
                    **dict.fromkeys(("grad_out", "h", "weighted_a", "grad_h"), f"*{stored}"),
                    **dict.fromkeys(("router_weights", "shares"), "*fp32"),
                    "source": "*i32",
                },
                sample=gated and number < len(available()),
                is_even=is_even,
                is_table=is_table,
                TOP_K=8,
                ACTIVATION=activation,
                CONCATENATED=concatenated,
                K_CONTIGUOUS=by_k,
            )
