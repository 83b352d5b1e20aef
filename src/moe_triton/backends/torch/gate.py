"""The gate: its logits and gradients; the definition is `reference.gate`.

On a CPU the products are fp32, of copies that are gone when they end. On a GPU 16-bit operands are multiplied by the
matrix unit, which sums in fp32: a product of two of them is exact there. Router weights that are kept in fp32 are split
into three 16-bit parts, one below another, as if there were 3E experts. A gradient of the logits is split into two
halves side by side, a contraction over 2E: 16 bits, for a gradient of the hidden states that has 8; and into three
parts for a gradient that is kept in fp32. With fp16 hidden states the products of backward are fp32: fp16 cannot hold
the lower half of a small gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from moe_triton import reference
from moe_triton.backends.torch import looped
from moe_triton.backends.torch.blocks import Block
from moe_triton.backends.torch.cpu import this_cpu
from moe_triton.backends.torch.memory import empty
from moe_triton.backends.torch.rows import round_rows, widen_rows
from moe_triton.records import GateGradients, GateWanted

COPIED_ELEMENTS = 1 << 20  # of an fp32 copy: four megabytes


class MatrixUnit(NamedTuple):
    """What multiplies 16-bit matrices.

    split    (fp32 [R, C], dtype, numbers of parts, stacked, step) -> parts: see `split`
    product  (a [M, K], b [K, N], dtype, addend [M, N] or None) -> a @ b + addend, summed in fp32
    """

    split: Callable[..., Tensor]
    product: Callable[[Tensor, Tensor, torch.dtype, Tensor | None], Tensor]


def split(values: Tensor, dtype: torch.dtype, order: tuple[int, ...], *, stacked: bool, step: float = 1.0) -> Tensor:
    """fp32 [R, C] -> its 16-bit parts of these numbers: [P * R, C] `stacked`, else side by side, [R, P * C].

    Part 0 is the nearest to the value, part 1 the nearest to what that leaves times `step`, part 2 to what that leaves
    times `step`. Their sum is the value where three have bits enough.
    """
    parts, rest = [], values
    for _ in range(max(order) + 1):
        part = rest.to(dtype)
        parts.append(part)
        rest = torch.where(part.isinf(), 0.0, (rest - part.float()) * step)
    return torch.cat([parts[number] for number in order], dim=0 if stacked else 1)


def product(a: Tensor, b: Tensor, dtype: torch.dtype, addend: Tensor | None = None) -> Tensor:
    out = torch.mm(a, b) if dtype == a.dtype else torch.mm(a, b, out_dtype=dtype)
    return out if addend is None else out.add_(addend)


TORCH = MatrixUnit(split, product)


@cache
def has_wide_products(device: torch.device) -> bool:
    """Return whether `torch.mm` gives fp32 from 16-bit operands on this device: on CUDA GPUs that have bf16."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def step_of(dtype: torch.dtype) -> float:
    """Return the `step` of `split` for weights: the lower parts of a small one are out of fp16's range."""
    return 2.0**11 if dtype == torch.float16 else 1.0


def forward_by(unit: MatrixUnit, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`gate_forward` of 16-bit hidden states on a matrix unit."""
    dtype = hidden.dtype
    if weight.dtype == dtype:
        logits = unit.product(hidden, weight.mT, torch.float32, None)
    else:
        step = step_of(dtype)
        parts = unit.split(weight.float(), dtype, (0, 1, 2), stacked=True, step=step)
        first, second, third = unit.product(hidden, parts.mT, torch.float32, None).chunk(3, dim=1)
        logits = first + (second + third / step) / step  # the smallest first
    return logits if bias is None else logits + bias.float()


def backward_by(
    unit: MatrixUnit,
    grad_logits: Tensor,
    grad_hidden: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    wanted: GateWanted,
) -> GateGradients:
    """`gate_backward` of bf16 hidden states on a matrix unit."""
    dtype, is_kept_wide = hidden.dtype, weight.dtype != hidden.dtype
    grad_x = grad_w = None
    if wanted.hidden:  # (high + low) W; where W has parts itself, all but low times low, which is below fp32's last bit
        order, against = ((0, 1, 0), (0, 0, 1)) if is_kept_wide else ((0, 1), (0, 0))
        rows = unit.split(grad_logits, dtype, order, stacked=False)
        columns = unit.split(weight.float(), dtype, against, stacked=True)
        grad_x = unit.product(rows, columns, dtype, grad_hidden)
    if wanted.weight:
        order = (0, 1, 2) if is_kept_wide else (0, 1)
        rows = unit.split(grad_logits, dtype, order, stacked=False)
        parts = unit.product(rows.mT, hidden, torch.float32, None).view(len(order), *weight.shape)
        grad_w = parts.sum(0).to(weight.dtype)
    return GateGradients(grad_x, grad_w, grad_logits.sum(0) if wanted.bias else None)


def wide_backward(
    grad_logits: Tensor, grad_hidden: Tensor | None, hidden: Tensor, weight: Tensor, wanted: GateWanted
) -> GateGradients:
    """`gate_backward` by fp32 products: on a CPU of blocks of tokens where it takes fp32 copies, which stay small."""
    size = min(max(16, COPIED_ELEMENTS // max(hidden.shape[1], 1)), looped.MOST_SUMMED)
    if hidden.device.type != "cpu" or hidden.dtype == torch.float32 or hidden.shape[0] <= size:
        return _products(grad_logits, grad_hidden, hidden, weight.float(), weight.dtype, wanted)
    addends = [None] * -(-hidden.shape[0] // size) if grad_hidden is None else grad_hidden.split(size)
    blocks = [
        _products(*block, weight.float(), torch.float32, wanted._replace(bias=False))
        for block in zip(grad_logits.split(size), addends, hidden.split(size), strict=True)
    ]
    grad_xs = [block.hidden for block in blocks if block.hidden is not None]
    grad_ws = [block.weight for block in blocks if block.weight is not None]
    return GateGradients(
        torch.cat(grad_xs) if grad_xs else None,
        torch.stack(grad_ws).sum(0).to(weight.dtype) if grad_ws else None,
        grad_logits.sum(0) if wanted.bias else None,
    )


def _products(
    grad_logits: Tensor,
    grad_hidden: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    dtype: torch.dtype,
    wanted: GateWanted,
) -> GateGradients:
    """`wide_backward` of one block and an fp32 weight, whose gradient is rounded to `dtype`."""
    grad_x = grad_w = None
    by_loops = hidden.dtype == torch.bfloat16 and 0 < hidden.shape[0] <= looped.MOST_SUMMED
    by_loops = by_loops and _runs_loops(hidden, weight)
    if wanted.hidden and by_loops:
        grad_x = _grad_hidden_by_loops(grad_logits.contiguous(), grad_hidden, weight.contiguous())
    elif wanted.hidden:
        grad_x = grad_logits @ weight
        grad_x = (grad_x if grad_hidden is None else grad_x.add_(grad_hidden)).to(hidden.dtype)
    if wanted.weight and by_loops:
        grad_w = _grad_weight_by_loops(grad_logits.contiguous(), hidden.contiguous()).to(dtype)
    elif wanted.weight:
        grad_w = (grad_logits.mT @ hidden.float()).to(dtype)
    return GateGradients(grad_x, grad_w, grad_logits.sum(0) if wanted.bias else None)


def _runs_loops(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the CPU's compiled loops make products of bf16 and of fp32."""
    has_words = hidden.device.type == weight.device.type == "cpu" and hidden.shape[1] % 2 == 0 and weight.numel() > 0
    return has_words and all(map(this_cpu().loops, (torch.float32, torch.bfloat16)))


def _one_part(num_rows: int) -> Block:
    """A block of all tokens, as rows of one expert."""
    rows = slice(0, num_rows)
    return Block(rows, rows, [(0, rows)])


def _grad_hidden_by_loops(grad_logits: Tensor, grad_hidden: Tensor | None, weight: Tensor) -> Tensor:
    """grad_logits @ weight + grad_hidden in bf16."""
    wide = empty((grad_logits.shape[0], weight.shape[1]), torch.float32)
    looped.multiply(_one_part(len(wide)), grad_logits, lambda _: weight.mT, out=wide)
    return round_rows(wide, None if grad_hidden is None else grad_hidden.to(torch.bfloat16).contiguous())


def _grad_weight_by_loops(grad_logits: Tensor, hidden: Tensor) -> Tensor:
    """grad_logits.T @ hidden in fp32."""
    grads = torch.empty(1, grad_logits.shape[1], hidden.shape[1])
    looped.multiply_outer(_one_part(len(hidden)), grad_logits, widen_rows(hidden), grads)
    return grads[0]


def gate_forward(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """16-bit hidden [T, d], weight [E, d], bias [E] or None -> fp32 logits [T, E]."""
    if has_wide_products(hidden.device):
        return forward_by(TORCH, hidden, weight, bias)
    if hidden.dtype == weight.dtype == torch.bfloat16 and hidden.numel() > 0 and _runs_loops(hidden, weight):
        return _forward_by_loop(hidden, weight, bias)
    return reference.gate(hidden, weight, bias)


def _forward_by_loop(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits, weight = torch.empty(hidden.shape[0], weight.shape[0]), weight.contiguous()
    looped.multiply(_one_part(len(hidden)), hidden.contiguous(), lambda _: weight, out=logits)
    return logits if bias is None else logits.add_(bias.float())


def gate_backward(
    grad_logits: Tensor, grad_hidden: Tensor | None, hidden: Tensor, weight: Tensor, wanted: GateWanted
) -> GateGradients:
    """The gradients that are wanted, from that of the logits; `grad_hidden` [T, d] is added to that of hidden.

    Those of hidden and weight have their dtypes, that of the bias is fp32.
    """
    arguments = (grad_logits, grad_hidden, hidden, weight, wanted)
    if hidden.dtype == torch.bfloat16 and has_wide_products(hidden.device):
        return backward_by(TORCH, *arguments)
    return wide_backward(*arguments)
