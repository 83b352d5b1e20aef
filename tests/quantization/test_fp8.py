"""e4m3 codes by groups, against rounding that is computed number by number."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe_triton.quantization import QuantizedWeight
from moe_triton.quantization.fp8 import GROUP, MX_GROUP, decode, quantize, rounded

GROUPS = [(1, GROUP), (GROUP, GROUP), (GROUP, 1)]
MAGNITUDES = sorted(
    {m * 2.0**-9 for m in range(8)} | {(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)}
)[:-1]  # of e4m3: 0x7f is NaN


def nearest(x: float) -> float:
    """The e4m3 number nearest to x, of two the one with the even code."""
    distances = [(abs(abs(x) - magnitude), code % 2, code) for code, magnitude in enumerate(MAGNITUDES)]
    return math.copysign(MAGNITUDES[min(distances)[2]], x)


def expected_of(x: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Codes as numbers, and scales, group by group."""
    codes = torch.zeros_like(x)
    scales = torch.zeros(-(-x.shape[0] // rows), -(-x.shape[1] // columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            group = x[here]
            largest = group.abs().max()
            scales[i, j] = 1.0 if largest == 0 else largest / 448
            codes[here] = torch.tensor([nearest(v) for v in (group / scales[i, j]).flatten().tolist()]).view_as(group)
    return codes, scales


def test_the_largest_number() -> None:
    assert MAGNITUDES[-1] == 448
    assert len(MAGNITUDES) == 127


@pytest.mark.parametrize(("rows", "columns"), GROUPS)
@pytest.mark.parametrize("shape", [(5, 7), (3, 150), (140, 3)])
def test_codes_and_scales(rows: int, columns: int, shape: tuple[int, int]) -> None:
    x = torch.randn(shape) * torch.logspace(-6, 3, shape[1])
    x[:, 1] = 0  # a group of zeros in columns of one
    codes, scales = quantize(x, rows, columns)
    assert codes.dtype == torch.float8_e4m3fn
    assert scales.dtype == torch.float32
    expected = expected_of(x, rows, columns)
    assert torch.equal(codes.float(), expected[0])
    assert torch.equal(scales, expected[1])
    wide = expected[1].repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]
    assert torch.equal(decode(codes, scales, rows, columns), expected[0] * wide)


@pytest.mark.parametrize(("rows", "columns"), [(1, MX_GROUP), (MX_GROUP, 1)])
def test_microscaled_codes_and_scales(rows: int, columns: int) -> None:
    """Number by number, with the first power of two that is large enough; torch's own E8M0 decodes the scales."""
    x = torch.randn(35, 70) * torch.logspace(-30, 30, 70)
    x[:, 1], x[:32, 2], x[2] = 0, 1e-44, 0  # groups of zeros, and one whose scale would be below E8M0's range
    codes, scales = quantize(x, rows, columns, microscaled=True)
    powers = scales.view(torch.float8_e8m0fnu).float()
    assert scales.shape == (-(-35 // rows), -(-70 // columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            largest, power = x[here].abs().max().item(), 2.0**-127
            while largest / power > 448:
                power *= 2
            assert powers[i, j] == power
            assert codes[here].float().flatten().tolist() == [nearest(v / power) for v in x[here].flatten().tolist()]
    wide = powers.repeat_interleave(rows, 0)[:35].repeat_interleave(columns, 1)[:, :70]
    assert torch.equal(decode(codes, scales, rows, columns), codes.float() * wide)
    assert rounded(torch.tensor([[1.0, float("nan")]]), 1, MX_GROUP, microscaled=True).isnan().all()
    for largest, power in ((448.0, 1.0), (449.0, 2.0), (511.0, 2.0)):  # nothing saturates
        assert quantize(torch.tensor([[largest, 1.0]]), 1, MX_GROUP, microscaled=True)[1].item() - 127 == power - 1


def test_several_matrices_at_once() -> None:
    x = torch.randn(3, 130, 140)
    one_by_one = torch.stack([rounded(part, GROUP, GROUP) for part in x])
    assert torch.equal(rounded(x, GROUP, GROUP), one_by_one)


def test_what_is_rounded_is_rounded_no_further() -> None:
    x = rounded(torch.randn(4, 256).bfloat16(), 1, GROUP)
    assert torch.equal(rounded(x, 1, GROUP), x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("rows", "columns"), GROUPS)
def test_what_is_not_finite_makes_its_group_nan(bad: float, rows: int, columns: int) -> None:
    x = torch.randn(256, 256)
    x[130, 5] = bad
    is_nan = rounded(x, rows, columns).isnan()
    first = 128 if rows > 1 else 130
    expected = torch.zeros(256, 256, dtype=torch.bool)
    expected[first : first + rows, (0 if columns > 1 else 5) : (128 if columns > 1 else 6)] = True
    assert torch.equal(is_nan, expected)


def test_numbers_whose_scale_is_zero_become_zeros() -> None:
    assert rounded(torch.tensor([[1e-45, 0.0]]), 1, GROUP).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("shape", [(0, 128), (3, 0), (0, 0)])
def test_nothing(shape: tuple[int, int]) -> None:
    assert rounded(torch.empty(shape), 1, GROUP).shape == shape


def test_blocks_are_those_of_a_quantized_weight() -> None:
    x = torch.randn(2, 130, 140)
    codes, scales = quantize(x, GROUP, GROUP)
    weight = QuantizedWeight.quantize(x, "fp8")
    assert torch.equal(weight.codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(weight.scales, scales)
