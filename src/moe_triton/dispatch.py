"""Dispatch: which row of the experts' input every assignment becomes, with capacity drops. Nowhere else drops a token.

Definition: `moe_triton.reference.dispatch`.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from moe_triton import reference, runtime
from moe_triton.checks import FLOATS, INTEGERS, check_choice, check_int, check_number, check_tensor
from moe_triton.records import PRIORITIES, Dispatch


def expert_capacity(
    num_tokens: int, num_experts: int, top_k: int, capacity_factor: float, min_capacity: int = 0
) -> int:
    """C = max(min_capacity, ceil(capacity_factor * K * T / E)), the assignments an expert keeps of T tokens (GShard).

    Computed exactly on the decimal that the user wrote: 1.1 means eleven tenths, so that 10 tokens for one expert
    keep 11 places, not the 12 that binary rounding would give.
    """
    check_number("capacity_factor", capacity_factor, above=0)
    check_int("min_capacity", min_capacity, low=0)
    factor = Fraction(str(float(capacity_factor)))
    exact = -(-(factor.numerator * top_k * num_tokens) // (factor.denominator * num_experts))
    return max(min_capacity, exact)


def dispatch(
    experts: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    capacity_groups: int = 1,
    priority: str = "position",
    weights: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str = "auto",
) -> Dispatch:
    """Give every assignment its row, in expert order, dropping what exceeds the capacity. No host sync on a GPU.

    Args:
        experts: [T, K] int32 or int64, each token's choices. An id that is negative or >= num_experts is skipped.
        num_experts: E.
        capacity: assignments that one expert keeps out of each group; 0 keeps none, None keeps all.
        capacity_groups: G equal runs of consecutive tokens, each with a capacity of its own (the ranks of an
            expert-parallel run). Must divide T.
        priority: who survives. "position": earlier tokens; "choice": all first choices, then all second ones, each in
            token order (GShard); "probability": higher weights; "random": a draw from torch's generator (DeepSpeed's
            random token selection). Ties go to the earlier token.
        weights: [T, K], needed by priority "probability".
        generator: where "random" draws from; None is torch's default generator.
        backend: "auto", "triton", "torch" or "reference".

    Returns:
        Dispatch. Rows within an expert are in token order whatever the priority.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or range, by name.
    """
    check_tensor("experts", experts, shape=("T", "K"), dtypes=INTEGERS)
    check_int("num_experts", num_experts, low=1)
    check_choice("priority", priority, PRIORITIES)
    check_int("capacity_groups", capacity_groups, low=1)
    if experts.shape[0] % capacity_groups:
        raise ValueError(f"capacity_groups: got {capacity_groups}, wanted a divisor of the {experts.shape[0]} tokens")
    if capacity is not None:
        check_int("capacity", capacity, low=0)
    if experts.numel() >= 2**31:
        raise ValueError(f"experts: got {experts.numel()} assignments, wanted fewer than 2**31")

    keys = None
    if capacity is not None and priority == "probability":
        if weights is None:
            raise ValueError("weights: got None, wanted [T, K] for priority 'probability'")
        check_tensor("weights", weights, shape=tuple(experts.shape), dtypes=FLOATS, device=experts.device)
        keys = weights.detach()
    elif capacity is not None and priority == "random":
        keys = torch.rand(experts.shape, generator=generator, device=experts.device)
    by_choice = priority == "choice"
    name = runtime.choose(backend, experts.device, torch.float32).name
    if name == "reference":
        return reference.dispatch(
            experts, num_experts, capacity=capacity, capacity_groups=capacity_groups, by_choice=by_choice, keys=keys
        )
    run = _dispatch_op if torch.compiler.is_compiling() else _build
    counts, offsets, source, position = run(experts, num_experts, capacity, capacity_groups, by_choice, keys, name)
    return Dispatch(counts=counts, offsets=offsets, source=source, position=position)


def _build(
    experts: Tensor,
    num_experts: int,
    capacity: int | None,
    capacity_groups: int,
    by_choice: bool,
    keys: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with runtime.plain_maths(experts):
        return runtime.load(backend, "dispatch").build_dispatch(
            experts.contiguous(), num_experts, capacity, capacity_groups, by_choice, keys
        )


_dispatch_op = torch.library.custom_op("moe_triton::dispatch", _build, mutates_args=())


@_dispatch_op.register_fake
def _(experts: Tensor, num_experts: int, *rest: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_tokens, top_k = experts.shape
    return (
        experts.new_empty((num_experts,), dtype=torch.int32),
        experts.new_empty((num_experts + 1,), dtype=torch.int32),
        experts.new_empty((num_tokens * top_k,), dtype=torch.int32),
        experts.new_empty((num_tokens, top_k), dtype=torch.int32),
    )


def renormalize(weights: Tensor, dispatch: Dispatch) -> Tensor:
    """Weights [T, K] divided by their sum over each token's surviving choices, 0 at dropped ones; differentiable.

    The sum is clamped at the dtype's eps, so that a token without survivors gets zeros (DeepSpeed's top-2 and top-k).
    """
    return reference.renormalize(weights, dispatch)
