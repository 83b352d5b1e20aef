"""`RoutingRecorder`: records the choices of a model's routers, and replays them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_triton.checks import INTEGERS, MASKS, check_tensor
from moe_triton.integrations.given_choices import GivenChoices
from moe_triton.integrations.transformers_routers import num_tokens_of
from moe_triton.reference import given_choices
from moe_triton.replay.passes import Call, Passes
from moe_triton.replay.routers import ChoosingLayer, choosing_layers, layer_index
from moe_triton.torch_internals import never_compiled, nodes_made, recomputing

IDS = (torch.uint8, torch.int16, *INTEGERS)


@dataclass(eq=False)
class _Replay:
    """What is being replayed, data [tokens, layers, K] and mask [tokens], and how far each router has come."""

    data: Tensor
    mask: Tensor | None
    done: dict[str, int] = field(default_factory=dict)


class RoutingRecorder:
    """Records the choices of a model's routers, and replays them.

        recorder = RoutingRecorder(rollout_model)
        with recorder.record():
            rollout_model.generate(...)
        data = recorder.data                           # [tokens, layers, K] int32

        recorder = RoutingRecorder(training_model)
        with recorder.replay(data, mask):
            loss = training_model(...).loss            # one forward pass or several, which take rows in turn
        loss.backward()                                # in the context or after it

    Args:
        model: has `moe_triton.Router`s, as in `moe_triton.MoE`, or is a transformers model whose experts have its
            interface, swapped or not. Give it the model that is called, after PEFT has changed it; it may be wrapped
            (FSDP, DistributedDataParallel) before or after.
        layers: maps the dotted name of a router to the global index of its layer, or to None to leave it out. None:
            the first number in the name, `layer_index`. A pipeline stage, or a model with two stacks of layers, needs
            one of its own.

    Under activation checkpointing of both kinds, a repeated forward makes the choices of the forward that it repeats,
    recorded or replayed, in any order of micro-batches. Checkpoints inside checkpoints, and a checkpoint around several
    calls of one router, cannot be distinguished. Over ranks, each rank records and replays the tokens that its routers
    see.

    The routers' `forward` is replaced from the first `record` or `replay` on, until `close`. Under torch.compile it is
    a break of the graph.

    Raises:
        ValueError: no router, one that is not known, or two with one index. TypeError: model is no Module.
    """

    def __init__(self, model: nn.Module, layers: Callable[[str], int | None] | None = None):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, wanted a Module")
        self.model = model
        self._layers = choosing_layers(model, layers or layer_index)
        self._undo: list[Callable[[], None]] = []
        self._recorded: dict[str, list[Tensor]] | None = None  # while recording
        self._replay: _Replay | None = None  # while replaying
        self._data: dict[str, list[Tensor]] = {}
        self._invalid: Tensor | None = None
        self._passes = Passes()

    @property
    def layers(self) -> dict[str, int]:
        """The routers' dotted names and their layers' global indices."""
        return {layer.name: layer.index for layer in self._layers}

    # Recording ----------------------------------------------------------------------------------------------------

    @contextmanager
    def record(self) -> Iterator[RoutingRecorder]:
        """Record every forward pass in this context, from an empty start. Nothing waits for the device."""
        if self._recorded is not None or self._replay is not None:
            raise RuntimeError("record: got a recorder that records or replays already, wanted one at a time")
        self._install()
        self._recorded = self._data = {layer.name: [] for layer in self._layers}
        try:
            yield self
        finally:
            self._recorded = None

    @property
    def data(self) -> Tensor:
        """The recorded choices, [tokens, layers, K] int32: the tokens of all forward passes, in their order.

        Layers are indexed as in the whole model; the rows of those without a recorded router are -1, as are the ids
        past a layer's own K and those of tokens that a token mask left out.

        Raises ValueError where nothing is recorded, or the layers have seen different numbers of tokens.
        """
        rows = [torch.cat(self._data[layer.name]) for layer in self._layers if self._data.get(layer.name)]
        seen = {layer.name: sum(map(len, self._data.get(layer.name, ()))) for layer in self._layers}
        if not rows:
            raise ValueError("data: got no forward pass inside record(), wanted at least one")
        if len(set(seen.values())) > 1:
            raise ValueError(f"data: got layers with different numbers of tokens, {seen}, wanted the same")
        shape = (len(rows[0]), self._num_layers(), max(ids.shape[1] for ids in rows))
        data = torch.full(shape, -1, dtype=torch.int32, device=rows[0].device)
        for layer, ids in zip(self._layers, rows, strict=True):
            data[:, layer.index, : ids.shape[1]] = ids
        return data

    def by_sequence(self, batch_size: int) -> Tensor:
        """Return `data` as [batch_size, positions, layers, K], for passes over [batch_size, some positions] each.

        So come a prompt and the tokens that `generate` adds one by one, without its last, which no router has seen.
        ValueError where a pass has another number of tokens than a multiple of batch_size.
        """
        data, parts = self.data, []
        for ids in data.split([len(ids) for ids in self._data[self._layers[0].name]]):
            if len(ids) % batch_size:
                raise ValueError(f"batch_size: got {batch_size}, wanted a divisor of a pass's {len(ids)} tokens")
            parts.append(ids.unflatten(0, (batch_size, -1)))
        return torch.cat(parts, 1)

    # Replaying ----------------------------------------------------------------------------------------------------

    @contextmanager
    def replay(self, data: Tensor, mask: Tensor | None = None) -> Iterator[RoutingRecorder]:
        """Give the routers the choices of `data`, [tokens, layers, K] integers, from its first row on.

        mask: [tokens], bool or integer; rows where it is 0 have no data: they are chosen from the logits. So is a row
        with an id out of range or twice: `invalid` counts them later. The forward passes in this context take as many
        rows as they have tokens each, in turn. `data` may be on another device and have more layers or columns than
        the model.

        Raises:
            ValueError, TypeError: data or mask of the wrong shape or dtype, too few layers or columns; in a forward
            pass, too few rows.
        """
        if self._recorded is not None or self._replay is not None:
            raise RuntimeError("replay: got a recorder that records or replays already, wanted one at a time")
        check_tensor("data", data, shape=("tokens", "layers", "K"), dtypes=IDS)
        num_layers = 1 + max(layer.index for layer in self._layers)
        top_k = max(layer.top_k for layer in self._layers)
        if data.shape[1] < num_layers or data.shape[2] < top_k:
            wanted = f"[tokens, at least {num_layers}, at least {top_k}]"
            raise ValueError(f"data: got shape {list(data.shape)}, wanted {wanted}")
        if mask is not None:
            check_tensor("mask", mask, shape=(data.shape[0],), dtypes=MASKS)
        self._install()
        # one copy here, not one of each layer's part
        device = next((parameter.device for parameter in self._layers[0].chooser.parameters()), data.device)
        self._replay = _Replay(data.to(device), None if mask is None else mask.to(device))
        try:
            yield self
        finally:
            self._replay = None

    @property
    def invalid(self) -> int:
        """How many rows that were to be replayed had an id out of range or twice, over all layers; waits."""
        return 0 if self._invalid is None else int(self._invalid)

    def close(self) -> None:
        """Give the routers their own `forward` back; forward passes that are not repeated yet are forgotten."""
        for undo in self._undo:
            undo()
        self._undo, self._passes = [], Passes()

    # The forward passes ---------------------------------------------------------------------------------------------

    def _install(self) -> None:
        if self._undo:
            return
        for layer in self._layers:
            chooser: Any = layer.chooser
            before = vars(chooser).get("forward")  # accelerate puts one there, too
            run = self._run_foreign if layer.foreign else self._run_own
            chooser.forward = partial(run, layer, chooser.forward)
            self._undo.append(partial(_restore, chooser, before))
        hooks = (
            self.model.register_forward_pre_hook(self._begin_pass),
            self.model.register_forward_hook(self._end_pass),
        )
        self._undo += [hook.remove for hook in hooks]

    @never_compiled
    def _begin_pass(self, *_: Any) -> None:
        if not recomputing():
            self._passes.begin()

    @never_compiled
    def _end_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        if not recomputing():
            self._passes.end(output)

    @never_compiled
    def _run_own(self, layer: ChoosingLayer, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call, is_first = self._enter(layer, *num_tokens_of(args, kwargs))
        if call is not None and call.given is not None:
            kwargs["experts"] = call.given
        routing = forward(*args, **kwargs)
        if is_first:
            self._leave(layer, call, routing.experts)
        return routing

    @never_compiled
    def _run_foreign(self, layer: ChoosingLayer, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call, is_first = self._enter(layer, *num_tokens_of(args, kwargs))
        given = None if call is None else call.given
        if given is None and self._recorded is None:
            return forward(*args, **kwargs)
        assert layer.foreign is not None
        with GivenChoices(layer.foreign, given) as mode:
            output = forward(*args, **kwargs)
        if mode.chosen is None or mode.chosen.shape[-1] != layer.top_k:
            raise RuntimeError(
                f"{layer.name}: got {type(layer.chooser).__name__}, which chooses in a way that moe_triton does not "
                f"know, wanted a top-{layer.top_k} of {layer.num_classes}"
            )
        if is_first:
            self._leave(layer, call, mode.chosen)
        return output

    def _enter(self, layer: ChoosingLayer, num_tokens: int, device: torch.device) -> tuple[Call | None, bool]:
        """(the call that this is or repeats, whether it is one itself)."""
        if recomputing():
            return self._passes.repeated(layer.name), False
        given = None if self._replay is None else self._next_rows(layer, self._replay, num_tokens, device)
        call = Call(nodes_made(), given)
        self._passes.add(layer.name, call, is_kept=given is not None or self._recorded is not None)
        return call, True

    @torch.inference_mode(False)  # a rollout's choices are used in training
    @torch.no_grad()
    def _leave(self, layer: ChoosingLayer, call: Call | None, chosen: Tensor) -> None:
        """Keep what was chosen in a recorded or replayed pass, for its repetition too: also in rows without data."""
        if call is None or (call.given is None and self._recorded is None):
            return
        call.given = chosen.detach().to(torch.int32, copy=True)
        if self._recorded is not None:
            self._recorded[layer.name].append(call.given)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _next_rows(self, layer: ChoosingLayer, replay: _Replay, num_tokens: int, device: torch.device) -> Tensor:
        """The router's next rows of the data, [T, K] int32; -1 in those that are chosen from the logits."""
        start = replay.done.get(layer.name, 0)
        end = replay.done[layer.name] = start + num_tokens
        if end > len(replay.data):
            raise ValueError(f"data: got {len(replay.data)} tokens, wanted at least {end} for {layer.name}")
        ids = replay.data[start:end, layer.index, : layer.top_k].to(device).int()
        is_valid = (given_choices(ids, layer.num_classes) >= 0).all(-1)
        has_data = (ids >= 0).any(-1)
        if replay.mask is not None:
            has_data &= replay.mask[start:end].to(device).bool()
        num_invalid = (has_data & ~is_valid).sum()
        self._invalid = num_invalid if self._invalid is None else self._invalid.to(device) + num_invalid
        return ids.masked_fill(~(is_valid & has_data)[:, None], -1)

    def _num_layers(self) -> int:
        config: Any = getattr(self.model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        of_model = getattr(text, "num_hidden_layers", 0)
        return max(of_model, 1 + max(layer.index for layer in self._layers))


def _restore(module: Any, forward: Any) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward
