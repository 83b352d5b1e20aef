"""What happens to rows between a token and its experts' outputs: stages that nest.

A stage takes rows x [R, d] with their ids [R, J] (-1 for none) and weights [R, J], and gives one output row per input
row: the sum of its choices. An exchange between nodes holds one inside the node, which holds the experts. Backward is
in two halves, as the backends' is: the rows' gradients, which others wait for, then the parameters'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from moe_triton.dispatch import chosen_experts
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
    """

    name: str
    num_experts: int
    backend: str = "auto"
    capacity: Callable[[int], int | None] = lambda num_tokens: None
    slots: Callable[[Tensor], Tensor] = lambda ids: ids
    held: Callable[[], Iterable[nn.Parameter]] = lambda: ()
    deduplicate: bool = True

    def ids(self, dispatched: Dispatch) -> Tensor:
        """Return the slot of every choice [T, K] int32, -1 where nothing is to be computed."""
        return self.slots(chosen_experts(dispatched)).int()


class Saved:
    """What one forward keeps for its backward; autograd holds the tensors, so that its hooks see them.

    parameters   the local experts', flat
    is_training  whether a backward may come
    """

    def __init__(self, parameters: Sequence[Tensor], tensors: Sequence[Tensor] = (), is_training: bool = True) -> None:
        self.parameters, self.tensors, self.is_training = parameters, list(tensors), is_training

    def put(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def __getitem__(self, index: int) -> Tensor:
        return self.tensors[index]


class Stage(Protocol):
    """See the module. `forward` may be called several times before the backward calls, which name theirs by number."""

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, assignments: int, saved: Saved) -> Tensor:
        """Compute [R, d]. `assignments` bounds the (row, id) pairs that are kept."""

    def start_backward(self, call: int, grad: Tensor, saved: Saved) -> Callable[[], tuple[Tensor, Tensor]]:
        """Issue the backward of a forward call; what is returned gives the gradients of its rows and weights."""


class InnermostStage(Stage, Protocol):
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
