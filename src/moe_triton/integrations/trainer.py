"""Callbacks for transformers' Trainer: how the experts are loaded, and gradients where they are spread over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from moe_triton.checks import check_number
from moe_triton.distributed.amp import GradScaler
from moe_triton.distributed.gradients import clip_grad_norm_, reduce_gradients
from moe_triton.distributed.groups import ParallelGroups
from moe_triton.distributed.parameters import expert_parameters
from moe_triton.metrics.monitor import LoadMonitor
from moe_triton.metrics.sinks import Sink
from moe_triton.torch_internals import ignore_in_ddp


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


class ExpertParallelCallback(TrainerCallback):
    """Makes Trainer train a model whose experts `moe_triton.swap(expert_parallel=)` has spread over ranks.

        arguments = TrainingArguments(..., max_grad_norm=0.0, save_strategy="no")
        Trainer(model, arguments, callbacks=[ExpertParallelCallback(max_grad_norm=1.0)], ...)

    Trainer puts DistributedDataParallel around the model: it then leaves the experts alone, and before each optimizer
    step their gradients are reduced here, and all are clipped by the norm of the whole model. Trainer itself must not
    clip, as every rank would by the norm of its own experts, nor save, as the first rank would save its own experts:
    use `moe_triton.export_safetensors`, or `moe_triton.distributed.save_checkpoint`, on every rank.

    Args:
        max_grad_norm: of all gradients together; None does not clip.
        groups: from `make_groups`; None takes those of the model's layers.

    Raises:
        ValueError, when Trainer is made: it would clip, save, or shard the model by FSDP or DeepSpeed; and when
        training begins: it scales fp16 losses by a scaler that knows this rank's experts only. Give it
        `trainer.accelerator.scaler = moe_triton.distributed.GradScaler("cuda")` before `trainer.train()`.
    """

    def __init__(self, max_grad_norm: float | None = 1.0, groups: ParallelGroups | None = None):
        if max_grad_norm is not None:
            check_number("max_grad_norm", max_grad_norm, above=0)
        self.max_grad_norm = max_grad_norm
        self.groups = groups
        self.grad_norm: torch.Tensor | None = None  # of the last step, before clipping

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        wanted = {"max_grad_norm": (args.max_grad_norm, 0.0), "save_strategy": (_name(args.save_strategy), "no")}
        for name, (got, value) in wanted.items():
            if got != value:
                raise ValueError(f"{name}: got {got!r} with experts over ranks, wanted {value!r}: see the callback")
        for name in ("fsdp", "deepspeed"):
            if getattr(args, name, None):
                raise ValueError(
                    f"{name}: got {getattr(args, name)!r}, wanted None: it takes all ranks' experts for copies"
                )
        if model is not None:
            experts = expert_parameters(model)
            ignore_in_ddp(model, [name for name, parameter in model.named_parameters() if parameter in experts])

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self._scaler(optimizer)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any = None, **_: Any
    ) -> None:
        reduce_gradients(model, self.groups, experts_only=args.world_size > 1)  # DDP has reduced the others
        if (scaler := self._scaler(optimizer)) is not None:
            scaler.unscale_(optimizer.optimizer)
        if self.max_grad_norm is not None:
            self.grad_norm = clip_grad_norm_(model, self.max_grad_norm, self.groups)

    def _scaler(self, optimizer: Any) -> GradScaler | None:
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None and not isinstance(scaler, GradScaler):
            raise ValueError(
                f"accelerator.scaler: got {type(scaler).__name__}, wanted moe_triton.distributed.GradScaler: this one "
                "skips a step on some ranks only"
            )
        return scaler


def _name(value: Any) -> str:
    return str(getattr(value, "value", value))
