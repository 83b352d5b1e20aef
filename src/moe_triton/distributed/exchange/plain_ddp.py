"""Find out that DistributedDataParallel was put around expert-parallel layers without `wrap_ddp`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from moe_triton.torch_internals import active_ddp

_examined: WeakKeyDictionary[DistributedDataParallel, set[str]] = WeakKeyDictionary()  # with the names of layers


def refuse_plain_ddp(
    layer: str, held: Callable[[], Iterable[nn.Parameter]], has_copies_on: Callable[[list[int]], bool]
) -> None:
    """Raise ValueError where a DistributedDataParallel takes the layer's experts for copies; looks once at each layer.

    Called in the wrapper's forward pass: before that a layer cannot know. `held`: gives the layer's expert parameters;
    `has_copies_on`: whether all of these ranks hold them.
    """
    wrapper = active_ddp()
    if wrapper is None or layer in _examined.setdefault(wrapper, set()):
        return
    experts, ranks = set(held()), dist.get_process_group_ranks(wrapper.process_group)
    for name, parameter in wrapper.module.named_parameters():
        if parameter in experts and name not in wrapper.parameters_to_ignore and not has_copies_on(ranks):
            raise ValueError(
                f"model: got a DistributedDataParallel that takes the different experts at {name!r} for copies, and "
                "has given all ranks the first one's; wanted moe_triton.distributed.wrap_ddp(model), of a fresh model"
            )
    _examined[wrapper].add(layer)
