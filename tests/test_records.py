"""Records that are made in one step, and what tells one kind of call from another."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from moe_triton.dispatch import dispatch
from moe_triton.records import ExpertCall, ExpertParameters, ExpertSpec
from moe_triton.torch_internals import record


def make(**changes: object) -> ExpertCall:
    fields = {
        "hidden": torch.ones(3, 4),
        "weights": torch.ones(3, 2),
        "dispatched": dispatch(torch.tensor([[0, 1]] * 3), 2),
        "parameters": ExpertParameters(torch.ones(2, 12, 4), torch.ones(2, 4, 6)),
        "spec": ExpertSpec(),
    }
    return record(ExpertCall, **{**fields, **changes})


def test_a_record_made_in_one_step_is_as_its_constructor_makes_it() -> None:
    made = make()
    assert vars(ExpertCall(**vars(made))) == {**vars(made), "is_part": False}
    assert made.is_part is False
    assert replace(made, is_part=True).is_part is True
    with pytest.raises(FrozenInstanceError):
        made.is_part = True  # type: ignore[misc]


def test_the_kind_of_a_call() -> None:
    call = make()
    assert call.kind is not None
    assert make().kind is call.kind
    others = [
        make(is_part=True),
        make(spec=ExpertSpec(activation="geglu")),
        make(hidden=torch.ones(3, 8)[:, :4]),
        make(weights=torch.ones(3, 2, dtype=torch.bfloat16)),
        make(dispatched=dispatch(torch.tensor([[0, 1]] * 3), 3)),
        make(parameters=call.parameters._replace(gate_up_bias=torch.ones(2, 12))),
    ]
    kinds = [call.kind, *(other.kind for other in others)]
    assert None not in kinds
    assert len(set(kinds)) == len(kinds)
