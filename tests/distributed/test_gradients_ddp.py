"""DistributedDataParallel around expert-parallel layers, against one process on the global batch."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from moe_triton.distributed import ExpertParallel, clip_grad_norm_, make_groups, reduce_gradients, wrap_ddp
from moe_triton.distributed.exchange.channel import Channel
from tests.helpers import parity
from tests.helpers.compare import assert_close
from tests.helpers.gradient_parity import LAYER, TOKENS, Model, compare, expected_gradients, losses, share
from tests.helpers.parity import HIDDEN, Case
from tests.helpers.ranks import products

# by micro-batch: whether the forward and the backward pass are outside of `no_sync`
ACCUMULATION = {
    "no_sync": [(False, False), (True, True)],
    "synchronised each time": [(True, True), (True, True)],
    "forward decides": [(False, False), (True, False)],
    "three": [(True, True), (False, False), (True, True)],
}


def ddp(sizes: dict, passes: list[tuple[bool, bool]]) -> None:
    groups = make_groups(**sizes)
    case = Case(TOKENS[: groups.dp.size], layer=LAYER, lora=True)
    model = Model(case, ExpertParallel(groups))
    wrapped = wrap_ddp(model, find_unused_parameters=True)
    x, grad = parity.global_batch(case)
    here = share(case, groups)
    for forward, backward in passes:
        with contextlib.nullcontext() if forward else wrapped.no_sync():
            loss = losses(case, wrapped, x[here], grad[here], 1 / groups.dp.size)
        with contextlib.nullcontext() if backward else wrapped.no_sync():
            loss.backward()
    expected = {name: len(passes) * value for name, value in expected_gradients(case, 1.0).items()}
    model.unused.grad = torch.zeros_like(model.unused) if model.unused.grad is None else model.unused.grad
    compare(case, model, expected)


class Tied(nn.Module):
    """Two MoE layers with one set of experts, and activation checkpointing."""

    def __init__(self, case: Case, parallel: ExpertParallel | None, reentrant: bool | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(parity.make_layer(case, parallel) for _ in range(2))
        self.layers[1].experts = self.layers[0].experts
        self.reentrant = reentrant

    def forward(self, x):
        loss = x.new_zeros(())
        for layer in self.layers:
            reentrant = self.reentrant
            output, aux, _ = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
            x, loss = x + output, loss + aux
        return x, loss


def tied(sizes: dict, reentrant: bool | None) -> None:
    groups = make_groups(**sizes)
    case = Case(TOKENS, layer=LAYER)
    model, whole = Tied(case, ExpertParallel(groups), reentrant), Tied(case, None, None)
    x, grad = parity.global_batch(case)
    here = share(case, groups)
    for net, part, scale in ((whole, slice(None), 1), (wrap_ddp(model), here, groups.dp.size)):
        out, loss = net(x[part].clone().requires_grad_())
        (scale * (out * grad[part]).sum() + loss).backward()
    for name, parameter in model.named_parameters():
        wanted = whole.get_parameter(name).grad
        if ".experts." in name:
            wanted = wanted[list(model.layers[0].experts.local_experts)]
        assert_close(parameter.grad, wanted)


class Two(nn.Module):
    """Two MoE layers."""

    def __init__(self, parallel: ExpertParallel) -> None:
        super().__init__()
        self.layers = nn.ModuleList(parity.make_layer(Case(TOKENS), parallel) for _ in range(2))

    def forward(self, x):
        return self.layers[1](self.layers[0](x).output).output


def overlapped() -> list[str]:
    """The events of a backward pass: of the layers, and of the experts' reductions."""
    events: list[str] = []
    wrapped = wrap_ddp(Two(ExpertParallel(make_groups(ep=2), listener=events.append)))
    start = Channel.start_all_reduce

    def start_all_reduce(self, tensor, phase, *args):
        wait = start(self, tensor, phase, *args)
        events.append(f"start {phase}")
        return lambda: [events.append(f"wait {phase}"), wait()][1]

    loss = wrapped(torch.randn(5, HIDDEN, dtype=torch.float64)).sum()
    events.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Channel, "start_all_reduce", start_all_reduce)
        loss.backward()
    return [event for event in events if event in ("weight gradients", *(f"{w} expert gradients" for w in WORDS))]


WORDS = ("start", "wait")


def test_the_reduction_of_experts_is_under_way_while_backward_goes_on(four_ranks):
    layer = ["weight gradients", *["start expert gradients"] * 2]
    for events in four_ranks.run(overlapped):
        assert events == [*layer, *layer, *["wait expert gradients"] * 4]


def plain_ddp(sizes: dict, ignores: bool) -> None:
    """What takes different experts for copies raises at the first forward pass, on every rank."""
    groups = make_groups(**sizes)
    model = Model(Case(TOKENS), ExpertParallel(groups))
    del model.unused
    if ignores:
        names = [name for name, _ in model.named_parameters() if ".experts." in name]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    wrapped = DistributedDataParallel(model)
    x = torch.randn(5, HIDDEN, dtype=torch.float64)
    if ignores or groups.ep.size == 1:
        wrapped(x).output.sum().backward()
        return
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"the different experts at 'moe\.experts\.gate_up_proj' .*wrap_ddp\(model\)"
        ):
            wrapped(x)


def reduced_twice() -> None:
    groups = make_groups(ep=2)
    model = Model(Case(TOKENS), ExpertParallel(groups))
    del model.unused
    wrapped = wrap_ddp(model)
    wrapped(torch.randn(5, HIDDEN, dtype=torch.float64)).output.sum().backward()
    with pytest.raises(ValueError, match="wrap_ddp"):
        reduce_gradients(wrapped)
    with pytest.raises(ValueError, match="wrap_ddp has wrapped before"):
        wrap_ddp(model)
    clip_grad_norm_(wrapped, 1.0)


def disagreeing() -> None:
    groups = make_groups(ep=2)
    with pytest.raises(ValueError, match=r"rule: got 'mean' with loss_reduction='sum'"):
        wrap_ddp(Model(Case(TOKENS), ExpertParallel(groups, loss_reduction="sum")))


@pytest.mark.parametrize(("sizes", "passes"), products(sizes=({"ep": 4}, {"ep": 2}), passes=tuple(ACCUMULATION)))
def test_accumulation(four_ranks, sizes, passes):
    four_ranks.run(ddp, sizes, ACCUMULATION[passes])


@pytest.mark.parametrize(("sizes", "reentrant"), products(sizes=({"ep": 4}, {"ep": 2}), reentrant=(None, False, True)))
def test_tied_experts_under_checkpointing(four_ranks, sizes, reentrant):
    four_ranks.run(tied, sizes, reentrant)


@pytest.mark.parametrize(("sizes", "ignores"), products(sizes=({"ep": 4}, {"ep": 2}, {"ep": 1}), ignores=(False, True)))
def test_plain_ddp(four_ranks, sizes, ignores):
    four_ranks.run(plain_ddp, sizes, ignores)


def test_gradients_are_reduced_by_one(four_ranks):
    four_ranks.run(reduced_twice)


def test_layer_and_ddp_have_to_agree(four_ranks):
    four_ranks.run(disagreeing)
