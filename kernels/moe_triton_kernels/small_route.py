"""Top-k, permutation and tile tables in one launch, by one program, for a few tokens: decoding.

What `routing` and `small_dispatch` compute in two launches, with the same device functions, in the same order and with
as many warps for the choice, so that its bits are the same. The second half reads what the first half has written.
Both halves walk through pieces: of tokens, adding up counts, and of slots, with the next row of each expert.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels import small_dispatch
from moe_triton_kernels.launch import Launch, prepare, register_limit, target_of
from moe_triton_kernels.permutation import block_experts
from moe_triton_kernels.routing import choice_of, choose_experts
from moe_triton_kernels.small_dispatch import MAX_SLOTS, few_rows, place_few
from moe_triton_kernels.tiles import BLOCK_SIZES, TileTables
from moe_triton_kernels.topk_options import FEW_REGISTERS, NUM_WARPS, TopK, choice_constants, programs_of

CHUNK = tl.constexpr(small_dispatch.CHUNK)


@triton.jit(do_not_specialize=["num_tokens"])
def small_route_kernel(
    logits, bias, noise, token_mask, given, experts, weights, partials, rows, num_tokens, scale,
    RULE, LIMIT, LANES, PACKED: tl.constexpr, SIZES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """See `small_route`."""
    choose_experts(
        logits, bias, noise, token_mask, given, experts, weights, partials, num_tokens, scale,
        RULE, LIMIT, LANES, PACKED,
    )  # fmt: skip
    tl.debug_barrier()  # other threads read the experts and the counts
    NUM_EXPERTS: tl.constexpr = RULE.NUM_EXPERTS
    e = tl.arange(0, BLOCK_E)
    total = tl.load(partials.counts + e, mask=e < NUM_EXPERTS, other=0)
    place_few(experts, total, rows, num_tokens * RULE.TOP_K, NUM_EXPERTS, SIZES, BLOCK, BLOCK_E, CHUNK)


@lru_cache(maxsize=4096)
def is_small(num_tokens: int, num_experts: int, options: TopK) -> bool:
    """Whether `small_route` takes so many tokens."""
    few = 0 < num_tokens * options.top_k <= MAX_SLOTS
    return few and options.sequences == 1 == programs_of(num_tokens, num_experts, options).number


def place_constants(num_experts: int, num_warps: int) -> dict[str, Any]:
    """What `place_few` is compiled for. Of 128 slots compared at a time, eight warps spill registers on sm_80."""
    block = 32 if num_warps == NUM_WARPS else 64
    return {"SIZES": BLOCK_SIZES, "BLOCK": block, "BLOCK_E": block_experts(num_experts)}


def small_route(
    logits: Tensor,
    options: TopK,
    *,
    choice_bias: Tensor | None = None,
    noise: Tensor | None = None,
    token_mask: Tensor | None = None,
    given: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, TileTables]]:
    """Compute `routing.topk_forward`, and of its experts `small_dispatch`, in one launch; where `is_small`.

    Returns the five of `topk_forward`, whose counts are the dispatch's too; and offsets, source, position and tables.
    """
    num_tokens, num_experts = logits.shape
    programs = programs_of(num_tokens, num_experts, options)
    read, experts, weights, partials, packed = choice_of(
        logits, options, programs, choice_bias, noise, token_mask, given
    )
    rows, tiles = few_rows((num_tokens, options.top_k), num_experts, logits.device)
    launch = _launch(num_experts, options, packed, programs.num_warps, target_of(logits.device).architecture)
    launch(*read, experts, weights, partials, rows, num_tokens, float(options.scale))
    return (experts, weights, *partials), (rows.offsets, rows.source, rows.position, tiles)


@lru_cache(maxsize=1024)
def _launch(num_experts: int, options: TopK, packed: bool, num_warps: int, architecture: str) -> Launch:
    limit = register_limit(architecture, FEW_REGISTERS)
    constants = choice_constants(num_experts, options, packed, num_warps) | place_constants(num_experts, num_warps)
    return prepare(small_route_kernel, (1,), **constants, **limit)
