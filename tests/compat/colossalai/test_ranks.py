"""Colossal-AI's layers over four processes equal one process: losses, gradients and what two steps make of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_triton.compat.colossalai import initialize
from moe_triton.compat.colossalai.context import MOE_CONTEXT, ParallelMode, global_context, moe_set_seed
from moe_triton.compat.colossalai.context.random import get_seeds, seed
from moe_triton.compat.colossalai.global_variables import moe_env
from moe_triton.compat.colossalai.nn.layer import WrappedDropout
from moe_triton.compat.colossalai.nn.layer.moe import TPExperts, build_ffn_experts
from moe_triton.compat.colossalai.nn.loss import MoeCrossEntropyLoss
from moe_triton.distributed import load_checkpoint, save_checkpoint
from tests.helpers.colossalai_context import launched
from tests.helpers.colossalai_models import Case, layers, train
from tests.helpers.compare import assert_close

TOLERANCE = 1e-10


def moe(size: int, tensor: int = 1, **exchange: Any) -> dict[str, Any]:
    return {"parallel": {"moe": {"size": size, **exchange}, "tensor": {"size": tensor, "mode": "1d"}}}


def compare(ranks: list[dict[str, Any]], alone: dict[str, Any], tensor: int = 1, factor: float = 1.0) -> None:
    """`factor`: of the experts' gradients."""
    by_place = {result["rank"]: result["losses"] for result in ranks}
    for step, loss in enumerate(alone["losses"]):
        mean = sum(losses[step] for losses in by_place.values()) / len(by_place)
        assert mean == pytest.approx(loss, rel=TOLERANCE)
    for result in ranks:
        assert result["gradients"].keys() == alone["gradients"].keys()
        for name, boxes in result["gradients"].items():
            ((_, whole),) = alone["gradients"][name].items()
            for offset, box in boxes.items():
                expected = tensor_slice(name, whole, tensor, result["tensor rank"])
                for dim, (start, size) in enumerate(zip(offset, box.shape, strict=True)):
                    expected = expected.narrow(dim, start, size)
                scale = factor if ".experts." in name else 1.0
                assert_close(box, scale * expected, tolerance=TOLERANCE)


def tensor_slice(name: str, whole: Tensor, size: int, rank: int) -> Tensor:
    """What a tensor-parallel rank has of the attention's parameters, all of the others'."""
    if size == 1 or ".att.dense" not in name or name.endswith("dense2.bias"):
        return whole
    if ".dense2." in name:
        return whole.chunk(size, 1)[rank]
    return torch.cat([part.chunk(size, 0)[rank] for part in whole.chunk(3, 0)])


CASES = {
    "moe size 2": (moe(2), {}),
    "moe size 4": (moe(4), {}),
    "moe size 1": (moe(1), {}),
    "max_ep_size 4, two experts": ({"max_ep_size": 4}, {"num_experts": 2}),
    "max_ep_size 2, eight experts": ({"max_ep_size": 2}, {"num_experts": 8}),
    "fixed-size exchange": (moe(2, mode="allgather", chunks=2), {}),
    "called": (moe(2), {"kind": "called"}),
    "called, fixed-size exchange": (moe(4, mode="bounded"), {"kind": "called"}),
    "slices": (moe(2), {"kind": "slices", "num_experts": 3}),
    "four slices": (moe(4), {"kind": "slices", "num_experts": 3}),
    "module": ({"max_ep_size": 2}, {"kind": "module"}),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(four_ranks, name):
    config, options = CASES[name]
    compare(four_ranks.run(train, Case(config, options=options)), train(Case(options=options)))


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
def test_widenet_equals_one_process(four_ranks, checkpoint):
    options = {"checkpoint_blocks": checkpoint}
    compare(four_ranks.run(train, Case(moe(2), "widenet", options)), train(Case({}, "widenet")))


def test_capacity_of_the_ranks(four_ranks):
    options = {"capacity_factor": 0.6}
    alone = train(Case(options={**options, "capacity_groups": 4, "priority": "position"}))
    compare(four_ranks.run(train, Case(moe(2), options={**options, "priority": "position"})), alone)


@pytest.mark.parametrize("ep", [1, 2, 4])
@pytest.mark.parametrize("model", ["layers", "widenet"])
def test_tensor_and_expert_parallelism_equal_one_process(four_ranks, ep, model):
    compare(four_ranks.run(train, Case(moe(ep, tensor=2), model)), train(Case({}, model)), tensor=2)


def test_tensor_parallelism_with_called_experts_and_slices(four_ranks):
    for options in ({"kind": "called"}, {"kind": "slices", "num_experts": 3}):
        case = Case(moe(2, tensor=2), options=options)
        compare(four_ranks.run(train, case), train(Case(options=options)), tensor=2)


@pytest.mark.parametrize(("size", "rule", "factor"), [(2, "colossalai", 2.0), (4, "colossalai", 4.0), (2, "mean", 1.0)])
def test_upstreams_rule_depends_on_ep(four_ranks, size, rule, factor):
    case = Case(moe(size), steps=1, rule=rule)
    compare(four_ranks.run(train, case), train(Case(steps=1)), factor=factor)


def test_the_comparison_can_fail(four_ranks):
    results = four_ranks.run(train, Case(moe(2), steps=1))
    alone = train(Case(steps=1))
    name = next(name for name in alone["gradients"] if ".experts." in name)
    ((offset, whole),) = alone["gradients"][name].items()
    alone["gradients"][name] = {offset: whole.flip(0)}  # swapped experts
    with pytest.raises(AssertionError):
        compare(results, alone)


def layout() -> dict[str, Any]:
    """What the contexts say of W = 4, M = 2, and of v0.1.6's get_info."""
    with launched(moe(2)):
        moe_set_seed(10)
        found: dict[str, Any] = {
            "model": global_context.get_ranks_in_group(ParallelMode.MOE_MODEL),
            "data": global_context.get_ranks_in_group(ParallelMode.MOE_DATA),
            "dense": global_context.get_ranks_in_group(ParallelMode.DATA),
            "sizes": (moe_env.model_parallel_size, moe_env.data_parallel_size),
            "seeds": get_seeds(),
        }
        with seed(ParallelMode.TENSOR):
            found["draw"] = torch.rand(()).item()
        found["next"] = torch.rand(()).item()
    with launched({"max_ep_size": 4}):
        MOE_CONTEXT.setup(10)
        found["v0.1.6 seeds"] = get_seeds()
        found["info"] = {}
        for num_experts in (1, 2, 4, 8):
            local, info = MOE_CONTEXT.get_info(num_experts)
            found["info"][num_experts] = (local, info.ep_size, info.dp_size)
        found["groups of 2"] = (info_ranks(2, "ep"), info_ranks(2, "edp"))
    return found


def info_ranks(num_experts: int, kind: str) -> tuple[int, ...]:
    return getattr(MOE_CONTEXT.get_info(num_experts)[1].parallel, kind).ranks


def test_groups_and_seeds(four_ranks):
    found = four_ranks.run(layout)
    assert [f["model"] for f in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [f["data"] for f in found] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(f["dense"] == [0, 1, 2, 3] and f["sizes"] == (2, 2) for f in found)
    assert [f["seeds"][ParallelMode.MOE_MODEL] for f in found] == [10, 11, 10, 11]
    assert [f["seeds"][ParallelMode.TENSOR] for f in found] == [0, 1, 2, 3]
    assert [f["v0.1.6 seeds"][ParallelMode.TENSOR] for f in found] == [10, 11, 12, 13]
    assert len({f["draw"] for f in found}) == 4
    assert len({f["next"] for f in found}) == 1
    assert all(f["info"] == {1: (1, 1, 4), 2: (1, 2, 2), 4: (1, 4, 1), 8: (2, 4, 1)} for f in found)
    assert [f["groups of 2"] for f in found] == [((0, 1), (0, 2)), ((0, 1), (1, 3)), ((2, 3), (0, 2)), ((2, 3), (1, 3))]


def dropped_out() -> dict[str, Any]:
    """Dropout everywhere, with tensor parallelism and slices: what has to be equal on ranks afterwards."""
    with launched(moe(2, tensor=2)):
        moe_set_seed(3)
        model = layers(num_experts=3, kind="slices")
        for module in model.modules():
            if isinstance(module, TPExperts):
                module.drop_rate = 0.5
        model.norm = torch.nn.Sequential(model.norm, WrappedDropout(0.5))
        engine, *_ = initialize(
            model, torch.optim.SGD(model.parameters(), lr=0.1), MoeCrossEntropyLoss(), verbose=False
        )
        group = global_context.group(ParallelMode.DATA)
        x = torch.randn(8, 3, 16).chunk(group.size)[group.rank]
        loss = engine.criterion(engine(x), torch.zeros(len(x), dtype=torch.long))
        engine.backward(loss)
        engine.step()
        return {"loss": loss.item(), "dense": model.head.weight.detach(), "bias": model.first.experts.b2.detach()}


def test_dropout_keeps_replicas_equal(four_ranks):
    found = four_ranks.run(dropped_out)
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6)  # the same tokens
    assert found[0]["loss"] != pytest.approx(found[2]["loss"], rel=1e-6)
    for other in found[1:]:
        assert_close(other["dense"], found[0]["dense"], tolerance=1e-6)
        assert_close(other["bias"], found[0]["bias"], tolerance=1e-6)


def build() -> str:
    with launched(moe(4)):
        kinds = [type(build_ffn_experts(4, 8, 8)).__name__, type(build_ffn_experts(3, 8, 8)).__name__]
        with pytest.raises(NotImplementedError, match="max_ep_size=4"):
            build_ffn_experts(3, 8, 6)
        with pytest.raises(ValueError, match="max_ep_size=4"):
            MOE_CONTEXT.get_info(6)
    return " ".join(kinds)


def test_build_ffn_experts(four_ranks):
    assert set(four_ranks.run(build)) == {"FFNExperts TPExperts"}


def test_a_size_that_does_not_divide(four_ranks):
    assert all("size: got 3" in text for text in four_ranks.run(bad_size))


def bad_size() -> str:
    with pytest.raises(ValueError, match="size") as error, launched(moe(3)):
        pass
    return str(error.value)


def saved(folder: str, kind: str) -> Tensor:
    """What a model over two ranks per set of experts computes, after saving it."""
    with launched(moe(2)):
        moe_set_seed(5)
        model = layers(kind=kind)
        save_checkpoint(folder, model)
        return model(torch.ones(2, 3, 16)).detach()


@pytest.mark.parametrize("kind", ["mixed", "called"])
def test_a_checkpoint_loads_on_one_process(four_ranks, tmp_path, kind):
    expected = four_ranks.run(saved, str(tmp_path), kind)[0]
    with launched({}):
        moe_set_seed(6)
        model = layers(kind=kind)
        assert not torch.allclose(model(torch.ones(2, 3, 16)), expected)
        load_checkpoint(tmp_path, model)
        assert_close(model(torch.ones(2, 3, 16)), expected)
