"""Colossal-AI's trainer: epochs over a data loader, with hooks, a progress bar, evaluation and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from moe_triton.checks import check_int
from moe_triton.compat.colossalai.context.parallel_context import global_context
from moe_triton.compat.colossalai.engine import Engine
from moe_triton.compat.colossalai.engine.engine import to_device
from moe_triton.compat.colossalai.trainer.hooks import BaseHook
from moe_triton.distributed import load_checkpoint, save_checkpoint


class Trainer:
    """Trains and evaluates an engine's model.

    cur_epoch, cur_step  finished epochs and batches
    metrics              {"train": {name: a value per epoch}, "test": ...}, filled by hooks
    has_stepped          whether the optimizer stepped in the batch just done

    Args:
        engine: from `initialize`.
        schedule, timer: accepted as upstream's, and not used; must be None.
        logger: accepted; hooks that log have their own.
    """

    def __init__(self, engine: Engine, schedule: Any = None, timer: Any = None, logger: Any = None) -> None:
        if not isinstance(engine, Engine):
            raise TypeError(f"engine: got {type(engine).__name__}, wanted the Engine that initialize returns")
        if schedule is not None:
            raise ValueError(f"schedule: got {schedule!r}, wanted None: there is no pipeline here")
        self.engine = engine
        self.timer, self.logger = timer, logger
        self.cur_epoch = 0
        self.cur_step = 0
        self.has_stepped = False
        self.metrics: dict[str, dict[str, list[float]]] = {"train": {}, "test": {}}
        self.hooks: list[BaseHook] = []
        self._hook_states: dict[str, dict[str, Any]] = {}

    def fit(
        self,
        train_dataloader: Any,
        epochs: int,
        max_steps: int | None = None,
        test_dataloader: Any = None,
        test_interval: int = 1,
        hooks: Sequence[BaseHook] | None = None,
        display_progress: bool = False,
        return_output_label: bool = True,
    ) -> None:
        """Train until `epochs` epochs are finished in all, those of a loaded checkpoint included.

        Args:
            train_dataloader: gives (data, label) batches of this rank; `set_epoch` of its sampler is called.
            epochs: in all.
            max_steps: stop after this number of batches in all.
            test_dataloader: evaluated after every `test_interval`-th epoch.
            hooks: see `trainer.hooks`.
            display_progress: a progress bar per epoch, on rank 0 and a terminal.
            return_output_label: must be True where a hook looks at outputs or labels.
        """
        check_int("epochs", epochs, low=0)
        check_int("test_interval", test_interval, low=1)
        self._attach(hooks)
        self._call("before_train")
        while self.cur_epoch < epochs and not self._is_over(max_steps):
            self._train_epoch(train_dataloader, epochs, max_steps, display_progress, return_output_label)
            if test_dataloader is not None and self.cur_epoch % test_interval == 0:
                self._test_epoch(test_dataloader, display_progress, return_output_label)
        self._call("after_train")

    def evaluate(
        self,
        test_dataloader: Any,
        hooks: Sequence[BaseHook] | None = None,
        display_progress: bool = False,
        return_output_label: bool = True,
    ) -> None:
        """Run the model over a data loader in eval mode; the hooks' metrics are in `metrics["test"]`."""
        self._attach(hooks)
        self._test_epoch(test_dataloader, display_progress, return_output_label)

    def predict(self, data: Any) -> Any:
        """Return the model's output in eval mode."""
        self.engine.eval()
        with torch.no_grad():
            return self.engine(to_device(data))

    def save(self, folder: str | Path) -> None:
        """Save model, optimizer, metrics and place; every rank calls it. Loads on any number of ranks.

        Raises NotImplementedError with tensor parallelism, whose slices of dense parameters checkpoints do not know.
        """
        _check_whole("save")
        states = {type(hook).__name__: state for hook in self.hooks if (state := hook.state_dict())}
        extra = {"epoch": self.cur_epoch, "step": self.cur_step, "metrics": self.metrics, "hooks": states}
        save_checkpoint(folder, self.engine.model, self.engine.optimizer, extra=extra)

    def load(self, folder: str | Path) -> None:
        """Go on from what `save` wrote, on any number of ranks; the hooks' states wait for the next `fit`.

        Make learning-rate schedulers before: they set the optimizer's rate when they are made.

        Raises NotImplementedError with tensor parallelism.
        """
        _check_whole("load")
        extra = load_checkpoint(folder, self.engine.model, self.engine.optimizer)
        self.cur_epoch, self.cur_step, self.metrics = extra["epoch"], extra["step"], extra["metrics"]
        self._hook_states = extra["hooks"]

    def _train_epoch(
        self, loader: Any, epochs: int, max_steps: int | None, display_progress: bool, return_output_label: bool
    ) -> None:
        self.engine.train()
        set_epoch = getattr(getattr(loader, "sampler", None), "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self.cur_epoch)
        self._call("before_train_epoch")
        batches = iter(loader)
        with self._bar(f"epoch {self.cur_epoch + 1}/{epochs}", len(loader), display_progress) as advance:
            for _ in range(len(loader)):
                if self._is_over(max_steps):
                    break
                self._call("before_train_iter")
                self.engine.zero_grad()
                output, label, loss = self.engine.execute_schedule(batches, True, return_output_label)
                self.has_stepped = self.engine.step()
                self.cur_step += 1
                self._call("after_train_iter", output, label, loss)
                advance(loss)
        self.cur_epoch += 1
        self._call("after_train_epoch")

    def _test_epoch(self, loader: Any, display_progress: bool, return_output_label: bool) -> None:
        self.engine.eval()
        self._call("before_test")
        self._call("before_test_epoch")
        batches = iter(loader)
        with self._bar("test", len(loader), display_progress) as advance:
            for _ in range(len(loader)):
                self._call("before_test_iter")
                output, label, loss = self.engine.execute_schedule(batches, True, return_output_label)
                self._call("after_test_iter", output, label, loss)
                advance(loss)
        self._call("after_test_epoch")
        self._call("after_test")

    def _is_over(self, max_steps: int | None) -> bool:
        return max_steps is not None and self.cur_step >= max_steps

    def _attach(self, hooks: Sequence[BaseHook] | None) -> None:
        hooks = () if hooks is None else hooks
        for hook in hooks:
            if not isinstance(hook, BaseHook):
                raise TypeError(f"hooks: got {type(hook).__name__}, wanted instances of BaseHook")
        self.hooks = sorted(hooks, key=lambda hook: hook.priority)
        for hook in self.hooks:
            if state := self._hook_states.pop(type(hook).__name__, None):
                hook.load_state_dict(state)
        self._call("after_hook_is_attached")

    def _call(self, moment: str, *args: Any) -> None:
        for hook in self.hooks:
            getattr(hook, moment)(self, *args)

    @contextmanager
    def _bar(self, title: str, total: int, wanted: bool) -> Iterator[Any]:
        """Advance a progress bar by a batch and show its loss; do nothing off rank 0 and off a terminal."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]}"),
            TimeRemainingColumn(),
        )
        shown = wanted and global_context.get_global_rank() == 0 and Console().is_terminal
        progress = Progress(*columns, transient=True, disable=not shown)
        task = progress.add_task(title, total=total, words="")

        def advance(loss: Tensor | None) -> None:
            if shown:
                progress.update(task, advance=1, words="" if loss is None else f"loss {float(loss):.4f}")

        with progress:
            yield advance


def _check_whole(what: str) -> None:
    """Refuse tensor parallelism: one rank's slice of a dense parameter would be saved as the whole."""
    size = global_context.tensor_parallel
    if size > 1:
        raise NotImplementedError(f"Trainer.{what}: got {size} tensor-parallel ranks, wanted 1")
