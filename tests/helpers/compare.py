"""How tests compare: relative RMS error against a reference, never an absolute tolerance larger than the data."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def relative_rms(actual: Tensor, expected: Tensor, scale: float | Tensor | None = None) -> float:
    """RMS(actual - expected) / RMS(expected), in float64, where `actual` lies.

    `scale` replaces the denominator where terms cancel: a number, or one for each number of `expected`, of which the
    RMS is taken.
    """
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = (x.detach().to(actual.device).double() for x in (actual, expected))
    if expected.numel() == 0:
        return 0.0
    assert torch.isfinite(expected).all(), "the reference is not finite"
    assert torch.isfinite(actual).all(), "not finite"
    error = (actual - expected).square().mean().sqrt().item()
    norm = expected if scale is None else torch.as_tensor(scale, dtype=torch.float64)
    norm = norm.square().mean().sqrt().item()
    if norm == 0.0:
        return 0.0 if error == 0.0 else float("inf")
    return error / norm


def assert_close(
    actual: Tensor, expected: Tensor, *, tolerance: float | None = None, scale: float | Tensor | None = None
) -> None:
    """Relative RMS error of the whole tensor, and of its worst row, within the tolerance of `actual`'s dtype.

    Where `scale` is one number there is no row by row comparison.
    """
    limit = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    error = relative_rms(actual, expected, scale)
    assert error <= limit, f"relative RMS error {error:.3e} > {limit:.1e}"
    if actual.dim() >= 2 and actual.numel() > 0 and not isinstance(scale, float):
        size = expected if scale is None else scale
        a, e, size = (x.detach().to(actual.device).double().reshape(-1, x.shape[-1]) for x in (actual, expected, size))
        row_error = (a - e).square().mean(1).sqrt()
        row_norm = size.square().mean(1).sqrt()
        typical = row_norm.square().mean().sqrt()
        worst = (row_error / torch.maximum(row_norm, 0.05 * typical).clamp_min(1e-300)).max().item()
        assert worst <= 20 * limit, f"relative RMS error of the worst row {worst:.3e} > {20 * limit:.1e}"
