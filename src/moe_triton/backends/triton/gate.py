"""The gate on GPUs: `backends.torch.gate`, split by a kernel and with the sum of two gradients in a product's epilogue.

torch multiplies where it can give fp32 from 16-bit operands; on other GPUs, and in the interpreter, our kernel does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_triton.backends.torch import gate as by_torch
from moe_triton.records import GateGradients, GateWanted
from moe_triton_kernels.gate import product as kernel_product
from moe_triton_kernels.gate import split


def product(a: Tensor, b: Tensor, dtype: torch.dtype, addend: Tensor | None = None) -> Tensor:
    """a [M, K] @ b [K, N] + addend. torch adds in a pass of its own, so that a sum is our kernel's."""
    if addend is None and by_torch.has_wide_products(a.device):
        return by_torch.product(a, b, dtype)
    return kernel_product(a, b, dtype, addend)


UNIT = by_torch.MatrixUnit(split, product)


def gate_forward(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """16-bit hidden [T, d], weight [E, d], bias [E] or None -> fp32 logits [T, E]."""
    return by_torch.forward_by(UNIT, hidden, weight, bias)


def gate_backward(
    grad_logits: Tensor, grad_hidden: Tensor | None, hidden: Tensor, weight: Tensor, wanted: GateWanted
) -> GateGradients:
    """The gradients that are wanted, from that of the logits; `grad_hidden` [T, d] is added to that of hidden."""
    arguments = (grad_logits, grad_hidden, hidden, weight, wanted)
    if hidden.dtype == torch.bfloat16:
        return by_torch.backward_by(UNIT, *arguments)
    return by_torch.wide_backward(*arguments)
