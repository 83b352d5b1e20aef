"""The activations of `moe_triton.reference.activate` and their gradients, on rows [S, 2n] (or [S, n] when ungated)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton.records import ExpertSpec
from moe_triton.torch_internals import LANES, SERIAL, by_full_vectors

aten = torch.ops.aten
GATE = {"swiglu": "silu", "gpt_oss": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


def activate(h_SN: Tensor, spec: ExpertSpec) -> Tensor:
    """[S, 2n] -> [S, n] for a gated activation, [S, n] -> [S, n] for an ungated one."""
    if not spec.is_gated:
        return _pointwise(h_SN, spec.activation)
    gate, up = _cut(*_halves(h_SN, spec), spec)
    return _activated_gate(gate, spec).mul_(up)


def activate_by_full_vectors(h_SN: Tensor, spec: ExpertSpec) -> Tensor:
    """`activate` on a CPU such that a row's bits depend on this row alone: see `by_full_vectors`."""
    if not spec.is_gated:
        return by_full_vectors(partial(activate, spec=spec), h_SN)
    gate, up = _halves(h_SN, spec)
    size = gate.shape[1]
    if size % LANES or not spec.is_concatenated:
        h_SN = torch.cat([F.pad(half, (0, -size % LANES)) for half in (gate, up)], dim=1)
        spec = replace(spec, is_concatenated=True)
    step = max(2 * SERIAL // max(h_SN.shape[1], 1), 1)
    return torch.cat([activate(rows, spec)[:, :size] for rows in h_SN.split(step)])


def activate_for_backward(h_SN: Tensor, spec: ExpertSpec) -> tuple[Tensor, Tensor | None]:
    """`activate`, and what `activate_backward` would otherwise compute again: the activated gate, if there is one."""
    if not spec.is_gated:
        return activate(h_SN, spec), None
    gate, up = _cut(*_halves(h_SN, spec), spec)
    activated_gate = _activated_gate(gate, spec)
    return activated_gate * up, activated_gate


def activate_backward(
    grad_Sn: Tensor, h_SN: Tensor, activated_gate_Sn: Tensor | None, spec: ExpertSpec, grad_h_SN: Tensor
) -> None:
    """Writes the gradient of h_SN to grad_h_SN, given that of the activation, and what `activate_for_backward` kept."""
    if activated_gate_Sn is None:
        _pointwise_backward(grad_Sn, h_SN, spec.activation, grad_h_SN)
        return
    whole_gate, whole_up = _halves(h_SN, spec)
    grad_gate, grad_up = _halves(grad_h_SN, spec)
    gate, up = _cut(whole_gate, whole_up, spec)
    if spec.alpha == 1:
        _pointwise_backward(grad_Sn * up, gate, GATE[spec.activation], grad_gate)
    else:
        sigmoid = (gate * spec.alpha).sigmoid_()
        slope = sigmoid * (1 + spec.alpha * gate * (1 - sigmoid))  # d (gate * sigmoid(alpha * gate)) / d gate
        torch.mul(grad_Sn * up, slope, out=grad_gate)
    torch.mul(activated_gate_Sn, grad_Sn, out=grad_up)
    if spec.limit is not None:
        grad_gate.masked_fill_(whole_gate > spec.limit, 0)
        grad_up.masked_fill_(whole_up.abs() > spec.limit, 0)


def _cut(gate: Tensor, up: Tensor, spec: ExpertSpec) -> tuple[Tensor, Tensor]:
    """What is activated of gate, and what this is multiplied by."""
    if spec.limit is not None:
        gate, up = gate.clamp(max=spec.limit), up.clamp(-spec.limit, spec.limit)
    return gate, up + 1 if spec.activation == "gpt_oss" else up


def _activated_gate(gate: Tensor, spec: ExpertSpec) -> Tensor:
    if spec.alpha == 1:
        return _pointwise(gate, GATE[spec.activation])
    return (gate * spec.alpha).sigmoid_().mul_(gate)


def _halves(h_SN: Tensor, spec: ExpertSpec) -> tuple[Tensor, Tensor]:
    """The gate and up parts of [S, 2n], two views [S, n]."""
    if not spec.is_concatenated:
        return h_SN[:, 0::2], h_SN[:, 1::2]
    half = h_SN.shape[1] // 2
    return h_SN[:, :half], h_SN[:, half:]


def _pointwise(x: Tensor, name: str) -> Tensor:
    if name == "silu":
        return F.silu(x)
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return x.relu() if name == "relu" else x.relu().square_()


def _pointwise_backward(grad: Tensor, x: Tensor, name: str, out: Tensor) -> None:
    if name == "silu":
        aten.silu_backward.grad_input(grad, x, grad_input=out)
    elif name == "gelu":
        aten.gelu_backward.grad_input(grad, x, grad_input=out)
    elif name == "gelu_tanh":
        aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=out)
    elif name == "relu":
        aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)
    else:
        torch.mul(x.relu().mul_(2), grad, out=out)
