"""How evenly the router spreads the tokens: statistics that a training loop can log, without a host sync until read.

`LoadMonitor` watches every MoE layer of a model by forward hooks; `load_statistics` is the arithmetic, for counts that
are at hand already (`MoEOutput.expert_counts`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_triton.checks import INTEGERS, check_int, check_tensor
from moe_triton.layers import Experts
from moe_triton.records import Dispatch
from moe_triton.torch_internals import recomputing


class LoadStatistics(NamedTuple):
    """The load of one layer's experts over some number of tokens. Loads are multiples of the mean load, so 1 is even.

    assignments    choices that were made (tokens times K), before dropping
    max_load       of the busiest expert; max_violation = max_load - 1 is MaxVio of arXiv 2408.15664
    min_load       of the idlest expert
    entropy        of the experts' shares, over log(E): 1 when even, 0 when one expert gets everything
    idle           experts that got nothing
    dropped        share of the assignments beyond the capacity; None where it is not known
    """

    assignments: int
    max_load: float
    min_load: float
    max_violation: float
    entropy: float
    idle: int
    dropped: float | None

    def __str__(self) -> str:
        dropped = "" if self.dropped is None else f", dropped {self.dropped:.2%}"
        return (
            f"load {self.min_load:.2f} to {self.max_load:.2f} of the mean, entropy {self.entropy:.3f}, "
            f"{self.idle} idle{dropped}"
        )


def load_statistics(counts: Tensor, dropped: int | None = None) -> LoadStatistics:
    """Compute statistics of counts [E] (int32 or int64, assignments wanted per expert); this waits for the device.

    dropped: how many of the assignments were dropped; None where that is not known. No assignments at all count as
    even. ValueError or TypeError on another shape or dtype, and on a negative `dropped`.
    """
    check_tensor("counts", counts, shape=("E",), dtypes=INTEGERS)
    if dropped is not None:
        check_int("dropped", dropped, low=0)
    values = [int(value) for value in counts.tolist()]
    total, size = sum(values), len(values)
    if total == 0:
        return LoadStatistics(0, 1.0, 1.0, 0.0, 1.0, size, None if dropped is None else 0.0)
    mean = total / size
    shares = [value / total for value in values if value > 0]
    entropy = -sum(share * math.log(share) for share in shares) / math.log(size) if size > 1 else 1.0
    return LoadStatistics(
        assignments=total,
        max_load=max(values) / mean,
        min_load=min(values) / mean,
        max_violation=max(values) / mean - 1,
        entropy=entropy,
        idle=sum(value == 0 for value in values),
        dropped=None if dropped is None else dropped / total,
    )


class LoadMonitor:
    """Counts what the experts of every MoE layer of a model are given, until it is read.

        monitor = LoadMonitor(model)
        ...                                   # training steps: two small additions per layer, nothing waits
        for name, statistics in monitor.read().items():
            log(f"{name}/max_load", statistics.max_load)

    Counts in training and in eval, only the forwards of the model itself (a recomputation under activation
    checkpointing does not count again). `close` removes the hooks. ValueError for a model without MoE layers.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, wanted a Module")
        found = {name or "experts": module for name, module in model.named_modules() if isinstance(module, Experts)}
        if not found:
            raise ValueError("model: got one without a moe_triton.MoE layer, wanted at least one")
        self.totals: dict[str, Tensor | None] = dict.fromkeys(
            found
        )  # [E + 1] int64: wanted per expert, and kept in all
        # bound, so that a copy of the model counts in a copy of the monitor, and can be pickled
        self.handles = [
            module.register_forward_pre_hook(partial(self._count, name), with_kwargs=True)
            for name, module in found.items()
        ]

    def _count(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        dispatched = kwargs["dispatched"] if "dispatched" in kwargs else args[2]
        if not recomputing():
            self._add(name, dispatched)

    @torch.inference_mode(False)  # totals of an evaluation go on counting in training
    @torch.no_grad()
    def _add(self, name: str, dispatched: Dispatch) -> None:
        seen = torch.cat((dispatched.counts, dispatched.offsets[-1:])).long()
        before = self.totals[name]
        self.totals[name] = seen if before is None else before.add_(seen)

    def read(self, *, reset: bool = True, group: Any = None) -> dict[str, LoadStatistics]:
        """Return each layer's statistics since the last read, by the name of its Experts module; waits for the device.

        reset: start counting anew. group: a torch.distributed group to sum over first; every rank must call then.
        """
        found = {}
        for name, total in self.totals.items():
            if total is None:
                continue
            summed = total.clone()
            if group is not None:
                torch.distributed.all_reduce(summed, group=group)
            counts, kept = summed[:-1], int(summed[-1])
            found[name] = load_statistics(counts, dropped=int(counts.sum()) - kept)
        if reset:
            self.totals = dict.fromkeys(self.totals)
        return found

    def counts(self) -> dict[str, Tensor]:
        """Return each layer's wanted assignments [E] int64 since the last reset, on the device; nothing waits."""
        return {name: total[:-1] for name, total in self.totals.items() if total is not None}

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def __enter__(self) -> LoadMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plot_load(history: Sequence[Mapping[str, LoadStatistics]], path: str | Path) -> None:
    """Write a PNG of what `LoadMonitor.read` gave over time: busiest and idlest expert, entropy and dropped share.

    One curve per layer. ValueError for an empty history.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    if not history:
        raise ValueError("history: got nothing, wanted at least one reading")
    layers = list(dict.fromkeys(name for reading in history for name in reading))
    panels = (
        ("max_load", "busiest expert, times the mean load"),
        ("min_load", "idlest expert, times the mean load"),
        ("entropy", "entropy of the load (1: even)"),
        ("dropped", "dropped share of the assignments"),
    )
    figure = Figure(figsize=(10, 6), dpi=110, layout="constrained")
    for axes, (field, title) in zip(figure.subplots(2, 2, sharex=True).flat, panels, strict=True):
        for layer in layers:
            points = [
                (at, value)
                for at, reading in enumerate(history, 1)
                if layer in reading and (value := getattr(reading[layer], field)) is not None
            ]
            axes.plot([at for at, _ in points], [value for _, value in points], label=layer, linewidth=1.4)
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.set_ylim(0, 1.05 if field == "entropy" else None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if field == "dropped":
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    figure.supxlabel("reading", fontsize=9)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path, format="png")
