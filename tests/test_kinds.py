"""What calls share that differ in values and addresses only."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_triton.kinds import kind_of


def tensor(*size: int) -> Tensor:
    return torch.ones(*(size or (2, 3)))


def test_tensors_that_lie_alike_are_of_one_kind() -> None:
    kind = kind_of(("fact",), (tensor(),), (tensor(), None))
    assert kind is not None
    assert kind_of(("fact",), (tensor(),), (tensor(), None)) is kind
    for facts, given, optional in (
        (("another",), (tensor(),), (tensor(), None)),
        (("fact",), (tensor(2, 4),), (tensor(), None)),
        (("fact",), (tensor(),), (tensor(3, 2).T, None)),
        (("fact",), (tensor(),), (tensor().half(), None)),
        (("fact",), (tensor(),), (torch.nn.Parameter(tensor()), None)),
        (("fact",), (tensor(),), (None, tensor())),
        (("fact",), (tensor(),), (tensor(), tensor())),
        (("fact",), (tensor(),), (None, None)),
    ):
        other = kind_of(facts, given, optional)
        assert other is not None
        assert other is not kind
        assert kind_of(facts, given, optional) is other


def test_what_is_not_a_plain_tensor_is_of_no_kind() -> None:
    class Own(Tensor):
        pass

    for odd in (tensor().as_subclass(Own), tensor().to_sparse(), [tensor()]):
        assert kind_of((), (tensor(),), (tensor(), odd)) is None
    assert kind_of((), (tensor().to_sparse(),), ()) is None
