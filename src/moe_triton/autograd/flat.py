"""How the experts' records pass through autograd, whose Functions and custom ops take and return flat tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise, product
from typing import Any, TypeVar

from torch import Tensor

from moe_triton.quantization import QuantizedWeight
from moe_triton.quantization.formats import FORMATS
from moe_triton.records import Dispatch, ExpertCall, ExpertParameters, ExpertSpec, Projection
from moe_triton.torch_internals import record

# Per group of parameters: 0 for one that is absent, STACKED, the number of tensors of a sequence, or for a quantised
# projection QUANTIZED - i for KINDS[i].
Form = tuple[int, ...]
STACKED, QUANTIZED = -1, -2
KINDS = tuple(product(FORMATS, (False, True), (False, True)))  # format, whether it has zero points, is_transposed
ROWS = 6  # the tensors of a call that come before its parameters: hidden, weights and the Dispatch's four

Item = TypeVar("Item")


def form_of(groups: Sequence[Projection | None]) -> Form:
    return tuple(map(_code_of, groups))


def _code_of(group: Projection | None) -> int:
    if isinstance(group, QuantizedWeight):
        return QUANTIZED - KINDS.index((group.format, group.zeros is not None, group.is_transposed))
    return 0 if group is None else STACKED if isinstance(group, Tensor) else len(group)


def size_of(code: int) -> int:
    """The number of tensors of a group."""
    return len(parts_of(*KINDS[QUANTIZED - code])) if code <= QUANTIZED else abs(code)


def flatten(groups: Sequence[Projection | None]) -> list[Tensor]:
    """All tensors of the groups, in order."""
    flat: list[Tensor] = []
    for group in groups:
        if isinstance(group, QuantizedWeight):
            flat += group.parts().values()
        elif group is not None:
            flat += [group] if isinstance(group, Tensor) else group
    return flat


def split(flat: Sequence[Item], form: Form) -> list[list[Item]]:
    """The items that belong to each group."""
    return [list(flat[here]) for here in _places(tuple(form))]


@cache
def _places(form: Form) -> list[slice]:
    """Where each group lies among the tensors of all."""
    ends = list(accumulate(map(size_of, form), initial=0))
    return [slice(*bounds) for bounds in pairwise(ends)]


def unflatten(flat: Sequence[Tensor], form: Form) -> ExpertParameters:
    """The parameters that `flatten` and `form_of` were given."""
    groups: list[Any] = list(map(_group, split(flat, form), form))
    return ExpertParameters(*groups)


def _group(tensors: list[Tensor], code: int) -> Projection | None:
    if code == STACKED:
        return tensors[0]
    if code <= QUANTIZED:
        format_, has_zeros, is_transposed = KINDS[QUANTIZED - code]
        parts = dict(zip(parts_of(format_, has_zeros, is_transposed), tensors, strict=True))
        return QuantizedWeight(format=format_, is_transposed=is_transposed, **parts)
    return tensors or None


def parts_of(format_: str, has_zeros: bool, _is_transposed: bool) -> tuple[str, ...]:
    """The fields of a QuantizedWeight that are tensors, in the order of its `parts`."""
    return ("codes", "scales", *["zeros"] * has_zeros, *["global_scale"] * (format_ == "nvfp4"))


def flatten_gradients(gradients: Sequence[Projection | None], form: Form) -> list[Tensor | None]:
    """One gradient per tensor of `flatten`'s, None for all of a group that has none."""
    flat: list[Tensor | None] = []
    for gradient, here in zip(gradients, _places(tuple(form)), strict=True):
        flat += [None] * (here.stop - here.start) if gradient is None else flatten([gradient])
    return flat


def tensors_of(call: ExpertCall) -> list[Tensor]:
    """The call's tensors: ROWS of them, then the parameters."""
    d = call.dispatched
    return [call.hidden, call.weights, d.counts, d.offsets, d.source, d.position, *flatten(call.parameters)]


def call_of(tensors: Sequence[Tensor], form: Form, spec: ExpertSpec) -> ExpertCall:
    """The call that `tensors_of` was given."""
    hidden, weights, counts, offsets, source, position, *flat = tensors
    dispatched = record(Dispatch, counts=counts, offsets=offsets, source=source, position=position)
    parameters = unflatten(flat, form)
    return record(ExpertCall, hidden=hidden, weights=weights, dispatched=dispatched, parameters=parameters, spec=spec)
