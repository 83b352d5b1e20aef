"""Expert parallelism on torch.distributed: the groups, the exchange, gradients and checkpoints."""

from importlib import import_module
from typing import TYPE_CHECKING

from moe_triton.distributed.checkpoint.export import export_safetensors
from moe_triton.distributed.checkpoint.save_load import load_checkpoint, save_checkpoint
from moe_triton.distributed.checkpoint.whole_tensors import load_experts_from
from moe_triton.distributed.errors import CheckpointError, ConfigurationMismatch, ExpertParallelError
from moe_triton.distributed.exchange.expert_parallel import ExpertParallel
from moe_triton.distributed.exchange.stages import ExchangeSpec, InnerStage, MakeExchange, Saved, Stage
from moe_triton.distributed.exchange.termination import explain_termination
from moe_triton.distributed.groups import Group, GroupOptions, ParallelGroups, make_groups
from moe_triton.distributed.rank_tables import RankTables, plan

if TYPE_CHECKING:
    from moe_triton.distributed.amp import GradScaler
    from moe_triton.distributed.consistency import broadcast_parameters, check_replicas
    from moe_triton.distributed.ddp import wrap_ddp
    from moe_triton.distributed.exchange.deep_ep import DeepEP
    from moe_triton.distributed.exchange.symmetric_memory import SymmetricMemory
    from moe_triton.distributed.fsdp import apply_fsdp2
    from moe_triton.distributed.gradients import clip_grad_norm_, reduce_gradients
    from moe_triton.distributed.replicas.replication import Rebalanced, rebalance

# Loaded when first asked for: most import DTensor or FSDP, which takes seconds.
_LAZY = {
    "apply_fsdp2": "fsdp",
    "broadcast_parameters": "consistency",
    "check_replicas": "consistency",
    "clip_grad_norm_": "gradients",
    "DeepEP": "exchange.deep_ep",
    "GradScaler": "amp",
    "rebalance": "replicas.replication",
    "Rebalanced": "replicas.replication",
    "reduce_gradients": "gradients",
    "SymmetricMemory": "exchange.symmetric_memory",
    "wrap_ddp": "ddp",
}

__all__ = [
    "CheckpointError", "ConfigurationMismatch", "DeepEP", "ExchangeSpec", "ExpertParallel", "ExpertParallelError",
    "GradScaler", "Group", "GroupOptions", "InnerStage", "MakeExchange", "ParallelGroups", "RankTables", "Rebalanced",
    "Saved", "Stage", "SymmetricMemory", "apply_fsdp2", "broadcast_parameters", "check_replicas", "clip_grad_norm_",
    "explain_termination", "export_safetensors", "load_checkpoint", "load_experts_from", "make_groups", "plan",
    "rebalance", "reduce_gradients", "save_checkpoint", "wrap_ddp",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
