"""Small experts modules of transformers' interface, their inputs, and what they should compute."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation

from tests.helpers.compare import assert_close

T, D, N, E, K = 24, 16, 12, 6, 2


def make_experts(
    *,
    act_fn="silu",
    gate=None,
    is_transposed=False,
    has_bias=False,
    has_gate=True,
    is_concatenated=True,
    post_expert_norm=None,
    dtype=torch.float64,
):
    """A decorated experts module, whose eager forward refuses: it is not what these tests compare with.

    `post_expert_norm` is set by hand: the decorators before transformers 5.24 do not know its flag.
    """

    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = E
            self.act_fn = ACT2FN[act_fn] if isinstance(act_fn, str) else act_fn
            rows, name = (2 * N, "gate_up_proj") if has_gate else (N, "up_proj")
            up, down = (E, rows, D), (E, D, N)
            if is_transposed:
                up, down = (E, D, rows), (E, N, D)
            setattr(self, name, nn.Parameter(torch.randn(up, dtype=dtype) * D**-0.5))
            self.down_proj = nn.Parameter(torch.randn(down, dtype=dtype) * N**-0.5)
            if has_bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.randn(E, rows, dtype=dtype)))
                self.down_proj_bias = nn.Parameter(torch.randn(E, D, dtype=dtype))

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise AssertionError("the eager forward ran")

    if gate is not None:
        Experts._apply_gate = gate
    decorate = use_experts_implementation(
        is_transposed=is_transposed, has_bias=has_bias, has_gate=has_gate, is_concatenated=is_concatenated
    )
    module = decorate(Experts)(SimpleNamespace(_experts_implementation="moe_triton"))
    if post_expert_norm is not None:
        module.has_post_expert_norm, module.post_expert_norm = True, post_expert_norm.to(dtype)
    return module


class RmsNorm(nn.Module):
    """Rows over their root mean square, times a weight; without an epsilon, so that it is NaN on a row of zeros."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(D) + 0.5)
        self.bias = nn.Parameter(torch.randn(D))

    def forward(self, rows):
        return rows * rows.square().mean(-1, keepdim=True).rsqrt() * self.weight + self.bias


def make_inputs(dtype=torch.float64, weights_dtype=None):
    """The last expert gets no token; some slots carry the ids that mean 'skip', with a weight that must not count."""
    x = torch.randn(T, D, dtype=dtype, requires_grad=True)
    index = torch.stack([torch.randperm(E - 1)[:K] for _ in range(T)])
    index[3, 1], index[5, 0], index[9] = E, -1, E
    weights = torch.rand(T, K, dtype=weights_dtype or dtype).requires_grad_()
    return x, index, weights


def results(out, module, x, weights):
    """The output and every gradient, for one random gradient of the output that every dtype holds exactly."""
    leaves = {"x": x, "weights": weights, **dict(module.named_parameters())}
    upstream = torch.randint(-8, 9, out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream)
    return {"out": out, **dict(zip(leaves, grads, strict=True))}


def assert_same(actual, expected, tolerance=None):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, f"{name} is zero: nothing would be compared"
        assert_close(actual[name], value, tolerance=tolerance)


def expected_results(module, x, index, weights, activate):
    """`reference.moe_mlp` written out with `activate` as the gate, so that any gate can be asked for."""
    has_gate = hasattr(module, "gate_up_proj")
    up = module.gate_up_proj if has_gate else module.up_proj
    up_bias = getattr(module, "gate_up_proj_bias" if has_gate else "up_proj_bias", None)
    out = torch.zeros_like(x)
    for e in range(E):
        token, choice = torch.where(index == e)
        w1, w2 = (up[e], module.down_proj[e]) if module.is_transposed else (up[e].T, module.down_proj[e].T)
        h = x[token] @ w1 + (0 if up_bias is None else up_bias[e])
        y = activate(h) @ w2 + (module.down_proj_bias[e] if up_bias is not None else 0)
        y = module.post_expert_norm(y) if hasattr(module, "post_expert_norm") else y
        out = out.index_add(0, token, y * weights[token, choice, None].to(y.dtype))
    return results(out, module, x, weights)
