"""Codes and scales against a decoding of their own, number by number, and every rounding against all codes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_triton.quantization import formats


def e2m1(code: int) -> float:
    """A sign, two bits of exponent and one of mantissa; subnormal where the exponent is 0."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
    return -magnitude if sign else magnitude


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int4"])
def test_codes_of_four_bits(name: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(2).view(2, 256)
    found = formats.values_of(codes, formats.FORMATS[name])
    value = float if name == "int4" else e2m1
    assert found.tolist() == [[value(code) for byte in range(256) for code in (byte & 15, byte >> 4)]] * 2


def test_codes_of_eight_bits() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert formats.values_of(codes, formats.FORMATS["int8"]).tolist() == list(range(256))
    floats = codes.view(torch.float8_e4m3fn)
    exact = formats.values_of(floats, formats.FORMATS["fp8"]).float()
    assert torch.equal(exact.nan_to_num(7), floats.float().nan_to_num(7))


def test_e8m0() -> None:
    found = formats.scales_of(torch.arange(256, dtype=torch.uint8))
    assert found[:255].tolist() == [2.0 ** (byte - 127) for byte in range(255)]
    assert found[255].isnan()


def test_packing() -> None:
    codes = torch.randint(0, 16, (3, 5, 8), dtype=torch.uint8)
    packed = formats.pack(codes)
    assert packed.shape == (3, 5, 4)
    assert packed[0, 0, 0] == codes[0, 0, 0] + 16 * codes[0, 0, 1]
    assert torch.equal(formats.unpack(packed), codes)


@settings(max_examples=200, deadline=None)
@given(st.floats(-8, 8, width=32))
def test_the_nearest_code(value: float) -> None:
    code = int(formats.nearest_e2m1(torch.tensor([value])))
    distances = [abs(e2m1(other) - value) for other in range(16)]
    assert abs(e2m1(code) - value) == min(distances)
    assert math.copysign(1, e2m1(code)) == math.copysign(1, value)


@pytest.mark.parametrize("sign", [1, -1])
def test_ties_go_to_the_even_code(sign: int) -> None:
    for lower, (below, above) in enumerate(itertools.pairwise(formats.E2M1)):
        code = int(formats.nearest_e2m1(torch.tensor([sign * (below + above) / 2])))
        assert code & 7 == lower + lower % 2
        assert code >> 3 == (sign < 0)


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (6.0, 127),
        (7.9, 127),
        (8.0, 128),
        (4.0, 127),
        (3.9, 126),
        (2.0**-126, 0),
        (0.0, 0),
        (3e38, 252),
        (math.inf, 255),
    ],
)
def test_the_scale_of_a_block(largest: float, expected: int) -> None:
    assert int(formats.e8m0_of(torch.tensor(largest))) == expected


def test_a_nan_is_its_blocks_scale() -> None:
    assert int(formats.e8m0_of(torch.tensor(math.nan))) == formats.E8M0_NAN
