"""`LoadMonitor`: counts what the experts are given, by forward hooks, on the device."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_triton.checks import check_choice
from moe_triton.distributed.exchange.expert_parallel import unless_alone
from moe_triton.distributed.exchange.meter import ExchangeMeter
from moe_triton.integrations.experts_interface import registry
from moe_triton.integrations.transformers_routers import (
    RoutedLayer,
    name_without_wrappers,
    num_counted_experts,
    routed_layers,
    router_scores,
)
from moe_triton.layers import Experts, MoE
from moe_triton.metrics.statistics import ExchangeStatistics, LoadStatistics, exchange_statistics, load_statistics
from moe_triton.records import Dispatch, Routing
from moe_triton.torch_internals import recomputing

MODES = ("train", "eval")
EXTRA = 3  # kept assignments, tokens, sum of logsumexp(logits)**2, at the end of a total


class LoadMonitor:
    """Counts what the experts of every routed layer of a model are given, until it is read.

        monitor = LoadMonitor(model)
        ...                                   # training steps: a few small operations per layer, nothing waits
        for name, statistics in monitor.read(mode="train").items():
            log(f"{name}/max_load", statistics.max_load)

    The model has `moe_triton.MoE` or `Experts` layers, or is a transformers model whose experts have its interface,
    swapped or not. Give it the model that is called, after PEFT has changed it: where a transformers model is called
    with an attention mask [batch, positions], padding does not count.

    Where experts are spread over ranks, the rows that come to this rank and the time of the exchange are counted too.

    Training and evaluation are counted apart, by the `training` flag of the experts. Only the forwards of the model
    itself count: a recomputation under activation checkpointing does not count again. Over ranks each counts what its
    own tokens are given, of all experts; ranks with the same batch count the same. `close` removes the hooks.
    ValueError for a model without such layers.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, wanted a Module")
        modules = dict(model.named_modules())
        own = {name or "experts": module for name, module in modules.items() if isinstance(module, Experts)}
        foreign = {
            name_without_wrappers(name) or "experts": module
            for name, module in modules.items()
            if registry(module) is not None
        }
        if not own and not foreign:
            raise ValueError(
                "model: got one without a moe_triton.MoE layer and without experts of transformers' interface, wanted "
                "at least one"
            )
        self.names = [*own, *foreign]
        self.totals: dict[tuple[str, str], Tensor] = {}  # by mode and layer: [2E + EXTRA] float64
        self.token_mask: Tensor | None = None  # of the forward that is running: [batch, positions]
        # bound, so that a copy of the model counts in a copy of the monitor, and can be pickled
        self.meters: dict[tuple[str, str], ExchangeMeter] = {}  # by mode and layer, where its rows travel
        before: list[tuple[nn.Module, Callable[..., None]]] = []
        after: list[tuple[nn.Module, Callable[..., None]]] = []
        before += [(module, partial(self._count, name)) for name, module in own.items()]
        before += [(module, partial(self._count_foreign, name)) for name, module in foreign.items()]
        after += [
            (module.router, partial(self._score, f"{name}.experts".lstrip(".")))
            for name, module in modules.items()
            if isinstance(module, MoE)
        ]
        layers = routed_layers(model)
        self.num_experts = {layer.name: layer.num_experts for layer in layers}  # over all ranks
        after += [(layer.router, partial(self._score_foreign, layer)) for layer in layers]
        if foreign:
            before.append((model, self._begin))
        self.handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in before]
        self.handles += [module.register_forward_hook(hook) for module, hook in after]
        self.handles += [
            module.register_forward_hook(take_back_meters, always_call=True)
            for module in own.values()
            if unless_alone(module.expert_parallel) is not None
        ]

    # Hooks --------------------------------------------------------------------------------------------------------

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not recomputing():
            self.token_mask = attention_mask(model, args, kwargs)

    def _count(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        dispatched = next(x for x in (*args, *kwargs.values()) if isinstance(x, Dispatch))
        assert isinstance(module, Experts)
        if unless_alone(module.expert_parallel) is not None:
            meter = self.meters.setdefault((MODES[not module.training], name), ExchangeMeter())
            module.lent_meters = (*module.lent_meters, meter)
        if not recomputing():
            self._add(name, module, dispatched.num_experts, dispatched.counts, kept=dispatched.offsets[-1])

    def _count_foreign(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if recomputing():
            return
        ids = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        num_experts = num_counted_experts(module, self.num_experts.get(name))
        counts = self._counts_of(ids.detach(), num_experts)
        self._add(name, module, num_experts, counts, kept=counts.sum())

    @torch.inference_mode(False)
    @torch.no_grad()
    def _counts_of(self, ids: Tensor, num_experts: int) -> Tensor:
        bins = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts).long()
        mask = self._mask_of(bins.shape[0], bins.device)
        if mask is not None:
            bins = bins.masked_fill(~mask[:, None], num_experts)
        # integer adds commute, so scatter_add_ is deterministic; bincount would wait for the device
        counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=ids.device)
        return counts.scatter_add_(0, bins.reshape(-1), torch.ones_like(bins).reshape(-1))[:num_experts]

    def _score(self, name: str, module: nn.Module, args: Any, routing: Any) -> None:
        if isinstance(routing, Routing) and not recomputing():
            size = routing.score_sums.shape[0]
            scores, z = routing.score_sums, routing.z_sum
            self._add(name, module, size, scores=scores, tokens=routing.num_tokens, z=z)

    def _score_foreign(self, layer: RoutedLayer, module: nn.Module, args: Any, output: Any) -> None:
        size = num_counted_experts(layer.experts, layer.num_experts)
        found = None if recomputing() or size != layer.num_experts else self._sums_of(layer, output)
        if found is not None:
            scores, tokens, z = found
            self._add(layer.name, layer.experts, size, scores=scores[:size], tokens=tokens, z=z)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _sums_of(self, layer: RoutedLayer, output: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        found = router_scores(layer, output)
        if found is None:
            return None
        probs, logits = found
        mask = self._mask_of(probs.shape[0], probs.device)
        weight = torch.ones_like(probs[:, 0]) if mask is None else mask.to(probs.dtype)
        z = torch.full_like(weight, math.nan) if logits is None else logits.logsumexp(-1).square()
        return weight @ probs, weight.sum(), z.masked_fill(weight == 0, 0).sum()

    def _mask_of(self, num_tokens: int, device: torch.device) -> Tensor | None:
        """The padding mask [T], where the rows are those of the mask that the model was called with."""
        if self.token_mask is None or self.token_mask.numel() != num_tokens:
            return None
        return self.token_mask.reshape(-1).to(device, non_blocking=True) != 0

    @torch.inference_mode(False)  # totals of an evaluation go on counting in training
    @torch.no_grad()
    def _add(
        self,
        name: str,
        module: nn.Module,
        num_experts: int,
        counts: Tensor | None = None,
        *,
        kept: Tensor | None = None,
        scores: Tensor | None = None,
        tokens: Tensor | None = None,
        z: Tensor | None = None,
    ) -> None:
        """Add what one hook has seen to a layer's total: counts [E], scores [E], kept [], tokens [], z []."""
        key = (MODES[not module.training], name)
        device = next(x.device for x in (counts, scores) if x is not None)
        total = self.totals.get(key)
        if total is None:
            total = self.totals[key] = torch.zeros(2 * num_experts + EXTRA, dtype=torch.float64, device=device)
        parts = (counts, scores, kept, tokens, z)
        for view, part in zip(split_total(total), parts, strict=True):
            if part is not None:
                view.add_(part.detach())

    # Reading ------------------------------------------------------------------------------------------------------

    def read(self, *, mode: str | None = None, reset: bool = True, group: Any = None) -> dict[str, LoadStatistics]:
        """Return each layer's statistics since the last read, by the name of its experts module; waits for the device.

        mode: "train", "eval", or None for both together. reset: start counting anew what is read. group: a
        torch.distributed group to sum over first; every rank must call then.
        """
        found = {}
        for name, total in self._totals(mode):
            if group is not None:
                torch.distributed.all_reduce(total, group=group)
            counts, scores, kept, tokens, z = split_total(total.cpu())
            num_tokens = float(tokens)
            balance = mean_z = None
            if num_tokens > 0:
                wanted = float(counts.sum())
                balance = len(counts) * float(counts @ scores) / (wanted * num_tokens) if wanted > 0 else None
                mean_z = None if torch.isnan(z) else float(z) / num_tokens
            statistics = load_statistics(counts.long(), int(counts.sum() - kept), balance, mean_z)
            found[name] = statistics._replace(exchange=self._exchange(name, mode, group, total.device))
        if reset:
            for key in [key for key in self.meters if mode in (None, key[0])]:
                del self.meters[key]
            for key in [key for key in self.totals if mode in (None, key[0])]:
                del self.totals[key]
        return found

    def _exchange(self, name: str, mode: str | None, group: Any, device: torch.device) -> ExchangeStatistics | None:
        """The exchange's statistics of a layer, over the ranks of the group."""
        read = [self.meters[key, name].read() for key in MODES if mode in (None, key) and (key, name) in self.meters]
        if not read:
            return None
        mine = [sum(rows for rows, _ in read), sum(seconds for _, seconds in read)]
        ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
        both = torch.zeros(2, ranks, dtype=torch.float64, device=device)
        both[:, rank] = torch.tensor(mine, dtype=torch.float64)
        if group is not None:
            torch.distributed.all_reduce(both, group=group)
        return exchange_statistics(*both.tolist())

    def counts(self, mode: str | None = None) -> dict[str, Tensor]:
        """Return each layer's wanted assignments [E] int64 since the last reset, on the device; nothing waits."""
        return {name: split_total(total)[0].long() for name, total in self._totals(mode)}

    def _totals(self, mode: str | None) -> Iterator[tuple[str, Tensor]]:
        """A new tensor per layer that has been seen in a mode, in the model's order."""
        if mode is not None:
            check_choice("mode", mode, MODES)
        for name in self.names:
            totals = [self.totals[key, name] for key in MODES if mode in (None, key) and (key, name) in self.totals]
            if totals:
                yield name, torch.stack(totals).sum(0)

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def __enter__(self) -> LoadMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def take_back_meters(module: Experts, args: Any, output: Any) -> None:
    """End the call that the meters were lent for, also one that has failed."""
    module.lent_meters = ()


def split_total(total: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Views of a total: counts [E], sums of scores [E], kept [], tokens [], z []."""
    num_experts = (total.shape[0] - EXTRA) // 2
    return total[:num_experts], total[num_experts : 2 * num_experts], total[-3], total[-2], total[-1]


def attention_mask(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the padding mask of the positions that a transformers model is called with, [batch, positions], or None.

    With a cache the mask is longer than the input: its end belongs to the input.
    """
    names = list(inspect.signature(model.forward).parameters) if args else []
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    mask = given.get("attention_mask")
    inputs = [given[name] for name in ("input_ids", "inputs_embeds") if isinstance(given.get(name), Tensor)]
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not inputs or inputs[0].dim() < 2:
        return None
    return mask[:, -inputs[0].shape[1] :]
