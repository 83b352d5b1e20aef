"""The experts with fp8 products on the triton backend: by kernels where the GPU multiplies e4m3, emulated elsewhere.

MXFP8 is emulated everywhere: its kernels (`moe_triton_kernels.mxfp8`) are compiled for Blackwell, and were never run.

Definition: `moe_triton.reference.fp8`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_triton.backends.protocols import ExpertsBackend
from moe_triton.backends.torch import experts_fp8 as emulated
from moe_triton.backends.triton import experts
from moe_triton.backends.triton.experts import combine_rows, linear
from moe_triton.records import ExpertCall, ExpertGradients, ParameterGradients, RowGradients, Wanted
from moe_triton_kernels.fp8 import fp8_supported
from moe_triton_kernels.launch import target_of

__all__ = [
    "combine_rows",
    "experts_backward",
    "experts_backward_rows",
    "experts_backward_weights",
    "experts_forward",
    "linear",
    "runs_kernels",
]


def runs_kernels(device: torch.device) -> bool:
    """Return whether the products are kernels on this device: it has matrix units for e4m3."""
    return fp8_supported(target_of(device).architecture)


def _backend(call: ExpertCall) -> ExpertsBackend:
    return experts if runs_kernels(call.hidden.device) and not call.spec.microscaled else emulated


def experts_forward(call: ExpertCall, keep_preactivation: bool) -> tuple[Tensor, Tensor]:
    """Compute `experts.experts_forward` with fp8 products."""
    return _backend(call).experts_forward(call, keep_preactivation)


def experts_backward(call: ExpertCall, grad_out: Tensor, preactivation: Tensor, wanted: Wanted) -> ExpertGradients:
    """Compute `experts.experts_backward` with fp8 products."""
    return _backend(call).experts_backward(call, grad_out, preactivation, wanted)


def experts_backward_rows(call: ExpertCall, grad_out: Tensor, preactivation: Tensor, wanted: Wanted) -> RowGradients:
    """Compute `experts.experts_backward_rows` with fp8 products."""
    return _backend(call).experts_backward_rows(call, grad_out, preactivation, wanted)


def experts_backward_weights(
    call: ExpertCall, grad_out: Tensor, row_grads: RowGradients, wanted: Wanted
) -> ParameterGradients:
    """Compute `experts.experts_backward_weights` with fp8 products."""
    return _backend(call).experts_backward_weights(call, grad_out, row_grads, wanted)
