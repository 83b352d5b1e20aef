"""A callback for transformers' Trainer that logs how the experts are loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from moe_triton.metrics.monitor import LoadMonitor
from moe_triton.metrics.sinks import Sink


class LoadCallback(TrainerCallback):
    """Reads a `LoadMonitor` of the trained model at every log of the Trainer and after every evaluation.

        Trainer(..., callbacks=[LoadCallback(JsonlSink("load.jsonl"), WandbSink(wandb.run))])

    Training steps in between wait for nothing. Over ranks the counts are summed, and the first rank writes. `history`
    keeps (step, mode, reading) of every reading.

    Args:
        sinks: called with (reading, step, "train" or "eval"); see `moe_triton.metrics`.
    """

    def __init__(self, *sinks: Sink):
        self.sinks = sinks
        self.monitor: LoadMonitor | None = None
        self.history: list[tuple[int, str, dict[str, Any]]] = []

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        self._watch(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        self._watch(model)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs is not None and "loss" in logs:  # not those of an evaluation, nor the summary at the end
            self._write(state, "train")

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._write(state, "eval")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._write(state, "train")  # the steps since the last log

    def close(self) -> None:
        """Remove the monitor's hooks from the model."""
        if self.monitor is not None:
            self.monitor.close()
            self.monitor = None

    def _watch(self, model: nn.Module | None) -> None:
        if self.monitor is None and model is not None:
            self.monitor = LoadMonitor(model)

    def _write(self, state: Any, mode: str) -> None:
        if self.monitor is None:
            return
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        reading = self.monitor.read(mode=mode, group=torch.distributed.group.WORLD if distributed else None)
        if not reading:
            return
        self.history.append((state.global_step, mode, reading))
        if state.is_world_process_zero:
            for sink in self.sinks:
                sink(reading, state.global_step, mode)
