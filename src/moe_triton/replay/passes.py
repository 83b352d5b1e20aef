"""The forward passes of a model that backward may repeat, and which of them it repeats."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_triton.torch_internals import nodes_made, running_node


@dataclass(eq=False)
class Call:
    """A call of a router in a forward pass: autograd's count of nodes then, and the ids that a repetition is given."""

    since: int
    given: Tensor | None


@dataclass(eq=False)
class Pass:
    """The calls of the routers in one forward pass of the model. The graph of its output keeps it alive.

    start, end: autograd's count of nodes before and after the pass, in which there was autograd if `has_graph`.
    """

    start: int = 0
    end: float = math.inf
    has_graph: bool = True
    calls: dict[str, list[Call]] = field(default_factory=dict)


class Passes:
    """The passes whose graphs are alive, the one that is running, and the latest one."""

    def __init__(self) -> None:
        self.known: list[weakref.ref[Pass]] = []
        self.running: Pass | None = None
        self.latest: Pass | None = None  # kept also without a graph: a checkpoint may be around the whole model

    def begin(self) -> None:
        self.running = self.latest = Pass(nodes_made(), has_graph=torch.is_grad_enabled())

    def end(self, output: Any) -> None:
        """Let the graph of a pass's output keep what is known of the pass alive."""
        ended = self.running
        if ended is None:
            return
        ended.end = nodes_made()
        for tensor in _tensors(output):
            node: Any = tensor.grad_fn
            if node is not None:
                node.metadata[id(self)] = ended
        self.known = [ref for ref in self.known if ref() is not None] + [weakref.ref(ended)]
        self.running = None

    def add(self, router: str, call: Call, is_kept: bool) -> None:
        """Add a router's call to the pass that is running; with `is_kept`, also one without the model around it."""
        current = self.running or (self.latest if is_kept else None)
        if current is None:
            current = self.latest = Pass()
        current.calls.setdefault(router, []).append(call)

    def repeated(self, router: str) -> Call | None:
        """Return the call in a forward pass that backward repeats now, by when the node that backward runs was made.

        That was before the call where it is a reentrant checkpoint's own node, else after it. None where the pass is
        not known: it came before the first context.
        """
        number, is_reentrant = running_node()
        passes = {id(x): x for x in (*(ref() for ref in self.known), self.latest) if x is not None}
        found = max((x for x in passes.values() if x.start <= number), key=lambda x: x.start, default=None)
        if is_reentrant and (found is None or number >= found.end):  # the checkpoint is around the whole model
            found = self.latest
            if found is None or found.has_graph or found.start <= number:
                return None
        calls = [] if found is None else found.calls.get(router, [])
        if is_reentrant:
            return next((call for call in calls if call.since > number), None)
        return next((call for call in reversed(calls) if call.since <= number), None)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list, Mapping)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)
