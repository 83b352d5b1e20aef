"""v0.0.2's moe_env: the parallel layout of the experts, by its names."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moe_triton.checks import check_int
from moe_triton.compat.colossalai.context.moe_context import MOE_CONTEXT
from moe_triton.compat.colossalai.context.parallel_context import global_context, world_size


class MoeEnv:
    """A view of `context.moe_context.MOE_CONTEXT`."""

    @property
    def data_parallel_size(self) -> int | None:
        """Return ranks that hold the same experts; None before `setup`."""
        return MOE_CONTEXT.min_dp_size if MOE_CONTEXT.is_initialized else None

    @property
    def model_parallel_size(self) -> int | None:
        """Return ranks that share one set of experts; None before `setup`."""
        return MOE_CONTEXT.max_ep_size if MOE_CONTEXT.is_initialized else None

    @property
    def aux_loss(self) -> Tensor | float:
        """Return the sum of the auxiliary losses since the last reset."""
        return MOE_CONTEXT.get_loss()

    def setup(self, moe_model_size: int, **exchange: Any) -> None:
        """Share the experts among runs of `moe_model_size` consecutive ranks (strided ones hold the same experts).

        exchange: options of `moe_triton.distributed.ExpertParallel`.

        Raises ValueError when the size does not divide the data-parallel size (with tensor parallelism: the world).
        """
        check_int("size", moe_model_size, low=1)
        ranks = world_size()
        if ranks % moe_model_size:
            what = "data parallel size" if global_context.tensor_parallel == 1 else "number of processes"
            raise ValueError(f"size: got {moe_model_size}, wanted a divisor of the {what} {ranks}")
        MOE_CONTEXT.setup(max_ep_size=moe_model_size, generation="v0.0.2", exchange=exchange)

    def is_initialized(self) -> bool:
        """Return whether `setup` was called."""
        return MOE_CONTEXT.is_initialized

    def reset_loss(self) -> None:
        """See `MoeContext.reset_loss`."""
        MOE_CONTEXT.reset_loss()

    def add_loss(self, loss: Tensor) -> None:
        """See `MoeContext.add_loss`."""
        MOE_CONTEXT.add_loss(loss)

    def get_loss(self) -> Tensor | float:
        """See `MoeContext.get_loss`."""
        return MOE_CONTEXT.get_loss()


moe_env = MoeEnv()
