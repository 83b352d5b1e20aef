"""Our products with a gate called between them, by themselves."""

from __future__ import annotations

import torch

from moe_triton import dispatch, reference
from moe_triton.integrations.called_gate import called_gate_mlp
from moe_triton.records import ExpertCall, ExpertParameters, ExpertSpec
from tests.helpers.compare import assert_close
from tests.helpers.experts_modules import D, E, N, make_inputs


def test_called_gate_equals_the_reference():
    x, index, weights = make_inputs()
    up, down = torch.randn(E, 2 * N, D, dtype=x.dtype), torch.randn(E, D, N, dtype=x.dtype)
    actual = called_gate_mlp(x, index, weights, up, down, lambda h: reference.activate(h, "geglu"))
    plan = dispatch(index, E)
    call = ExpertCall(
        hidden=x,
        weights=weights,
        dispatched=plan,
        parameters=ExpertParameters(up, down),
        spec=ExpertSpec(activation="geglu"),
    )
    expected = reference.moe_experts(call)
    assert_close(actual, expected)
