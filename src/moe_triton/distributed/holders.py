"""Base classes of the modules that hold experts: what gradients, FSDP and checkpoints ask of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from moe_triton.distributed.exchange.expert_parallel import ExpertParallel
from moe_triton.distributed.replicas.placement import Placement


class ExpertHolder(nn.Module):
    """Hold experts, on this rank or over the ranks of `expert_parallel`."""

    expert_parallel: ExpertParallel | None = None

    def held_parameters(self) -> Iterator[nn.Parameter]:
        """Return the experts' parameters: the module's own, not its children's."""
        return self.parameters(recurse=False)

    def is_sliced(self, parameter: nn.Parameter) -> bool:
        """Return whether expert tensor parallelism splits this parameter of the module."""
        return True


class StackedExperts(ExpertHolder):
    """Hold experts in stacked parameters [slots, ...], which checkpoints save by global expert id.

    num_experts       of all ranks
    placement         which expert each slot of each rank holds, where hot experts have replicas; else None
    gradient_scale    what the module multiplies its parameters' gradients by; None: it does not, and FSDP2 is refused
    sliced_dimensions what expert tensor parallelism slices: parameter -> (dimension, parts); None: unknown
    casts_inputs      whether the module itself casts what it is given, and FSDP2 has to leave it alone: the router
                      weights may have another dtype than the experts
    """

    num_experts: int
    placement: Placement | None = None
    physical_to_logical: Tensor | None
    gradient_scale: float | None = None
    casts_inputs: bool = False

    @property
    def sliced_dimensions(self) -> Mapping[str, tuple[int, int]] | None:
        return None

    @property
    def local_experts(self) -> Sequence[int]:
        """Return the global ids of the experts whose parameters are here, by slot."""
        parallel = self.expert_parallel
        if parallel is None:
            return range(self.num_experts)
        if self.placement is None:
            return parallel.experts_of(self.num_experts)
        size, rank = self.placement.slots_per_rank, parallel.ep.rank
        return self.placement.physical_to_logical[rank * size : (rank + 1) * size].tolist()

    def set_placement(self, placement: Placement) -> None:
        """Say which expert each slot holds now; `moe_triton.distributed.rebalance` moves the parameters along."""
        assert self.physical_to_logical is not None
        self.placement = placement
        self.physical_to_logical.copy_(placement.physical_to_logical)

    def load_on(self, device: torch.device) -> Tensor:
        """Return the counted load [num_experts] on a device, as `moe_triton.layers.load.CountsLoad` does."""
        raise NotImplementedError


Holder = TypeVar("Holder", bound=ExpertHolder)


def expert_modules(model: nn.Module, kind: type[Holder]) -> Iterator[tuple[str, Holder]]:
    """Yield (name, module) of every module of a kind of ExpertHolder, whether its experts are spread or not."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, kind))


def spread_experts(model: nn.Module) -> Iterator[tuple[str, ExpertHolder, ExpertParallel]]:
    """Yield (name, module, its ExpertParallel) of every module whose experts are spread over ranks."""
    for name, module in expert_modules(model, ExpertHolder):
        if module.expert_parallel is not None:
            yield name, module, module.expert_parallel
