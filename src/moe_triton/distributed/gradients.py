"""What is left to do with gradients after backward: sums over ranks, and the norm of all of them.

With N tokens in the whole step and the loss of rank r = (sum over its tokens) / N, a gradient is the plain sum over
ranks: of dense parameters over the data-parallel ranks, of experts over those that hold the same ones, since the
exchange has brought them everybody else's tokens. With the loss of rank r = mean over its tokens and equal numbers of
tokens, both sums are divided by the number of data-parallel ranks: the experts' too, not by the number of their copies.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_triton.checks import check_choice, check_number
from moe_triton.distributed.exchange.channel import Channel, end_step
from moe_triton.distributed.exchange.schedule import described
from moe_triton.distributed.groups import Group, ParallelGroups, device_type, group_from_handle, number_of_ranks
from moe_triton.distributed.holders import spread_experts
from moe_triton.distributed.parameters import check_rule, data_groups, expert_parameters
from moe_triton.distributed.replicas.replication import shares_of_slots, sum_replica_gradients

RULES = ("mean", "sum", "colossalai")
BUCKET_BYTES = 25 << 20  # what DistributedDataParallel sends at a time
REDUCED = "_moe_triton_reduced"  # on a parameter whose gradient wrap_ddp reduces


def reduce_gradients(
    model: nn.Module, groups: ParallelGroups | None = None, *, rule: str = "mean", experts_only: bool = False
) -> None:
    """Make every gradient that of the global batch, in place; once per optimizer step, on every rank.

    A missing gradient of a parameter that wants one becomes zeros, so that all ranks send the same. DTensor parameters
    are left to FSDP2, which reduces them itself.

    Args:
        model: with any number of expert-parallel layers, none included.
        groups: None takes those of the model's layers.
        rule: "mean": for losses that are means over a rank's tokens, and layers of
            `ExpertParallel(loss_reduction="mean")`, as both are by default. "sum": for losses whose sum over ranks is
            the global one, and `loss_reduction="sum"`. "colossalai": as "mean", but an expert's gradient is averaged
            over its copies only: ep times larger (also DeepSpeed's before 0.6).
        experts_only: leave the dense gradients to somebody else, such as DistributedDataParallel.

    Raises:
        ValueError: a layer's `loss_reduction` is of another rule; `wrap_ddp` reduces the experts already; FSDP2 takes
            different experts for copies.
        ExpertParallelError: a rank is gone; the message names it.
    """
    check_choice("rule", rule, RULES)
    check_rule(model, rule)
    _check_shards(model)
    over = data_groups(model, groups)
    num_ranks = number_of_ranks(over)
    experts = expert_parameters(model)
    if any(hasattr(parameter, REDUCED) for parameter in experts):
        raise ValueError("model: got one whose experts' gradients wrap_ddp reduces, wanted either that or this")
    sum_replica_gradients(model)
    for copies in {parallel.edp: None for parallel in experts.values()}:
        divisor = {"sum": 1, "colossalai": copies.size}.get(rule, num_ranks)
        mine = (parameter for parameter, parallel in experts.items() if parallel.edp is copies)
        sum_over((copies,), _gradients(mine), divisor, "expert gradients")
    if not experts_only:
        dense = (parameter for parameter in model.parameters() if parameter not in experts)
        sum_over(over, _gradients(dense), 1 if rule == "sum" else num_ranks, "dense gradients")
    _end_step(model)


@torch.no_grad()
def clip_grad_norm_(
    model: nn.Module,
    max_norm: float,
    groups: ParallelGroups | None = None,
    *,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Clip the gradients of a model whose experts are spread over ranks as torch's does: one norm, one factor.

    The norm is that of all gradients of the whole model: dense ones once, every expert's once, sharded ones (FSDP2)
    over their shards, and with `groups` also over the pipeline stages. Call it after `reduce_gradients`.
    Tensor-parallel slices of dense parameters that are no DTensors are not known here.

    Returns:
        The norm [], before clipping, equal on all ranks.
    """
    check_number("max_norm", max_norm, low=0)
    _check_shards(model)
    inside: dict[int, tuple[Group, ...]] = {}
    shares: dict[int, Tensor] = {}
    for _, module, parallel in spread_experts(model):
        share = shares_of_slots(module)
        for parameter in module.held_parameters():
            sliced = module.is_sliced(parameter)
            inside[id(parameter)] = (parallel.ep, parallel.etp) if sliced else (parallel.ep,)
            if share is not None:
                shares[id(parameter)] = share
    parameters = list(model.parameters())
    # what is sent depends on the parameters, not on this rank's gradients: all ranks have to send the same
    device = parameters[0].device if parameters else torch.device(device_type() if dist.is_initialized() else "cpu")
    dtype = functools.reduce(torch.promote_types, [parameter.dtype for parameter in parameters], torch.float32)
    is_max = norm_type == float("inf")
    _end_step(model)
    sums: dict[tuple[Group, ...], list[Tensor]] = {}
    grads = []
    for parameter in parameters:
        over = inside.get(id(parameter), ())
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            shards = [i for i, placement in enumerate(parameter.placements) if not placement.is_replicate()]
            over = (*(group_from_handle(mesh.get_group(i)) for i in shards), *over)
        found = sums.setdefault(tuple(group for group in over if group.size > 1), [])
        if parameter.grad is None:
            continue
        grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        grads.append(grad)
        if id(parameter) in shares and not is_max:  # an expert with replicas counts once
            root = shares[id(parameter)].pow(1 / norm_type).to(grad)
            grad = grad * root.view(-1, *(1 for _ in grad.shape[1:]))
        found.append(grad)
    zero = total = torch.zeros((), dtype=dtype, device=device)
    for key, tensors in sums.items():
        local = torch._foreach_norm(tensors, norm_type) if tensors else (zero,)
        norms = torch.stack([norm.to(zero) for norm in local])
        part = norms.max() if is_max else norms.pow(norm_type).sum()
        total = _over_ranks(part, key, total, is_max)
    if groups is not None and groups.pp.size > 1:
        total = _over_ranks(total, (groups.pp,), torch.zeros_like(total), is_max)
    norm: Tensor = total if is_max else total.pow(1 / norm_type)
    if error_if_nonfinite and not torch.isfinite(norm):
        raise RuntimeError(f"clip_grad_norm_: the gradients' norm is {norm.item()}")
    if grads:
        torch._foreach_mul_(grads, (max_norm / (norm + 1e-6)).clamp_max(1.0))
    return norm


def _end_step(model: nn.Module) -> None:
    """Compare what the ranks have done in this step; nothing where `reduce_gradients` has done it."""
    device = next((parameter.device for parameter in model.parameters()), None)
    if device is not None and dist.is_available() and dist.is_initialized():
        end_step("gradients", device)


def _check_shards(model: nn.Module) -> None:
    """Raise ValueError where FSDP2 shards experts over ranks that hold different ones, as if they were the same."""
    for name, module, parallel in spread_experts(model):
        for parameter in module.held_parameters():
            if isinstance(parameter, DTensor):
                ranks = parameter.device_mesh.mesh.flatten().tolist()
                if not parallel.has_copies_on(ranks):
                    raise ValueError(
                        f"model: got different experts at {name!r} sharded as if they were the same on the ranks "
                        f"{ranks}, wanted apply_fsdp2(model, groups)"
                    )


def _over_ranks(part: Tensor, over: Sequence[Group], total: Tensor, is_max: bool) -> Tensor:
    """`total` with `part` of every rank of the groups added to it."""
    op = dist.ReduceOp.MAX if is_max else dist.ReduceOp.SUM
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
def sum_over(over: Sequence[Group], tensors: Sequence[Tensor], divisor: int, what: str) -> None:
    """Replace each tensor by its sum over the ranks of the groups, divided; small ones travel together."""
    for group in over:
        start_sum(group, tensors, 1, what)()
    if divisor > 1 and len(tensors) > 0:
        torch._foreach_div_(list(tensors), divisor)


@torch.no_grad()
def start_sum(group: Group, tensors: Sequence[Tensor], divisor: int, what: str) -> Callable[[], None]:
    """Start to replace each tensor by its sum over the group's ranks, divided. Return the wait for it."""
    sums: list[tuple[list[Tensor], Tensor | None, Callable[[], None]]] = []
    if group.size > 1 and len(tensors) > 0:
        layout = zlib.crc32(repr([(tuple(tensor.shape), tensor.dtype) for tensor in tensors]).encode())
        same = {"reduced": what, "tensors": len(tensors), "layout": layout, "divisor": divisor}
        channel = Channel(group=group, layer="gradients")
        channel.agree(described(same), f"comparison of {what}", tensors[0].device)
        for bucket in _buckets(tensors):
            # one large contiguous tensor needs no copy
            alone = len(bucket) == 1 and bucket[0].is_contiguous()
            flat = bucket[0].view(-1) if alone else torch.cat([tensor.reshape(-1) for tensor in bucket])
            sums.append((bucket, None if alone else flat, channel.start_all_reduce(flat, what)))

    @torch.no_grad()
    def finish() -> None:
        for bucket, flat, wait in sums:
            wait()
            if flat is not None:
                parts = flat.split([tensor.numel() for tensor in bucket])
                torch._foreach_copy_(bucket, [p.view_as(t) for p, t in zip(parts, bucket, strict=True)])
        if divisor > 1 and len(tensors) > 0:
            torch._foreach_div_(list(tensors), divisor)

    return finish


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
