"""The base of Colossal-AI's containers of experts, over our fused products and exchange.

All of them hold stacked parameters [local experts, ...], which `moe_triton.distributed` reduces, clips and saves by
global expert id. Experts are drawn by their global id: they differ from each other, and do not depend on how many ranks
share them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from moe_triton.compat.colossalai.context.moe_context import MoeParallelInfo
from moe_triton.compat.opaque import compute_experts
from moe_triton.distributed import ExpertParallel
from moe_triton.distributed.exchange.expert_parallel import unless_alone
from moe_triton.distributed.exchange.opaque_experts import Compute, OpaqueCall
from moe_triton.distributed.exchange.stages import ExchangedLayer
from moe_triton.distributed.holders import StackedExperts
from moe_triton.records import Dispatch, ExpertCall

Capacity = Callable[[int], int | None]


class MoeExperts(StackedExperts):
    """The base of Colossal-AI's containers: what `MoeLayer` needs of experts.

    num_experts, num_local_experts  of all ranks that share them, and here
    dist_info                       where the others are
    comm_name                       how tokens reach the experts, in v0.1.6's words

    Every parameter carries the marks that Colossal-AI's users look for: `moe_param` (v0.0.2) and `moe_info` (v0.1.6),
    also after what makes new parameters: `.to`, copying, unpickling, loading with assign=True. A copy shares the
    process groups; an unpickled layer takes those of the MoE context, which has to be set up as it was.
    """

    comm_name = "all_to_all"
    num_local_experts: int
    dist_info: MoeParallelInfo
    backend: str
    layer_name: str

    @property
    def parallel(self) -> ExpertParallel:
        return self.dist_info.parallel

    def mark(self) -> None:
        """Put the marks on all parameters."""
        for parameter in self.parameters(recurse=False):
            parameter.moe_param = 1  # type: ignore[attr-defined]
            parameter.moe_info = self.dist_info  # type: ignore[attr-defined]

    def bind(self, info: MoeParallelInfo) -> None:
        """Spread the experts as `info` says, and mark the parameters, now and after loading."""
        self.dist_info = info
        self.expert_parallel = info.parallel
        self.mark()
        self.register_load_state_dict_post_hook(_mark_after_loading)

    def _apply(self, fn: Any, recurse: bool = True) -> MoeExperts:
        super()._apply(fn, recurse)
        self.mark()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "expert_parallel"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.expert_parallel = self.parallel
        self.mark()

    def compute(self, call: ExpertCall | OpaqueCall, capacity: Capacity) -> Tensor:
        """Return the experts' outputs [T, d] where the context puts them."""
        layer = ExchangedLayer(
            name=self.layer_name,
            num_experts=self.num_experts,
            backend=self.backend,
            capacity=capacity,
            held=self.held_parameters,
        )
        return compute_experts(call, unless_alone(self.parallel), layer)

    def opaque_call(self, run: Compute, hidden: Tensor, weights: Tensor, dispatched: Dispatch) -> OpaqueCall:
        """Return the call of experts whose local ones `run` computes, under autograd."""
        return OpaqueCall(
            hidden=hidden,
            weights=weights,
            dispatched=dispatched,
            name="called",
            compute=run,
            parameters=list(self.held_parameters()),
            num_experts=self.num_local_experts,
        )


def _mark_after_loading(experts: MoeExperts, _incompatible_keys: object) -> None:
    experts.mark()
