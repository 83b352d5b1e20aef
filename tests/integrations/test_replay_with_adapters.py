"""Replay and statistics of a model with PEFT's adapters."""

from __future__ import annotations

import peft
import pytest
import torch

import moe_triton
from moe_triton import RoutingRecorder
from tests.helpers.families import VOCAB, tiny_model

E, K = 6, 2


@pytest.mark.parametrize("target", [{"target_parameters": ["experts.gate_up_proj"]}, {"target_modules": "all-linear"}])
def test_a_model_with_adapters(target):
    """PEFT wraps the experts, and with "all-linear" the router too."""
    model = peft.get_peft_model(tiny_model("mixtral"), peft.LoraConfig(r=2, **target))
    tokens = torch.randint(2, VOCAB, (1, 5))
    recorder, monitor = RoutingRecorder(model), moe_triton.LoadMonitor(model)
    data = torch.rand(5, 2, E).argsort(-1)[..., :K]
    with recorder.replay(data):
        wanted = model(tokens).logits
    with recorder.record():
        model(tokens)
    with recorder.replay(recorder.data):
        assert not torch.equal(model(tokens).logits, wanted)
    with recorder.replay(data):
        assert torch.equal(model(tokens).logits, wanted)
    name = "base_model.model.model.layers.0.mlp.experts"
    assert monitor.read()[name].assignments == 4 * 5 * K
    assert moe_triton.explain(model)[0].name == name
