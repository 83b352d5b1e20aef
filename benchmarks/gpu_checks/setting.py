"""What a check or a measurement is given, and what it sees of torch and Triton while it runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from moe_triton.backends.triton import problem
from moe_triton_kernels.configs import choose_config
from moe_triton_kernels.launch import Config


class Skipped(Exception):
    """A check that does not apply here; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a check or a measurement runs on.

    device   where the kernels run
    tiny     sizes that Triton's interpreter gets through in seconds, and no bf16, which it computes wrongly
    seconds  what it may take
    seed     of the random inputs
    """

    device: torch.device
    tiny: bool = False
    seconds: float = 60.0
    seed: int = 0

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        few = (torch.float32, torch.float16)
        return few if self.tiny else (*few, torch.bfloat16)

    def need_gpu(self) -> None:
        if self.device.type != "cuda":
            raise Skipped("needs a GPU")


Check = Callable[[Setting], str]  # returns what it did, in a line; raises AssertionError where something is wrong


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is filled with NaN (integers: their largest value), so that nothing can lean on what nobody wrote.

    torch does this itself in its deterministic mode; operations that have no deterministic version only warn.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = filled


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the kernels that Triton specialises within: also where the binary comes from its cache on disk."""
    import triton

    names: list[str] = []
    before = triton.knobs.runtime.jit_post_compile_hook

    def note(*_: object, fn: Any, **__: object) -> None:
        names.append(fn.name)

    triton.knobs.runtime.jit_post_compile_hook = note
    try:
        yield names
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before


@contextmanager
def warp_specialized(schedule: str | None) -> Iterator[list[str]]:
    """Every kernel that has this schedule runs with it; the operations that did are listed as they are launched."""
    from moe_triton_kernels.gluon import d_hidden, down, up  # imports Gluon, which is experimental

    def choose(op: str, **sizes: Any) -> Config:
        return replace(choose_config(op, **sizes), gluon=schedule)

    launched: list[str] = []

    def noted(name: str, launch: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            launched.append(name)
            return launch(*arguments, **options)

        return run

    with (
        mock.patch.object(problem, "choose_config", choose),
        mock.patch.object(up, "up", noted("up", up.up)),
        mock.patch.object(down, "down", noted("down", down.down)),
        mock.patch.object(d_hidden, "d_hidden", noted("d_hidden", d_hidden.d_hidden)),
    ):
        yield launched
