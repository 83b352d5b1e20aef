"""DistributedDataParallel for models with expert-parallel layers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moe_triton.distributed.gradients import REDUCED, start_sum
from moe_triton.distributed.groups import Group, ParallelGroups, number_of_ranks
from moe_triton.distributed.parameters import check_rule, data_groups, expert_parameters
from moe_triton.torch_internals import after_backward, ignore_in_ddp


def wrap_ddp(model: nn.Module, groups: ParallelGroups | None = None, **arguments: object) -> DistributedDataParallel:
    """Wrap a model with expert-parallel layers in DistributedDataParallel, by the rule "mean".

    DDP averages the dense gradients over the data-parallel ranks, and leaves the experts alone: a hook averages theirs
    over their copies, in the backward passes in which DDP averages its own (not under `no_sync`), any number of times.
    An average is under way while backward goes on, and is over when backward is.

    Args:
        model: with layers of `ExpertParallel(loss_reduction="mean")`, the default.
        groups: None takes those of the model's layers.
        arguments: DDP's own.

    Raises:
        ValueError: a layer's `loss_reduction` is "sum", it has `redundant_experts`, the data-parallel ranks are no one
            group, or the model has been wrapped before.
    """
    check_rule(model, "mean")
    over = [group for group in data_groups(model, groups) if group.size > 1]
    if len(over) > 1:
        raise ValueError("groups: got a mesh whose data-parallel ranks are no one group, wanted make_groups(...)")
    experts = expert_parameters(model)
    if any(parallel.redundant_experts for parallel in experts.values()):
        raise ValueError("model: got layers with redundant_experts, whose gradients reduce_gradients has to sum")
    if any(hasattr(parameter, REDUCED) for parameter in experts):  # its hooks stay, and would scale twice
        raise ValueError("model: got one that wrap_ddp has wrapped before, wanted a fresh model, or that wrapper")
    ignored = [name for name, parameter in model.named_parameters() if parameter in experts]
    ignore_in_ddp(model, ignored)
    handle = over[0].handle if over else (groups.dp.handle if groups is not None else None)
    wrapped = DistributedDataParallel(model, process_group=handle, **arguments)  # type: ignore[arg-type]
    num_ranks = number_of_ranks(over)
    under_way: dict[nn.Parameter, Callable[[], None]] = {}

    def finish() -> None:
        while under_way:
            under_way.popitem()[1]()

    for parameter, parallel in experts.items():
        if not parameter.requires_grad:
            continue

        def scaled(
            grad: Tensor, parameter: nn.Parameter = parameter, scale: float = parallel.edp.size / num_ranks
        ) -> Tensor:
            if parameter in under_way:  # what comes again in one backward pass is added to the average
                under_way.pop(parameter)()
            return grad if scale == 1.0 else grad * scale

        def average(parameter: nn.Parameter, copies: Group = parallel.edp) -> None:
            # of the flags, one is as of now and one as of the forward pass, which DDP goes by
            syncs = wrapped.require_backward_grad_sync or wrapped.require_forward_param_sync
            if syncs and parameter.grad is not None and copies.size > 1:
                if not under_way:
                    after_backward(finish)
                under_way[parameter] = start_sum(copies, [parameter.grad], copies.size, "expert gradients")

        # A gradient may be accumulated on top of one that has been reduced: what is new is scaled before, and an
        # average leaves the rest as it is.
        parameter.register_hook(scaled)
        parameter.register_post_accumulate_grad_hook(average)
        setattr(parameter, REDUCED, True)
    return wrapped
