"""The experts of few narrow rows on a CPU, in one compiled loop a pass: as calls of torch they take longer."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import addressof
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor

from moe_triton.backends.torch.cpu import this_cpu
from moe_triton.backends.torch.fused import loops_problem
from moe_triton.backends.torch.gated_rows import constants
from moe_triton.backends.torch.memory import empty
from moe_triton.backends.torch.threads import on_all_threads
from moe_triton.records import LIMITED, ExpertCall, ExpertGradients, Wanted

MOST_PRODUCTS = 1 << 21  # multiplications of numbers in a forward; with more, all threads together take less time
MANY_PRODUCTS, CACHED_WEIGHTS = 1 << 23, 1 << 20  # the same, and numbers in all matrices, where a cache holds these


def runs_loops(call: ExpertCall) -> bool:
    """Whether the loops have the call's options, can read its tensors, and take less time than block by block."""
    spec, (gate_up, down, *others) = call.spec, call.parameters
    if not (isinstance(gate_up, Tensor) and isinstance(down, Tensor)):
        return False
    weights, dispatched = gate_up.numel() + down.numel(), call.dispatched
    products = call.num_rows * weights // max(call.num_experts, 1)
    return (
        0 < products <= (MANY_PRODUCTS if weights <= CACHED_WEIGHTS else MOST_PRODUCTS)
        and dispatched.offsets.dtype == dispatched.source.dtype == torch.int32
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
    out = empty(call.hidden.shape, torch.float32)
    kept = empty((call.num_rows, call.width), torch.float32) if keep_preactivation else None
    _run(call, kept=kept, out=out)
    return out, torch.empty(0) if kept is None else kept


def experts_backward(call: ExpertCall, grad_out: Tensor, preactivation: Tensor, wanted: Wanted) -> ExpertGradients:
    """`experts_cpu.experts_backward`."""
    inputs = (call.hidden, call.weights, *cast(tuple[Tensor, Tensor], call.parameters[:2]))
    hidden, weights, gate_up, down = (
        empty(x.shape, torch.float32) if want else None for x, want in zip(inputs, wanted[:4], strict=True)
    )
    _run(
        call, backward=True, kept=preactivation if preactivation.numel() > 0 else None, grad_out=grad_out.contiguous(),
        grad_hidden=hidden, grad_weights=weights, grad_gate_up=gate_up, grad_down=down,
    )  # fmt: skip
    return ExpertGradients(hidden, weights, gate_up, down, None, None)


def _run(call: ExpertCall, *, backward: bool = False, **others: Tensor | None) -> None:
    """Run the loop of one pass over the call's tensors and others."""
    from moe_triton.backends.torch.small_loops import FewRows

    spec, (gate_up, down) = call.spec, cast(tuple[Tensor, Tensor], call.parameters[:2])
    tensors = [call.hidden, call.weights, call.dispatched.offsets, call.dispatched.source, gate_up, down]
    tensors = [x.contiguous() for x in tensors]  # they live until the loop has run
    hidden, weights, offsets, source, gate_up_address, down_address = (x.data_ptr() for x in tensors)
    alpha, limit, offset = constants(spec)
    loop, activate, multiply, multiply_back, outer = _loops(
        backward, spec.is_concatenated, torch.float32 in this_cpu().looped
    )
    (num_tokens, top_k), (num_experts, width, d) = call.weights.shape, gate_up.shape
    job = FewRows(
        num_tokens=num_tokens, num_experts=num_experts, top_k=top_k, d=d, width=width, n=width // 2,
        hidden=hidden, weights=weights, offsets=offsets, source=source, gate_up=gate_up_address, down=down_address,
        multiply=multiply, multiply_back=multiply_back, outer=outer, activate=activate,
        alpha=alpha, limit=limit, offset=offset, **{name: x.data_ptr() for name, x in others.items() if x is not None},
    )  # fmt: skip
    on_all_threads(loop, addressof(job), 1)


@cache
def _loops(backward: bool, is_concatenated: bool, has_vectors: bool) -> tuple[int, int, int, int, int]:
    """The addresses of the pass, and of the loops that it calls: activation, products and outer products.

    has_vectors: of 512 bits, for which the products of `product_loops` are made.
    """
    from moe_triton.backends.torch.activation_loops import activation_loops
    from moe_triton.backends.torch.plain_loops import plain_outer_loop, plain_product_loop
    from moe_triton.backends.torch.product_loops import outer_loop, product_loop
    from moe_triton.backends.torch.small_loops import few_rows_backward_loop, few_rows_loop

    activations = activation_loops(False, is_concatenated)
    multiply: Callable[[bool], Any] = partial(product_loop, False) if has_vectors else plain_product_loop
    if not backward:  # nothing is compiled that is not called
        return few_rows_loop().address, activations.forward.address, multiply(True).address, 0, 0
    outer = outer_loop(False) if has_vectors else plain_outer_loop()
    return (
        few_rows_backward_loop().address, activations.backward.address,
        multiply(True).address, multiply(False).address, outer.address,
    )  # fmt: skip
