"""Routing in plain torch: top-k choices, weights, the sums that the losses need, and their gradient."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import addressof
from functools import partial

import torch
from torch import Tensor

from moe_triton.backends.torch.fused import loops_problem
from moe_triton.backends.torch.threads import on_all_threads
from moe_triton.records import RouterSpec, TiledDispatch
from moe_triton.reference import EPS, choice_keys, normalised_and_chosen, router_scores, unless_empty, wide
from moe_triton.torch_internals import record

LOOP_SCORES = ("softmax", "topk_softmax", "sigmoid")  # in the order of their numbers in the compiled loops
SORTED_ELEMENTS = 4096  # of so few keys a whole sort takes less time than the operations that spare it


def top_choices(keys_TE: Tensor, top_k: int) -> Tensor:
    """Indices [T, K] int64 of the K highest keys, highest first; the lower index wins a tie."""
    if keys_TE.dtype != torch.float32 or keys_TE.numel() <= SORTED_ELEMENTS:
        return keys_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    # torch.topk breaks ties as it likes, so ties are made impossible: fp32 bits above, the reversed index below.
    # Adding 0.0 turns -0.0 into 0.0; flipping a negative number's lower bits makes the bits sort like the floats.
    bits = (keys_TE + 0.0).view(torch.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    reversed_index = torch.arange(keys_TE.shape[1] - 1, -1, -1, device=keys_TE.device)
    return ((bits.long() << 32) | reversed_index).topk(top_k, dim=-1).indices


def route_forward(
    logits: Tensor,
    spec: RouterSpec,
    choice_bias: Tensor | None,
    noise: Tensor | None,
    token_mask: Tensor | None,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits [T, E] -> experts [T, K] int32, weights [T, K], counts [E] int32, score_sums [E], z_sum [].

    The floats are fp32, or fp64 for fp64 logits. A token that `token_mask` [T] leaves out has experts -1 and adds
    nothing to any sum. With B sequences, counts and score sums are [B, E]. Definition: `moe_triton.reference.route`.
    """
    experts, weights, sums = route_unsummed(logits, spec, choice_bias, noise, token_mask, given)
    return experts, weights, *sums()


def route_unsummed(
    logits: Tensor,
    spec: RouterSpec,
    choice_bias: Tensor | None,
    noise: Tensor | None,
    token_mask: Tensor | None,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor, Callable[[], tuple[Tensor, Tensor, Tensor]]]:
    """Return the experts and weights of `route_forward`, and what computes its sums."""
    if _runs_loops(logits, spec):
        (experts, weights, *sums), _ = _route_by_loop(logits, spec, choice_bias, noise, token_mask, given)
        return experts, weights, lambda: (sums[0], sums[1], sums[2])
    logits_TE = logits.to(wide(logits.dtype))
    experts_TK = top_choices(choice_keys(logits_TE, spec, choice_bias, noise), spec.top_k)
    all_real = given is None and not spec.weightless
    if given is not None:
        experts_TK = unless_empty(given, experts_TK)
    probs_TE, weights_TK = normalised_and_chosen(logits_TE, experts_TK, spec, all_real=all_real)
    if spec.normalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + EPS)
    if spec.scale != 1.0:
        weights_TK = weights_TK * spec.scale
    if token_mask is not None:
        skipped_T1 = ~token_mask.bool()[:, None]
        experts_TK = experts_TK.masked_fill(skipped_T1, -1)
        weights_TK = weights_TK.masked_fill(skipped_T1, 0.0)
        probs_TE = probs_TE.masked_fill(skipped_T1, 0.0)
    return experts_TK.int(), weights_TK, partial(_sums, logits_TE, spec, token_mask, experts_TK, probs_TE)


def route_and_dispatch(
    logits: Tensor,
    spec: RouterSpec,
    choice_bias: Tensor | None,
    noise: Tensor | None,
    token_mask: Tensor | None,
    given: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], TiledDispatch | None] | None:
    """Return what `route_forward` does, and a Dispatch without a capacity; None where no loop makes them."""
    if not _runs_loops(logits, spec):
        return None
    return _route_by_loop(logits, spec, choice_bias, noise, token_mask, given)


def _runs_loops(logits: Tensor, spec: RouterSpec) -> bool:
    """Whether the compiled loops have the options and the dtype; neither this nor a row's bits depend on the rows."""
    return (
        wide(logits.dtype) == torch.float32
        and logits.device.type == "cpu"
        and spec.score in LOOP_SCORES
        and spec.weightless == 0
        and loops_problem() is None
    )


def _route_by_loop(
    logits: Tensor,
    spec: RouterSpec,
    choice_bias: Tensor | None,
    noise: Tensor | None,
    token_mask: Tensor | None,
    given: Tensor | None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], TiledDispatch | None]:
    """What `route_forward` returns, and for one sequence the Dispatch of all choices."""
    from moe_triton.backends.torch.routing_loops import PIECE, Routing, routing_loop

    logits, (num_tokens, num_experts), parts = logits.detach().float().contiguous(), logits.shape, spec.sequences
    pieces = parts * -(-(num_tokens // parts) // PIECE)
    experts, weights = (torch.empty(num_tokens, spec.top_k, dtype=dtype) for dtype in (torch.int32, torch.float32))
    shape = (num_experts,) if parts == 1 else (parts, num_experts)
    counts, score_sums, z_sum = torch.empty(shape, dtype=torch.int32), torch.empty(shape), torch.empty(())
    dispatched = None
    if parts == 1:
        sizes = ((num_experts + 1,), (num_tokens * spec.top_k,), experts.shape)
        offsets, source, position = (torch.empty(size, dtype=torch.int32) for size in sizes)
        dispatched = record(
            TiledDispatch,
            counts=counts, offsets=offsets, source=source, position=position, tiles=None, experts=experts,
        )  # fmt: skip
    of_pieces, keys = torch.empty(pieces, 2 * num_experts + 1, dtype=torch.float64), logits
    if choice_bias is not None or noise is not None or spec.num_groups > 1:
        keys = choice_keys(logits, spec, choice_bias, noise).float().contiguous()
    choices = None if given is None else given.int().contiguous()
    mask = None if token_mask is None else token_mask.bool().contiguous()
    job = Routing(
        num_tokens=num_tokens, num_experts=num_experts, top_k=spec.top_k, sequences=parts,
        logits=logits.data_ptr(), keys=keys.data_ptr(), given=_address(choices), mask=_address(mask),
        score=LOOP_SCORES.index(spec.score), normalize=spec.normalize, scale=spec.scale,
        experts=experts.data_ptr(), weights=weights.data_ptr(), of_pieces=of_pieces.data_ptr(),
        counts=counts.data_ptr(), score_sums=score_sums.data_ptr(), z_sum=z_sum.data_ptr(),
    )  # fmt: skip
    if dispatched is not None:
        job.offsets, job.source, job.position = offsets.data_ptr(), source.data_ptr(), position.data_ptr()
    on_all_threads(routing_loop().address, addressof(job), pieces)
    return (experts, weights, counts, score_sums, z_sum), dispatched


def _address(values: Tensor | None) -> int:
    return 0 if values is None else values.data_ptr()


def _sums(
    logits_TE: Tensor, spec: RouterSpec, token_mask: Tensor | None, experts_TK: Tensor, probs_TE: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts [E] int32, score_sums [E] and z_sum []; the first two [B, E] for B sequences."""
    num_experts = logits_TE.shape[1]
    z_T = logits_TE.logsumexp(-1).square()
    if token_mask is not None:
        z_T = z_T.masked_fill(~token_mask.bool(), 0.0)
    flat = experts_TK.masked_fill(experts_TK < 0, num_experts).reshape(spec.sequences, -1)
    # Integer adds commute, so scatter_add_ is deterministic; bin E takes the choices that are none.
    counts = torch.zeros(spec.sequences, num_experts + 1, dtype=torch.int32, device=logits_TE.device)
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.int32))
    counts, score_sums = counts[:, :num_experts], probs_TE.view(*shape_of_sums(logits_TE, spec)).sum(1)
    if spec.sequences == 1:
        counts, score_sums = counts[0], score_sums[0]
    return counts.contiguous(), score_sums, z_T.sum()


def shape_of_sums(logits: Tensor, spec: RouterSpec) -> tuple[int, int, int]:
    """[B, T / B, E], of which the middle one is summed over."""
    return spec.sequences, logits.shape[0] // spec.sequences, logits.shape[1]


def route_backward(
    grad_weights: Tensor,
    grad_score_sums: Tensor | None,
    grad_z_sum: Tensor | None,
    logits: Tensor,
    experts: Tensor,
    spec: RouterSpec,
    *,
    all_real: bool = False,
) -> Tensor:
    """Gradient of the logits, [T, E] in their dtype; zeros for the tokens whose experts are -1.

    grad_weights [T, K], grad_score_sums [E] and grad_z_sum [] are the gradients of the three differentiable outputs;
    None stands for zeros. all_real: every choice is of an expert that has a weight.
    """
    if _runs_loops(logits, spec):
        return _route_backward_by_loop(grad_weights, grad_score_sums, grad_z_sum, logits, experts, spec)
    num_experts = logits.shape[1]
    logits_TE = logits.to(wide(logits.dtype))
    experts_TK = experts.long()
    grad_raw_TK = grad_weights.to(logits_TE.dtype) * spec.scale
    probs_TE, raw_TK = normalised_and_chosen(logits_TE, experts_TK, spec, all_real=all_real)
    if spec.normalize:  # w = raw / sum(raw)
        total_T1 = raw_TK.sum(-1, keepdim=True) + EPS
        mean_T1 = (grad_raw_TK * raw_TK).sum(-1, keepdim=True) / total_T1
        grad_raw_TK = (grad_raw_TK - mean_T1) / total_T1
    ids_TK = experts_TK
    if not all_real:
        has_none_TK = (experts_TK < 0) | (experts_TK >= num_experts - spec.weightless)
        grad_raw_TK = grad_raw_TK.masked_fill(has_none_TK, 0.0)
        ids_TK = experts_TK.masked_fill(has_none_TK, 0)

    if grad_score_sums is None:
        grad_probs_TE = torch.zeros_like(logits_TE)
    else:
        grad_probs_BE = grad_score_sums.to(logits_TE.dtype).reshape(spec.sequences, 1, num_experts)
        grad_probs_TE = grad_probs_BE.expand(shape_of_sums(logits, spec)).reshape(logits.shape)
    softmax_TE = probs_TE
    if spec.score in ("sigmoid", "sqrt_softplus"):
        softmax_TE = logits_TE.softmax(-1)
        scores_TE = router_scores(logits_TE, spec.score)
        mean_T1 = (grad_probs_TE * probs_TE).sum(-1, keepdim=True)
        grad_scores_TE = (grad_probs_TE - mean_T1) / (scores_TE.sum(-1, keepdim=True) + EPS)
        grad_scores_TE = grad_scores_TE.scatter_add(1, ids_TK, grad_raw_TK)
        if spec.score == "sigmoid":
            slope_TE = scores_TE * (1 - scores_TE)
        else:  # sigmoid(l) / (2 s), which far below is s / 2
            slope_TE = torch.where(logits_TE < -40, scores_TE / 2, logits_TE.sigmoid() / (2 * scores_TE))
        grad_TE = grad_scores_TE * slope_TE
    elif spec.score == "topk_softmax":
        grad_TE = _softmax_backward(grad_probs_TE, softmax_TE)
        grad_TE = grad_TE.scatter_add(1, ids_TK, _softmax_backward(grad_raw_TK, raw_TK))
    else:
        grad_TE = _softmax_backward(grad_probs_TE.scatter_add(1, ids_TK, grad_raw_TK), softmax_TE)
    if grad_z_sum is not None:  # d logsumexp(l)**2 / dl = 2 * logsumexp(l) * softmax(l)
        grad_TE = grad_TE + 2 * grad_z_sum.to(logits_TE.dtype) * logits_TE.logsumexp(-1, keepdim=True) * softmax_TE
    if not all_real:
        grad_TE = grad_TE.masked_fill((experts == -1).all(-1, keepdim=True), 0.0)
    return grad_TE.to(logits.dtype)


def _route_backward_by_loop(
    grad_weights: Tensor,
    grad_score_sums: Tensor | None,
    grad_z_sum: Tensor | None,
    logits: Tensor,
    experts: Tensor,
    spec: RouterSpec,
) -> Tensor:
    from moe_triton.backends.torch.routing_loops import PIECE, RoutingGradient, routing_gradient_loop

    num_tokens, num_experts = logits.shape
    numbers, choices, of_weights = (
        x.to(dtype).contiguous()
        for x, dtype in ((logits, torch.float32), (experts, torch.int32), (grad_weights, torch.float32))
    )
    grad_logits = torch.empty(num_tokens, num_experts)
    of_sums = torch.zeros(spec.sequences, num_experts) if grad_score_sums is None else grad_score_sums
    of_sums = of_sums.float().contiguous()
    job = RoutingGradient(
        num_tokens=num_tokens, num_experts=num_experts, top_k=spec.top_k, sequences=spec.sequences,
        logits=numbers.data_ptr(), experts=choices.data_ptr(), grad_weights=of_weights.data_ptr(),
        grad_score_sums=of_sums.data_ptr(), score=LOOP_SCORES.index(spec.score), normalize=spec.normalize,
        grad_logits=grad_logits.data_ptr(), scale=spec.scale,
        grad_z_sum=0.0 if grad_z_sum is None else float(grad_z_sum),
    )  # fmt: skip
    on_all_threads(routing_gradient_loop().address, addressof(job), -(-num_tokens // PIECE))
    return grad_logits.to(logits.dtype)


def _softmax_backward(grad: Tensor, probs: Tensor) -> Tensor:
    return probs * (grad - (grad * probs).sum(-1, keepdim=True))
