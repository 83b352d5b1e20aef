"""Faults of one rank out of three where waits only queue, as under NCCL: what the other ranks raise, and when."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_triton.distributed import ExpertParallel, ExpertParallelError
from tests.helpers import faults
from tests.helpers.faults import HIDDEN, Model, outcomes, step
from tests.helpers.queued import start_anew, waits_only_queue
from tests.helpers.ranks import Ranks

WORLD, VICTIM = 3, 1
MODES: dict[str, dict[str, Any]] = {"dropless": {}, "bounded": {"mode": "bounded", "max_tokens_per_rank": 6}}
DIFFERENCES = ("skips layer 0", "skips layer 1", "other top_k", "other chunks", "evaluates", "no backward")
FAILURES = ("is killed", "raises", "sleeps", "is stopped")
STAYS = ("sleeps", "is stopped")  # a process that has to be ended from outside


@dataclass(frozen=True, kw_only=True)
class Raised:
    """What a rank raised: the class of the error, its message, and how many seconds after the fault."""

    error: str
    message: str
    seconds: float


def differs(mode: str, fault: str, timeout_s: float, grace_s: float | None = 10.0) -> Raised:
    """Run in every rank: a good step, then the victim goes its own way; every rank raises.

    All of them report, so that a long grace costs no time; on a busy machine some report seconds after others.
    """
    with waits_only_queue(timeout_s, grace_s, ep=WORLD) as groups:
        parallel = ExpertParallel(groups, **MODES[mode])
        model = Model(parallel, top_k=2)
        step(model)
        names = [layer.experts.layer_name for layer in model.layers]
        start = time.monotonic()
        with pytest.raises(ExpertParallelError) as raised:
            _go_on(model, parallel, fault)
        seconds = time.monotonic() - start
        start_anew()
    message = str(raised.value)
    for i, name in enumerate(names):
        message = re.sub(rf"{name}\b", f"layer {i}", message)
    return Raised(error=raised.type.__name__, message=message, seconds=seconds)


def _go_on(model: Model, parallel: ExpertParallel, fault: str) -> None:
    """Three more steps, of which the victim does the first in its own way."""
    is_other = dist.get_rank() == VICTIM
    x = torch.randn(6, HIDDEN)
    if is_other and "skips layer" in fault:
        del model.layers[int(fault[-1])]
    if is_other and fault == "other top_k":
        for layer in model.layers:
            layer.router.spec = replace(layer.router.spec, top_k=3)
    if is_other and fault == "other chunks":
        parallel.chunks = 3
    if is_other and fault == "evaluates":
        with torch.no_grad():
            model(x)
    if fault == "no backward":
        loss = model(x)
        if not is_other:
            loss.backward()
    for _ in range(3):
        step(model)


def fails(mode: str, fault: str, timeout_s: float, grace_s: float | None = 2.5) -> list[Raised | None]:
    """Start ranks of their own: a good step, then the victim's fault in the middle of the second. By rank.

    None for a rank that raised nothing: it was killed, or has to be ended from outside.
    """
    found = outcomes(WORLD, _live, mode, fault, timeout_s, grace_s, without=VICTIM if fault in STAYS else None)
    raised: list[Raised | None] = []
    for outcome in found:
        parts = None if outcome is None else re.fullmatch(r"(\w+): (.*) \[(\d+\.\d+) s\]", outcome.error, re.DOTALL)
        raised.append(parts and Raised(error=parts[1], message=parts[2], seconds=float(parts[3])))
    return raised


def _live(rank: int, mode: str, fault: str, timeout_s: float, grace_s: float | None) -> None:
    start = None

    def listen(event: str) -> None:
        if start is None or rank != VICTIM or event != "row gradients 0":
            return
        if fault == "raises":
            raise MemoryError("no memory left")
        if fault == "sleeps":
            time.sleep(faults.DEADLINE)
        os.kill(os.getpid(), {"is killed": signal.SIGKILL, "is stopped": signal.SIGSTOP}[fault])

    with waits_only_queue(timeout_s, grace_s, ep=WORLD) as groups:
        model = Model(ExpertParallel(groups, listener=listen, **MODES[mode]))
        step(model)
        start = time.monotonic()
        try:
            while True:
                step(model)
        except (ExpertParallelError, MemoryError) as error:
            error.args = (f"{error} [{time.monotonic() - start:.3f} s]",)
            raise


def what_others_raise(ranks: Ranks, mode: str, fault: str, timeout_s: float) -> list[Raised]:
    """Return what the ranks without the fault raise, in rank order, with the patience that users have."""
    how = mode, fault, timeout_s, None
    found = ranks.run(differs, *how) if fault in DIFFERENCES else fails(*how)
    others = [raised for rank, raised in enumerate(found) if rank != VICTIM]
    assert None not in others, found
    return others


def rows(found: Mapping[tuple[str, str], list[Raised]], timeout_s: float) -> list[str]:
    """The table of the page: by fault and mode, what the other ranks raised and when the last of them did."""
    lines = ["| on one rank | mode | the others raise | after, s | time-out, s |", "|---|---|---|--:|--:|"]
    for (fault, mode), others in found.items():
        errors = " or ".join(f"`{error}`" for error in dict.fromkeys(raised.error for raised in others))
        latest = max(raised.seconds for raised in others)
        lines.append(f"| {WORDS.get(fault, fault)} | {mode} | {errors} | {latest:.1f} | {timeout_s:g} |")
    return lines


WORDS = {
    "other top_k": "has another K",
    "other chunks": "has other chunks",
    "evaluates": "evaluates before it trains on",
    "no backward": "makes no backward",
    "is killed": "its process is killed",
    "raises": "an exception in the layer",
    "sleeps": "is busy elsewhere",
    "is stopped": "its process is stopped",
}
CASES = [(fault, mode) for fault in (*DIFFERENCES, *FAILURES) for mode in MODES]
