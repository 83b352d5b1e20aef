"""What Colossal-AI v0.1.6's own tests of groups and gradients ask, on four ranks, and copies of models over ranks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

from moe_triton.compat.colossalai.context import MOE_CONTEXT
from moe_triton.compat.colossalai.engine.gradient_handler import MoeGradientHandler
from moe_triton.compat.colossalai.nn.layer.moe import Experts, MoeLayer, Top1Router, UniformNoiseGenerator
from moe_triton.compat.colossalai.testing import assert_equal, assert_equal_in_group, assert_not_equal
from moe_triton.compat.colossalai.utils.moe import get_moe_epsize_param_dict, sync_moe_model_param
from tests.helpers.colossalai_context import launched
from tests.helpers.colossalai_models import layers


def groups() -> None:
    """tests/test_moe/test_moe_group.py: containers of 1, 2, 4 and 8 experts."""
    with launched({}):
        MOE_CONTEXT.setup(42)
        sizes = {"in_features": 4, "out_features": 8}
        containers = [Experts(nn.Linear, number, **sizes) for number in (1, 2, 4, 8)]
        assert [one.num_local_experts for one in containers] == [1, 1, 1, 2]
        info, rank = MOE_CONTEXT.parallel_info_dict, dist.get_rank()
        assert len(info) == 3
        assert [dist.get_rank(info[size].ep_group) for size in (4, 2, 1)] == [rank, rank % 2, 0]
        assert [dist.get_rank(info[size].dp_group) for size in (4, 2, 1)] == [0, rank // 2, rank]
        model = nn.ModuleList(containers)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(rank)
        sync_moe_model_param(model)
        assert sorted(get_moe_epsize_param_dict(model)) == [1, 2, 4]
        for size, container in ((1, containers[0]), (2, containers[1]), (4, containers[2])):
            assert_equal_in_group(container.experts[0].weight.data, info[size].dp_group)
            assert_equal_in_group(container.experts[0].bias.data, info[size].dp_group)
        with pytest.raises(AssertionError, match="wanted equal tensors"):
            assert_equal_in_group(torch.tensor(rank % 2), info[2].ep_group)


def gradients() -> None:
    """tests/test_moe/test_grad_handler.py: layers of 1, 2 and 4 experts, other tokens on every rank."""
    with launched({}):
        MOE_CONTEXT.setup(42)
        router = Top1Router(noisy_func=UniformNoiseGenerator())
        model = nn.Sequential(
            *(MoeLayer(16, n, router, Experts(nn.Linear, n, in_features=16, out_features=16)) for n in (1, 2, 4))
        )
        sync_moe_model_param(model)
        info = MOE_CONTEXT.parallel_info_dict
        handler = MoeGradientHandler(model, 0)
        torch.manual_seed(78 + dist.get_rank())
        data = torch.randn(4, 16)
        MOE_CONTEXT.reset_loss()
        model(data).backward(torch.randn_like(data))
        before = model[1].experts.experts[0].weight.grad.clone()
        handler.handle_gradient()
        assert_not_equal(model[1].experts.experts[0].weight.grad, before)
        for layer, size in ((model[0], 1), (model[1], 2)):
            assert_equal_in_group(layer.experts.experts[0].weight.grad, info[size].dp_group)
            assert_equal_in_group(layer.experts.experts[0].bias.grad, info[size].dp_group)


def copied(kind: str) -> None:
    """Copies share the groups; what is unpickled takes those of the context."""
    with launched({"max_ep_size": 2}):
        MOE_CONTEXT.setup(42)
        model = layers(num_experts=3 if kind == "slices" else 4, kind=kind).eval()
        x = torch.randn(2, 3, 16)
        before = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_equal(other(x), before)
            for (name, parameter), own in zip(model.named_parameters(), other.parameters(), strict=True):
                assert getattr(own, "moe_info", None) is getattr(parameter, "moe_info", None), name


@pytest.mark.parametrize("case", [groups, gradients])
def test_upstreams_tests(four_ranks, case):
    four_ranks.run(case)


@pytest.mark.parametrize("kind", ["mixed", "called", "module", "slices"])
def test_copies(four_ranks, kind):
    four_ranks.run(copied, kind)
