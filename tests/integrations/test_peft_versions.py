"""How PEFT packs its adapters, which of its versions ours were checked on, and what happens with another."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import peft
import pytest
import torch
from peft import get_peft_model
from peft.tuners.lora import layer as peft_layers
from torch import nn

import moe_triton
from moe_triton.integrations import peft as ours
from moe_triton.layers import MoE
from tests.helpers.adapters import (
    TOLERANCE,
    adapted,
    assert_same,
    logits,
    lora_config,
    nothing_materialised,
    switch,
    train_step,
)
from tests.helpers.compare import assert_close


@pytest.mark.parametrize("is_transposed", [False, True])
def test_packing(is_transposed):
    """A expert-slowest, B expert-fastest, written out."""
    experts, rank, size_in, size_out = 3, 2, 4, 5
    shape = (experts, size_in, size_out) if is_transposed else (experts, size_out, size_in)
    lora_a = torch.arange(experts * rank * size_in).view(experts * rank, size_in)
    lora_b = torch.arange(size_out * rank * experts).view(size_out, rank * experts)
    for version in (None, "0.18.0", "0.21.2"):
        a, b = ours.unpack(lora_a, lora_b, shape, is_transposed=is_transposed, version=version)
        for e in range(experts):
            for k in range(rank):
                assert torch.equal(a[e, k], lora_a[e * rank + k])
                assert torch.equal(b[e, :, k], lora_b[:, k * experts + e])


def test_packing_before_0_19_1():
    """in and out are swapped for [E, out, in]: PEFT 0.18's delta weight, einsum("o r e, e r i -> e i o")."""
    experts, rank, size_in, size_out = 3, 2, 4, 5
    generator = torch.Generator().manual_seed(0)
    old_a = torch.randn(experts * rank, size_out, generator=generator)
    old_b = torch.randn(size_in, rank * experts, generator=generator)
    delta = torch.einsum("ore,eri->eio", old_b.view(size_in, rank, experts), old_a.view(experts, rank, size_out))
    a, b = ours.unpack(old_a, old_b, (experts, size_out, size_in), version="0.18.1")
    assert a.shape == (experts, rank, size_in)
    assert_close(b @ a, delta)


def test_a_square_parameter_needs_a_version():
    a, b = torch.zeros(6, 4), torch.zeros(4, 6)
    ours.unpack(a, b, (3, 4, 4), version="0.19.1")
    ours.unpack(a, b, (3, 4, 4), version="0.21.2.dev0@abc")
    for version in (None, "0.18.1", "0.19.0"):
        with pytest.raises(
            ValueError, match=r"square parameter \[3, 4, 4\] by PEFT .*, which may have in and out swap"
        ):
            ours.unpack(a, b, (3, 4, 4), version=version)
    with pytest.raises(ValueError, match=r"got shapes \[6, 4\] and \[4, 6\], wanted \[3\*r, 7\] and \[4, r\*3\]"):
        ours.unpack(a, b, (3, 4, 7), version="0.21.2")


def test_a_square_adapter_of_an_old_peft_is_refused(tmp_path):
    moe_triton.swap(layer := MoE(8, 4, 4, 2))  # gate_up_proj is [4, 8, 8]
    config = lora_config(target_modules=[], target_parameters=["experts.gate_up_proj"])
    config.peft_version = "0.18.1"
    with pytest.raises(ValueError, match=r"square parameter \[4, 8, 8\] by PEFT 0.18.1"):
        get_peft_model(nn.Sequential(layer), config)


# Versions -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_delivered(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Takes the patch back, of a PEFT that then has the version given; also at the end of the test."""

    def deliver(version: str) -> None:
        ours.install()
        own = peft_layers.ParamWrapper._moe_triton
        monkeypatch.setattr(peft_layers.ParamWrapper, "_activate_lora", own.activate)
        monkeypatch.setattr(peft_layers.ParamWrapper, "update_layer", own.update)
        monkeypatch.setattr(peft_layers.ParamWrapper, "merge", own.merge)
        monkeypatch.setattr(peft_layers.ParamWrapper, "_get_in_out_features", own.sizes)
        monkeypatch.delattr(peft_layers.ParamWrapper, "_moe_triton")
        monkeypatch.setattr(peft, "__version__", version)

    return deliver


def test_a_version_that_was_not_checked_is_correct_with_one_warning(as_delivered):
    model = adapted("qwen3_moe")
    expected = train_step(model)
    as_delivered("0.99.0")
    with pytest.warns(UserWarning, match=r"peft 0.99.0: moe_triton was checked on 0.19.1 and later, below 0.22"):
        moe_triton.swap(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        moe_triton.swap(model)
        assert_same(train_step(model), expected, TOLERANCE)
    with nothing_materialised(), pytest.raises(AssertionError, match="of the weight's size"):
        logits(model)


def test_peft_imported_after_register(as_delivered):
    """The first forward is correct and installs what the next ones use."""
    model = adapted("qwen3_moe")
    expected = train_step(model)
    switch(model, "moe_triton")
    as_delivered(peft.__version__)
    assert_same(train_step(model), expected, TOLERANCE)
    with nothing_materialised():
        assert_same(train_step(model), expected, TOLERANCE)
