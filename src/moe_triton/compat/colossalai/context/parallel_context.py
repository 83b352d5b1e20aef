"""What `launch` was told and made: the config, and this rank's place among the processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from moe_triton.compat.colossalai.context.parallel_mode import ParallelMode
from moe_triton.distributed.groups import ALONE, Group, ParallelGroups, make_groups

KINDS = {
    ParallelMode.DATA: "dp",
    ParallelMode.TENSOR: "tp",
    ParallelMode.PARALLEL_1D: "tp",
    ParallelMode.MOE_MODEL: "ep",
    ParallelMode.MOE_DATA: "edp",
}


def world_size() -> int:
    """Processes of the default group; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass
class ParallelContext:
    """Colossal-AI's `global_context`, usually imported as `gpc`.

    config           what `launch` was given, as a dict
    tensor_parallel  ranks that hold the same tokens, and slices of the dense parameters
    moe_parallel     ranks that share one set of experts: those of the MOE groups
    """

    config: dict[str, Any] = field(default_factory=dict)
    tensor_parallel: int = 1
    moe_parallel: int = 1

    def groups(self, *, ep: int = 1, etp: int = 1) -> ParallelGroups | None:
        """This rank's groups with so many ranks to share or to slice the experts; None on one process.

        Made by every rank at the same time, the first time they are asked for.
        """
        if world_size() == 1:
            return None
        return make_groups(tp=self.tensor_parallel, ep=ep, etp=etp)

    def group(self, mode: ParallelMode) -> Group:
        """This rank's group of a kind."""
        if mode is ParallelMode.GLOBAL:
            ranks = tuple(range(world_size()))
            return Group(ranks=ranks, rank=self.get_global_rank(), handle=dist.group.WORLD if len(ranks) > 1 else None)
        groups = self.groups(ep=self.moe_parallel)
        return ALONE if groups is None else getattr(groups, KINDS[mode])

    def get_global_rank(self) -> int:
        """This process among all of them."""
        return dist.get_rank() if world_size() > 1 else 0

    def get_local_rank(self, mode: ParallelMode) -> int:
        """This process's place in its group of a kind."""
        return self.group(mode).rank

    def get_world_size(self, mode: ParallelMode) -> int:
        """Ranks in this process's group of a kind."""
        return self.group(mode).size

    def get_ranks_in_group(self, mode: ParallelMode) -> list[int]:
        """The global ranks of this process's group of a kind."""
        return list(self.group(mode).ranks)

    def get_group(self, mode: ParallelMode) -> dist.ProcessGroup | None:
        """torch's handle of this process's group of a kind; None for a group of one."""
        return self.group(mode).handle

    def is_initialized(self, mode: ParallelMode) -> bool:
        """Whether there are several processes, and so a group of the kind."""
        return world_size() > 1

    def destroy(self) -> None:
        """Forget what `launch` made; torch.distributed's own groups are left to `destroy_process_group`."""
        self.config, self.tensor_parallel, self.moe_parallel = {}, 1, 1


global_context = ParallelContext()
