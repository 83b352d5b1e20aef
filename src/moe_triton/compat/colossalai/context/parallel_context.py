"""What `launch` was given and made: the config, and this rank's place among the processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from moe_triton.compat.colossalai.context.parallel_mode import ParallelMode
from moe_triton.distributed.groups import ALONE, Group, ParallelGroups, group_from_handle, make_groups

KINDS = {
    ParallelMode.DATA: "dp",
    ParallelMode.TENSOR: "tp",
    ParallelMode.PARALLEL_1D: "tp",
    ParallelMode.MOE_MODEL: "ep",
    ParallelMode.MOE_DATA: "edp",
}


GENERATIONS = ("v0.0.2", "v0.1.6")


def is_running() -> bool:
    """Return whether torch.distributed is initialised."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Return processes of the default group; 1 without torch.distributed."""
    return dist.get_world_size() if is_running() else 1


@dataclass
class ParallelContext:
    """Colossal-AI's `global_context`, usually imported as `gpc`.

    config           what `launch` was given, as a dict
    tensor_parallel  ranks that hold the same tokens, and slices of the dense parameters
    moe_parallel     ranks that share one set of experts: those of the MOE groups
    generation       "v0.0.2" or "v0.1.6": whose conventions hold where the two differ and a call does not say
    """

    config: dict[str, Any] = field(default_factory=dict)
    tensor_parallel: int = 1
    moe_parallel: int = 1
    generation: str = GENERATIONS[0]

    def groups(self, *, ep: int = 1, etp: int = 1) -> ParallelGroups | None:
        """Return this rank's groups, `ep` ranks sharing and `etp` slicing the experts; None without torch.distributed.

        Made by every rank at the same time, the first time they are asked for.
        """
        if not is_running():
            return None
        return make_groups(tp=self.tensor_parallel, ep=ep, etp=etp)

    def group(self, mode: ParallelMode) -> Group:
        """Return this rank's group of a kind."""
        if mode is ParallelMode.GLOBAL:
            return group_from_handle(dist.group.WORLD) if is_running() else ALONE
        groups = self.groups(ep=self.moe_parallel)
        return ALONE if groups is None else getattr(groups, KINDS[mode])

    def get_global_rank(self) -> int:
        """Return this process's rank among all of them."""
        return dist.get_rank() if is_running() else 0

    def get_local_rank(self, mode: ParallelMode) -> int:
        """Return this process's place in its group of a kind."""
        return self.group(mode).rank

    def get_world_size(self, mode: ParallelMode) -> int:
        """Return ranks in this process's group of a kind."""
        return self.group(mode).size

    def get_ranks_in_group(self, mode: ParallelMode) -> list[int]:
        """Return the global ranks of this process's group of a kind."""
        return list(self.group(mode).ranks)

    def get_group(self, mode: ParallelMode) -> dist.ProcessGroup | None:
        """Return torch's handle of this process's group of a kind, also of one rank; None without torch.distributed."""
        return self.group(mode).handle

    def is_initialized(self, mode: ParallelMode) -> bool:
        """Return whether there are several processes, and so a group of the kind."""
        return world_size() > 1

    def destroy(self) -> None:
        """Forget what `launch` made; torch.distributed's own groups are left to `destroy_process_group`."""
        self.config, self.tensor_parallel, self.moe_parallel, self.generation = {}, 1, 1, GENERATIONS[0]


global_context = ParallelContext()
