"""Codes decoded by kernels: the bits of `QuantizedWeight.dequantize`, in both directions, and what is in their way."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_triton import QuantizedWeight
from moe_triton.backends.triton.parameters import matrices
from moe_triton_kernels.heuristics import DECODING, decodes_in_loop, over_codes
from moe_triton_kernels.launch import Config
from moe_triton_kernels.quantized import FORMATS, decode, quantized_per_expert
from tests.helpers.problems import DEVICE

KINDS = {
    "mxfp4": {},
    "nvfp4": {},
    "fp8": {},
    "int8": {"group": 32},
    "int8, zeros": {"group": 32, "symmetric": False},
    "int4": {},
    "int4, zeros": {"symmetric": False},
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def quantized(kind: str, *shape: int) -> QuantizedWeight:
    return QuantizedWeight.quantize(torch.randn(*shape, device=DEVICE), kind.split(",")[0], **KINDS[kind])


def same_bits(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def check(weight: QuantizedWeight, dtype: torch.dtype) -> None:
    """The projection and its transpose; a NaN is a NaN."""
    expected = weight.dequantize(dtype)
    found = matrices(weight)
    for projection in (found, found.transposed()):
        decoded = decode(projection, dtype)
        strides = (decoded.layout.stride_e, *decoded.strides)
        as_read = decoded.data.as_strided((len(weight), *projection.decoding.size), strides)
        same_bits(as_read, expected if projection is found else expected.mT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_dequantize(kind: str, dtype: torch.dtype) -> None:
    check(quantized(kind, 2, 66, 160), dtype)


def test_a_projection_that_counts_as_transposed() -> None:
    check(quantized("mxfp4", 2, 16, 64).mT, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_scale_of_mxfp4(dtype: torch.dtype) -> None:
    """Infinities, numbers below the normal ones, and NaN where the scale is."""
    weight = quantized("mxfp4", 1, 256, 32)
    codes = torch.arange(256, dtype=torch.uint8).repeat(16).view(1, 256, 16)
    check(replace(weight, codes=codes, scales=torch.arange(256, dtype=torch.uint8).view(1, 256, 1)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_of_fp8_and_every_scale_of_nvfp4(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    check(replace(quantized("fp8", 1, 4, 64), codes=every.view(1, 4, 64)), dtype)
    check(replace(quantized("nvfp4", 1, 256, 16), scales=every.view(1, 256, 1)), dtype)


@pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16])
def test_scales_of_sixteen_bits(scales: torch.dtype) -> None:
    weight = QuantizedWeight.quantize(torch.randn(1, 16, 128, device=DEVICE), "int4", group=64, symmetric=False)
    check(replace(weight, scales=weight.scales.to(scales)), torch.float32)


@pytest.mark.parametrize("columns", [135, 130, 7])
def test_columns_of_fp8_that_fill_no_word(columns: int) -> None:
    check(quantized("fp8", 2, 50, columns), torch.float32)


def test_codes_that_do_not_lie_in_words() -> None:
    weight = quantized("int8", 4, 8, 64)
    shifted = torch.zeros(weight.codes.numel() + 1, dtype=torch.uint8)[1:].view(weight.codes.shape)
    for codes in (shifted.copy_(weight.codes), weight.codes.mT.contiguous().mT):
        check(replace(weight, codes=codes), torch.float32)
    check(weight[1:3], torch.float32)  # nothing is copied of some experts
    assert matrices(weight[1:3]).data.data_ptr() == weight.codes[1:].data_ptr()


def test_no_numbers() -> None:
    empty = torch.empty(2, 0, 32, dtype=torch.uint8)
    found = quantized_per_expert("mxfp4", empty, torch.empty(2, 0, 2, dtype=torch.uint8), block=(1, 32))
    assert decode(found, torch.float32).data.shape == (2, 0, 64)


def test_where_a_projection_is_decoded() -> None:
    """The arithmetic in `decodes_in_loop`: mxfp4 for bf16 up to three tiles of 128 rows."""
    assert DECODING.keys() == FORMATS.keys()
    rows = {name: max(r for r in range(128, 4096, 128) if decodes_in_loop(name, r, 2)) for name in FORMATS}
    assert rows == {"mxfp4": 384, "nvfp4": 256, "fp8": 256, "int8": 256, "int4": 384}
    assert decodes_in_loop("mxfp4", 0.25, 2)
    assert not decodes_in_loop("mxfp4", 385, 2)
    assert decodes_in_loop("mxfp4", 768, 4)  # fp32 moves twice the bytes


def test_a_block_of_scales_stays_within_gate_or_up() -> None:
    assert decodes_in_loop("fp8", 1, 2, block=128, half=256)
    assert not decodes_in_loop("fp8", 1, 2, block=128, half=192)


def test_fewer_columns_of_a_thread_over_codes() -> None:
    tile = Config(block_m=32, block_n=64, block_k=64, num_warps=4, num_stages=4)
    assert over_codes("down", tile) == replace(tile, num_warps=8)
    wide = replace(tile, block_m=128, block_n=256, num_warps=8)
    assert over_codes("d_rows", wide) == replace(wide, block_n=128)
    half = replace(wide, block_n=128)
    assert (over_codes("up_gated", half).block_n, over_codes("down", half).block_n) == (64, 128)
