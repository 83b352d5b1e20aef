"""Replicas of hot experts: their gradients are summed, and now and then they move to where the load is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_triton.distributed.exchange.channel import Channel
from moe_triton.distributed.exchange.expert_parallel import ExpertParallel
from moe_triton.distributed.exchange.schedule import described
from moe_triton.distributed.holders import ExpertHolder, StackedExperts, spread_experts
from moe_triton.distributed.replicas.placement import Placement, build_placement, moves, plan_placement


@dataclass(frozen=True, kw_only=True)
class Rebalanced:
    """What `rebalance` did with one layer: the busiest rank's load over the mean before and after, and slots moved."""

    layer: str
    before: float
    after: float
    moved: int


def replicated(model: nn.Module) -> Iterator[tuple[str, StackedExperts, ExpertParallel, Placement]]:
    """Return the layers with redundant experts."""
    for name, module, parallel in spread_experts(model):
        if isinstance(module, StackedExperts) and module.placement is not None:
            yield name, module, parallel, module.placement


@torch.no_grad()
def sum_replica_gradients(model: nn.Module) -> None:
    """Give every replica of an expert the sum of all its replicas' gradients; `reduce_gradients` calls it.

    The replicas then stay equal under any optimizer that works element by element. A missing gradient counts as zeros.
    """
    for name, module, parallel, placement in replicated(model):
        hot = (placement.replicas > 1).nonzero()[:, 0].tolist()
        if not hot:
            continue
        row_of = {expert: row for row, expert in enumerate(hot)}
        slots = [(slot, row_of[e]) for slot, e in enumerate(module.local_experts) if e in row_of]
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            total = parameter.grad.new_zeros(len(hot), *parameter.shape[1:])
            for slot, row in slots:
                total[row] += parameter.grad[slot]
            if parallel.ep.size > 1:
                Channel(group=parallel.ep, layer=name).all_reduce(total, "gradients of replicas")
            for slot, row in slots:
                parameter.grad[slot] = total[row]


def shares_of_slots(module: ExpertHolder) -> Tensor | None:
    """Return 1 / replicas of each local slot's expert, [slots], to count an expert once; None without replicas."""
    if not isinstance(module, StackedExperts) or module.placement is None:
        return None
    return 1 / module.placement.replicas.cpu()[list(module.local_experts)].double()


@torch.no_grad()
def rebalance(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, loads: Mapping[str, Tensor] | None = None
) -> list[Rebalanced]:
    """Place every layer's replicas again by its load, and move parameters and optimizer state to their new slots.

    Call it between two steps, on every rank; the computed function does not change, nor does the training beyond
    rounding. It reads the loads on the host.

    Args:
        model: layers with `ExpertParallel(redundant_experts=...)`; others are left alone.
        optimizer: its state tensors of a parameter's shape move with the experts.
        loads: by the name of the Experts module, [E] on every rank the same; None takes the assignments counted in
            training since the last call, summed over the ranks.
    """
    found = []
    for name, module, parallel, old in replicated(model):
        load = _global_load(module, parallel, name) if loads is None else loads[name].cpu().double()
        now = build_placement(old.physical_to_logical.cpu(), load, parallel.ep.size)
        new = plan_placement(
            load,
            old.physical_to_logical.shape[0],
            parallel.ep.size,
            ranks_per_node=parallel.ranks_per_node,
            previous=now,
        )
        todo = moves(now, new)
        tensors = list(_slot_tensors(module, optimizer))
        device = tensors[0].device
        if parallel.ep.size > 1:  # a rank without gradients or state would leave the others waiting
            what = {"moved": tuple((tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors)}
            Channel(group=parallel.ep, layer=name).agree(
                described(what), "comparison of what moves with the experts", device
            )
        for tensor in tensors:
            _move(tensor, todo, new.slots_per_rank, parallel, name)
        module.set_placement(new)
        module.load_on(device).zero_()
        found.append(Rebalanced(layer=name, before=now.imbalance, after=new.imbalance, moved=len(todo)))
    return found


def _global_load(module: StackedExperts, parallel: ExpertParallel, name: str) -> Tensor:
    """The assignments that all ranks' tokens wanted of each expert since the last call, [E] fp64 on the host."""
    total = module.load_on(next(module.held_parameters()).device).double()
    for group in parallel.data:
        if group.size > 1:
            Channel(group=group, layer=name).all_reduce(total, "sum of the expert loads")
    return total.cpu()


def _slot_tensors(module: StackedExperts, optimizer: torch.optim.Optimizer | None) -> Iterator[Tensor]:
    """The parameters of a layer, their gradients, and the optimizer's states of the same shape."""
    for parameter in module.parameters(recurse=False):
        yield parameter
        if parameter.grad is not None:
            yield parameter.grad
        if optimizer is not None:
            state = optimizer.state.get(parameter, {})
            for key in sorted(state, key=str):
                if isinstance(state[key], Tensor) and state[key].shape == parameter.shape:
                    yield state[key]


def _move(tensor: Tensor, todo: list[tuple[int, int]], per_rank: int, parallel: ExpertParallel, name: str) -> None:
    """Copy slots of a local tensor [slots, ...] to other slots of any rank; all are read before any is written."""
    me, size = parallel.ep.rank, parallel.ep.size
    leaving = sorted((d // per_rank, d, s % per_rank) for s, d in todo if s // per_rank == me)
    arriving = sorted((s // per_rank, d % per_rank) for s, d in todo if d // per_rank == me)
    width = math.prod(tensor.shape[1:])
    rows = tensor[[slot for _, _, slot in leaving]].reshape(len(leaving), width)
    out = rows.new_empty(len(arriving), width)
    sent = [sum(rank == to for to, _, _ in leaving) for rank in range(size)]
    received = [sum(rank == source for source, _ in arriving) for rank in range(size)]
    if size > 1:
        channel = Channel(group=parallel.ep, layer=name)
        channel.all_to_all(out, rows, received, sent, "moving of experts")()
    else:
        out = rows
    if arriving:
        tensor[[slot for _, slot in arriving]] = out.view(len(arriving), *tensor.shape[1:])
