"""Expert parallelism on torch.distributed: the groups, the exchange, gradients and checkpoints."""

from moe_triton.distributed.errors import ConfigurationMismatch, ExpertParallelError
from moe_triton.distributed.expert_parallel import ExpertParallel
from moe_triton.distributed.groups import Group, ParallelGroups, make_groups
from moe_triton.distributed.plan import RankTables, plan

__all__ = [
    "ConfigurationMismatch",
    "ExpertParallel",
    "ExpertParallelError",
    "Group",
    "ParallelGroups",
    "RankTables",
    "make_groups",
    "plan",
]
