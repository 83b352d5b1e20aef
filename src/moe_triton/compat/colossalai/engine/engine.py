"""Colossal-AI's engine: model, optimizer and criterion in one object, with what happens between backward and step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moe_triton.checks import check_int, check_number
from moe_triton.compat.colossalai.context.moe_context import MOE_CONTEXT
from moe_triton.compat.colossalai.context.parallel_context import global_context
from moe_triton.compat.colossalai.engine.gradient_handler import MoeGradientHandler
from moe_triton.distributed.gradients import clip_grad_norm_


class Engine:
    """Runs training steps: zero_grad, output = engine(x), loss = engine.criterion(output, y), backward(loss), step.

    Args:
        model, optimizer: the optimizer on the model's parameters.
        criterion: called with (output, label).
        gradient_handlers: run before each optimizer step, in order.
        clip_grad_norm: largest norm of all gradients together, of all ranks' experts; 0 does not clip.
        gradient_accumulation: calls of backward and step that make one optimizer step of the mean of their losses.

    Raises:
        ValueError, TypeError: an argument out of range, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        criterion: Any = None,
        gradient_handlers: Sequence[MoeGradientHandler] = (),
        clip_grad_norm: float = 0.0,
        gradient_accumulation: int = 1,
    ) -> None:
        check_number("clip_grad_norm", clip_grad_norm, low=0)
        check_int("gradient_accumulation", gradient_accumulation, low=1)
        if clip_grad_norm > 0 and global_context.tensor_parallel > 1:
            raise ValueError(
                f"clip_grad_norm: got {clip_grad_norm} with {global_context.tensor_parallel} tensor-parallel ranks, "
                "wanted 0: the norm over slices of dense parameters is not known"
            )
        self.model = model
        self.optimizer = optimizer
        self.criterion = criterion
        self.gradient_handlers = list(gradient_handlers)
        self._clip_grad_norm = float(clip_grad_norm)
        self._accumulation = gradient_accumulation
        self._accumulated = 0
        self.training = model.training

    def train(self) -> None:
        """Set training mode, of model and engine."""
        self.training = True
        self.model.train()

    def eval(self) -> None:
        """Set evaluation mode, of model and engine."""
        self.training = False
        self.model.eval()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's forward."""
        return self.model(*args, **kwargs)

    def zero_grad(self) -> None:
        """Forget the gradients, unless they are being accumulated."""
        if self._accumulated == 0:
            self.optimizer.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of a loss, which is the mean over this rank's batch."""
        (loss / self._accumulation if self._accumulation > 1 else loss).backward()

    def step(self) -> bool:
        """Reduce the gradients over ranks, clip them, and step; True when the optimizer stepped.

        While gradients are being accumulated only every `gradient_accumulation`-th call does.
        """
        self._accumulated += 1
        if self._accumulated < self._accumulation:
            return False
        self._accumulated = 0
        for handler in self.gradient_handlers:
            handler.handle_gradient()
        if self._clip_grad_norm > 0:
            clip_grad_norm_(self.model, self._clip_grad_norm, global_context.groups())
        self.optimizer.step()
        return True

    def execute_schedule(
        self, data_iter: Iterator[Any], return_loss: bool = True, return_output_label: bool = True
    ) -> tuple[Any, Any, Tensor | None]:
        """Take a batch (data, label), run it forward, and in training mode backward.

        Returns:
            (output, label, loss), without a graph; None for what was not asked for.
        """
        data, label = (to_device(part) for part in next(data_iter))
        with torch.set_grad_enabled(self.training):
            output = self(data)
            loss = self.criterion(output, label) if return_loss or self.training else None
        if self.training:
            assert loss is not None
            self.backward(loss)
        if loss is None:
            MOE_CONTEXT.reset_loss()
        loss = loss.detach() if loss is not None and return_loss else None
        if not return_output_label:
            return None, None, loss
        return output.detach() if isinstance(output, Tensor) else output, label, loss


def to_device(batch: Any) -> Any:
    """Move tensors, also in lists, tuples and dicts, to the GPU where there is one."""
    if isinstance(batch, Tensor):
        return batch.cuda(non_blocking=True) if torch.cuda.is_available() else batch
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(part) for part in batch)
    if isinstance(batch, dict):
        return {name: to_device(part) for name, part in batch.items()}
    return batch
