"""Exact top-k routing: logits -> each token's experts and weights, with the sums that the losses need, in one pass.

A program takes BLOCK_T tokens at a time, with all of their experts in registers, and repeats an arg-max K times.
Scores are compared as int32 whose order is that of the floats, so NaN, infinities and ties have a defined order and
chosen experts are always distinct. Every program writes its partial sums; a second kernel adds them in a fixed order.
Shapes: T tokens, E experts, K choices, B sequences with sums of their own, P programs for each. Maths in fp32.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton_kernels.arithmetic import cdiv
from moe_triton_kernels.launch import Launch, prepare, register_limit, target_of
from moe_triton_kernels.scores import (
    EPS,
    SIGMOID,
    first_of,
    ordered_bits,
    own_score,
    scores_of,
    scores_of_chosen,
    softmax_rows,
)  # fmt: skip
from moe_triton_kernels.topk_options import (
    FEW_REGISTERS,
    FEW_WARPS,
    Programs,
    TopK,
    choice_constants,
    limit_of,
    programs_of,
)

TAKEN = tl.constexpr(-(2**31))  # below every score, -inf included
INDEX_BITS = tl.constexpr(2**13 - 1)  # a 16-bit float has at least 13 zeros at the end of its fp32 pattern

SUM_PROGRAMS, SUM_EXPERTS, SUM_WARPS = 512, 8, 8  # the part of the partial sums that a program holds at a time


class PartialSums(NamedTuple):
    """The sums of every program's tokens: counts and scores [B, P, E], z [B, P]; [E] and [] where B = P = 1."""

    counts: Any
    scores: Any
    z: Any


@triton.jit
def mask_groups(scores, LIMIT, LANES):
    """-inf for the experts outside of each token's best groups. Padding is -inf before."""
    group = tl.arange(0, LANES.GROUPS)[None, :]
    scores_TGM = tl.reshape(scores, (LANES.BLOCK_T, LANES.GROUPS, LANES.MEMBERS))
    best = tl.max(scores_TGM, 2)
    if LIMIT.TOP2 and LANES.MEMBERS > 1:
        member = tl.arange(0, LANES.MEMBERS)[None, None, :]
        winner = tl.min(tl.where(scores_TGM == best[:, :, None], member, LANES.MEMBERS), 2)
        best += tl.max(tl.where(member == winner[:, :, None], float("-inf"), scores_TGM), 2)
    keys = tl.where(best != best, 0x7FFFFFFF, ordered_bits(best))  # inf - inf; NaN sorts first
    kept = tl.zeros((LANES.BLOCK_T, LANES.GROUPS), tl.int32)
    for _ in range(LIMIT.TOP_GROUPS):
        choice = first_of(keys, tl.max(keys, 1), group, LANES.GROUPS)
        taken = group == choice[:, None]
        kept = tl.where(taken, 1, kept)
        keys = tl.where(taken, TAKEN, keys)
    return tl.reshape(
        tl.where(kept[:, :, None] != 0, scores_TGM, float("-inf")), (LANES.BLOCK_T, LANES.GROUPS * LANES.MEMBERS)
    )


@triton.jit
def choose_experts(
    logits, bias, noise, token_mask, given, experts, weights, partials, num_tokens, scale,
    RULE, LIMIT, LANES, PACKED: tl.constexpr,
):  # fmt: skip
    """Experts and weights of every token; counts, score sums and z sum of this program's tokens. See `topk_kernel`.

    `expert` maps lanes to experts and `inside` marks the real ones.
    PACKED: keys are 16-bit logits, so the index fits below the score and one maximum finds both.
    """
    NUM_EXPERTS: tl.constexpr = RULE.NUM_EXPERTS
    NUM_GROUPS: tl.constexpr = LIMIT.NUM_GROUPS
    MEMBERS: tl.constexpr = LANES.MEMBERS
    MEMBERS_USED: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    BLOCK_T: tl.constexpr = LANES.BLOCK_T
    BLOCK_E: tl.constexpr = LANES.GROUPS * MEMBERS
    BLOCK_K: tl.constexpr = LANES.BLOCK_K
    lane = tl.arange(0, BLOCK_E)
    if NUM_GROUPS == 1 or MEMBERS == MEMBERS_USED:
        expert = lane  # written so that the compiler sees contiguous loads
        inside = lane < NUM_EXPERTS
    else:
        inside = (lane // MEMBERS < NUM_GROUPS) & (lane % MEMBERS < MEMBERS_USED)
        expert = tl.where(inside, lane // MEMBERS * MEMBERS_USED + lane % MEMBERS, BLOCK_E)
    choice_k = tl.arange(0, BLOCK_K)[None, :]

    counts = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
    score_sums = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    z_sums = tl.zeros((BLOCK_T,), tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(num_tokens, BLOCK_T), tl.num_programs(1)):
        token = tl.arange(0, BLOCK_T) + tile * BLOCK_T
        exists = token < num_tokens
        token += tl.program_id(0).to(tl.int64) * num_tokens
        valid = exists
        if token_mask is not None:
            valid = exists & (tl.load(token_mask + token, mask=exists, other=0) != 0)
        cells = token[:, None] * NUM_EXPERTS + expert[None, :]
        present = valid[:, None] & inside[None, :]
        x = tl.load(logits + cells, mask=present, other=float("-inf")).to(tl.float32)
        softmax, lse = softmax_rows(x, valid)

        # what the experts are chosen by
        keys = x
        noisy_softmax = softmax
        if noise is not None:
            keys += tl.load(noise + cells, mask=present, other=0.0).to(tl.float32)
        if bias is not None or LIMIT.TOP2:
            if noise is not None:
                noisy_softmax, _ = softmax_rows(keys, valid)
            keys = scores_of(keys, noisy_softmax, RULE.SCORE)
            if bias is not None:
                keys += tl.load(bias + expert, mask=inside, other=0.0).to(tl.float32)[None, :]
        keys = tl.where((keys == keys) & inside[None, :], keys, float("-inf"))
        if NUM_GROUPS > 1:
            keys = mask_groups(keys, LIMIT, LANES)
        bits = ordered_bits(keys)
        if PACKED:
            bits = (bits | INDEX_BITS) ^ expert[None, :]  # the low bits count down
        bits = tl.where(inside[None, :], bits, TAKEN)

        # the choice: K times the best one, the lowest index first
        chosen = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
        for k in range(RULE.TOP_K):
            best = tl.max(bits, 1)
            if PACKED:
                choice = (best & INDEX_BITS) ^ INDEX_BITS
            else:
                choice = first_of(bits, best, expert[None, :], BLOCK_E)
            chosen = tl.where(choice_k == k, choice[:, None], chosen)
            bits = tl.where(expert[None, :] == choice[:, None], TAKEN, bits)

        slots = token[:, None] * RULE.TOP_K + choice_k
        slot_exists = exists[:, None] & (choice_k < RULE.TOP_K)
        slot_valid = valid[:, None] & (choice_k < RULE.TOP_K)
        if given is not None:
            given_ids = tl.load(given + slots, mask=slot_valid, other=-1)
            is_given = (tl.max((given_ids != -1).to(tl.int32), 1) != 0)[:, None]
            chosen = tl.where(is_given, given_ids, chosen)
            bits = tl.where(is_given, 0, bits)
            for k in range(RULE.TOP_K):
                choice = tl.sum(tl.where(choice_k == k, chosen, 0), 1)
                bits = tl.where(expert[None, :] == choice[:, None], TAKEN, bits)

        # the weights, from the chosen logits
        has_weight = slot_valid & (chosen >= 0) & (chosen < NUM_EXPERTS - RULE.WEIGHTLESS)
        logit = tl.load(logits + token[:, None] * NUM_EXPERTS + chosen, mask=has_weight, other=float("-inf"))
        logit = logit.to(tl.float32)
        weight = scores_of_chosen(logit, lse, has_weight, RULE.SCORE)
        if RULE.NORMALIZE:
            weight /= tl.sum(weight, 1)[:, None] + EPS
        tl.store(experts + slots, tl.where(slot_valid, chosen, -1), mask=slot_exists)
        tl.store(weights + slots, weight * scale, mask=slot_exists)

        # the sums; a logit of -inf, as of a masked token, adds nothing
        counts += (present & (bits == TAKEN)).to(tl.int32)
        if RULE.SCORE >= SIGMOID:
            scores = own_score(x, RULE.SCORE)
            score_sums += scores * (1.0 / (tl.sum(scores, 1) + EPS))[:, None]
        else:
            score_sums += softmax
        z_sums += lse * lse

    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    row = program.to(tl.int64) * NUM_EXPERTS + expert
    tl.store(partials.counts + row, tl.sum(counts, 0), mask=inside)
    tl.store(partials.scores + row, tl.sum(score_sums, 0), mask=inside)
    tl.store(partials.z + program, tl.sum(z_sums, 0))


@triton.jit(do_not_specialize=["num_tokens"])
def topk_kernel(
    logits,  # [T, E]
    bias,  # [E], or None
    noise,  # [T, E], or None
    token_mask,  # [T], or None
    given,  # [T, K], or None
    experts,  # [T, K]
    weights,  # [T, K]
    partials,
    num_tokens,  # of a sequence, on which a row of the grid [B, P] works
    scale,
    RULE,
    LIMIT,
    LANES,
    PACKED: tl.constexpr,
):
    """Every program's part of `choose_experts`."""
    choose_experts(
        logits, bias, noise, token_mask, given, experts, weights, partials, num_tokens, scale,
        RULE, LIMIT, LANES, PACKED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_partials"])
def sum_partials_kernel(
    partials, counts, score_sums, z_sums, num_partials,
    NUM_EXPERTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The programs' partial sums [B, P, E] and [B, P], added in the order of the programs."""
    sequence = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    count = tl.zeros((BLOCK_P, BLOCK_E), tl.int32)
    score = tl.zeros((BLOCK_P, BLOCK_E), tl.float32)
    z = tl.zeros((BLOCK_P,), tl.float32)
    for start in range(0, num_partials, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        cell = (sequence * num_partials + p[:, None]) * NUM_EXPERTS + column
        mask = (p < num_partials)[:, None] & (column < NUM_EXPERTS)
        count += tl.load(partials.counts + cell, mask=mask, other=0)
        score += tl.load(partials.scores + cell, mask=mask, other=0.0)
        z += tl.load(partials.z + sequence * num_partials + p, mask=p < num_partials, other=0.0)
    column = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    cell = sequence * NUM_EXPERTS + column
    tl.store(counts + cell, tl.sum(count, 0), mask=column < NUM_EXPERTS)
    tl.store(score_sums + cell, tl.sum(score, 0), mask=column < NUM_EXPERTS)
    if tl.program_id(1) == 0:
        tl.store(z_sums + sequence, tl.sum(z, 0))


def choice_of(
    logits: Tensor,
    options: TopK,
    programs: Programs,
    choice_bias: Tensor | None,
    noise: Tensor | None,
    token_mask: Tensor | None,
    given: Tensor | None,
) -> tuple[tuple[Tensor | None, ...], Tensor, Tensor, PartialSums, bool]:
    """Make the arguments of `choose_experts`: what is read, the experts, the weights, the sums, and `packed`.

    For what they are see `topk_forward` and `choice_constants`.
    """
    (num_tokens, num_experts), device, top_k = logits.shape, logits.device, options.top_k
    is_one = options.sequences == programs.number == 1  # its partial sums are the sums
    shape = () if is_one else (options.sequences, programs.number)
    experts = torch.empty(num_tokens, top_k, dtype=torch.int32, device=device)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=device)
    counts, scores = experts.new_empty(*shape, num_experts), weights.new_empty(*shape, num_experts)
    return (
        (
            logits.contiguous(),
            None if choice_bias is None else choice_bias.contiguous(),
            None if noise is None else noise.contiguous(),
            None if token_mask is None else token_mask.contiguous(),
            None if given is None else given.contiguous(),
        ),
        experts,
        weights,
        PartialSums(counts, scores, weights.new_empty(shape)),
        logits.dtype != torch.float32 and noise is None and choice_bias is None and not limit_of(options).TOP2,
    )


def topk_forward(
    logits: Tensor,
    options: TopK,
    *,
    choice_bias: Tensor | None = None,
    noise: Tensor | None = None,
    token_mask: Tensor | None = None,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits [T, E] (fp32, bf16, fp16) -> experts [T, K], weights [T, K], counts [E], score_sums [E], z_sum [].

    Experts and counts are int32, the others fp32; with several sequences, counts and score sums are [B, E]. Experts are
    in order of preference; they are -1, with weight 0, where `token_mask` [T] is false. `choice_bias` [E] and `noise`
    [T, E] change the choice only. `given` [T, K] int32, ids distinct in a row, -1 for none or -2 for an empty place,
    takes its place in the rows that are not all -1. One
    launch for few tokens, else two; no host sync, bitwise deterministic.
    """
    num_tokens, num_experts = logits.shape
    sequences, device = options.sequences, logits.device
    of_experts = (num_experts,) if sequences == 1 else (sequences, num_experts)
    programs = programs_of(num_tokens, num_experts, options)
    read, experts, weights, partials, packed = choice_of(
        logits, options, programs, choice_bias, noise, token_mask, given
    )
    if num_tokens == 0:
        zeros = torch.zeros(of_experts, dtype=torch.float32, device=device)
        return experts, weights, zeros.int(), zeros, torch.zeros((), dtype=torch.float32, device=device)
    launch = _launch(num_experts, options, packed, programs, target_of(device).architecture)
    launch(*read, experts, weights, partials, num_tokens // sequences, float(options.scale))
    if sequences == programs.number == 1:
        return experts, weights, *partials
    counts, score_sums = experts.new_empty(*of_experts), weights.new_empty(*of_experts)
    z_sums = weights.new_empty(() if sequences == 1 else (sequences,))
    _sum_launch(sequences, num_experts)(partials, counts, score_sums, z_sums, programs.number)
    return experts, weights, counts, score_sums, z_sums if sequences == 1 else z_sums.sum()


@lru_cache(maxsize=1024)
def _launch(num_experts: int, options: TopK, packed: bool, programs: Programs, architecture: str) -> Launch:
    limit = register_limit(architecture, FEW_REGISTERS) if programs.num_warps == FEW_WARPS else {}
    constants = choice_constants(num_experts, options, packed, programs.num_warps)
    return prepare(topk_kernel, (options.sequences, programs.number), **constants, **limit)


@lru_cache(maxsize=1024)
def _sum_launch(sequences: int, num_experts: int) -> Launch:
    constants = {"NUM_EXPERTS": num_experts, "BLOCK_P": SUM_PROGRAMS, "BLOCK_E": SUM_EXPERTS, "num_warps": SUM_WARPS}
    return prepare(sum_partials_kernel, (sequences, cdiv(num_experts, SUM_EXPERTS)), **constants)
