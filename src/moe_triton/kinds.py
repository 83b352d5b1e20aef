"""Kinds: one object for all calls that are equal in everything but values and addresses, to look things up by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from moe_triton.torch_internals import comparison_with

PLAIN = (Tensor, nn.Parameter)
MOST_KINDS, MOST_ALIKE = 1024, 32  # keys, and kinds with the same one
UNASKED = object()
Alike = tuple[tuple[Callable[..., bool], object], ...]  # comparisons, and the kind where one holds
NOT_YET: tuple[tuple[bool, ...], Alike] = ((), ())
_KINDS: dict[tuple[Any, ...], tuple[tuple[bool, ...], Alike]] = {}  # which optional tensors are there, and the rest


def kind_of(facts: tuple[object, ...], given: tuple[Tensor, ...], optional: Sequence[Any]) -> object | None:
    """Return the kind of a call: equal for equal facts and for tensors of the same sizes, strides, dtypes and devices.

    optional: tensors, or None where one is absent. The result is None where one of all these is not a plain, strided
    tensor, as a list of tensors is not.
    """
    key = (*facts, *map(type, optional))  # without a frame for each of them
    present, alike = _KINDS.get(key, NOT_YET)
    tensors = (*given, *compress(optional, present))
    for is_alike, kind in alike:
        if is_alike(*tensors):
            return kind
    return _new_kind(key, given, optional)


def _new_kind(key: tuple[object, ...], given: tuple[Tensor, ...], optional: Sequence[Any]) -> object | None:
    present = tuple(tensor is not None for tensor in optional)
    tensors = (*given, *compress(optional, present))
    if not all(type(tensor) in PLAIN and tensor.layout is torch.strided for tensor in tensors):
        return None
    _, alike = _KINDS.get(key, NOT_YET)
    if len(_KINDS) >= MOST_KINDS:
        _KINDS.clear()
    kind = object()
    _KINDS[key] = present, ((comparison_with(*tensors), kind), *alike[: MOST_ALIKE - 1])
    return kind
