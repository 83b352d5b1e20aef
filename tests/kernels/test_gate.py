"""The gate's kernels: parts of fp32 matrices, and products of 16-bit ones, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_triton.backends.torch import gate as by_torch
from moe_triton_kernels.gate import product, split
from tests.helpers.compare import assert_close

device = "cuda" if torch.cuda.is_available() else "cpu"


def values(rows: int, columns: int) -> Tensor:
    """fp32 of all 24 bits, over the range in which fp16's parts hold them (from 2**-23 on), with some special ones."""
    found = torch.randn(rows, columns).sign() * (0.2 + torch.rand(rows, columns)) * torch.logspace(-6, 4, columns)
    found.view(-1)[:4] = torch.tensor([0.0, -0.0, 1 - 2.0**-24, 3.0])
    return found.to(device)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("order", [(0, 1), (0, 1, 2), (0, 1, 0), (0, 0, 1), (0, 0)])
@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 1.0), (torch.float16, 2048.0)])
def test_parts_lie_where_they_ought_to_and_add_up(
    dtype: torch.dtype, step: float, order: tuple[int, ...], stacked: bool
) -> None:
    x = values(37, 60)
    parts = split(x, dtype, order, stacked=stacked, step=step)
    assert torch.equal(parts, by_torch.split(x, dtype, order, stacked=stacked, step=step))
    chunks = [part.double() for part in parts.chunk(len(order), 0 if stacked else 1)]
    assert torch.equal(chunks[0], x.to(dtype).double())
    assert all(torch.equal(chunks[0], chunk) == (number == 0) for number, chunk in zip(order, chunks, strict=True))
    if order == (0, 1, 2):
        assert torch.equal(chunks[0] + (chunks[1] + chunks[2] / step) / step, x.double())
    if order == (0, 1):
        assert_close(chunks[0] + chunks[1] / step, x.double(), tolerance=2.0**-16)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about the intended infinities
@pytest.mark.parametrize("implementation", [split, by_torch.split])
def test_what_is_infinite_in_the_dtype_stays_so(implementation) -> None:
    x = torch.tensor([[float("inf"), -float("inf"), float("nan"), 1e6]], device=device)
    parts = implementation(x, torch.float16, (0, 1), stacked=True)
    assert parts[0].tolist()[:2] == [float("inf"), -float("inf")]
    assert parts[0, 3] == float("inf")
    assert (parts[1, [0, 1, 3]] == 0).all()
    assert parts[:, 2].isnan().all()


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.tuples(st.integers(0, 70), st.sampled_from([0, 1, 31, 64, 96]), st.sampled_from([1, 5, 32, 70])),
    transposed=st.tuples(st.booleans(), st.booleans()),
    dtypes=st.sampled_from(
        [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)]
    ),
    adds=st.booleans(),
)
def test_product(
    sizes: tuple[int, int, int],
    transposed: tuple[bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype],
    adds: bool,
) -> None:
    (m, k, n), (narrow, dtype) = sizes, dtypes
    a, b = torch.randn(m, k, device=device).to(narrow), torch.randn(k, n, device=device).to(narrow)
    a, b = (x.mT.contiguous().mT if swap else x for x, swap in zip((a, b), transposed, strict=True))
    addend = torch.randn(m, n, device=device).to(narrow) if adds else None
    out = product(a, b, dtype, addend)
    exact = a.double() @ b.double() + (0 if addend is None else addend.double())
    assert out.dtype == dtype
    # one rounding of an fp32 sum
    assert_close(out, exact, tolerance=1e-6 if dtype == torch.float32 else 2.0**-8.5)
