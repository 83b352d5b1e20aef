"""Which configurations ship: what the tables and the heuristic give at the sizes of common models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from moe_triton_kernels.configs import OPS, choose_config
from moe_triton_kernels.heuristics import BUCKETS
from moe_triton_kernels.launch import Config
from moe_triton_kernels.tools.models import LAYERS

TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
CODES = {torch.float8_e4m3fn: "fp8e4nv"}
SIZES = tuple(dict.fromkeys((layer.hidden, layer.intermediate) for layer in LAYERS))  # (d, n)


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """One configuration that a GPU can meet: the op, Triton's name of the dtype, and the configuration."""

    op: str
    dtype: str
    config: Config


def shipped_configs(architecture: str, types: Mapping[torch.dtype, str] = TYPES) -> list[Shipped]:
    """Every configuration of the table and of the heuristic at the sizes of common models, without repetitions.

    fp16 shares bf16's configurations. The first entry of an op is the one of large bf16 problems.
    """
    found: dict[Shipped, None] = {}
    for op in OPS:
        for dtype, name in types.items():
            for bucket in reversed(BUCKETS):
                for d, n in sorted(SIZES, reverse=True):  # the largest first
                    config = choose_config(
                        op, d=d, n=n, dtype=dtype, num_rows=bucket, num_experts=1, architecture=architecture
                    )
                    plain = replace(config, gluon=None)  # the Gluon kernels list their own cases
                    found[Shipped(op=op, dtype=name, config=plain)] = None
    return list(found)
