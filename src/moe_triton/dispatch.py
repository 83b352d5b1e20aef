"""Dispatch: which row of the experts' input every assignment becomes, with capacity drops. Nowhere else drops a token.

Definition: `moe_triton.reference.dispatch`.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton import reference, runtime
from moe_triton.autograd.transforms import call_per_sample
from moe_triton.checks import FLOATS, INTEGERS, check_choice, check_int, check_number, check_tensor
from moe_triton.records import PRIORITIES, Dispatch
from moe_triton.torch_internals import has_no_data, is_transforming, record


def expert_capacity(
    num_tokens: int, num_experts: int, top_k: int, capacity_factor: float, min_capacity: int = 0
) -> int:
    """Compute max(min_capacity, ceil(capacity_factor * K * T / E)), what an expert keeps of T tokens (GShard).

    Computed exactly on the decimal that the user wrote: 1.1 means eleven tenths, so that 10 tokens for one expert
    keep 11 places, not the 12 that binary rounding would give.
    """
    check_number("capacity_factor", capacity_factor, above=0)
    check_int("min_capacity", min_capacity, low=0)
    if _is_symbolic(capacity_factor):
        # a float argument of an op is a constant of its graph; as a tensor the factor may change between steps
        factor = torch.ones((), dtype=torch.float64) * capacity_factor
        return _capacity_op(factor, num_tokens, num_experts, top_k, min_capacity)
    return _exact_capacity(capacity_factor, num_tokens, num_experts, top_k, min_capacity)


def _exact_capacity(capacity_factor: float, num_tokens: int, num_experts: int, top_k: int, min_capacity: int) -> int:
    factor = Fraction(capacity_factor) if isinstance(capacity_factor, int) else Fraction(str(float(capacity_factor)))
    exact = -(-(factor.numerator * top_k * num_tokens) // (factor.denominator * num_experts))
    return max(min_capacity, exact)


def _is_symbolic(number: float) -> bool:
    """Return whether torch.compile keeps this number out of its guards, so that its value is unknown here."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # the compiler's; it takes seconds to import

    return not has_static_value(number)


@torch.library.custom_op("moe_triton::expert_capacity", mutates_args=())
def _capacity_op(factor: Tensor, num_tokens: int, num_experts: int, top_k: int, min_capacity: int) -> int:
    capacity = _exact_capacity(factor.item(), num_tokens, num_experts, top_k, min_capacity)
    return min(capacity, 2**63 - 1)  # an op returns an int64; no expert can get as many assignments


@_capacity_op.register_fake
def _(factor: Tensor, *rest: object) -> torch.SymInt:
    return torch.library.get_ctx().new_dynamic_size()


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
        capacity = min(capacity, experts.numel())  # keeps as much as any larger one, which may not fit an int64
    if experts.numel() >= 2**31:
        raise ValueError(f"experts: got {experts.numel()} assignments, wanted fewer than 2**31")

    keys = None
    if capacity is not None and priority == "probability":
        if weights is None:
            raise ValueError("weights: got None, wanted [T, K] for priority 'probability'")
        check_tensor("weights", weights, shape=tuple(experts.shape), dtypes=FLOATS, device=experts.device)
        keys = weights.detach()
    elif capacity is not None and priority == "random":
        # not torch.rand, which takes no generator, even None, with symbolic sizes; nor torch.empty, which tests replace
        keys = torch.zeros(experts.shape, device=experts.device).uniform_(generator=generator)
    by_choice = priority == "choice"
    name = runtime.choose(backend, experts.device, torch.float32).name
    if name == "reference":
        return reference.dispatch(
            experts, num_experts, capacity=capacity, capacity_groups=capacity_groups, by_choice=by_choice, keys=keys
        )
    if capacity is None and runtime.is_plain(experts):
        return dropless_dispatch(experts, num_experts, name)
    as_op = torch.compiler.is_compiling() or has_no_data(experts) or is_transforming()
    if capacity is None and not as_op:
        with runtime.plain_maths(experts):
            return dropless_dispatch(experts, num_experts, name)
    run = _dispatch_op if as_op else _build
    counts, offsets, source, position = run(experts, num_experts, capacity, capacity_groups, by_choice, keys, name)
    return Dispatch(counts=counts, offsets=offsets, source=source, position=position)


def dropless_dispatch(experts: Tensor, num_experts: int, backend: str) -> Dispatch:
    """Do what `dispatch` does without a capacity, for checked ids, by backend "torch" or "triton".

    Called under `runtime.plain_maths`.
    """
    implementation = runtime.dispatch_backend(backend)
    if (small := implementation.build_small_dispatch(experts, num_experts)) is not None:
        return small
    counts, offsets, source, position = implementation.build_dispatch(
        experts.contiguous(), num_experts, None, 1, False, None
    )
    return record(Dispatch, counts=counts, offsets=offsets, source=source, position=position)


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
        return runtime.dispatch_backend(backend).build_dispatch(
            experts.contiguous(), num_experts, capacity, capacity_groups, by_choice, keys
        )


_dispatch_op = torch.library.custom_op("moe_triton::dispatch", _build, mutates_args=())


@_dispatch_op.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return call_per_sample(_dispatch_op, info, in_dims, args)


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
    """Divide weights [T, K] by their sum over each token's surviving choices, 0 at dropped ones; differentiable.

    The sum is clamped at the dtype's eps, so that a token without survivors gets zeros (DeepSpeed's top-2 and top-k).
    """
    return reference.renormalize(weights, dispatch)


def sorted_dispatch(counts: Tensor, num_rows: int, starts: Tensor | None = None) -> Dispatch:
    """Return the Dispatch of rows that lie in expert order already, as T = `num_rows` tokens with K = 1. No host sync.

    counts [E] int32 or int64: the rows of each expert. starts [E]: the first row of each; None where the experts' rows
    follow each other without gaps. Rows of no expert are skipped. Counts beyond `num_rows` are cut there.
    """
    offsets = F.pad(counts.cumsum(0), (1, 0)).clamp_max(num_rows).int()
    rows = torch.arange(num_rows, dtype=torch.int32, device=counts.device)
    source = rows
    if starts is not None:
        expert = torch.searchsorted(offsets[1:].contiguous(), rows, right=True).clamp_max(counts.shape[0] - 1)
        source = (starts.int()[expert] + rows - offsets[expert]).clamp_max(num_rows - 1)
    source = torch.where(rows < offsets[-1], source, -1)
    position = torch.full((num_rows + 1,), -1, dtype=torch.int32, device=counts.device)
    position[torch.where(source >= 0, source, num_rows).long()] = torch.where(source >= 0, rows, -1)
    return Dispatch(counts=offsets.diff(), offsets=offsets, source=source, position=position[:num_rows, None])


def chosen_experts(dispatched: Dispatch) -> Tensor:
    """Return the expert of every choice [T, K] int32, -1 for one without a row: the ids that the Dispatch kept."""
    # row -1 lies before all experts
    return torch.searchsorted(dispatched.offsets, dispatched.position, right=True, out_int32=True) - 1
