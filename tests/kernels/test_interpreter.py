"""The interpreter of the tests: bf16 as the hardware computes it, and triton.language as it was after a launch."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.helpers.compare import assert_close

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter runs on a CPU")
NAN, INF = float("nan"), float("inf")


@triton.jit
def product_kernel(a, b, out, TRANSPOSED: tl.constexpr, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    left = tl.load(a + row * SIZE + column)
    right = tl.load(b + row * SIZE + column)
    if TRANSPOSED:
        right = tl.trans(right)
    acc = tl.full((SIZE, SIZE), 1.0, tl.float32)
    tl.store(out + row * SIZE + column, tl.dot(left, right, acc))


@triton.jit
def arithmetic_kernel(a, b, total, product, less, negative, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(total + at, x + y)
    tl.store(product + at, x * y)
    tl.store(less + at, x < y)
    tl.store(negative + at, -x)


@triton.jit
def convert_kernel(values, out, back, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    narrow = tl.load(values + at).to(tl.bfloat16)
    tl.store(out + at, narrow)
    tl.store(back + at, narrow.to(tl.float32))


@triton.jit
def sum_kernel(values, out, SIZE: tl.constexpr):
    tl.store(out, tl.sum(tl.load(values + tl.arange(0, SIZE)), 0))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_summed_in_fp32_and_rounded_once(dtype: torch.dtype, transposed: bool) -> None:
    a, b = (torch.randn(32, 32).bfloat16() for _ in range(2))
    out = torch.empty(32, 32, dtype=dtype)
    product_kernel[(1,)](a, b, out, TRANSPOSED=transposed, SIZE=32)
    exact = 1 + a.double() @ (b.T if transposed else b).double()
    assert_close(out, exact, tolerance=1e-6 if dtype == torch.float32 else 2.0**-8)
    if dtype == torch.bfloat16:  # the nearest, but for the few that the fp32 sum moves over a tie
        assert (out == exact.to(dtype)).double().mean() > 0.99


def test_arithmetic_is_that_of_torch() -> None:
    a, b = (torch.randn(64).bfloat16() for _ in range(2))
    total, product, negative = (torch.empty_like(a) for _ in range(3))
    less = torch.empty(64, dtype=torch.int32)
    arithmetic_kernel[(1,)](a, b, total, product, less, negative, SIZE=64)
    for got, wanted in ((total, a + b), (product, a * b), (less.bool(), a < b), (negative, -a)):
        assert torch.equal(got, wanted)


def converted(values: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(len(values), dtype=torch.bfloat16)
    back = torch.empty(len(values))
    convert_kernel[(1,)](values, out, back, SIZE=len(values))
    return out, back


def test_a_conversion_rounds_to_the_nearest_and_ties_to_even() -> None:
    ties = [1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 2 - 2.0**-8]  # the last rounds up into the next exponent
    odd = [0.0, -0.0, INF, -INF, NAN, 1e-40, -1e-45, 3.4e38, 3.39e38, 1 + 2.0**-8 + 2.0**-20, 65504.0, 0.1]
    values = torch.cat([torch.tensor(ties + odd), torch.randn(112) * torch.logspace(-38, 38, 112)])
    out, back = converted(values)
    expected = values.bfloat16()
    assert torch.equal(out.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(out.view(torch.int16)[:2], expected.view(torch.int16)[:2])
    assert torch.equal(out.isnan(), values.isnan())
    assert torch.equal(back.nan_to_num(7.0), expected.float().nan_to_num(7.0))
    assert torch.equal(out[:4].float(), torch.tensor([1.0, 1 + 2.0**-6, -1.0, 2.0]))


def test_a_launch_leaves_the_language_as_it_was() -> None:
    out, owners = torch.empty(1), (tl, tl.core, tl.math, tl.tensor)
    sum_kernel[(1,)](torch.ones(16), out, SIZE=16)  # the first one may copy what a class has inherited into it
    before = [dict(vars(owner)) for owner in owners]
    sum_kernel[(1,)](torch.full((16,), 2.0), out, SIZE=16)
    assert out.item() == 32
    for owner, names in zip(owners, before, strict=True):
        assert vars(owner).keys() == names.keys()
        assert all(value is names[name] for name, value in vars(owner).items()), owner
