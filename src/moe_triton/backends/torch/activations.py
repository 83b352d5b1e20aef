"""The activations of `moe_triton.reference.activate` and their gradients, on rows [S, 2n] (or [S, n] when ungated)."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_triton.records import ExpertSpec
from moe_triton.reference import GPT_OSS_ALPHA, GPT_OSS_LIMIT

aten = torch.ops.aten
GATE = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}


def activate(h_SN: Tensor, spec: ExpertSpec) -> Tensor:
    """[S, 2n] -> [S, n] for a gated activation, [S, n] -> [S, n] for an ungated one."""
    if not spec.is_gated:
        return _pointwise(h_SN, spec.activation)
    gate, up = _halves(h_SN, spec)
    if spec.activation == "gpt_oss":
        gate, up = gate.clamp(max=GPT_OSS_LIMIT), up.clamp(-GPT_OSS_LIMIT, GPT_OSS_LIMIT)
        return (gate * GPT_OSS_ALPHA).sigmoid_().mul_(gate).mul_(up.add_(1))
    return _pointwise(gate, GATE[spec.activation]).mul_(up)


def activate_for_backward(h_SN: Tensor, spec: ExpertSpec) -> tuple[Tensor, Tensor | None]:
    """`activate`, and what `activate_backward` would otherwise compute again: the activated gate, if there is one."""
    if not spec.is_gated or spec.activation == "gpt_oss":
        return activate(h_SN, spec), None
    gate, up = _halves(h_SN, spec)
    activated_gate = _pointwise(gate, GATE[spec.activation])
    return activated_gate * up, activated_gate


def activate_backward(
    grad_Sn: Tensor, h_SN: Tensor, activated_gate_Sn: Tensor | None, spec: ExpertSpec, grad_h_SN: Tensor
) -> None:
    """Writes the gradient of h_SN to grad_h_SN, given that of the activation, and what `activate_for_backward` kept."""
    if not spec.is_gated:
        _pointwise_backward(grad_Sn, h_SN, spec.activation, grad_h_SN)
        return
    gate, up = _halves(h_SN, spec)
    grad_gate, grad_up = _halves(grad_h_SN, spec)
    if activated_gate_Sn is not None:
        _pointwise_backward(grad_Sn * up, gate, GATE[spec.activation], grad_gate)
        torch.mul(activated_gate_Sn, grad_Sn, out=grad_up)
        return
    gate_in, up_in = gate <= GPT_OSS_LIMIT, up.abs() <= GPT_OSS_LIMIT
    gate, up = gate.clamp(max=GPT_OSS_LIMIT), up.clamp(-GPT_OSS_LIMIT, GPT_OSS_LIMIT) + 1
    sigmoid = (gate * GPT_OSS_ALPHA).sigmoid_()
    slope = sigmoid * (1 + GPT_OSS_ALPHA * gate * (1 - sigmoid))  # d (gate * sigmoid(alpha * gate)) / d gate
    torch.mul(grad_Sn * up * slope, gate_in, out=grad_gate)
    torch.mul(grad_Sn * gate * sigmoid, up_in, out=grad_up)


def _halves(h_SN: Tensor, spec: ExpertSpec) -> tuple[Tensor, Tensor]:
    """The gate and up parts of [S, 2n], two views [S, n]."""
    if not spec.is_concatenated:
        return h_SN[:, 0::2], h_SN[:, 1::2]
    half = h_SN.shape[1] // 2
    return h_SN[:, :half], h_SN[:, half:]


def _pointwise(x: Tensor, name: str) -> Tensor:
    if name == "silu":
        return aten.silu(x)
    if name == "gelu":
        return aten.gelu(x)
    if name == "gelu_tanh":
        return aten.gelu(x, approximate="tanh")
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
