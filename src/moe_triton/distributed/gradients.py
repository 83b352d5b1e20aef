"""What is left to do with gradients after backward: sums over ranks, and the norm of all of them.

With N tokens in the whole step and the loss of rank r = (sum over its tokens) / N, a gradient is the plain sum over
ranks: of dense parameters over the data-parallel ranks, of experts over those that hold the same ones, since the
exchange has brought them everybody else's tokens. With the loss of rank r = mean over its tokens and equal numbers of
tokens, both sums are divided by the number of data-parallel ranks: the experts' too, not by the number of their copies.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from moe_triton.checks import check_choice, check_number
from moe_triton.distributed.channel import Channel
from moe_triton.distributed.groups import Group, ParallelGroups, group_from_handle
from moe_triton.distributed.parameters import (
    data_groups,
    expert_modules,
    expert_parameters,
    is_sliced,
    number_of_ranks,
)
from moe_triton.distributed.replication import shares_of_slots, sum_replica_gradients

RULES = ("mean", "sum", "deepspeed", "colossalai")
BUCKET_BYTES = 25 << 20  # what DistributedDataParallel sends at a time


def reduce_gradients(
    model: nn.Module,
    groups: ParallelGroups | None = None,
    *,
    rule: str = "mean",
    experts_only: bool = False,
) -> None:
    """Make every gradient that of the global batch, in place; once per optimizer step, on every rank.

    A missing gradient of a parameter that wants one becomes zeros, so that all ranks send the same. DTensor parameters
    are left to FSDP2, which reduces them itself.

    Args:
        model: with any number of expert-parallel layers, none included.
        groups: None takes those of the model's layers.
        rule: "mean": for losses that are means over a rank's tokens. "sum": for losses whose sum over ranks is the
            global one. "deepspeed": what DeepSpeed does now, which is "mean". "colossalai": as "mean", but an expert's
            gradient is averaged over its copies only: ep times larger (also DeepSpeed's before 0.6).
        experts_only: leave the dense gradients to somebody else, such as DistributedDataParallel.

    Raises:
        ExpertParallelError: a rank is gone; the message names it.
    """
    check_choice("rule", rule, RULES)
    over = data_groups(model, groups)
    num_ranks = number_of_ranks(over)
    experts = expert_parameters(model)
    sum_replica_gradients(model)
    for copies in {parallel.edp: None for parallel in experts.values()}:
        divisor = {"sum": 1, "colossalai": copies.size}.get(rule, num_ranks)
        mine = (parameter for parameter, parallel in experts.items() if parallel.edp is copies)
        _sum_over((copies,), _gradients(mine), divisor, "expert gradients")
    if not experts_only:
        dense = (parameter for parameter in model.parameters() if parameter not in experts)
        _sum_over(over, _gradients(dense), 1 if rule == "sum" else num_ranks, "dense gradients")


def wrap_ddp(model: nn.Module, groups: ParallelGroups | None = None, **arguments: object) -> DistributedDataParallel:
    """DistributedDataParallel for a model with expert-parallel layers, by the rule "mean".

    DDP averages the dense gradients over the data-parallel ranks, and leaves the experts alone: their gradients are
    reduced as they are accumulated, in the backward passes in which DDP would reduce its own (not under `no_sync`).
    Give the layers `ExpertParallel(loss_reduction="mean")`.

    Args:
        groups: None takes those of the model's layers.
        arguments: DDP's own.
    """
    over = [group for group in data_groups(model, groups) if group.size > 1]
    if len(over) > 1:
        raise ValueError("groups: got a mesh whose data-parallel ranks are no one group, wanted make_groups(...)")
    experts = expert_parameters(model)
    if any(parallel.redundant_experts for parallel in experts.values()):
        raise ValueError("model: got layers with redundant_experts, whose gradients reduce_gradients has to sum")
    # a router's load is counted per rank, and summed when it is used: DDP must not overwrite it with rank 0's
    counted = {id(buffer) for module in model.modules() if (buffer := getattr(module, "load", None)) is not None}
    ignored = [name for name, parameter in model.named_parameters() if parameter in experts]
    ignored += [name for name, buffer in model.named_buffers() if id(buffer) in counted]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    handle = over[0].handle if over else (groups.dp.handle if groups is not None else None)
    wrapped = DistributedDataParallel(model, process_group=handle, **arguments)  # type: ignore[arg-type]
    divisor = number_of_ranks(tuple(over))
    for parameter, parallel in experts.items():

        def reduce(parameter: Tensor, copies: Group = parallel.edp) -> None:
            if wrapped.require_backward_grad_sync and parameter.grad is not None:
                _sum_over((copies,), [parameter.grad], divisor, "expert gradients")

        parameter.register_post_accumulate_grad_hook(reduce)
    return wrapped


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module,
    max_norm: float,
    groups: ParallelGroups | None = None,
    *,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """`torch.nn.utils.clip_grad_norm_` for a model whose experts are spread over ranks: one norm, one factor.

    The norm is that of all gradients of the whole model: dense ones once, every expert's once, sharded ones (FSDP2)
    over their shards, and with `groups` also over the pipeline stages. Call it after `reduce_gradients`.
    Tensor-parallel slices of dense parameters that are no DTensors are not known here.

    Returns:
        The norm [], before clipping, equal on all ranks.
    """
    check_number("max_norm", max_norm, low=0)
    sums: dict[tuple[Group, ...], list[Tensor]] = {}
    inside: dict[int, tuple[Group, ...]] = {}
    shares: dict[int, Tensor] = {}
    for _, module, parallel in expert_modules(model):
        share = shares_of_slots(module)
        for parameter in module.parameters(recurse=False):
            sliced = is_sliced(module, parameter)
            inside[id(parameter)] = (parallel.ep, parallel.etp) if sliced else (parallel.ep,)
            if share is not None:
                shares[id(parameter)] = share
    grads = []
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        grad, over = parameter.grad, inside.get(id(parameter), ())
        if isinstance(grad, DTensor):
            mesh = grad.device_mesh
            shards = [i for i, placement in enumerate(grad.placements) if isinstance(placement, Shard)]
            over = (*(group_from_handle(mesh.get_group(i)) for i in shards), *over)
            grad = grad.to_local()
        grads.append(grad)
        key = tuple(group for group in over if group.size > 1)
        if id(parameter) in shares and norm_type != float("inf"):  # an expert with replicas counts once
            root = shares[id(parameter)].pow(1 / norm_type).to(grad)
            grad = grad * root.view(-1, *(1 for _ in grad.shape[1:]))
        sums.setdefault(key, []).append(grad)
    if not grads:
        return torch.zeros(())
    is_max = norm_type == float("inf")
    total = grads[0].new_zeros((), dtype=torch.promote_types(grads[0].dtype, torch.float32))
    for key, tensors in sums.items():
        norms = torch.stack([norm.to(total) for norm in torch._foreach_norm(tensors, norm_type)])
        part = norms.max() if is_max else norms.pow(norm_type).sum()
        total = _over_ranks(part, key, total, is_max)
    if groups is not None and groups.pp.size > 1:
        total = _over_ranks(total, (groups.pp,), torch.zeros_like(total), is_max)
    norm: Tensor = total if is_max else total.pow(1 / norm_type)
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(f"clip_grad_norm_: the gradients' norm is {norm.item()}")
    torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp_max(1.0))
    return norm


def _over_ranks(part: Tensor, over: Sequence[Group], total: Tensor, is_max: bool) -> Tensor:
    """`total` with `part` of every rank of the groups added to it."""
    op = torch.distributed.ReduceOp.MAX if is_max else torch.distributed.ReduceOp.SUM
    for group in over:
        Channel(group=group, layer="gradients").all_reduce(part, "sum of the squared norms", op)
    return torch.maximum(total, part) if is_max else total + part


def _gradients(parameters: Iterator[nn.Parameter]) -> list[Tensor]:
    """The gradients of the plain parameters, zeros where there was none."""
    found = []
    for parameter in parameters:
        if not parameter.requires_grad or isinstance(parameter, DTensor):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        found.append(parameter.grad)
    return found


@torch.no_grad()
def _sum_over(over: Sequence[Group], tensors: Sequence[Tensor], divisor: int, what: str) -> None:
    """Each tensor becomes its sum over the ranks of the groups, divided; small ones travel together."""
    over = [group for group in over if group.size > 1]
    if over and len(tensors) > 0:
        layout = zlib.crc32(repr([(tuple(tensor.shape), tensor.dtype) for tensor in tensors]).encode())
        same = {"reduced": what, "tensors": len(tensors), "layout": layout, "divisor": divisor}
        for group in over:
            Channel(group=group, layer="gradients").agree(same, f"comparison of {what}", tensors[0].device)
        for bucket in _buckets(tensors):
            # one large contiguous tensor needs no copy
            alone = len(bucket) == 1 and bucket[0].is_contiguous()
            flat = bucket[0].view(-1) if alone else torch.cat([tensor.reshape(-1) for tensor in bucket])
            for group in over:
                Channel(group=group, layer="gradients").all_reduce(flat, what)
            if not alone:
                parts = flat.split([tensor.numel() for tensor in bucket])
                torch._foreach_copy_(bucket, [p.view_as(t) for p, t in zip(parts, bucket, strict=True)])
    if divisor > 1 and len(tensors) > 0:
        torch._foreach_div_(list(tensors), divisor)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in their order, in runs of one dtype and at most BUCKET_BYTES, or one larger tensor."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.nbytes > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
