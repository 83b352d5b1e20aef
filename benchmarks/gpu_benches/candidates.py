"""Other configurations of the kernels beside those that run: each checked against float64, then timed in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from moe_triton.benchmarking.cases import Case, make_workload
from moe_triton.benchmarking.kernel_search import OK, WRONG, Searched
from moe_triton.benchmarking.timing import Timer
from moe_triton.benchmarking.tuning import Problem, first_candidates
from moe_triton.kernel_stages import STAGES_OF, in_words
from moe_triton_kernels.launch import Config, target_of

Keep = Callable[[Config], bool]


def every(config: Config) -> bool:
    return True


def is_warp_specialized(config: Config) -> bool:
    return config.gluon is not None


def opened(case: Case, op: str, device: torch.device, timer: Timer, keep: Keep) -> tuple[Searched, list[Config]]:
    """An operation of the case, and its candidates that are wanted."""
    searched = Searched(make_workload(case, device), op, timer)
    problem = Problem(case=case, op=op, architecture=target_of(device).architecture)
    return searched, [config for config in first_candidates(problem, searched.incumbent) if keep(config)]


def measure_candidates(
    case: Case,
    device: torch.device,
    timer: Timer,
    *,
    budget_s: float,
    keep: Keep = every,
    ops: Sequence[str] = tuple(STAGES_OF),
) -> dict[str, Any]:
    """Of every operation the configuration that runs; of each candidate the outcome, and its time over that one's."""
    found: dict[str, Any] = {}
    wrong = []
    for op in ops:
        searched, configs = opened(case, op, device, timer, keep)
        running, tried = searched.incumbent, {}
        for config in configs:
            outcome = searched.try_out(config, running, budget_s / max(1, len(configs) * len(ops)))
            tried[in_words(config)] = asdict(outcome)
            if outcome.status == WRONG:
                wrong.append(f"{op} {in_words(config)}: {outcome.note}")
        found[op] = {"runs": in_words(running), "tried": tried}
    result = {"title": case.title(), "ops": found}
    return {**result, "status": "mismatch", "note": "; ".join(wrong)} if wrong else result


def prepare_candidates(case: Case, op: str, device: torch.device, timer: Timer, *, keep: Keep = every) -> str:
    """Compiles them: each runs once."""
    searched, configs = opened(case, op, device, timer, keep)
    outcomes = [searched.verify(config) for config in configs]
    good = sum(outcome.status == OK for outcome in outcomes)
    return f"{good} of {len(configs)} candidates of {op} run"
