"""What happens to rows between a token and its experts' outputs: stages that nest.

A stage takes rows x [R, d] with their ids [R, J] and weights [R, J], and gives one output row per input row: the sum of
its choices. An id outside of the stage's experts is no choice: its weight is not used, and has a gradient of zero. An
exchange between nodes holds one inside the node, which holds the experts. Backward is in two halves, as the backends'
is: the rows' gradients, which others wait for, then the parameters'.

An exchange is made anew for every call of a layer by a `MakeExchange`: `all_to_all.AllToAll` is the package's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moe_triton.dispatch import chosen_experts
from moe_triton.distributed.exchange.channel import Channel
from moe_triton.distributed.exchange.counts import NodeCounts, SliceSizes
from moe_triton.distributed.exchange.meter import ExchangeMeter
from moe_triton.distributed.exchange.overlap import Deferred
from moe_triton.distributed.exchange.transport import Shape
from moe_triton.distributed.groups import Group
from moe_triton.records import Dispatch


@dataclass(frozen=True, kw_only=True)
class ExchangedLayer:
    """A layer whose experts are spread over ranks.

    name         in messages
    num_experts  of all ranks; with replicas their slots
    backend      "auto", "triton" or "torch"
    capacity     tokens -> places of an expert, None for all, for mode "capacity"
    slots        ids [T, K] of experts -> of slots, where they have replicas
    held         the parameters of the experts that are here, as the model has them
    deduplicate  whether a token may travel once for several of its choices
    meters       of this call's exchange
    """

    name: str
    num_experts: int
    backend: str = "auto"
    capacity: Callable[[int], int | None] = lambda num_tokens: None
    slots: Callable[[Tensor], Tensor] = lambda ids: ids
    held: Callable[[], Iterable[nn.Parameter]] = lambda: ()
    deduplicate: bool = True
    meters: Sequence[ExchangeMeter] = ()

    def ids(self, dispatched: Dispatch) -> Tensor:
        """Return the slot of every choice [T, K] int32, -1 where nothing is to be computed."""
        return self.slots(chosen_experts(dispatched)).int()


class Saved:
    """What one forward keeps for its backward; autograd holds the tensors, so that its hooks see them.

    parameters   the local experts', flat
    is_training  whether a backward may come
    """

    __slots__ = ("is_training", "parameters", "tensors")

    def __init__(self, parameters: Sequence[Tensor], tensors: Sequence[Tensor] = (), is_training: bool = True) -> None:
        self.parameters, self.tensors, self.is_training = parameters, list(tensors), is_training

    def put(self, *tensors: Tensor) -> int:
        """Keep tensors; return the place of the first, behind which the others are."""
        place = len(self.tensors)
        self.tensors += tensors
        return place

    def __getitem__(self, index: int) -> Tensor:
        return self.tensors[index]


class Stage(Protocol):
    """See the module. `forward` may be called several times before the backward calls, which name theirs by number."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, assignments: int, saved: Saved) -> Tensor:
        """Compute [R, d]. `assignments` bounds the (row, id) pairs that are kept."""

    def start_backward(self, call: int, grad: Tensor, saved: Saved) -> Callable[[], tuple[Tensor, Tensor]]:
        """Issue the backward of a forward call; what is returned gives the gradients of its rows and weights."""


class InnerStage(Stage, Protocol):
    """What an exchange holds: it also takes rows that lie in the order of the local experts, with one weight each."""

    def forward_sorted(self, x: Tensor, weights: Tensor, counts: Tensor, starts: Tensor | None, saved: Saved) -> Tensor:
        """Compute [R, d] for rows x [R, d] in expert order, weights [R, 1]; a call like any other in backward.

        counts [L] int32 or int64: rows of each local expert. starts [L]: the first row of each; None where the experts'
        rows follow each other without gaps. Both stay on the device. Rows that belong to no expert are skipped: their
        outputs and gradients are zeros.
        """


class InnermostStage(InnerStage, Protocol):
    """The experts of this rank.

    num_experts  how many they are
    backend      "triton" or "torch": what makes the Dispatch and sums rows
    """

    num_experts: int
    backend: str

    def description(self) -> Mapping[str, object]:
        """What has to be the same on all ranks, by name."""

    def backward_weights(self, wanted: Sequence[bool], saved: Saved) -> Sequence[Tensor | None]:
        """Return the gradients of `saved.parameters` over the rows of all calls, after their `start_backward`."""


class ExchangeSpec(NamedTuple):
    """What an exchange is made for: one call of one layer, over one group.

    channel         the group's collectives, with names for error messages
    shape           how the experts lie on the group's ranks, and the backend that makes Dispatches and sums rows
    schedule        hash of all that this rank has done on the group, to be compared where the sizes vary
    watch           called with the channel, a flag [] int32 on the device that is 1 where rows found no room, and a
                    limit in words: every rank raises, on a GPU in its next call, so that nothing waits for the device
    max_tokens      most tokens that a rank of the group passes in this call; None where it is not known
    places          of an expert in what one rank sends, in mode "capacity"
    dispatch_dtype  what rows are sent as in the forward pass; None: as they are
    overlap_with    may be computed while rows travel; what is not computed there is computed afterwards
    slices          where ranks hold slices of the same experts: may be given the sizes of what arrives before it does,
                    which saves an exchange of them for each chunk
    node            between nodes: is given the counts of the exchange inside the node, which then has none of its own
    """

    channel: Channel
    shape: Shape
    schedule: int
    watch: Callable[[Channel, Tensor, str], None]
    max_tokens: int | None = None
    places: int | None = None
    dispatch_dtype: torch.dtype | None = None
    overlap_with: Deferred | None = None
    slices: SliceSizes | None = None
    node: NodeCounts | None = None

    @property
    def group(self) -> Group:
        """The ranks that share the experts, and their process group."""
        return self.channel.group


class MakeExchange(Protocol):
    """What `ExpertParallel(exchange=...)` takes: makes the exchange of one call around the experts of this rank.

    The ranks compare its `repr`, without addresses, before each call. `with spec.channel.error_context(phase)` makes a
    RuntimeError of another library's collective one that names rank, layer and phase.
    """

    def __call__(self, inner: InnerStage, spec: ExchangeSpec) -> Stage:
        """Return a stage for rows x [T, d] with global ids [T, K] (-1 for none) and weights [T, K] fp32 or fp64.

        `inner` takes rows with ids that count from this rank's first expert, or rows in the order of its experts.
        """
