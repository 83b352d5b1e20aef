"""One step of an MoE layer, as a call that can be timed by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A step on the very tensors that the step before it made.

    name         "gate", "route", "dispatch", "up", "down", "combine", ..., or "experts" where they run as one
    is_backward  of which pass
    kernel       what runs: a kernel, or a function
    config       its configuration in words; "" where it has none
    floors       the names in `moe_triton_kernels.tools.floors.FLOORS` whose work it does
    decoded      its projections are numbers, which a stage before it made of the case's codes
    call         does the step once; None where it cannot be timed apart, which `note` explains
    """

    name: str
    is_backward: bool = False
    kernel: str = ""
    config: str = ""
    floors: tuple[str, ...] = ()
    decoded: bool = False
    call: Callable[[], object] | None = None
    note: str = ""
