"""transformers' own expert parallelism (5.24): our exchange as `DistributedConfig(ep_implementation="moe_triton")`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moe_triton.distributed.exchange.expert_parallel import ExpertParallel
from moe_triton.distributed.exchange.stages import ExchangedLayer
from moe_triton.distributed.expert_groups import ExpertGroups
from moe_triton.distributed.groups import group_from_handle, group_of_one
from moe_triton.integrations.experts_interface import KEY, implementation


def register() -> None:
    """Register our exchange with transformers under the key "moe_triton", where it has a registry for it."""
    try:
        from transformers.distributed.expert_parallel import EPImplementationInterface
    except ImportError:  # before 5.24
        return
    EPImplementationInterface.register(KEY, ep_implementation())


def ep_implementation(**options: Any) -> type:
    """Return an `EPImplementation` of transformers whose tokens travel by our exchange, to register under another key.

        EPImplementationInterface.register("moe_triton in chunks", ep_implementation(chunks=2))

    transformers spreads the experts, slices what the tensor-parallel ranks share, and reduces the gradients, as for its
    own "all_to_all". The experts have to run on "moe_triton", too.

    Args:
        options: of `ExpertParallel`, without a group: mode, chunks, exchange, dispatch_dtype and so on.

    Raises:
        ImportError: a transformers without such implementations (before 5.24).
    """
    from transformers.distributed.expert_parallel import EPImplementation

    class MoeTritonEP(EPImplementation):
        """What transformers makes for each experts module."""

        def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            self.experts = experts
            _mark(experts, _parallel(ep_mesh, tp_mesh, options), self.num_local_experts)

        def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            if (found := implementation(self.experts)) != KEY:
                raise ValueError(
                    f"experts_implementation: got {found!r} with ep_implementation={KEY!r}, wanted {KEY!r}; no other "
                    "knows where the experts are"
                )
            return self.experts_forward(hidden_states, top_k_index, top_k_weights)

    return MoeTritonEP


def _parallel(ep_mesh: DeviceMesh, tp_mesh: DeviceMesh, options: dict[str, Any]) -> ExpertParallel:
    ep, alone = group_from_handle(ep_mesh.get_group()), group_of_one()
    tp = group_from_handle(tp_mesh.get_group()) if tp_mesh.size() > 1 else alone
    return ExpertParallel(ExpertGroups(ep=ep, edp=alone, etp=alone, tp=tp, data=(ep,), alone=alone), **options)


def _mark(experts: Any, parallel: ExpertParallel, num_local_experts: int) -> None:
    """Let our experts' forward find the ranks and the layer, as in an experts module that `swap` has spread."""
    experts.expert_parallel = parallel
    experts.exchanged_layer = ExchangedLayer(
        name=parallel.new_layer(),
        num_experts=num_local_experts * parallel.ep.size,
        backend=getattr(experts, "moe_triton_backend", "auto"),
        held=lambda: [parameter for parameter in experts._parameters.values() if parameter is not None],
    )
