"""Activations of a block's rows on a CPU: in one pass over memory where the compiled loops have them, else by torch."""

from __future__ import annotations

import math
from ctypes import addressof

import torch
from torch import Tensor

from moe_triton.backends.torch.activations import activate, activate_backward, activate_for_backward
from moe_triton.backends.torch.fused import runs_on_threads
from moe_triton.backends.torch.memory import empty
from moe_triton.backends.torch.threads import on_all_threads
from moe_triton.records import LIMITED, ExpertSpec

LEAST = 1 << 14  # numbers of an activation from which one call of a loop takes less time than torch's several


def activate_rows(h_SN: Tensor, spec: ExpertSpec) -> Tensor:
    """`activations.activate`."""
    if not _runs_loops(spec, h_SN):
        return activate(h_SN, spec)
    from moe_triton.backends.torch.activation_loops import Activation, activation_loops

    a_Sn = empty((h_SN.shape[0], h_SN.shape[1] // 2), h_SN.dtype)
    alpha, limit, offset = constants(spec)
    job = Activation(
        num_rows=a_Sn.shape[0], n=a_Sn.shape[1], h=h_SN.data_ptr(), a=a_Sn.data_ptr(),
        alpha=alpha, limit=limit, offset=offset,
    )  # fmt: skip
    on_all_threads(activation_loops(h_SN.dtype == torch.bfloat16, spec.is_concatenated).forward.address, addressof(job))
    return a_Sn


def activate_rows_backward(
    h_SN: Tensor,
    grad_Sn: Tensor,
    weights_S1: Tensor,
    spec: ExpertSpec,
    grad_h_SN: Tensor,
    weighted_a_Sn: Tensor | None,
    grad_weights_S: Tensor | None,
) -> None:
    """Write what follows from the gradient of the unweighted activation a, which may be overwritten.

    grad_h_SN         the gradient of h, given that of weights * a
    weighted_a_Sn     weights * a, where it is asked for
    grad_weights_S    the sum over n of grad * a, where it is asked for
    """
    if not _runs_loops(spec, h_SN, grad_Sn, grad_h_SN, weighted_a_Sn):
        a, activated_gate = activate_for_backward(h_SN, spec)
        if grad_weights_S is not None:
            grad_weights_S.copy_(torch.linalg.vecdot(grad_Sn, a))
        if weighted_a_Sn is not None:
            torch.mul(a, weights_S1, out=weighted_a_Sn)
        activate_backward(grad_Sn.mul_(weights_S1), h_SN, activated_gate, spec, grad_h_SN)
        return
    from moe_triton.backends.torch.activation_loops import Activation, activation_loops

    num_rows, n = grad_Sn.shape
    # memory of its own also where nobody reads it: loops over arrays that overlap are not vectorised
    weighted_a = torch.empty_like(grad_Sn) if weighted_a_Sn is None else weighted_a_Sn
    w, sums = weights_S1.float().contiguous(), torch.empty(num_rows)
    alpha, limit, offset = constants(spec)
    job = Activation(
        num_rows=num_rows, n=n, h=h_SN.data_ptr(), a=grad_Sn.data_ptr(), w=w.data_ptr(), grad_h=grad_h_SN.data_ptr(),
        weighted_a=weighted_a.data_ptr(), grad_w=sums.data_ptr(), alpha=alpha, limit=limit, offset=offset,
    )  # fmt: skip
    on_all_threads(
        activation_loops(h_SN.dtype == torch.bfloat16, spec.is_concatenated).backward.address, addressof(job)
    )
    if grad_weights_S is not None:
        grad_weights_S.copy_(sums)


def _runs_loops(spec: ExpertSpec, h_SN: Tensor, *others: Tensor | None) -> bool:
    """Whether the loops have the activation, can read the tensors, and are faster than torch."""
    tensors = [h_SN, *(x for x in others if x is not None)]
    return (
        spec.activation in LIMITED
        and h_SN.numel() >= 2 * LEAST
        and runs_on_threads(h_SN.dtype)
        and all(x.dtype == h_SN.dtype and x.is_contiguous() for x in tensors)
    )


def constants(spec: ExpertSpec) -> tuple[float, float, float]:
    """Alpha, the limit, and what is added to up."""
    limit = math.inf if spec.limit is None else spec.limit
    return spec.alpha, limit, float(spec.activation == "gpt_oss")
