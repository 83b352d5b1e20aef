"""Activations of a block's rows on a CPU: in one pass over memory where the compiled loops have them, else by torch."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from moe_triton.backends.torch.activations import activate, activate_backward, activate_for_backward
from moe_triton.backends.torch.fused import DTYPES, array, loops_problem
from moe_triton.backends.torch.threads import share
from moe_triton.records import LIMITED, ExpertSpec

LEAST = 1 << 14  # numbers of an activation from which one call of a loop takes less time than torch's several
WORTH_A_THREAD = 1 << 18  # numbers of an activation: 0.1 ms
# torch's threads, above which its operations are ahead of a loop in one thread (forward, backward)
MOST_THREADS = (1, 2)


def activate_rows(h_SN: Tensor, spec: ExpertSpec) -> Tensor:
    """`activations.activate`."""
    # torch needs two operations then, of neighbouring numbers, and a loop is no faster
    is_plain = spec.limit is None and spec.alpha == 1 and spec.is_concatenated
    if is_plain or not _runs_loops(spec, h_SN, backward=False):
        return activate(h_SN, spec)
    num_rows, n = h_SN.shape[0], h_SN.shape[1] // 2
    from moe_triton.backends.torch.activation_loops import activation_loops

    forward = activation_loops(h_SN.dtype == torch.bfloat16, spec.is_concatenated).forward
    a_Sn = h_SN.new_empty(num_rows, n)
    arguments = (_in_parts(h_SN, spec), *constants(spec), array(a_Sn))
    share(lambda first, last: forward(*arguments, first, last), num_rows, WORTH_A_THREAD // n)
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
    outputs = [x for x in (grad_h_SN, weighted_a_Sn) if x is not None]
    if not _runs_loops(spec, h_SN, grad_Sn, *outputs, backward=True):
        a, activated_gate = activate_for_backward(h_SN, spec)
        if grad_weights_S is not None:
            grad_weights_S.copy_(torch.linalg.vecdot(grad_Sn, a))
        if weighted_a_Sn is not None:
            torch.mul(a, weights_S1, out=weighted_a_Sn)
        activate_backward(grad_Sn.mul_(weights_S1), h_SN, activated_gate, spec, grad_h_SN)
        return
    from moe_triton.backends.torch.activation_loops import activation_loops

    backward = activation_loops(h_SN.dtype == torch.bfloat16, spec.is_concatenated).backward
    (num_rows, n), sums = grad_Sn.shape, torch.empty(grad_Sn.shape[0])
    # memory of its own also where nobody reads it: loops over arrays that overlap are not vectorised
    weighted_a = torch.empty_like(grad_Sn) if weighted_a_Sn is None else weighted_a_Sn
    given = (_in_parts(h_SN, spec), array(grad_Sn), weights_S1.float().flatten().numpy(), *constants(spec))
    arguments = (*given, _in_parts(grad_h_SN, spec), array(weighted_a), sums.numpy())
    share(lambda first, last: backward(*arguments, first, last), num_rows, WORTH_A_THREAD // n)
    if grad_weights_S is not None:
        grad_weights_S.copy_(sums)


def _runs_loops(spec: ExpertSpec, h_SN: Tensor, *others: Tensor, backward: bool) -> bool:
    """Whether the loops have the activation, read the tensors, and are faster than torch's threads together."""
    numbers, threads = h_SN.numel() // 2, torch.get_num_threads()
    return (
        spec.activation in LIMITED
        and numbers >= LEAST
        and (threads <= MOST_THREADS[backward] or numbers >= threads * WORTH_A_THREAD)
        and all(x.dtype == h_SN.dtype and x.dtype in DTYPES and x.is_contiguous() for x in (h_SN, *others))
        and loops_problem() is None
    )


def _in_parts(h_SN: Tensor, spec: ExpertSpec) -> np.ndarray:
    """Gate and up as the loops read them: [S, 2n], or [S, n] integers for pairs that lie side by side."""
    h = array(h_SN)
    return h if spec.is_concatenated else h.view(np.uint32 if h.itemsize == 2 else np.uint64)


def constants(spec: ExpertSpec) -> tuple[float, float, float]:
    """Alpha, the limit, and what is added to up."""
    limit = math.inf if spec.limit is None else spec.limit
    return spec.alpha, limit, float(spec.activation == "gpt_oss")
