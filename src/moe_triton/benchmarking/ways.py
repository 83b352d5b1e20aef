"""The ways to run a block: eager, compiled by torch.compile, or captured once and replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from moe_triton.benchmarking.cases import Workload
from moe_triton.benchmarking.correctness import Check, verify
from moe_triton.benchmarking.providers.block import Block, Unavailable
from moe_triton.benchmarking.timing import Call, Fresh

WAYS = ("eager", "compile", "graph")
LABELS = {"eager": "", "compile": ", compiled", "graph": ", CUDA graph"}
GRAPH_WARM_UP = 3  # calls on a side stream before a capture, as torch asks for


class Runnable:
    """A block in one way: its check, and its calls by mode."""

    def __init__(self, block: Block, workload: Workload) -> None:
        self.block, self.workload = block, workload
        self.hidden = workload.hidden.detach().clone().requires_grad_(block.is_trainable)

    def infer(self) -> Tensor:
        with torch.no_grad():
            return self.block.forward(self.workload.hidden)

    def gradients(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, [self.hidden, *self.block.leaves()], self.workload.grad_out)

    def train(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output, and gradients of the hidden states and parameters."""
        out = self.block.forward(self.hidden)
        return out.detach(), self.gradients(out)

    def check(self) -> Check:
        """Runs the block forward, and backward if it is trainable, and judges the outcome."""
        with torch.no_grad():
            chosen = self.block.choose(self.workload.hidden).long()
        out, grads = self.train() if self.block.is_trainable else (self.infer(), None)
        return verify(chosen, out, grads, self.block, self.workload)

    def call(self, mode: str) -> Call:
        """What is timed.

        forward: without autograd, as in inference. backward: the gradients of hidden states and parameters, the forward
        that they need being run anew outside the timed part. full: both.
        """
        if mode == "forward":
            return self.infer
        if mode == "full":
            return lambda: self.gradients(self.block.forward(self.hidden))

        def make() -> Callable[[], object]:
            out = self.block.forward(self.hidden)
            return lambda: self.gradients(out)

        return Fresh(make)


class Replayed(Runnable):
    """A block captured in three graphs: the forward of inference, and forward and backward of training."""

    def __init__(self, block: Block, workload: Workload) -> None:
        super().__init__(block, workload)
        device = workload.hidden.device
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(GRAPH_WARM_UP):
                super().infer()
                if block.is_trainable:
                    super().train()
        torch.cuda.current_stream(device).wait_stream(side)
        self.inference = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.inference):
            self.inferred = super().infer()
        if block.is_trainable:
            self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.forward):
                self.out = block.forward(self.hidden)
            with torch.cuda.graph(self.backward, pool=self.forward.pool()):
                self.grads = self.gradients(self.out)

    def infer(self) -> Tensor:
        return self.inferred

    def train(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        self.forward.replay()
        self.backward.replay()
        return self.out.detach(), self.grads

    def check(self) -> Check:
        """Replays the inference of a trainable block too, whose outcome is judged by its training."""
        self.inference.replay()
        return super().check()

    def call(self, mode: str) -> Call:
        if mode == "forward":
            return self.inference.replay
        if mode == "full":
            return self.train

        def make() -> Callable[[], object]:
            self.forward.replay()
            return self.backward.replay

        return Fresh(make)


def runnable(block: Block, workload: Workload, way: str) -> Runnable:
    """The block, ready to be checked and timed in a way of `WAYS`; Unavailable where the device has no such way."""
    if way == "eager":
        return Runnable(block, workload)
    if way == "compile":
        return Runnable(replace(block, forward=torch.compile(block.forward)), workload)
    if workload.hidden.device.type != "cuda":
        raise Unavailable("not measured", "CUDA graphs need a GPU")
    return Replayed(block, workload)
