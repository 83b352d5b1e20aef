"""QuantizedWeight: decoded by transformers and number by number, rounded to the nearest, saved, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_triton import QuantizedWeight
from moe_triton.quantization.formats import E2M1, FORMATS
from tests.helpers.compare import relative_rms

E, OUT, IN = 3, 40, 128
KINDS: dict[str, dict[str, Any]] = {
    "mxfp4": {},
    "nvfp4": {},
    "fp8": {},
    "int8": {},
    "int8 by 32, zero points": {"group": 32, "symmetric": False},
    "int4": {},
    "int4 by 64": {"group": 64},
    "int4 by 128, zero points": {"group": 128, "symmetric": False},
}


def quantized(kind: str, weight: Tensor, **options: Any) -> QuantizedWeight:
    return QuantizedWeight.quantize(weight, kind.split()[0], **KINDS[kind], **options)


def number_by_number(weight: QuantizedWeight) -> Tensor:
    """The definition at the top of formats.py, written out."""
    found = torch.empty(weight.codes.shape[0], weight.codes.shape[1], IN, dtype=torch.float64)
    for e, row, column in torch.cartesian_prod(*map(torch.arange, found.shape)).tolist():
        block = (e, row // weight.kind.rows, column // weight.group)
        stored = weight.codes[e, row, column // weight.kind.codes_per_element]
        if weight.format == "fp8":
            value = stored.double()
        else:
            code = int(stored)
            if weight.kind.bits == 4:
                code = code >> 4 if column % 2 else code & 15
            if weight.kind.is_integer:
                value = code - (int(weight.zeros[block]) if weight.zeros is not None else weight.kind.zero_point)
            else:
                value = -E2M1[code & 7] if code & 8 else E2M1[code]
        scale = weight.scales[block].double()
        if weight.format == "mxfp4":
            scale = 2.0 ** (scale - 127)
        if weight.global_scale is not None:
            scale = scale * weight.global_scale[e].double()
        found[e, row, column] = value * scale
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_definition(kind: str) -> None:
    weight = quantized(kind, torch.randn(2, 5, IN))
    expected = number_by_number(weight)
    assert relative_rms(weight.dequantize(torch.float32), expected) < 1e-7
    assert relative_rms(weight.dequantize(torch.float64), expected) < 1e-7  # fp32 inside
    assert weight.dequantize().dtype == torch.bfloat16


# SQNR in dB of a Gaussian weight, measured here with margins of 1 dB; see also docs/few_bits.md
QUALITY = {"mxfp4": 17.5, "nvfp4": 19, "fp8": 30, "int8": 40, "int8 by 32, zero points": 42, "int4": 18.5,
           "int4 by 64": 17.5, "int4 by 128, zero points": 17.5}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_how_close(kind: str) -> None:
    torch.manual_seed(0)
    dense = torch.randn(E, OUT, IN)
    error = relative_rms(quantized(kind, dense).dequantize(torch.float32), dense)
    assert error < 10 ** (-QUALITY[kind] / 20)


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_the_nearest(kind: str) -> None:
    """With the scales as they are, no other code comes closer."""
    dense = torch.randn(1, 3, IN)
    weight = quantized(kind, dense)
    chosen = (weight.dequantize(torch.float32) - dense).abs()
    if weight.format == "fp8":
        finite = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
        others = [code.expand(weight.codes.shape) for code in finite[~finite.float().isnan()]]
    else:
        codes = range(16) if weight.kind.bits == 4 else range(256)
        step = 17 if weight.kind.bits == 4 else 1
        others = [torch.full_like(weight.codes, code * step) for code in codes]
    for codes in others:
        other = (replace(weight, codes=codes).dequantize(torch.float32) - dense).abs()
        assert (chosen <= other * (1 + 1e-6) + 1e-9).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_representable_stays(kind: str) -> None:
    once = quantized(kind, torch.randn(E, OUT, IN)).dequantize(torch.float32)
    twice = quantized(kind, once).dequantize(torch.float32)
    assert relative_rms(twice, once) < (1e-6 if kind != "nvfp4" else 0.07)  # nvfp4 rounds its block scales again


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind: str) -> None:
    assert quantized(kind, torch.zeros(2, 4, IN)).dequantize().abs().max() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_it(kind: str) -> None:
    weight = quantized(kind, torch.randn(E, 300, IN))
    whole = weight.dequantize(torch.float32)
    assert torch.equal(weight.dequantize(torch.float32, expert=1), whole[1])
    assert torch.equal(weight.dequantize(torch.float32, expert=2, rows=slice(128, 300)), whole[2, 128:])
    assert torch.equal(weight[1:].dequantize(torch.float32), whole[1:])
    assert torch.equal(weight.dequantize(torch.float32, columns=slice(0, 128)), whole)
    assert torch.equal(weight.mT.dequantize(torch.float32), whole.mT)
    assert torch.equal(weight.mT.dequantize(torch.float32, expert=0, columns=slice(128, 256)), whole[0, 128:256].mT)
    assert (weight.shape, weight.mT.shape, len(weight)) == ((E, 300, IN), (E, IN, 300), E)
    with pytest.raises(TypeError, match="experts: got 1, wanted a slice"):
        weight[1]
    with pytest.raises(ValueError, match="rows, columns: got slice"):
        weight.dequantize(rows=slice(0, 4, 2))
    with pytest.raises(ValueError, match=f"multiple of {weight.group}"):
        weight.dequantize(columns=slice(1, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_several_blocks(kind: str) -> None:
    weight = quantized(kind, torch.randn(2, 256, 512))
    whole = weight.dequantize(torch.float32)
    assert torch.equal(weight.dequantize(torch.float32, columns=slice(128, 384)), whole[..., 128:384])
    part = weight.mT.dequantize(torch.float32, expert=1, rows=slice(256, 512), columns=slice(128, 256))
    assert torch.equal(part, whole[1, 128:256, 256:512].mT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_saved_and_loaded(kind: str, is_transposed: bool, tmp_path: Path) -> None:
    dense = torch.randn(E, OUT, IN)
    weight = quantized(kind, dense.mT if is_transposed else dense, is_transposed=is_transposed)
    assert torch.equal(
        weight.dequantize(), quantized(kind, dense).dequantize().mT if is_transposed else weight.dequantize()
    )
    save_file(weight.to_tensors("experts.down_proj") | {"other": torch.ones(1)}, tmp_path / "file")
    loaded = QuantizedWeight.from_tensors(load_file(tmp_path / "file"), "experts.down_proj")
    assert (loaded.format, loaded.is_transposed, loaded.shape) == (weight.format, is_transposed, weight.shape)
    assert torch.equal(loaded.dequantize(), weight.dequantize())
    with pytest.raises(ValueError, match="tensors: got 0 quantised weights named 'experts'"):
        QuantizedWeight.from_tensors(load_file(tmp_path / "file"), "experts")


def test_bytes() -> None:
    dense = torch.randn(2, 256, 256)
    bits = {kind: quantized(kind, dense).nbytes * 8 / dense.numel() for kind in KINDS}
    assert bits["mxfp4"] == 4.25
    assert 4.5 <= bits["nvfp4"] < 4.501
    assert 8 < bits["fp8"] < 8.01
    assert bits["int4"] == 5
    assert bits["int4 by 128, zero points"] == 4 + 40 / 128


def test_fp8_of_any_size() -> None:
    dense = torch.randn(2, 130, 200)
    weight = QuantizedWeight.quantize(dense, "fp8")
    assert weight.scales.shape == (2, 2, 2)
    assert relative_rms(weight.dequantize(torch.float32), dense) < 0.04


# peers --------------------------------------------------------------------------------------------------------------


def test_mxfp4_as_transformers_decodes_it() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (E, OUT, IN // 32, 16), dtype=torch.uint8)
    scales = torch.randint(100, 150, (E, OUT, IN // 32), dtype=torch.uint8)
    ours = QuantizedWeight.from_mxfp4(blocks, scales)
    theirs = convert_moe_packed_tensors(blocks, scales)  # [E, in, out]
    assert torch.equal(ours.dequantize().mT, theirs)
    assert torch.equal(QuantizedWeight.from_mxfp4(blocks.flatten(2), scales, is_transposed=True).dequantize(), theirs)


def test_fp8_as_deepseek_writes_it() -> None:
    weight = torch.randn(E, 256, 384).to(torch.float8_e4m3fn)
    scale_inv = torch.rand(E, 2, 3) + 0.5
    ours = QuantizedWeight.from_fp8_blocks(weight, scale_inv).dequantize(torch.float32)
    by_block = weight.float().view(E, 2, 128, 3, 128) * scale_inv[:, :, None, :, None]
    assert torch.equal(ours, by_block.view(E, 256, 384))


def test_nvfp4_of_both_conventions() -> None:
    dense = torch.randn(E, OUT, IN)
    ours = QuantizedWeight.quantize(dense, "nvfp4")
    assert ours.global_scale is not None
    assert torch.allclose(ours.global_scale, dense.abs().amax((1, 2)) / 2688)
    multiplied = QuantizedWeight.from_nvfp4(ours.codes, ours.scales, ours.global_scale)
    divided = QuantizedWeight.from_nvfp4(ours.codes, ours.scales, 1 / ours.global_scale, divides=True)
    assert torch.equal(multiplied.dequantize(), ours.dequantize())
    assert relative_rms(divided.dequantize(torch.float32), ours.dequantize(torch.float32)) < 1e-6
    one = QuantizedWeight.from_nvfp4(ours.codes, ours.scales, torch.tensor(0.5))
    assert one.global_scale.tolist() == [0.5] * E


# what it refuses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "fp6"}, "format: got 'fp6', wanted one of mxfp4"),
        ({"codes": torch.zeros(E, OUT, 64)}, "codes: got dtype torch.float32, wanted torch.uint8"),
        ({"codes": torch.zeros(E, OUT, 60, dtype=torch.uint8)}, "scales: got shape"),
        ({"scales": torch.zeros(E, OUT, 4)}, "scales: got dtype torch.float32, wanted torch.uint8"),
        ({"scales": torch.zeros(E, OUT, 3, dtype=torch.uint8)}, "scales: got shape .* wanted one for every 1 x 32"),
        ({"scales": torch.zeros(E - 1, OUT, 4, dtype=torch.uint8)}, "scales: got shape"),
        ({"zeros": torch.zeros(E, OUT, 4, dtype=torch.uint8)}, "zeros: got a tensor for mxfp4, wanted None"),
        ({"global_scale": torch.ones(E)}, "global_scale: wanted None for mxfp4"),
    ],
)
def test_parts_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    weight = QuantizedWeight.quantize(torch.randn(E, OUT, IN), "mxfp4")
    with pytest.raises((ValueError, TypeError), match=message):
        replace(weight, **change)


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (48, {"format": "mxfp4"}, "weight: got 48 input columns for mxfp4, wanted a multiple of 32"),
        (64, {"format": "int4", "group": 16}, "group: got 16 for int4, wanted 32 or 64 or 128"),
        (64, {"format": "mxfp4", "symmetric": False}, "symmetric: got False for mxfp4, wanted True"),
        (64, {"format": "bf16"}, "format: got 'bf16'"),
    ],
)
def test_what_cannot_be_quantised(columns: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizedWeight.quantize(torch.randn(1, 4, columns), **options)


def test_the_comparison_can_fail() -> None:
    dense = torch.randn(E, OUT, IN)
    found = QuantizedWeight.quantize(dense, "mxfp4").dequantize(torch.float32)
    limit = 10 ** (-QUALITY["mxfp4"] / 20)
    assert relative_rms(found, dense) < limit < relative_rms(found.roll(1, 0), dense)
    assert relative_rms(torch.zeros_like(found), dense) > limit
    assert FORMATS.keys() == {kind.split()[0] for kind in KINDS}
