"""The MoE layer with the signature of DeepSpeed's documentation (January 2022): `k` is the fourth argument."""

from __future__ import annotations

from typing import Any

from torch import nn

from moe_triton.compat.deepspeed import groups, layer


class MoE(layer.MoE):
    """`moe_triton.compat.deepspeed.layer.MoE` with the documentation's argument order; the others are keywords.

    ep_size None takes the size given to `groups.initialize`; a layer with fewer experts gets groups of its own size.
    Without a call every rank holds all experts.
    """

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
        use_tutel: bool = False,
        *,
        ep_size: int | None = None,
        use_residual: bool = False,
        enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True,
        expert_group_name: str | None = None,
        drop_policy: str = "probs",
        exchange: dict[str, Any] | None = None,
        backend: str = "auto",
    ) -> None:
        options = {name: value for name, value in locals().items() if name not in ("self", "ep_size", "__class__")}
        super().__init__(**options, ep_size=groups.ep_size_for(num_experts) if ep_size is None else ep_size)
        self.follows_groups = ep_size is None

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Make the layer's process groups if there are none, and bind them; S1 or S3 when nobody initialised groups."""
        if self.follows_groups:
            groups.ensure_initialized(groups.get_mpu())
        super().set_deepspeed_parallelism(use_data_before_expert_parallel_)
