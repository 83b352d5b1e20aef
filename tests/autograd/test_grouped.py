"""The linear map of every expert: the custom operation, its gradients and both of its ways."""

from __future__ import annotations

import pytest
import torch

from moe_triton.autograd import grouped as operation
from moe_triton.autograd.grouped import grouped_linear
from moe_triton.backends.torch import grouped
from tests.helpers.compare import assert_close


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_grouped_linear_is_a_sound_operation(is_transposed, has_bias):
    offsets = torch.tensor([0, 3, 3, 7], dtype=torch.int32)  # an idle expert, and two rows past the end
    x = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, *((5, 4) if is_transposed else (4, 5)), dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, 4, dtype=torch.float64, requires_grad=True) if has_bias else None
    torch.library.opcheck(grouped_linear, (x, weight, bias, offsets, is_transposed))
    assert torch.autograd.gradcheck(
        lambda *tensors: grouped_linear(
            tensors[0], tensors[1], tensors[2] if has_bias else None, offsets, is_transposed
        ),
        (x, weight, bias) if has_bias else (x, weight),
    )


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_grouped_linear_without_a_host_sync(is_transposed, has_bias, monkeypatch):
    """The way that bf16 takes on a GPU, on the CPU's grouped_mm, against the loop over experts."""
    offsets = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    x = torch.randn(9, 16, requires_grad=True)
    weight = torch.randn(3, *((16, 8) if is_transposed else (8, 16)), requires_grad=True)
    bias = torch.randn(3, 8, requires_grad=True) if has_bias else None
    leaves = [x, weight, bias] if has_bias else [x, weight]
    upstream = torch.randn(9, 8)

    def run():
        out = grouped_linear(x, weight, bias, offsets, is_transposed)
        return out, *torch.autograd.grad(out, leaves, upstream)

    expected = run()
    monkeypatch.setattr(grouped, "can_group", lambda left, right: True)
    monkeypatch.setattr(grouped.GroupedRows, "ranges", None)  # the way with a host sync
    for actual, value in zip(run(), expected, strict=True):
        assert value.abs().max() > 0
        assert_close(actual, value)


def test_frozen_weights_get_no_gradient(monkeypatch):
    """Nothing of the weights' size is made, as under adapters."""

    def refuse(*args, **kwargs):
        raise AssertionError("a gradient of the weights was made")

    monkeypatch.setattr(operation, "grouped_outer", refuse)
    offsets = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    x, weight = torch.randn(9, 5, requires_grad=True), torch.randn(3, 4, 5)
    (grad,) = torch.autograd.grad(grouped_linear(x, weight, None, offsets, False).sum(), x)
    assert_close(grad[3:7], weight[2].sum(0).expand(4, -1))
    with pytest.raises(AssertionError, match="of the weights was made"):
        grouped_linear(x, weight.requires_grad_(), None, offsets, False).sum().backward()
