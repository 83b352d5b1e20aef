"""Count the assignments that the experts were asked for, to balance their load."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_triton.torch_internals import recomputing


class CountsLoad(nn.Module):
    """Counts in `load` [E] int64 the assignments that each expert was asked for in training; None: nothing is counted.

    A router whose choice bias is a quantile counts a histogram [E, bins] in its place.

    `load` is not a buffer. It differs from rank to rank until it is summed, so DistributedDataParallel must not replace
    it by rank 0's, and `to_empty` and averages of models must not change it. It is on the device of the last counts.
    """

    load: Tensor | None

    def count_load(self, counts: Tensor) -> None:
        """Add counts like `load`, in training only, and not again when activation checkpointing repeats a forward.

        Raises NotImplementedError under torch.func, which changes no tensor in place that it has not made.
        """
        if self.load is None or not self.training or recomputing():
            return
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                "load: got a torch.func transform in training, which counts it; wanted eval() or choice_bias=False"
            )
        self.load_on(counts.device).add_(counts)

    def load_on(self, device: torch.device) -> Tensor:
        """Move `load` to a device; from the meta device, where it has no values, it comes as zeros."""
        assert self.load is not None
        if self.load.device != device:
            self.load = torch.zeros_like(self.load, device=device) if self.load.is_meta else self.load.to(device)
        return self.load
