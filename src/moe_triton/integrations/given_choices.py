"""A router of transformers' with given choices: its own code runs, and what it chooses is exchanged.

The choice of all families is one of three operations inside the router's forward, which a TorchFunctionMode sees: a
top-k over all experts; for routing by hash, a look-up in the table of tokens; for PhiMoE, an arg-max per choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moe_triton.integrations.transformers_routers import RoutedLayer, without_wrappers

Call = tuple[Callable[..., Any], tuple[Any, ...], Mapping[str, Any]]


class GivenChoices(TorchFunctionMode):
    """While active, what the layer's router chooses is what is given, and what it chose can be read.

    Args:
        layer: the layer whose `chooser` runs its forward in this mode.
        given: [T, K] integers in the router's order, or None to choose as ever. A row whose first id is negative is
            chosen as ever too; the ids of the others must be distinct and in range.

    `chosen` [T, K] int64 is what the router chose, None before. Weights and gradients are the router's own for those
    experts: a top-k's values become a gather. Where the router keeps only the experts of its best groups, the groups of
    given experts come first. The operations do not depend on `given`, so a repetition under activation checkpointing
    that is given what was chosen saves the same tensors.
    """

    def __init__(self, layer: RoutedLayer, given: Tensor | None):
        super().__init__()
        self.layer = layer
        self.given = None if given is None else given.long()
        self.table = getattr(without_wrappers(layer.router), "tid2eid", None)
        self.is_sparsemixer = samples_by_argmax(layer.router)
        self.is_training = layer.router.training
        self.parts: list[Tensor] = []  # of sparsemixer's choices, [T, 1] each
        self.num_masks = 0
        self.chosen: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.topk, Tensor.topk):
            return self._topk(func, args, kwargs)
        if self.table is not None and func is Tensor.__getitem__ and args[0] is self.table:
            self.chosen = self._exchange(func(*args, **kwargs).long(), self.layer.top_k)
            return self.chosen
        if self.is_sparsemixer and func in (torch.max, Tensor.max):
            return self._max(func, args, kwargs)
        if self.is_sparsemixer and func in (torch.masked_fill, Tensor.masked_fill):
            return self._masked_fill(func, args, kwargs)
        return func(*args, **kwargs)

    def _exchange(self, live: Tensor, top_k: int, first: int = 0) -> Tensor:
        """Put the given ids, from column `first`, in place of those that were chosen, [..., top_k] int64."""
        if self.given is None:
            return live
        given = self.given[:, first : first + top_k]
        return torch.where(self.given[:, :1] >= 0, given, live.reshape(-1, top_k)).view_as(live)

    def _topk(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        scores, *rest = args if args else (kwargs["input"],)
        kwargs = {key: value for key, value in kwargs.items() if key != "input"}
        top_k = rest[0] if rest else kwargs["k"]
        num_classes = self.layer.num_classes
        if scores.shape[-1] == num_classes and top_k == self.layer.top_k:
            with torch.no_grad():
                ids = self._exchange(func(scores, *rest, **kwargs)[1], top_k)
            self.chosen = ids.reshape(-1, top_k)  # the last such top-k is the choice: the only group's comes before it
            return torch.return_types.topk((scores.gather(-1, ids), ids))
        is_of_groups = scores.dim() == 2 and scores.shape[-1] < num_classes and num_classes % scores.shape[-1] == 0
        if is_of_groups:
            scores = scores.detach() if self.given is None else self._prefer_groups(scores.detach())
        return func(scores, *rest, **kwargs)

    def _prefer_groups(self, scores: Tensor) -> Tensor:
        """Raise the scores [T, G] of the groups that given experts are in."""
        assert self.given is not None
        is_given = self.given[:, :1] >= 0
        group = self.given.clamp_min(0) // (self.layer.num_classes // scores.shape[-1])
        has_given = torch.zeros_like(scores, dtype=torch.bool).scatter(1, group, is_given.expand_as(group))
        return scores.masked_fill(has_given, float("inf"))

    # PhiMoE's sparsemixer (arXiv 2409.12136) chooses one expert after the other: among those near the best score by the
    # maximum of noisy scores in training, by the maximum itself in eval, where one call also gives the best score.

    def _max(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        found = func(*args, **kwargs)
        keepdim = kwargs.get("keepdim", len(args) > 2 and args[2])
        if keepdim == self.is_training:
            return found
        live = found[1] if keepdim else found[1][..., None]
        ids = self._exchange(live, 1, first=len(self.parts))
        self.parts.append(ids)
        self.chosen = torch.cat(self.parts, -1)
        return torch.return_types.max((found[0], ids if keepdim else ids[..., 0]))

    def _masked_fill(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Keep the given expert, however far it is from the best score."""
        scores, mask, *rest = args
        if self.given is not None:
            column = self.given[:, self.num_masks : self.num_masks + 1]
            kept = torch.zeros_like(mask).scatter(1, column.clamp_min(0), column >= 0)
            mask = mask & ~kept
        self.num_masks += 1
        return func(scores, mask, *rest, **kwargs)


def samples_by_argmax(router: nn.Module) -> bool:
    """Return whether the router is PhiMoE's."""
    forward = type(without_wrappers(router)).forward
    return "sparsemixer" in getattr(getattr(forward, "__code__", None), "co_names", ())
