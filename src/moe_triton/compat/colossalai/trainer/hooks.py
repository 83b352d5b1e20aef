"""Hooks around a trainer's steps: metrics, the learning rate, the log, checkpoints.

A hook's methods are called in the order of priority, lowest first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moe_triton.checks import check_int
from moe_triton.compat.colossalai.context.parallel_context import global_context
from moe_triton.compat.colossalai.context.parallel_mode import ParallelMode
from moe_triton.compat.colossalai.logging import DistributedLogger, get_dist_logger


class Training(Protocol):
    """The part of a `Trainer` that hooks use: its progress, the metrics to fill, and its checkpoint."""

    cur_epoch: int
    cur_step: int
    has_stepped: bool
    metrics: dict[str, dict[str, list[float]]]

    def save(self, folder: str | Path) -> None:
        """Save model, optimizer, metrics and place."""


class BaseHook:
    """Base class: every hook does nothing."""

    def __init__(self, priority: int = 10) -> None:
        self.priority = priority

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint of the trainer keeps of the hook."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""

    def after_hook_is_attached(self, trainer: Training) -> None: ...
    def before_train(self, trainer: Training) -> None: ...
    def after_train(self, trainer: Training) -> None: ...
    def before_train_epoch(self, trainer: Training) -> None: ...
    def after_train_epoch(self, trainer: Training) -> None: ...
    def before_train_iter(self, trainer: Training) -> None: ...
    def after_train_iter(self, trainer: Training, output: Any, label: Any, loss: Tensor) -> None: ...
    def before_test(self, trainer: Training) -> None: ...
    def after_test(self, trainer: Training) -> None: ...
    def before_test_epoch(self, trainer: Training) -> None: ...
    def after_test_epoch(self, trainer: Training) -> None: ...
    def before_test_iter(self, trainer: Training) -> None: ...
    def after_test_iter(self, trainer: Training, output: Any, label: Any, loss: Tensor) -> None: ...


class _MeanHook(BaseHook):
    """A mean over an epoch and over the data-parallel ranks, in trainer.metrics["train" or "test"][name]."""

    name = ""

    def __init__(self, priority: int = 0) -> None:
        super().__init__(priority)
        self.total = torch.zeros(2, dtype=torch.float64)  # the sum, and the number of its terms

    def _add(self, value: float, count: int) -> None:
        self.total += torch.tensor([value, count], dtype=torch.float64)

    def _finish(self, trainer: Training, phase: str) -> None:
        group, total = global_context.group(ParallelMode.DATA), self.total
        if group.size > 1:
            total = total.cuda() if torch.cuda.is_available() else total
            dist.all_reduce(total, group=group.handle)
        value, count = total.tolist()
        trainer.metrics[phase].setdefault(self.name, []).append(value / max(count, 1))
        self.total = torch.zeros(2, dtype=torch.float64)

    def after_test_iter(self, trainer: Training, output: Any, label: Any, loss: Tensor) -> None:
        self.after_train_iter(trainer, output, label, loss)

    def after_train_epoch(self, trainer: Training) -> None:
        self._finish(trainer, "train")

    def after_test_epoch(self, trainer: Training) -> None:
        self._finish(trainer, "test")


class LossHook(_MeanHook):
    """The mean loss, of the samples where labels are known."""

    name = "Loss"

    def after_train_iter(self, trainer: Training, output: Any, label: Any, loss: Tensor) -> None:
        size = 1 if label is None else len(label)
        self._add(size * float(loss), size)


class AccuracyHook(_MeanHook):
    """The share of right answers; `accuracy_func(output, label)` counts those of a batch, None by the largest logit."""

    name = "Accuracy"

    def __init__(self, accuracy_func: Callable[[Tensor, Tensor], Any] | None = None, priority: int = 0) -> None:
        super().__init__(priority)
        self.accuracy_func = accuracy_func or (lambda output, label: (output.argmax(-1) == label).sum())

    def after_train_iter(self, trainer: Training, output: Any, label: Any, loss: Tensor) -> None:
        self._add(float(self.accuracy_func(output, label)), len(label))


class LRSchedulerHook(BaseHook):
    """Steps a learning-rate scheduler after each epoch, or each optimizer step; rates in trainer.metrics["train"]."""

    def __init__(self, lr_scheduler: Any, by_epoch: bool, store_lr_in_state: bool = True, priority: int = 1) -> None:
        super().__init__(priority)
        self.lr_scheduler = lr_scheduler
        self.by_epoch = by_epoch
        self.store_lr_in_state = store_lr_in_state

    def state_dict(self) -> dict[str, Any]:
        return self.lr_scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lr_scheduler.load_state_dict(state)

    def after_train_iter(self, trainer: Training, output: Any, label: Any, loss: Tensor) -> None:
        if not self.by_epoch and trainer.has_stepped:
            self.lr_scheduler.step()

    def after_train_epoch(self, trainer: Training) -> None:
        if self.store_lr_in_state:
            trainer.metrics["train"].setdefault("LR", []).append(self.lr_scheduler.get_last_lr()[0])
        if self.by_epoch:
            self.lr_scheduler.step()


class ThroughputHook(BaseHook):
    """Samples per second of an epoch of training, over all ranks."""

    def before_train_epoch(self, trainer: Training) -> None:
        self.samples, self.start = 0, time.perf_counter()

    def after_train_iter(self, trainer: Training, output: Any, label: Any, loss: Tensor) -> None:
        self.samples += len(label)

    def after_train_epoch(self, trainer: Training) -> None:
        ranks = global_context.get_world_size(ParallelMode.DATA)
        rate = self.samples * ranks / (time.perf_counter() - self.start)
        trainer.metrics["train"].setdefault("Throughput", []).append(rate)


class LogMetricByEpochHook(BaseHook):
    """Logs the metrics of every `interval`-th epoch on rank 0."""

    def __init__(self, logger: DistributedLogger | None = None, interval: int = 1, priority: int = 20) -> None:
        super().__init__(priority)
        check_int("interval", interval, low=1)
        self.logger = get_dist_logger() if logger is None else logger
        self.interval = interval

    def _log(self, trainer: Training, phase: str) -> None:
        if trainer.cur_epoch % self.interval == 0:
            words = ", ".join(f"{name} {values[-1]:.4g}" for name, values in trainer.metrics[phase].items())
            self.logger.info(f"epoch {trainer.cur_epoch} {phase}: {words}", ranks=[0])

    def after_train_epoch(self, trainer: Training) -> None:
        self._log(trainer, "train")

    def after_test_epoch(self, trainer: Training) -> None:
        self._log(trainer, "test")


class SaveCheckpointHook(BaseHook):
    """Saves model, optimizer and epoch after every `interval`-th epoch, experts by their global ids."""

    def __init__(self, interval: int, checkpoint_dir: str | Path, priority: int = 30) -> None:
        super().__init__(priority)
        check_int("interval", interval, low=1)
        self.interval = interval
        self.checkpoint_dir = Path(checkpoint_dir)

    def after_train_epoch(self, trainer: Training) -> None:
        if trainer.cur_epoch % self.interval == 0:
            trainer.save(self.checkpoint_dir)
