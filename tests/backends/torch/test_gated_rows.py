"""Activations of rows on a CPU, by compiled loops and by torch: the reference's numbers, and the same infinities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_triton import reference
from moe_triton.backends.torch import fused, gated_rows
from moe_triton.backends.torch.gated_rows import activate_rows, activate_rows_backward
from moe_triton.records import ExpertSpec
from tests.helpers.compare import TOLERANCE, assert_close

SPECS = {
    "swiglu": ExpertSpec(),
    "cut, another alpha": ExpertSpec(activation_limit=1.5, activation_alpha=1.3),
    "gpt_oss": ExpertSpec(activation="gpt_oss", activation_limit=2.0),
    "alternating": ExpertSpec(activation="gpt_oss", activation_limit=2.0, is_concatenated=False),
}
OTHERS = {
    "geglu": ExpertSpec(activation="geglu"),
    "ungated": ExpertSpec(activation="silu"),
}
ROWS, N = 9, 37  # an odd number of elements is left after whole vectors


@pytest.fixture(params=["0", "1"], ids=["by torch", "by loops"])
def by_loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param == "1":
        pytest.importorskip("numba")
    monkeypatch.setenv(fused.VARIABLE, request.param)
    run_loops_always(monkeypatch)
    return request.param == "1"


def run_loops_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on few rows."""
    monkeypatch.setattr(gated_rows, "LEAST", 1)


def draw(spec: ExpertSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """h, the gradient of the activation, and the weights."""
    width = 2 * N if spec.is_gated else N
    return (3 * torch.randn(ROWS, width)).to(dtype), torch.randn(ROWS, N).to(dtype), torch.rand(ROWS, 1).to(dtype)


def backward(h: Tensor, grad: Tensor, weights: Tensor, spec: ExpertSpec) -> dict[str, Tensor]:
    grad_h, weighted_a, grad_weights = torch.empty_like(h), torch.empty_like(grad), weights.new_empty(len(h))
    activate_rows_backward(h, grad.clone(), weights, spec, grad_h, weighted_a, grad_weights)
    return {"h": grad_h, "weighted a": weighted_a, "weights": grad_weights}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SPECS | OTHERS)
def test_results_of_the_reference(name: str, dtype: torch.dtype, by_loops: bool) -> None:
    spec = (SPECS | OTHERS)[name]
    h, grad, weights = draw(spec, dtype)
    assert gated_rows._runs_loops(spec, h) == (by_loops and name in SPECS)
    wide = [x.double().requires_grad_() for x in (h, weights)]
    a = reference.activate(
        wide[0], spec.activation, spec.is_concatenated, limit=spec.activation_limit, alpha=spec.activation_alpha
    )
    expected_h, expected_weights = torch.autograd.grad(a * wide[1], wide, grad.double())
    found = backward(h, grad, weights, spec)
    limit = 2e-6 if dtype == torch.float32 else TOLERANCE[dtype]
    assert_close(activate_rows(h, spec), a.detach(), tolerance=limit)
    assert_close(found["h"], expected_h, tolerance=limit)
    assert_close(found["weighted a"], (a * wide[1]).detach(), tolerance=limit)
    assert_close(found["weights"], expected_weights.squeeze(1), tolerance=limit)
    with pytest.raises(AssertionError):
        assert_close(found["h"], expected_h.roll(1, 0), tolerance=limit)


@pytest.mark.parametrize("name", SPECS)
def test_the_same_infinities(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    run_loops_always(monkeypatch)
    spec = SPECS[name]
    h, grad, weights = draw(spec, torch.float32)
    special = torch.tensor([float("inf"), -float("inf"), float("nan"), 87.5, 88.5, 89.5, -87.5, -95, 0, -0.0])
    h[:, : len(special)] = special
    h[4:, N : N + len(special)] = special.flip(0)
    results = []
    for value in ("0", "1"):
        monkeypatch.setenv(fused.VARIABLE, value)
        results.append([activate_rows(h, spec), *backward(h, grad, weights, spec).values()])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-30, equal_nan=True)
    assert results[0][0].isnan().any()


def test_the_bits_depend_on_neither_threads_nor_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    run_loops_always(monkeypatch)
    spec = SPECS["gpt_oss"]
    h, grad, weights = (x.repeat(4, 1) for x in draw(spec, torch.float32))  # several pieces
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(torch.cat([activate_rows(h, spec), *map(torch.atleast_2d, columns(h, grad, weights, spec))]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(activate_rows(h[3:4].clone(), spec), results[0][3:4])


def columns(h: Tensor, grad: Tensor, weights: Tensor, spec: ExpertSpec) -> list[Tensor]:
    """The gradients as rows of N."""
    found = backward(h, grad, weights, spec)
    padded = torch.cat([found["weights"], found["weights"].new_zeros(N - len(h))])
    return [found["h"][:, :N], found["h"][:, N:], found["weighted a"], padded]


def test_what_is_not_asked_for() -> None:
    spec = SPECS["swiglu"]
    h, grad, weights = draw(spec, torch.float32)
    expected, found = backward(h, grad, weights, spec), torch.empty_like(h)
    activate_rows_backward(h, grad.clone(), weights, spec, found, None, None)
    assert torch.equal(found, expected["h"])


@pytest.mark.parametrize(("numbers", "runs"), [(1 << 14, True), (1 << 13, False)])
def test_torch_has_the_short_ones(numbers: int, runs: bool) -> None:
    pytest.importorskip("numba")
    assert gated_rows._runs_loops(SPECS["swiglu"], torch.empty(numbers // 64, 128)) == runs


def test_torch_has_them_where_its_threads_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    monkeypatch.setattr(fused, "knows_torchs_threads", lambda: False)
    assert not gated_rows._runs_loops(SPECS["swiglu"], torch.empty(256, 128))
