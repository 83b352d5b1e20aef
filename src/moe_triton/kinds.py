"""Kinds: one object for all calls that are equal in everything but values and addresses, to look things up by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_triton.torch_internals import comparison_with

PLAIN = (Tensor, nn.Parameter)
MOST_KINDS, MOST_ALIKE = 1024, 32  # keys, and kinds with the same one
UNASKED = object()
_KINDS: dict[tuple[Any, ...], tuple[tuple[Callable[..., bool], object], ...]] = {}


def kind_of(facts: tuple[object, ...], given: tuple[Tensor, ...], optional: Sequence[Any]) -> object | None:
    """Return the kind of a call: equal for equal facts and for tensors of the same sizes, strides, dtypes and devices.

    optional: tensors, or None where one is absent. The result is None where one of all these is not a plain, strided
    tensor, as a list of tensors is not.
    """
    tensors = (*given, *(tensor for tensor in optional if tensor is not None))
    for tensor in tensors:
        if type(tensor) not in PLAIN:
            return None
    key = (*facts, None if len(tensors) == len(given) + len(optional) else tuple(x is None for x in optional))
    known = _KINDS.get(key, ())
    for is_alike, kind in known:
        if is_alike(*tensors):
            return kind
    if not all(tensor.layout is torch.strided for tensor in tensors):
        return None
    if len(_KINDS) >= MOST_KINDS:
        _KINDS.clear()
    kind = object()
    _KINDS[key] = ((comparison_with(*tensors), kind), *known[: MOST_ALIKE - 1])
    return kind
