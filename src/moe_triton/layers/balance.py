"""Balancing the load of the global batch: over gradient accumulation, and over ranks without expert parallelism."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_triton.layers.moe import MoE
from moe_triton.torch_internals import never_compiled, recomputing


@dataclass
class _Total:
    """What was counted for a layer since the last step: sums [E + 2] fp64 of counts, tokens and micro-batches."""

    sums: Tensor
    is_final: bool = False


class BalanceAccumulator:
    """Let the load-balance losses of a model's MoE layers see the load of the global batch, not of each micro-batch.

    Balancing every micro-batch by itself forces each sequence to use all experts evenly, which hinders experts that
    specialise; the global batch only has to be even as a whole (arXiv 2501.11873). The loss stays E / K * sum_e f_e p_e
    with p from the micro-batch, and with f over all micro-batches of the step so far and over all ranks of `group`:

        balance = BalanceAccumulator(model)
        for micro_batches in steps:
            for batch in micro_batches:
                (loss(model, batch) / len(micro_batches)).backward()
            optimizer.step()
            balance.step()

    That is the published method, in which the first micro-batches of a step see less of it than the last. To have the
    gradient of the one global loss, whatever the number of micro-batches and of ranks, count the whole step before:

        with balance.counting():
            for batch in micro_batches:
                model(batch)

    at the price of one more forward. Then f, the number of tokens of both losses and their weights, also where masks
    make micro-batches unequal, are those of the global batch; losses are to be averaged over micro-batches and ranks.

    Args:
        model: its MoE layers with an `aux_loss_weight` or a `z_loss_weight` when this object is made.
        group: the data-parallel ranks; None: torch.distributed's default group, when there is one. A layer with expert
            parallelism sums over its own ranks already and takes accumulation only from here.

    In eval mode nothing is counted. A recomputation by activation checkpointing sees the counts that are there when it
    runs: it is exact where backward follows its forward, and after `counting`. Noise and dropout differ between the two
    forwards of `counting`. torch.compile breaks its graph here.

    Raises:
        ValueError: a model without such a layer.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
        self.layers = [m for m in model.modules() if isinstance(m, MoE) and (m.aux_loss_weight or m.z_loss_weight)]
        if not self.layers:
            raise ValueError("model: got no MoE layer with an aux_loss_weight or z_loss_weight, wanted at least one")
        for layer in self.layers:
            layer.balance = self
        self.group = group
        self._totals: dict[nn.Module, _Total] = {}
        self._is_counting = False

    def step(self) -> None:
        """Start a new global batch: call it with every step of the optimizer."""
        self._totals.clear()

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count the load of the forwards inside, without gradients, as that of the global batch; see the class."""
        self.step()
        self._is_counting = True
        try:
            with torch.no_grad():
                yield
        except BaseException:
            self.step()
            raise
        finally:
            self._is_counting = False
        for layer in self.layers:
            if (total := self._totals.get(layer)) is not None:
                self._sum_over_ranks(layer, total.sums)
                total.is_final = True

    @never_compiled  # it remembers, and sums over ranks
    def global_load(self, layer: nn.Module, counts: Tensor, num_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return (counts [E], number of tokens []) for the losses of a layer's micro-batch; their quotient is f."""
        if not layer.training:
            return counts, num_tokens
        total = self._totals.get(layer)
        if total is not None and total.is_final:
            mean = total.sums[:-1] / total.sums[-1]  # over micro-batches
            return mean[:-1], mean[-1].to(num_tokens.dtype)
        if total is None or not recomputing():
            one = torch.ones_like(num_tokens).reshape(1)
            new = torch.cat([counts.double(), num_tokens.detach().reshape(1).double(), one.double()])
            if not self._is_counting:
                self._sum_over_ranks(layer, new)
            total = self._totals[layer] = _Total(new if total is None else total.sums + new)
        load = total.sums[:-2] / total.sums[-2].clamp_min(1)
        return load * num_tokens, num_tokens

    def _sum_over_ranks(self, layer: nn.Module, sums: Tensor) -> None:
        if isinstance(layer, MoE) and layer.parallel is None and dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums, group=self.group)
