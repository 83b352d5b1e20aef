"""Keeping equal what has to be equal: parameters at the start, and a check that they still are."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moe_triton.distributed.errors import ConfigurationMismatch
from moe_triton.distributed.exchange.channel import Channel
from moe_triton.distributed.groups import Group, ParallelGroups
from moe_triton.distributed.parameters import data_groups, expert_parameters


@torch.no_grad()
def broadcast_parameters(model: nn.Module, groups: ParallelGroups | None = None) -> None:
    """Give every rank the first rank's parameters and buffers: dense ones over the data-parallel ranks, experts over
    those that hold the same ones. Call it once, before training."""
    experts = expert_parameters(model)
    for parameter, parallel in experts.items():
        _broadcast(parameter, (parallel.edp,))
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor not in experts:
            _broadcast(tensor, data_groups(model, groups))


def check_replicas(model: nn.Module, groups: ParallelGroups | None = None, *, everything: bool = False) -> None:
    """Raise if the ranks' routers have drifted apart: tokens would go to experts by different rules.

    Compares a checksum of every router parameter and saved buffer, or with `everything` of all dense parameters and of
    experts with their copies. It reads the tensors on the host: call it now and then, on every rank.

    Raises:
        ConfigurationMismatch: the names of the tensors, and the ranks that differ from the first one.
    """
    experts = expert_parameters(model)
    saved = model.state_dict(keep_vars=True)
    dense = {name: t for name, t in saved.items() if isinstance(t, Tensor) and t not in experts}
    if not everything:
        routers = tuple(f"{name}." if name else "" for name, module in model.named_modules() if hasattr(module, "gate"))
        dense = {name: t for name, t in dense.items() if name.startswith(routers)} if routers else {}
    for group in data_groups(model, groups):
        _compare(dense, group)
    if everything:
        for copies in {parallel.edp: None for parallel in experts.values()}:
            mine = {n: p for n, p in model.named_parameters() if p in experts and experts[p].edp is copies}
            _compare(mine, copies)


def _broadcast(tensor: Tensor, over: tuple[Group, ...]) -> None:
    for group in over:
        if group.size > 1:
            Channel(group=group, layer="replicas").broadcast(tensor, "broadcast of the first rank's parameters")


def _compare(tensors: Mapping[str, Tensor], group: Group) -> None:
    if group.size == 1:
        return
    sums = {
        name: zlib.crc32(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }
    everybody = Channel(group=group, layer="replicas").gather_objects(sums, "comparison of checksums")
    first = everybody[0]
    assert isinstance(first, dict)
    differences = [
        f"{name} on rank {rank}"
        for rank, theirs in zip(group.ranks, everybody, strict=True)
        if isinstance(theirs, dict)
        for name in first
        if theirs.get(name) != first[name]
    ]
    if differences:
        raise ConfigurationMismatch(f"not equal to rank {group.ranks[0]}'s: {', '.join(differences)}")
