"""The parallel layout of the experts, and the auxiliary losses of a forward: v0.1.6's MOE_CONTEXT.

v0.0.2's `global_variables.moe_env` is a view of the same object.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_triton.checks import check_choice, check_int
from moe_triton.compat.colossalai.context.parallel_context import GENERATIONS, global_context, world_size
from moe_triton.compat.colossalai.context.random import moe_set_seed
from moe_triton.distributed import ExpertParallel


@dataclass(frozen=True, kw_only=True)
class MoeParallelInfo:
    """The ranks that hold a layer's experts; every expert parameter carries it as `moe_info`.

    Groups are torch's handles, those of one rank included; None without torch.distributed. `parallel` is what computes
    there. Copies share the groups; a pickle holds the sizes, and is loaded as what the MoE context has for them.
    """

    ep_size: int
    dp_size: int
    ep_group: dist.ProcessGroup | None
    dp_group: dist.ProcessGroup | None
    parallel: ExpertParallel = field(repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> MoeParallelInfo:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _info_of_context, (self.ep_size, self.parallel.etp.size > 1)


@dataclass(frozen=True)
class AuxiliaryLoss:
    """One layer's loss of one forward, not yet weighted."""

    value: Tensor
    layer: object
    has_gradient: bool  # whether autograd was on when it was computed


class MoeContext:
    """The layout of the experts, and the auxiliary losses since the last reset.

    max_ep_size         the most ranks that share one set of experts (v0.0.2: model_parallel_size)
    exchange            further options of `moe_triton.distributed.ExpertParallel`: mode, chunks, ...
    parallel_info_dict  by the ranks that share a set of experts, as far as layers were made: where the experts are
    use_kernel_optim    kept as given, without effect: upstream's kernels are not used
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self.max_ep_size = 1
        self.use_kernel_optim = True
        self.exchange: dict[str, Any] = {}
        self.parallel_info_dict: dict[int, MoeParallelInfo] = {}
        self._slices: MoeParallelInfo | None = None
        self._is_set_up = False
        self._losses: list[AuxiliaryLoss] = []
        self._is_reset = False

    @property
    def generation(self) -> str:
        """Return the generation, "v0.0.2" or "v0.1.6", whose conventions hold where a call does not say."""
        return global_context.generation

    @property
    def world_size(self) -> int:
        return world_size()

    @property
    def min_dp_size(self) -> int:
        """Return ranks that hold the same experts when max_ep_size ranks share a set of them."""
        return self.world_size // self.max_ep_size

    def setup(
        self,
        seed: int | None = None,
        use_kernel_optim: bool = True,
        *,
        max_ep_size: int | None = None,
        generation: str = "v0.1.6",
        exchange: dict[str, Any] | None = None,
    ) -> None:
        """Lay out the experts over the present processes, and seed the MoE streams with `seed`.

        Args:
            seed: for `context.random.moe_set_seed`; None seeds nothing.
            use_kernel_optim: without effect: this package has its own kernels.
            max_ep_size: None takes the config's `max_ep_size`, and without one the number of processes.
            generation: "v0.0.2" or "v0.1.6".
            exchange: options of `ExpertParallel`.

        Raises:
            ValueError: the number of processes is not a multiple of max_ep_size.
        """
        check_choice("generation", generation, GENERATIONS)
        if max_ep_size is None:
            max_ep_size = global_context.config.get("max_ep_size", self.world_size)
        check_int("max_ep_size", max_ep_size, low=1)
        if self.world_size % max_ep_size:
            raise ValueError(f"max_ep_size: got {max_ep_size}, wanted a divisor of the {self.world_size} processes")
        self._forget()
        self.max_ep_size, self.exchange, self.use_kernel_optim = max_ep_size, dict(exchange or {}), use_kernel_optim
        self._is_set_up = True
        global_context.moe_parallel, global_context.generation = max_ep_size, generation
        if seed is not None:
            moe_set_seed(seed)

    @property
    def is_initialized(self) -> bool:
        """Return whether the layout was set up; without that, all experts are on every process."""
        return self._is_set_up

    @property
    def has_setup(self) -> bool:
        """Return the same as `is_initialized`."""
        return self._is_set_up

    def set_kernel_not_use(self) -> None:
        """Set `use_kernel_optim` to False, which changes nothing."""
        self.use_kernel_optim = False

    def reset(self) -> None:
        """Go back to one process and no layout."""
        self._forget()
        global_context.moe_parallel, global_context.generation = 1, GENERATIONS[0]

    def get_info(self, num_experts: int) -> tuple[int, MoeParallelInfo]:
        """Return (experts per rank, where they are) for a layer of E experts.

        E >= max_ep_size: max_ep_size ranks share them; E < max_ep_size: E ranks do, with one expert each.

        Raises ValueError when neither divides the other.
        """
        check_int("num_experts", num_experts, low=1)
        if num_experts % self.max_ep_size and self.max_ep_size % num_experts:
            raise ValueError(
                f"num_experts: got {num_experts}, wanted a multiple or a divisor of max_ep_size={self.max_ep_size}"
            )
        ep_size = min(num_experts, self.max_ep_size)
        return num_experts // ep_size, self.info_of(ep_size)

    def info_of(self, ep_size: int) -> MoeParallelInfo:
        """Return where the experts are that `ep_size` ranks share; every rank calls it at the same time.

        Raises ValueError where max_ep_size ranks cannot be so divided.
        """
        if self.max_ep_size % ep_size:
            raise ValueError(
                f"ep_size: got {ep_size}, wanted a divisor of max_ep_size={self.max_ep_size} of the MoE context"
            )
        if ep_size not in self.parallel_info_dict:
            parallel = self._parallel(ep=ep_size)
            self.parallel_info_dict[ep_size] = MoeParallelInfo(
                ep_size=parallel.ep.size,
                dp_size=parallel.edp.size,
                ep_group=parallel.ep.handle,
                dp_group=parallel.edp.handle,
                parallel=parallel,
            )
        return self.parallel_info_dict[ep_size]

    def get_slices(self) -> MoeParallelInfo:
        """Return where the slices of experts are that max_ep_size ranks split between them (`TPExperts`).

        The groups are those of max_ep_size ranks that share whole experts.
        """
        if self._slices is None:
            whole = self.info_of(self.max_ep_size)
            has_slices = self.max_ep_size > 1
            self._slices = replace(whole, parallel=self._parallel(etp=self.max_ep_size)) if has_slices else whole
        return self._slices

    def _parallel(self, *, ep: int = 1, etp: int = 1) -> ExpertParallel:
        # the engine averages the ranks' gradients, so that the losses have to average too
        return ExpertParallel(global_context.groups(ep=ep, etp=etp), loss_reduction="mean", **self.exchange)

    def reset_loss(self) -> None:
        """Forget the auxiliary losses: the beginning of a forward. A model that `initialize` was given does it."""
        self._losses = []
        self._is_reset = True

    def add_loss(self, loss: Tensor, layer: object = None) -> None:
        """Add an auxiliary loss [].

        The sum is over what was added since `reset_loss`. Without a reset a layer's newer loss replaces its older one,
        so that forwards without `MoeLoss` do not add up.
        """
        if not self._is_reset and layer is not None:
            self._losses = [other for other in self._losses if other.layer is not layer]
        self._losses.append(AuxiliaryLoss(loss, layer, torch.is_grad_enabled()))

    def get_loss(self) -> Tensor | float:
        """Return the sum of the auxiliary losses, 0.0 when there is none."""
        return sum((loss.value for loss in self._losses), 0.0)

    def take_losses(self) -> list[AuxiliaryLoss]:
        """Return all auxiliary losses, and forget them."""
        losses, self._losses, self._is_reset = self._losses, [], False
        return losses

    @property
    def aux_loss(self) -> Tensor | float:
        return self.get_loss()


MOE_CONTEXT = MoeContext()


def _info_of_context(ep_size: int, is_sliced: bool) -> MoeParallelInfo:
    """Return what an unpickled MoeParallelInfo becomes."""
    return MOE_CONTEXT.get_slices() if is_sliced else MOE_CONTEXT.info_of(ep_size)
