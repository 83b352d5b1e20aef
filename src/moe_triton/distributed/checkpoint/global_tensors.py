"""A model's tensors as parts of global ones: which boxes of [E, ...] lie on this rank, whatever spread them.

Three things spread a parameter, and each only cuts boxes out of the one before: expert parallelism gives a rank some
experts, expert tensor parallelism a slice of each, and FSDP2 a shard of what is then there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe_triton.distributed.holders import StackedExperts, expert_modules
from moe_triton.torch_internals import WRAPPERS, compiled_module, shards

Offset = tuple[int, ...]
PROJECTIONS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class GlobalTensor:
    """A tensor of the whole model, and the boxes of it that are here.

    boxes    by their offset in the global tensor: views of this rank's memory, so that a load can write into them.
             Ranks that hold the same experts, or the same dense parameter, have the same boxes
    copies   further places of boxes that this rank has more than once, as it has with two replicas of an expert
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: dict[Offset, Tensor]
    copies: list[tuple[Offset, Tensor]] = field(default_factory=list)

    def fill_copies(self) -> None:
        """Copy the boxes into their replicas; call it once the boxes have been written."""
        for offset, view in self.copies:
            view.copy_(self.boxes[offset])


class Span(NamedTuple):
    """Indices [start, stop) of a local dimension that lie at [to, ...) of the global one."""

    start: int
    stop: int
    to: int


@dataclass(frozen=True, kw_only=True)
class ExpertLayout:
    """How a rank's expert parameter lies in the global one.

    experts       the expert of each local slot, by global id
    num_experts   E
    sliced        (the dimension that expert tensor parallelism slices, in how many parts: 2 for gate and up), or None
    slices, slot  into how many slices, and which of them is here
    apart         every expert is a box of its own. Else consecutive experts are one box, which replicas do not allow:
                  the boxes of different ranks have to be either the same or apart
    """

    experts: tuple[int, ...]
    num_experts: int
    sliced: tuple[int, int] | None = None
    slices: int = 1
    slot: int = 0
    apart: bool = False

    def spread(self, shape: list[int], spans: list[list[Span]]) -> None:
        """Turn the local shape, and every dimension's spans, into the global ones."""
        shape[0] = self.num_experts
        spans[0] = [Span(i, i + 1, e) for i, e in enumerate(self.experts)] if self.apart else list(_runs(self.experts))
        if self.sliced is not None and self.slices > 1:
            dim, parts = self.sliced
            size = shape[dim] // parts
            spans[dim] = [Span(i * size, (i + 1) * size, (i * self.slices + self.slot) * size) for i in range(parts)]
            shape[dim] *= self.slices


def _runs(experts: Iterable[int]) -> Iterator[Span]:
    """Consecutive ids in consecutive slots are one box."""
    for _, run in itertools.groupby(enumerate(experts), key=lambda pair: pair[1] - pair[0]):
        slots = list(run)
        yield Span(slots[0][0], slots[-1][0] + 1, slots[0][1])


def as_global(tensor: Tensor, layout: ExpertLayout | None) -> GlobalTensor:
    """`tensor`: a plain tensor, or a DTensor, whose shards are then cut further."""
    shape = list(tensor.shape)
    spans = [[Span(0, size, 0)] for size in shape]
    if layout is not None:
        layout.spread(shape, spans)
    boxes: dict[Offset, Tensor] = {}
    copies = []
    for start, local in shards(tensor.detach()):
        for spot in itertools.product(*spans):
            lows = [max(span.start, low) for span, low in zip(spot, start, strict=True)]
            highs = [min(span.stop, low + n) for span, low, n in zip(spot, start, local.shape, strict=True)]
            if any(low >= high for low, high in zip(lows, highs, strict=True)):
                continue
            view = local
            for dim, (low, high) in enumerate(zip(lows, highs, strict=True)):
                view = view.narrow(dim, low - start[dim], high - low)
            offset = tuple(span.to + low - span.start for span, low in zip(spot, lows, strict=True))
            if offset in boxes:
                copies.append((offset, view))
            boxes.setdefault(offset, view)
    return GlobalTensor(shape=tuple(shape), dtype=tensor.dtype, boxes=boxes, copies=copies)


class ModelTensor(NamedTuple):
    """A parameter or persistent buffer, as it lives in the model; `layout` where expert parallelism spreads it."""

    live: Tensor
    layout: ExpertLayout | None
    is_expert: bool

    def as_global(self) -> GlobalTensor:
        return as_global(self.live, self.layout)


def model_tensors(model: nn.Module) -> dict[str, ModelTensor]:
    """Return the model's parameters and persistent buffers by name; one that has several names by the first of them.

    `StackedExperts` hold experts; with a `placement` these come in any order, and several slots, here or elsewhere, may
    hold the same expert. Wrappers (DistributedDataParallel, torch.compile, activation checkpointing) leave no trace in
    the names.

    Raises:
        TypeError: the model is no Module, or its state dict has something else than tensors.
        ValueError: a tensor on the meta device; an expert module that does not say how its parameters are sliced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")
    model = unwrapped(model)
    layouts = {
        id(tensor): expert_layout(name, module, own.partition(".")[0])
        for name, module in named_experts(model).items()
        for own, tensor in (*module.named_parameters(recurse=False), *_quantized_parts(module))
    }
    found: dict[str, ModelTensor] = {}
    # where replicas lie is not the same on other ranks: experts are saved and loaded by their own ids
    seen = {
        id(module.physical_to_logical)
        for _, module in expert_modules(model, StackedExperts)
        if module.placement is not None
    }
    for key, value in model.state_dict(keep_vars=True).items():
        name = _plain(key)
        if not isinstance(value, Tensor):
            raise TypeError(f"model: its state dict has a {type(value).__name__} at {name!r}, wanted tensors only")
        if value.is_meta:
            raise ValueError(f"model: {name!r} is on the meta device, wanted memory to read or write")
        if id(value) not in seen:
            seen.add(id(value))
            found[name] = ModelTensor(value, layouts.get(id(value)), id(value) in layouts)
    return found


def _quantized_parts(module: StackedExperts) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, buffer) of quantised projections: their dimensions lie as those of the projection do."""
    return ((name, buffer) for name, buffer in module.named_buffers() if name.partition(".")[0] in PROJECTIONS)


def named_experts(model: nn.Module) -> dict[str, StackedExperts]:
    """Return the modules that hold stacked experts by name, without the wrappers."""
    return {_plain(name): module for name, module in expert_modules(unwrapped(model), StackedExperts)}


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif (inner := compiled_module(model)) is not None:
            model = inner
        else:
            return model


def expert_layout(name: str, module: StackedExperts, own: str) -> ExpertLayout | None:
    """Return how the parameter `own` of the module `name` lies in the global one; None where no rank has a part."""
    parallel, sliced = module.expert_parallel, module.sliced_dimensions
    if parallel is None:
        return None
    if parallel.etp.size > 1 and sliced is None:
        raise ValueError(
            f"model: {name} has {parallel.etp.size} expert slices, but no `sliced_dimensions` to say how {own!r} is cut"
        )
    return ExpertLayout(
        experts=tuple(module.local_experts),
        num_experts=module.num_experts,
        sliced=sliced.get(own) if sliced is not None and parallel.etp.size > 1 else None,
        slices=parallel.etp.size,
        slot=parallel.etp.rank,
        apart=module.placement is not None,
    )
