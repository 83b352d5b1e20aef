"""How the experts' records pass through autograd, whose Functions and custom ops take and return flat tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor

from moe_triton.records import Dispatch, ExpertCall, ExpertParameters, ExpertSpec, ExpertWeight

# Per group of parameters: 0 for one that is absent, STACKED, or the number of tensors of a sequence.
Form = tuple[int, ...]
STACKED = -1
ROWS = 6  # the tensors of a call that come before its parameters: hidden, weights and the Dispatch's four

Item = TypeVar("Item")


def form_of(groups: Sequence[ExpertWeight | None]) -> Form:
    return tuple(0 if x is None else STACKED if isinstance(x, Tensor) else len(x) for x in groups)


def flatten(groups: Sequence[ExpertWeight | None]) -> list[Tensor]:
    """All tensors of the groups, in order."""
    flat: list[Tensor] = []
    for group in groups:
        if group is not None:
            flat += [group] if isinstance(group, Tensor) else group
    return flat


def split(flat: Sequence[Item], form: Form) -> list[list[Item]]:
    """The items that belong to each group."""
    parts, start = [], 0
    for size in map(abs, form):
        parts.append(list(flat[start : start + size]))
        start += size
    return parts


def unflatten(flat: Sequence[Tensor], form: Form) -> ExpertParameters:
    """The parameters that `flatten` and `form_of` were given."""
    groups: list[Any] = [
        part[0] if size == STACKED else part or None for part, size in zip(split(flat, form), form, strict=True)
    ]
    return ExpertParameters(*groups)


def flatten_gradients(gradients: Sequence[ExpertWeight | None], form: Form) -> list[Tensor | None]:
    """One gradient per tensor of `flatten`'s, None for all of a group that has none."""
    flat: list[Tensor | None] = []
    for gradient, size in zip(gradients, form, strict=True):
        flat += [None] * abs(size) if gradient is None else flatten([gradient])
    return flat


def tensors_of(call: ExpertCall) -> list[Tensor]:
    """The call's tensors: ROWS of them, then the parameters."""
    d = call.dispatched
    return [call.hidden, call.weights, d.counts, d.offsets, d.source, d.position, *flatten(call.parameters)]


def call_of(tensors: Sequence[Tensor], form: Form, spec: ExpertSpec) -> ExpertCall:
    """The call that `tensors_of` was given."""
    hidden, weights, counts, offsets, source, position, *flat = tensors
    dispatched = Dispatch(counts=counts, offsets=offsets, source=source, position=position)
    parameters = unflatten(flat, form)
    return ExpertCall(hidden=hidden, weights=weights, dispatched=dispatched, parameters=parameters, spec=spec)
