"""The activations and their slopes as device functions, against the reference and its autograd."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_triton import records, reference
from moe_triton_kernels.activations import (
    GATED,
    GATED_CASES,
    UNGATED,
    UNGATED_CASES,
    Activation,
    factor,
    factor_slope,
    up_factor,
    up_slope,
)
from tests.helpers.compare import assert_close

# the sigmoid of a far negative number is 1 / (1 + inf) = 0, as it should be
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
device = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def gated_kernel(gate_in, up_in, out, gate_slope, up_slope_out, ACTIVATION: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    gate = tl.load(gate_in + at)
    up = tl.load(up_in + at)
    tl.store(out + at, factor(gate, ACTIVATION) * up_factor(up, ACTIVATION))
    tl.store(gate_slope + at, factor_slope(gate, ACTIVATION) * up_factor(up, ACTIVATION))
    tl.store(up_slope_out + at, factor(gate, ACTIVATION) * up_slope(up, ACTIVATION))


@triton.jit
def ungated_kernel(x_in, out, slope, ACTIVATION: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_in + at)
    tl.store(out + at, factor(x, ACTIVATION))
    tl.store(slope + at, factor_slope(x, ACTIVATION))


def points() -> Tensor:
    """Dense around zero, both tails, and the exact kinks of relu and of the limits 7 and 10."""
    special = [0.0, 7.0, -7.0, 7.0001, -7.0001, 6.9999, 10.0, -10.0, 1e-6, -1e-6, 20.0, -20.0, 300.0, -300.0]
    special = torch.tensor(special)
    return torch.cat([special, torch.linspace(-9, 9, 256 - len(special))]).to(device)


def derivative(value: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(value.sum(), x, retain_graph=True)[0]


@pytest.mark.parametrize("activation", [*GATED_CASES, Activation("gpt_oss", limit=3.5, alpha=0.5)], ids=str)
def test_gated(activation: Activation) -> None:
    gate, up = points(), points()[torch.randperm(256)]
    out, gate_slope, up_slopes = (torch.empty_like(gate) for _ in range(3))
    gated_kernel[(1,)](gate, up, out, gate_slope, up_slopes, ACTIVATION=activation, SIZE=256)
    wide_gate, wide_up = gate.double().requires_grad_(), up.double().requires_grad_()
    limits = {"limit": activation.limit, "alpha": activation.alpha}
    expected = reference.activate(torch.cat([wide_gate, wide_up]), activation.name, **limits)
    small = (gate.abs() <= 9) & (up.abs() <= 9)  # a tail would hide everything else in the norm
    for part in (small, ~small):
        assert_close(out[part], expected[part])
        assert_close(gate_slope[part], derivative(expected, wide_gate)[part])
        assert_close(up_slopes[part], derivative(expected, wide_up)[part])


@pytest.mark.parametrize("activation", UNGATED_CASES, ids=str)
def test_ungated(activation: Activation) -> None:
    x = points()
    out, slope = torch.empty_like(x), torch.empty_like(x)
    ungated_kernel[(1,)](x, out, slope, ACTIVATION=activation, SIZE=256)
    wide = x.double().requires_grad_()
    expected = reference.activate(wide, activation.name)
    small = x.abs() <= 9  # a tail would hide everything else in the norm
    for part in (small, ~small):
        assert_close(out[part], expected[part])
        assert_close(slope[part], derivative(expected, wide)[part])


def test_no_activation_passes_for_another() -> None:
    """The comparison above would notice any exchange of two names (swiglu and silu share a formula on purpose)."""
    x = points()[14:]
    curves = [reference.activate(x.double(), name) for name in UNGATED]
    for i, curve in enumerate(curves):
        for other in curves[:i]:
            with pytest.raises(AssertionError, match="relative RMS error"):
                assert_close(curve.float(), other)


def test_what_is_no_number_stays_so_at_a_limit() -> None:
    gate, up = torch.full((256,), torch.nan, device=device), torch.ones(256, device=device)
    for pair in ((gate, up), (up, gate)):
        outs = [torch.zeros_like(gate) for _ in range(3)]
        gated_kernel[(1,)](*pair, *outs, ACTIVATION=GATED_CASES[-1], SIZE=256)
        assert outs[0].isnan().all()


def test_the_names_are_the_reference_s() -> None:
    assert GATED == records.GATED
    assert UNGATED == records.UNGATED
    assert Activation("geglu").is_gated
    assert not Activation("relu2").is_gated
    with pytest.raises(ValueError, match="activation: got 'swish', wanted one of swiglu"):
        Activation("swish")
