"""Layers that different ranks could mistake for each other: every layer has a name of its own, copies included."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.swa_utils import AveragedModel

from moe_triton import MoE
from moe_triton.compat import deepspeed as compat
from moe_triton.distributed import ConfigurationMismatch, ExpertParallel, make_groups
from tests.helpers.faults import EXPERTS, HIDDEN, Model, fresh_groups, step


def names(model: Model) -> list[str]:
    return [layer.experts.layer_name for layer in model.layers]


def two_models_in_another_order(kind: str) -> None:
    groups = fresh_groups(ep=2)
    first = Model(ExpertParallel(groups))
    second = copy.deepcopy(first) if kind == "a copy" else Model(ExpertParallel(groups))
    models = [first, second] if dist.get_rank() == 0 else [second, first]
    mine, theirs = (re.escape(repr(str(names(model)[0]))) for model in models)
    with pytest.raises(ConfigurationMismatch, match=rf"layer: {mine} here, {theirs} on rank {1 - dist.get_rank()}"):
        models[0](torch.randn(4, HIDDEN))
    step(models[0] if dist.get_rank() == 0 else models[1])


@pytest.mark.parametrize("kind", ["two models", "a copy"])
def test_ranks_that_run_two_models_in_another_order(two_ranks, kind):
    two_ranks.run(two_models_in_another_order, kind)


def layers_of_some_ranks() -> None:
    """Ranks 1 and 3 have a model of their own before all ranks make one, whose groups include (1, 3)."""
    pairs = make_groups(ep=2, order="data-before-expert")
    assert pairs.ep.ranks in ((0, 2), (1, 3))
    if dist.get_rank() in (1, 3):
        Model(ExpertParallel(DeviceMesh.from_group(pairs.ep.handle, "cpu", mesh_dim_names=("ep",))))
    step(Model(ExpertParallel(pairs), aux_loss_weight=0.1))


def test_a_model_of_some_ranks_leaves_the_names_of_common_ones_alone(four_ranks):
    four_ranks.run(layers_of_some_ranks)


def copies() -> tuple[list[str], list[str], list[str]]:
    """An average of the weights on all ranks, and a copy that rank 1 alone makes."""
    parallel = ExpertParallel(fresh_groups(ep=2))
    model = Model(parallel, aux_loss_weight=0.1)
    step(model)
    ema = AveragedModel(model)
    ema.update_parameters(model)
    inner = ema.module
    assert inner.layers[0].experts.expert_parallel is parallel, "the copy shares the groups"
    again = copy.deepcopy(inner)
    if dist.get_rank() == 1:
        copy.deepcopy(model)
    x = torch.randn(5, HIDDEN)
    with torch.no_grad():
        assert torch.equal(ema(x), model(x))
        assert torch.equal(again(x), model(x))
        before = again(x)
        model.layers[0].experts.down_proj.zero_()
        assert torch.equal(again(x), before), "the copy has its own weights"
    step(inner)
    assert all(p.grad is None for p in model.parameters())
    step(Model(parallel))  # named alike on both ranks, though rank 1 has copied once more
    return names(model), names(inner), names(again)


def test_copies_share_groups_and_have_names_of_their_own(two_ranks):
    found = two_ranks.run(copies)
    assert found[0] == found[1]
    originals, first, second = found[0]
    assert first == [f"copy 1 of {name}" for name in originals]
    assert second == [f"copy 2 of {name}" for name in originals], "a copy of a copy is one more copy of the original"


def unpickled() -> ExpertParallel:
    parallel = ExpertParallel(fresh_groups(ep=2), chunks=3, listener=lambda event: None)
    loaded = pickle.loads(pickle.dumps(parallel))
    assert loaded.chunks == 3
    assert loaded.experts_of(EXPERTS) == parallel.experts_of(EXPERTS)
    layer = MoE(HIDDEN, 8, EXPERTS, expert_parallel=loaded)
    with pytest.raises(RuntimeError, match=r"^handle: got an unpickled group, .* wanted a layer made in this process"):
        layer(torch.randn(4, HIDDEN))
    return parallel


def test_a_pickled_one_leaves_its_process_groups_behind(two_ranks):
    """In its own process and in one without torch.distributed: parameters can be read, but nothing is exchanged."""
    for rank, parallel in enumerate(two_ranks.run(unpickled)):
        assert parallel.ep.ranks == (0, 1)
        assert parallel.ep.rank == rank
        assert pickle.loads(pickle.dumps(parallel)).ep.rank == rank
        layer = MoE(HIDDEN, 8, EXPERTS, expert_parallel=parallel)
        assert len(layer.experts.local_experts) == len(layer.state_dict()["experts.down_proj"]) == EXPERTS // 2
        with pytest.raises(RuntimeError, match=r"^handle: got an unpickled group"):
            layer(torch.randn(4, HIDDEN))


def test_an_unpickled_group_of_one_works():
    parallel = pickle.loads(pickle.dumps(ExpertParallel()))
    layer = MoE(HIDDEN, 8, EXPERTS, expert_parallel=parallel)
    assert layer(torch.randn(4, HIDDEN)).output.shape == (4, HIDDEN)


def deepspeed_layers() -> list[str]:
    """DeepSpeed's layers and ours over the same ranks."""
    layers = [compat.MoE(HIDDEN, torch.nn.Linear(HIDDEN, HIDDEN), EXPERTS, ep_size=2) for _ in range(2)]
    for layer in layers:
        layer(torch.randn(4, HIDDEN))
    parallel = layers[0].deepspeed_moe.expert_parallel
    ours = MoE(HIDDEN, 8, EXPERTS, expert_parallel=ExpertParallel(parallel.ep.handle))
    found = [layer.deepspeed_moe.experts.message_name for layer in layers] + [ours.experts.layer_name]
    return [*found, copy.deepcopy(layers[0]).deepspeed_moe.experts.message_name]


def test_deepspeed_layers_are_counted_too(two_ranks):
    first, second = two_ranks.run(deepspeed_layers)
    assert first == second
    assert len(set(first)) == 4
