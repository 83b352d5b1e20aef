"""The experts of few narrow rows on a CPU, in one compiled loop a pass: as calls of torch they take longer."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor

from moe_triton.backends.torch.fused import data, loops_problem
from moe_triton.backends.torch.gated_rows import constants
from moe_triton.records import LIMITED, ExpertCall, ExpertGradients, Wanted

MOST_PRODUCTS = 1 << 21  # multiplications of numbers in a forward; with more, a library's products take less time


def runs_loops(call: ExpertCall) -> bool:
    """Whether the loops have the call's options, can read its tensors, and take less time than products by torch."""
    spec, (gate_up, down, *others) = call.spec, call.parameters
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor)):
        return False
    (_, width, size_in), (_, size_out, size_n) = gate_up.shape, down.shape
    return (
        0 < call.num_rows * (width * size_in + size_out * size_n) <= MOST_PRODUCTS
        and call.hidden.dtype == call.weights.dtype == gate_up.dtype == down.dtype == torch.float32
        and spec.activation in LIMITED
        and not (spec.is_transposed or spec.batch_invariant)
        and others == [None] * 6
        and gate_up.is_contiguous()
        and down.is_contiguous()
        and loops_problem() is None
    )


def experts_forward(call: ExpertCall, keep_preactivation: bool) -> tuple[Tensor, Tensor]:
    """`experts_cpu.experts_forward`."""
    from moe_triton.backends.torch.small_loops import experts_forward

    out = np.zeros(tuple(call.hidden.shape), np.float32)
    kept = np.zeros((call.num_rows if keep_preactivation else 0, call.width), np.float32)
    arguments = [*_arguments(call), kept, out]
    experts_forward(*arguments)
    return torch.from_numpy(out), torch.from_numpy(kept if keep_preactivation else kept.reshape(0))


def experts_backward(call: ExpertCall, grad_out: Tensor, preactivation: Tensor, wanted: Wanted) -> ExpertGradients:
    """`experts_cpu.experts_backward`."""
    from moe_triton.backends.torch.small_loops import experts_backward

    inputs = (call.hidden, call.weights, *cast(tuple[Tensor, Tensor], call.parameters[:2]))
    grads = [
        np.zeros(tuple(x.shape) if want else (0,) * x.dim(), np.float32)
        for x, want in zip(inputs, wanted[:4], strict=True)
    ]
    arguments = [*_arguments(call), data(preactivation).reshape(-1, call.width), data(grad_out), *grads]
    experts_backward(*arguments)
    hidden, weights, gate_up, down = (
        torch.from_numpy(grad) if want else None for grad, want in zip(grads, wanted[:4], strict=True)
    )
    return ExpertGradients(hidden, weights, gate_up, down, None, None)


def _arguments(call: ExpertCall) -> tuple[object, ...]:
    """What both loops read."""
    dispatched, spec = call.dispatched, call.spec
    projections = cast(tuple[Tensor, Tensor], call.parameters[:2])
    read = (call.hidden, call.weights, dispatched.offsets, dispatched.source, *projections)
    return (*map(data, read), spec.is_concatenated, *constants(spec))
