"""Expert parallelism on torch.distributed: the groups, the exchange, gradients and checkpoints."""

from moe_triton.distributed.checkpoint import load_checkpoint, save_checkpoint
from moe_triton.distributed.errors import CheckpointError, ConfigurationMismatch, ExpertParallelError
from moe_triton.distributed.expert_parallel import ExpertParallel
from moe_triton.distributed.export import export_safetensors
from moe_triton.distributed.groups import Group, ParallelGroups, make_groups
from moe_triton.distributed.plan import RankTables, plan
from moe_triton.distributed.whole_tensors import load_experts_from

__all__ = [
    "CheckpointError",
    "ConfigurationMismatch",
    "ExpertParallel",
    "ExpertParallelError",
    "Group",
    "ParallelGroups",
    "RankTables",
    "export_safetensors",
    "load_checkpoint",
    "load_experts_from",
    "make_groups",
    "plan",
    "save_checkpoint",
]
