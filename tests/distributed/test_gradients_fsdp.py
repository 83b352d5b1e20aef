"""FSDP2 around expert-parallel layers, and FSDP of both kinds around plain ones, against one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Shard

import moe_triton.layers.experts
from moe_triton.distributed import ExpertParallel, apply_fsdp2, clip_grad_norm_, make_groups, reduce_gradients
from moe_triton.layers import Experts
from moe_triton.records import ExpertCall
from tests.helpers import parity
from tests.helpers.compare import assert_close
from tests.helpers.gradient_parity import LAYER, TOKENS, Model, compare, expected_gradients, local_part, losses, share
from tests.helpers.parity import Case
from tests.helpers.ranks import products


def fsdp(sizes: dict, rule: str) -> None:
    groups = make_groups(**sizes)
    case = Case(TOKENS[: groups.dp.size], layer=LAYER, lora=True)
    model = Model(case, ExpertParallel(groups, loss_reduction=rule))
    del model.unused
    expected = expected_gradients(case, 1.0)
    x, grad = parity.global_batch(case)
    here = share(case, groups)
    whole = Model(case, None)
    losses(case, whole, x, grad, 1.0).backward()
    wanted = nn.utils.clip_grad_norm_([p for p in whole.parameters() if p.grad is not None], 0.5)
    apply_fsdp2(model, groups, rule=rule)
    losses(case, model, x[here], grad[here], 1.0 if rule == "sum" else 1 / groups.dp.size).backward()
    compare(case, model, expected)
    assert_close(clip_grad_norm_(model, 0.5), wanted)


def frozen_base() -> None:
    """Shards of adapters that are trained beside shards of projections that are not."""
    groups = make_groups(ep=2)
    case = Case(TOKENS, layer=LAYER, lora=True)
    expected = expected_gradients(case, 1.0)
    model = Model(case, ExpertParallel(groups))
    del model.unused
    for name, parameter in model.moe.experts.named_parameters():
        parameter.requires_grad_("lora" in name)
    apply_fsdp2(model, groups)
    x, grad = parity.global_batch(case)
    here = share(case, groups)
    losses(case, model, x[here], grad[here], 1 / groups.dp.size).backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert [name for name in trained if "experts" in name] == [
        f"moe.experts.{projection}_lora_{key}" for projection in ("gate_up", "down") for key in "ab"
    ]
    for name in trained:
        assert_close(model.get_parameter(name).grad.full_tensor(), local_part(model, name, expected[name]))


def test_adapters_over_a_frozen_base(four_ranks):
    four_ranks.run(frozen_base)


def sharded_in_bf16(model: Model, how: str) -> nn.Module:
    groups = make_groups(ep=2)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if how == "apply_fsdp2":
        return apply_fsdp2(model, groups, mp_policy=policy)
    if how == "apply_fsdp2 with blocks":
        return apply_fsdp2(model, groups, blocks=[model.moe], mp_policy=policy)
    if how == "fully_shard":
        fully_shard(model.moe.experts, mp_policy=policy)
        return fully_shard(model)
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Experts}),
        mixed_precision=MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


def in_bf16(how: str) -> None:
    """The experts compute in bf16 and get the router's fp32 weights, bit for bit, whoever makes them a unit."""
    groups = make_groups(ep=2 if how.startswith("apply") else 1)
    # all experts chosen: a router that is cast to bf16 chooses no others
    case = Case(TOKENS, layer={"bias": True, "top_k": parity.EXPERTS}, dtype=torch.float32)
    model = Model(case, ExpertParallel(groups) if groups.ep.size > 1 else None)
    del model.unused
    expected = expected_gradients(case, 1.0)
    routed, seen = [], []
    model.moe.router.register_forward_hook(lambda module, inputs, out: routed.append(out.weights.detach().clone()))
    sharded = sharded_in_bf16(model, how)
    x, grad = parity.global_batch(case)
    here = share(case, groups)
    with pytest.MonkeyPatch.context() as patch:
        for place, name in ((ExpertParallel, "run"), (moe_triton.layers.experts, "run_experts")):
            original = getattr(place, name)

            def spy(*arguments, original=original, **more):
                (call,) = [value for value in arguments if isinstance(value, ExpertCall)]
                seen.append((call.hidden.dtype, call.weights.detach().clone()))
                return original(*arguments, **more)

            patch.setattr(place, name, spy)
        losses(case, sharded, x[here], grad[here], 1 / 4).backward()
    ((dtype, weights),) = seen
    assert dtype == torch.bfloat16
    assert weights.dtype == torch.float32
    assert torch.equal(weights, routed[0])
    assert (weights != weights.bfloat16()).any(), "bf16 would make a difference"
    if how == "FSDP1":
        with FullyShardedDataParallel.summon_full_params(sharded, with_grads=True):
            for name, parameter in sharded.named_parameters():
                assert_close(parameter.grad, expected[name.replace("_fsdp_wrapped_module.", "")], tolerance=3e-2)
        return
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad.full_tensor(), local_part(model, name, expected[name]), tolerance=3e-2)


def drawn_after_meta(sizes: dict | None, experts: int, dim: int) -> None:
    """meta -> shards -> to_empty -> reset_parameters: the values of one process."""
    groups = make_groups(**(sizes or {"ep": 1}))
    case = Case(TOKENS, layer=LAYER, experts=experts, lora=True)
    with torch.device("meta"):
        model = Model(case, None if sizes is None else ExpertParallel(groups))
    del model.unused
    place = {"shard_placement_fn": lambda parameter: Shard(dim if parameter.dim() == 3 else 0)}
    if sizes is None:
        fully_shard(model.moe.experts, mesh=groups.dp_mesh, **place)
    else:
        apply_fsdp2(model, groups, **(place if dim else {}))
    model.to_empty(device="cpu")
    whole = Model(case, None).moe.experts
    for module in (model.moe.experts, whole):
        torch.manual_seed(7)
        module.reset_parameters()
    for name, parameter in model.moe.experts.named_parameters():
        assert torch.equal(
            parameter.full_tensor(), local_part(model, f"moe.experts.{name}", getattr(whole, name).detach())
        )


def replicas_after_meta() -> None:
    """The map of replicas and the load come back too."""
    parallel = ExpertParallel(make_groups(ep=4), redundant_experts=4)
    wanted = parity.make_layer(Case(TOKENS), parallel).experts
    experts = parity.make_layer(Case(TOKENS), parallel, device="meta").experts
    experts.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*experts.parameters(), *experts.buffers()):
            tensor.fill_(77)
    torch.manual_seed(7)
    experts.reset_parameters()
    torch.manual_seed(7)
    wanted.reset_parameters()
    for (name, tensor), (_, other) in zip(experts.named_parameters(), wanted.named_parameters(), strict=True):
        assert torch.equal(tensor, other), name
    assert torch.equal(experts.physical_to_logical, wanted.physical_to_logical)
    assert torch.equal(experts.load, torch.zeros(parity.EXPERTS, dtype=torch.int64))


def sharded_as_if_the_same() -> None:
    groups = make_groups(ep=2)
    model = Model(Case(TOKENS), ExpertParallel(groups))
    del model.unused
    fully_shard(model.moe.experts, mesh=groups.dp_mesh)
    fully_shard(model, mesh=groups.dp_mesh)
    for reduce in (lambda: clip_grad_norm_(model, 1.0), lambda: reduce_gradients(model)):
        with pytest.raises(ValueError, match=r"different experts at 'moe\.experts' sharded as if they were the same"):
            reduce()


def fsdp_disagreeing(rule: str) -> None:
    groups = make_groups(ep=2)
    model = Model(Case(TOKENS), ExpertParallel(groups, loss_reduction="mean" if rule == "sum" else "sum"))
    with pytest.raises(ValueError, match=f"rule: got '{rule}'"):
        apply_fsdp2(model, groups, rule=rule)
    assert not any(hasattr(type(module), "unshard") for module in model.modules()), "nothing is sharded yet"


HOW = ("apply_fsdp2", "apply_fsdp2 with blocks", "fully_shard", "FSDP1")


@pytest.mark.parametrize(
    ("sizes", "rule"),
    products(sizes=({"ep": 4}, {"ep": 2}, {"ep": 2, "dp_replicate": 2}, {"dp_replicate": 2}), rule=("sum", "mean")),
)
def test_fsdp2(four_ranks, sizes, rule):
    four_ranks.run(fsdp, sizes, rule)


@pytest.mark.parametrize("how", HOW)
def test_mixed_precision(four_ranks, how):
    four_ranks.run(in_bf16, how)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("sizes", [{"ep": 2}, {"ep": 1}, {"ep": 2, "etp": 2}, {"ep": 1, "etp": 2}, None], ids=str)
def test_draws_are_those_of_one_process(four_ranks, sizes, dim):
    four_ranks.run(drawn_after_meta, sizes, 6, dim)


def test_replicas_of_a_meta_model(four_ranks):
    four_ranks.run(replicas_after_meta)


def test_shards_over_ranks_with_other_experts(four_ranks):
    four_ranks.run(sharded_as_if_the_same)


@pytest.mark.parametrize("rule", ["sum", "mean"])
def test_layer_and_fsdp2_have_to_agree(four_ranks, rule):
    four_ranks.run(fsdp_disagreeing, rule)
