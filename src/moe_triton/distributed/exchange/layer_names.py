"""Names of MoE layers: by them the ranks of a group notice that they run different layers."""

from __future__ import annotations

import itertools
from collections import Counter

import torch.distributed as dist

from moe_triton.distributed.exchange.failure_board import failure_board


class LayerName(str):
    """The name of one layer, which no other layer over the same ranks has.

    A deep copy of a layer is a layer of its own, "copy 1 of MoE layer 0". Copies are numbered by their original, so
    that a copy made on one rank alone changes no other layer's name. Pickling makes it a plain string.
    """

    _original: LayerName
    _copies: itertools.count[int]

    def __new__(cls, name: str, original: LayerName | None = None) -> LayerName:
        made = super().__new__(cls, name)
        made._original = made if original is None else original
        made._copies = itertools.count(1)
        return made

    def __deepcopy__(self, memo: object) -> LayerName:
        original = self._original
        return LayerName(f"copy {next(original._copies)} of {original}", original)

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


_alone: Counter[tuple[int, ...]] = Counter()  # without torch.distributed


def new_layer_name(ranks: tuple[int, ...]) -> LayerName:
    """Name a layer that all of `ranks` make, by the order of creation, which has to be the same on all of them.

    Counted over all ranks that hold the layer, not over one expert-parallel group alone: the name is compared wherever
    the layer communicates.
    """
    counts = failure_board().num_layers if dist.is_available() and dist.is_initialized() else _alone
    counts[ranks] += 1
    return LayerName(f"MoE layer {counts[ranks] - 1}")
