"""Routing by the Triton kernels; the definition is `reference.route`."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from moe_triton.records import RouterSpec, TiledDispatch
from moe_triton.torch_internals import record
from moe_triton_kernels.routing import topk_forward
from moe_triton_kernels.routing_backward import topk_backward
from moe_triton_kernels.small_route import is_small, small_route
from moe_triton_kernels.topk_options import TopK


def route_forward(
    logits: Tensor,
    spec: RouterSpec,
    choice_bias: Tensor | None,
    noise: Tensor | None,
    token_mask: Tensor | None,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits [T, E] -> experts [T, K] i32, weights [T, K] f32, counts [E] i32, score_sums [E] f32, z_sum [] f32."""
    return topk_forward(
        logits, options_of(spec), choice_bias=choice_bias, noise=noise, token_mask=token_mask, given=given
    )


def route_and_dispatch(
    logits: Tensor,
    spec: RouterSpec,
    choice_bias: Tensor | None,
    noise: Tensor | None,
    token_mask: Tensor | None,
    given: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], TiledDispatch | None]:
    """Return what `route_forward` does, and, where one launch makes both, the Dispatch of all choices."""
    options = options_of(spec)
    inputs = {"choice_bias": choice_bias, "noise": noise, "token_mask": token_mask, "given": given}
    if not is_small(*logits.shape, options):
        return topk_forward(logits, options, **inputs), None
    routed, (offsets, source, position, tiles) = small_route(logits, options, **inputs)
    return routed, record(
        TiledDispatch,
        counts=routed[2],
        offsets=offsets,
        source=source,
        position=position,
        tiles=tiles,
        experts=routed[0],
    )


def route_unsummed(*_inputs: object) -> None:
    """Return None: the kernel makes the sums along with the choice."""


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
    """The gradient of the logits [T, E] in their dtype; zeros for masked tokens, whose experts are -1."""
    if grad_score_sums is None:
        shape = (logits.shape[1],) if spec.sequences == 1 else (spec.sequences, logits.shape[1])
        grad_score_sums = grad_weights.new_zeros(shape)
    if grad_z_sum is None:
        grad_z_sum = grad_weights.new_zeros(())
    return topk_backward(grad_weights, grad_score_sums, grad_z_sum, logits, experts, options_of(spec))


@lru_cache(maxsize=1024)
def options_of(spec: RouterSpec) -> TopK:
    return TopK(*(getattr(spec, name) for name in TopK._fields))
