"""Layers with quantised experts: what they compute, train, save, and refuse."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_triton import MoE, explain, moe_mlp, quantize
from moe_triton.backends.torch.fused import codes_in_words
from moe_triton.layers.quantized import QuantizedProjection, projection_of
from tests.helpers.compare import assert_close

D, N, E, K, T = 64, 32, 4, 2, 19
FORMATS = ("mxfp4", "nvfp4", "fp8", "int4")


def make(format: str | None = None, **options) -> MoE:
    torch.manual_seed(3)
    layer = MoE(D, N, E, K, **options)
    if format is not None:
        quantize(layer, format)
    return layer


def twin_of(layer: MoE) -> MoE:
    """The same layer with the numbers that its projections stand for, as parameters."""
    twin = make()
    twin.load_state_dict({k: v for k, v in layer.state_dict().items() if "_proj." not in k}, strict=False)
    with torch.no_grad():
        for name in ("gate_up_proj", "down_proj"):
            getattr(twin.experts, name).copy_(projection_of(layer.experts, name).dequantize(torch.float32))
    return twin


@pytest.mark.parametrize("format", FORMATS)
def test_it_computes_what_its_numbers_do(format):
    layer = make(format)
    twin = twin_of(layer)
    x = torch.randn(T, D)
    results = []
    for model in (layer, twin):
        inputs = x.clone().requires_grad_()
        out = model(inputs)
        (out.output.square().sum() + out.aux_loss).backward()
        results.append((out.output, inputs.grad, model.router.weight.grad))
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected)
    assert not [name for name, _ in layer.experts.named_parameters()]
    assert f"{format}, [4, 64, 64]" in repr(layer)


def test_bytes():
    layer = MoE(512, 256, 8, 2)
    quantize(layer, "mxfp4")
    held = sum(buffer.nbytes for buffer in layer.experts.buffers())
    assert held == 8 * 3 * 512 * 256 * 17 // 32  # half a byte each and a byte for 32


@pytest.mark.parametrize("format", FORMATS)
def test_saved_and_loaded(format, tmp_path: Path):
    layer = make(format)
    save_file(layer.state_dict(), tmp_path / "layer")
    torch.manual_seed(8)
    other = MoE(D, N, E, K)
    quantize(other, format)
    other.load_state_dict(load_file(tmp_path / "layer"))
    x = torch.randn(T, D)
    assert torch.equal(other(x).output, layer(x).output)
    with pytest.raises(RuntimeError, match="gate_up_proj"):
        make().load_state_dict(layer.state_dict())


@pytest.mark.parametrize("format", FORMATS)
def test_a_change_of_dtype_leaves_it_as_it_is(format):
    layer = make(format)
    before = {name: buffer.clone() for name, buffer in layer.experts.named_buffers()}
    layer.bfloat16()
    assert layer.router.weight.dtype == torch.bfloat16
    for name, buffer in layer.experts.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer.view(torch.uint8), before[name].view(torch.uint8))
    out = layer(torch.randn(T, D, dtype=torch.bfloat16)).output
    assert out.dtype == torch.bfloat16
    assert torch.equal(copy.deepcopy(layer).state_dict()["experts.down_proj.codes"], before["down_proj.codes"])


def test_adapters_train_over_it():
    layer = make("mxfp4")
    layer.experts.add_lora(r=4, alpha=8)
    for parameter in layer.router.parameters():
        parameter.requires_grad_(False)
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert [p.shape[0] for p in trained] == [E] * 4
    codes = layer.experts.down_proj.codes.clone()
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    x, target = torch.randn(64, D), torch.randn(64, D)
    losses = []
    for _ in range(20):
        loss = (layer(x).output - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(layer.experts.down_proj.codes, codes)
    with pytest.raises(ValueError, match="merge_lora: got quantised projections"):
        layer.experts.merge_lora()


def test_adapters_from_before():
    layer = make()
    layer.experts.add_lora(r=4, alpha=8)
    with torch.no_grad():
        layer.experts.down_lora_b.normal_()
    quantize(layer, "int4")
    x, given = torch.randn(T, D), layer.experts
    routing = layer.router(x)
    expected = moe_mlp(
        x,
        routing.experts,
        routing.weights,
        projection_of(given, "gate_up_proj").dequantize(torch.float32),
        projection_of(given, "down_proj").dequantize(torch.float32),
        gate_up_lora=given.lora("gate_up"),
        down_lora=given.lora("down"),
        backend="reference",
    )
    assert_close(layer(x).output, expected)


def test_what_it_refuses():
    layer = make("mxfp4")
    with pytest.raises(ValueError, match="quantize: got experts with quantised projections"):
        quantize(layer, "int4")
    with pytest.raises(ValueError, match="format: got 'fp5'"):
        make("fp5")
    merged = make()
    merged.experts.add_lora(r=2, alpha=2)
    merged.experts.merge_lora()
    with pytest.raises(ValueError, match="quantize: got experts with merged adapters"):
        quantize(merged, "int4")
    odd = MoE(24, 20, 4, 2)
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj: weight: got 24 input columns for mxfp4"):
        quantize(odd, "mxfp4")
    assert isinstance(odd.experts.gate_up_proj, torch.nn.Parameter)  # nothing was replaced by halves
    assert isinstance(layer.experts.gate_up_proj, QuantizedProjection)


def test_explained():
    (found,) = explain(make("mxfp4"))
    assert found.dtype == torch.float32
    assert found.parts[-1].step == "projections in mxfp4"
    assert codes_in_words(torch.float32) in str(found)
    assert not [part for (one,) in [explain(make())] for part in one.parts if "projections in" in part.step]
