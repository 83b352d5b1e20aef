"""Recognise experts that are MLPs for the fused path, by the operations of their forward, not by their names.

torch.fx traces the expert's forward. Recognised are down(act(up(x))), and down(act(gate(x)) * up(x)) with gate and up
as two Linears or as the halves of one. Identity, dropout with p = 0 and a tuple around the output are ignored.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from moe_triton.integrations.transformers import GATED, pointwise_name


@dataclass(frozen=True)
class MLP:
    """Dotted names of an expert's Linears, and one of our activations.

    `up` is one Linear, or two, gate and up, which make the two halves of a gated activation's input.
    """

    up: tuple[str, ...]
    down: str
    activation: str

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.up, self.down)


def recognise(expert: nn.Module) -> MLP | None:
    """Return the MLP that the expert's forward computes, in training and in eval, or None."""
    # the copy shares the tensors; side effects of the forward reach the copy only
    shared = {id(tensor): tensor for tensor in (*expert.parameters(), *expert.buffers())}
    trial = copy.deepcopy(expert, shared)
    in_training, in_eval = (_recognise_mode(trial.train(mode)) for mode in (True, False))
    return in_training if in_training == in_eval else None


def is_tampered(module: nn.Module) -> bool:
    """Return whether calling the module would do more than its class's forward: hooks, or a forward of its own."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def _recognise_mode(expert: nn.Module) -> MLP | None:
    try:
        graph = _Tracer().trace(expert)
    except Exception:  # a forward that cannot be traced, for any reason, is unknown
        return None
    modules = dict(expert.named_modules())
    if any(is_tampered(module) for module in modules.values()):
        return None
    mlp = _Matcher(graph, modules).match()
    if mlp is None:
        return None
    linears = [modules[name] for name in mlp.linears]
    used = [tensor for linear in linears for tensor in (linear.weight, linear.bias) if tensor is not None]
    distinct = {id(tensor) for tensor in used}
    # a tied parameter, or one outside the Linears, needs the expert's own forward
    return mlp if len(distinct) == len(used) and distinct == {id(p) for p in expert.parameters()} else None


class _Tracer(fx.Tracer):
    """Linears, activations and no-ops stay whole; everything else is traced through."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return super().is_leaf_module(m, module_qualified_name) or pointwise_name(m) is not None


class _Matcher:
    """Walk a traced forward from its output to its input, and remember the nodes on the way."""

    def __init__(self, graph: fx.Graph, modules: dict[str, Any]) -> None:
        self.modules = modules
        self.input, *unused = [node for node in graph.nodes if node.op == "placeholder"]
        self.output = next(node for node in graph.nodes if node.op == "output")
        # a node left over at the end (an operation in place, an assertion) prevents the match
        self.unseen = set(graph.nodes) - {self.output, *(node for node in unused if set(node.users) <= {self.output})}

    def match(self) -> MLP | None:
        returned = self.output.args[0]
        mlp = self._mlp(returned[0] if isinstance(returned, tuple) and returned else returned)
        return mlp if mlp is not None and not self.unseen else None

    def _mlp(self, node: Any) -> MLP | None:
        down, inner = self._linear(node)
        pointwise, body = self._pointwise(inner)
        if down is None:
            return None
        if pointwise is not None:
            up, x = self._linear(body)
            return MLP((up,), down, pointwise) if up is not None and self._is_input(x) else None
        node = self._step(inner)
        if node is None or node.target not in (operator.mul, torch.mul, "mul") or len(node.args) != 2:
            return None
        for left, right in (node.args, node.args[::-1]):
            pointwise, gate = self._pointwise(left)
            if pointwise in GATED:
                ups = self._halves(gate, right) or self._pair(gate, right)
                return None if ups is None else MLP(ups, down, GATED[pointwise])
        return None

    def _pair(self, gate: Any, up: Any) -> tuple[str, ...] | None:
        """Return two Linears of the input that are alike, or None."""
        names, inputs = zip(self._linear(gate), self._linear(up), strict=True)
        if None in names or not all(self._is_input(x) for x in inputs):
            return None
        one, other = (self.modules[name] for name in names)
        alike = one.weight.shape == other.weight.shape and (one.bias is None) == (other.bias is None)
        return names if alike else None

    def _halves(self, gate: Any, up: Any) -> tuple[str, ...] | None:
        """Return one Linear of the input, cut by chunk(2, dim=-1) with the gate first, or None."""
        gate, up = self._step(gate), self._step(up)
        if not all(node is not None and node.target is operator.getitem for node in (gate, up)):
            return None
        chunk = self._step(gate.args[0])
        if chunk is None or self._step(up.args[0]) is not chunk or (gate.args[1], up.args[1]) != (0, 1):
            return None
        options = (*chunk.args[1:], *(chunk.kwargs[name] for name in ("chunks", "dim") if name in chunk.kwargs))
        if chunk.target not in ("chunk", torch.chunk) or options != (2, -1):
            return None
        name, x = self._linear(chunk.args[0])
        return (name,) if name is not None and self._is_input(x) else None

    def _linear(self, node: Any) -> tuple[str | None, Any]:
        """Return (name of the Linear that makes the node, its input)."""
        node = self._step(node)
        if node is None or node.op != "call_module" or type(self.modules[str(node.target)]) is not nn.Linear:
            return None, None
        return str(node.target), node.args[0]

    def _pointwise(self, node: Any) -> tuple[str | None, Any]:
        """Return (our name of the activation that makes the node, its input)."""
        node = self._step(node)
        if node is None or not node.args:
            return None, None
        if node.op == "call_module":
            return pointwise_name(self.modules[node.target]), node.args[0]
        options = {name: value for name, value in node.kwargs.items() if name != "inplace"}
        if node.target is F.gelu and not node.args[1:]:
            return {"none": "gelu", "tanh": "gelu_tanh"}.get(options.get("approximate", "none")), node.args[0]
        return (None if options else FUNCTIONS.get(node.target)), node.args[0]

    def _is_input(self, node: Any) -> bool:
        return self._step(node) is self.input

    def _step(self, node: Any) -> fx.Node | None:
        """Return the first node at or behind `node` that does something."""
        while isinstance(node, fx.Node):
            self.unseen.discard(node)
            if not self._does_nothing(node):
                return node
            node = node.args[0]
        return None

    def _does_nothing(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            return type(module) is nn.Identity or (type(module) is nn.Dropout and module.p == 0)
        probability: Any = (*node.args[1:2], node.kwargs.get("p"))[0]
        return node.target is F.dropout and probability == 0


FUNCTIONS: dict[Any, str] = {F.silu: "silu", F.relu: "relu", torch.relu: "relu", "relu": "relu"}
