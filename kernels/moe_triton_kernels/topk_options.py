"""How a top-k is asked for, and what its kernels are compiled and launched for.

Shapes: T tokens, E experts, K choices, B sequences with sums of their own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from moe_triton_kernels.arithmetic import cdiv, next_power_of_2
from moe_triton_kernels.launch import MAX_REGISTERS, constants
from moe_triton_kernels.scores import SCORES
from moe_triton_kernels.small_dispatch import MAX_SLOTS

MAX_PROGRAMS = 2048  # a constant, not the number of processors: sums have the same order on every GPU
TILE_ELEMENTS = 512
FEW_WARPS = 8  # of the program that takes all tokens, where they are more than a tile of one warp but a few
FEW_TILES = 8  # that it takes, one after another, rather than leave sums to another launch [estimated, not measured]
FEW_REGISTERS = MAX_REGISTERS - 1  # of its threads: without a limit, ptxas takes 128 in some cases, and spills
NUM_WARPS = 1  # a token's experts lie in one warp, so that an arg-max needs no shared memory


class TopK(NamedTuple):
    """How logits become choices and weights; the fields are those of `moe_triton.records.RouterSpec`.

    `score` is a key of `SCORES`, `group_score` "max" or "top2_sum". Each of B = `sequences` equal runs of tokens has
    sums of its own.
    """

    top_k: int
    score: str = "softmax"
    normalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    weightless: int = 0
    sequences: int = 1


class Rule(NamedTuple):
    """How experts are chosen and weighted, as a kernel is compiled for it; the last WEIGHTLESS have weight 0."""

    NUM_EXPERTS: int
    WEIGHTLESS: int
    TOP_K: int
    SCORE: int
    NORMALIZE: bool


class GroupLimit(NamedTuple):
    """The groups of experts that a token may choose from, as a kernel is compiled for them.

    TOP2  a group's score is the sum of its best two, not its best one
    """

    NUM_GROUPS: int
    TOP_GROUPS: int
    TOP2: bool


class Lanes(NamedTuple):
    """A tile of tokens: their experts lie as [GROUPS, MEMBERS], their choices as [BLOCK_K], all powers of two."""

    BLOCK_T: int
    GROUPS: int
    MEMBERS: int
    BLOCK_K: int


def rule_of(num_experts: int, options: TopK) -> Rule:
    return Rule(num_experts, options.weightless, options.top_k, SCORES[options.score], options.normalize)


@lru_cache(maxsize=1024)
def limit_of(options: TopK) -> GroupLimit:
    top2 = options.num_groups > 1 and options.group_score == "top2_sum"
    return GroupLimit(options.num_groups, options.top_groups, TOP2=top2)


@lru_cache(maxsize=1024)
def lanes_of(num_experts: int, top_k: int, num_groups: int = 1, num_warps: int = NUM_WARPS) -> Lanes:
    """As many tokens at a time as let [tokens, experts] and [tokens, choices] fit in a program's registers.

    In proportion to the warps: each thread then holds as much of a token, in the same places, whatever their number,
    so that the bits of a token's choice are the same.
    """
    groups, members = next_power_of_2(num_groups), next_power_of_2(num_experts // num_groups)
    block_k = next_power_of_2(top_k)
    tokens = max(1, min(64, TILE_ELEMENTS // max(groups * members, block_k)))
    return Lanes(BLOCK_T=tokens * num_warps, GROUPS=groups, MEMBERS=members, BLOCK_K=block_k)


@lru_cache(maxsize=1024)
def choice_constants(num_experts: int, options: TopK, packed: bool, num_warps: int) -> dict[str, Any]:
    """What `choose_experts` is compiled for. `packed`: the keys are logits, of 16 bits."""
    return {
        "RULE": constants(rule_of(num_experts, options)),
        "LIMIT": constants(limit_of(options)),
        "LANES": constants(lanes_of(num_experts, options.top_k, options.num_groups, num_warps)),
        "PACKED": packed,
        "num_warps": num_warps,
    }


class Programs(NamedTuple):
    """How many programs choose for each sequence, and the warps of each."""

    number: int
    num_warps: int


@lru_cache(maxsize=4096)
def programs_of(num_tokens: int, num_experts: int, options: TopK) -> Programs:
    """The programs of a choice among `num_tokens` tokens in all."""
    lanes = lanes_of(num_experts, options.top_k, options.num_groups)
    tiles = cdiv(num_tokens // options.sequences, lanes.BLOCK_T)
    is_few = num_tokens * options.top_k <= MAX_SLOTS and tiles <= FEW_TILES * FEW_WARPS
    if options.sequences == 1 and (tiles <= 1 or is_few):
        return Programs(1, NUM_WARPS if tiles <= 1 else FEW_WARPS)
    return Programs(min(tiles, max(1, MAX_PROGRAMS // options.sequences)), NUM_WARPS)
