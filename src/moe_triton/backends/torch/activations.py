"""The activations of `moe_triton.reference.activate` and their gradients, on rows that may be views."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_triton.records import ExpertSpec

aten = torch.ops.aten
GATE = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
GPT_OSS_ALPHA, GPT_OSS_LIMIT = 1.702, 7.0


def split_gate(h_SN: Tensor, spec: ExpertSpec) -> tuple[Tensor, Tensor]:
    """The gate and up halves of [S, 2n], two views [S, n]."""
    if not spec.is_concatenated:
        return h_SN[:, 0::2], h_SN[:, 1::2]
    half = h_SN.shape[1] // 2
    return h_SN[:, :half], h_SN[:, half:]


def activate(h_SN: Tensor, spec: ExpertSpec) -> Tensor:
    """[S, 2n] -> [S, n] for a gated activation, [S, n] -> [S, n] for an ungated one."""
    if not spec.is_gated:
        return _pointwise(h_SN, spec.activation)
    gate, up = split_gate(h_SN, spec)
    if spec.activation == "gpt_oss":
        gate, up = gate.clamp(max=GPT_OSS_LIMIT), up.clamp(-GPT_OSS_LIMIT, GPT_OSS_LIMIT)
        return (gate * GPT_OSS_ALPHA).sigmoid_().mul_(gate).mul_(up.add_(1))
    return _pointwise(gate, GATE[spec.activation]).mul_(up)


def activate_backward(grad_Sn: Tensor, h_SN: Tensor, spec: ExpertSpec, grad_h_SN: Tensor) -> None:
    """Writes the gradient of `activate` at h_SN, given that of its output, to grad_h_SN [S, 2n] or [S, n]."""
    if not spec.is_gated:
        grad_h_SN.copy_(_pointwise_backward(grad_Sn, h_SN, spec.activation))
        return
    gate, up = split_gate(h_SN, spec)
    grad_gate, grad_up = split_gate(grad_h_SN, spec)
    if spec.activation == "gpt_oss":
        gate_in, up_in = gate <= GPT_OSS_LIMIT, up.abs() <= GPT_OSS_LIMIT
        gate, up = gate.clamp(max=GPT_OSS_LIMIT), up.clamp(-GPT_OSS_LIMIT, GPT_OSS_LIMIT) + 1
        sigmoid = (gate * GPT_OSS_ALPHA).sigmoid_()
        slope = sigmoid * (1 + GPT_OSS_ALPHA * gate * (1 - sigmoid))
        grad_gate.copy_(grad_Sn * up * slope * gate_in)
        grad_up.copy_(grad_Sn * gate * sigmoid * up_in)
        return
    name = GATE[spec.activation]
    grad_gate.copy_(_pointwise_backward(grad_Sn * up, gate, name))
    grad_up.copy_(_pointwise(gate, name).mul_(grad_Sn))


def _pointwise(x: Tensor, name: str) -> Tensor:
    if name == "silu":
        return aten.silu(x)
    if name == "gelu":
        return aten.gelu(x)
    if name == "gelu_tanh":
        return aten.gelu(x, approximate="tanh")
    return x.relu() if name == "relu" else x.relu().square_()


def _pointwise_backward(grad: Tensor, x: Tensor, name: str) -> Tensor:
    if name == "silu":
        return aten.silu_backward(grad, x)
    if name == "gelu":
        return aten.gelu_backward(grad, x)
    if name == "gelu_tanh":
        return aten.gelu_backward(grad, x, approximate="tanh")
    if name == "relu":
        return aten.threshold_backward(grad, x, 0)
    return (x.relu() * 2).mul_(grad)
