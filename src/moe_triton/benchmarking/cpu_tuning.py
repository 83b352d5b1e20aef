"""Which of the CPU's policies is the fastest on this machine: what `moe-triton tune --cpu` measures and keeps."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import geometric_mean

import torch

from moe_triton.backends.torch import cpu, experts_cpu
from moe_triton.backends.torch.cpu import POLICIES, CpuPolicy, make_policy, policy_key, read_policies
from moe_triton.backends.torch.processor import this_processor
from moe_triton.benchmarking.cases import Case, make_workload
from moe_triton.benchmarking.report import write_json
from moe_triton.benchmarking.timing import make_timer, ratios, run_rounds
from moe_triton.dispatch import dispatch
from moe_triton.records import ExpertCall, Wanted
from moe_triton.routing import route
from moe_triton.runtime import plain_maths

CPU = torch.device("cpu")
# Many narrow experts, few wide ones, and few rows each: what the CPU suite of `moe-triton bench` has.
CASES = (
    Case(tokens=2048, hidden=512, intermediate=384, experts=64, top_k=8, dtype="float32"),
    Case(tokens=4096, hidden=512, intermediate=1024, experts=8, top_k=2, dtype="float32"),
    Case(tokens=64, hidden=512, intermediate=384, experts=64, top_k=8, dtype="float32"),
)
TIE = 1.02  # a policy that is faster by less than this does not take the place of the table's


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was found.

    policy  the one to use
    table   the one that the table names
    times   each policy's time over the table's, by case, in the order of CASES
    """

    policy: str
    table: str
    times: Mapping[str, list[float]]

    def ratio(self, policy: str) -> float:
        """The policy's time over the table's, over all cases."""
        return geometric_mean(self.times[policy])


def tune_cpu(budget_s: float, on_step: Callable[[str, float], None] = lambda what, share: None) -> Tuned:
    """Time the experts' forward and backward with every policy, in turns, and choose.

    on_step: called with what is measured and the share of it that is done.

    The same policy twice under two names, as where torch has no oneDNN, is measured once.
    """
    processor = this_processor()
    table = next(rule for rule in cpu.RULES if rule.fits(processor)).policy
    distinct: dict[str, CpuPolicy] = {}
    for name in (table, *POLICIES):
        policy = make_policy(name, processor)
        if policy not in distinct.values():
            distinct[name] = policy
    times: dict[str, list[float]] = {name: [] for name in distinct}
    for case in CASES:
        calls = {name: experts_step(case, policy) for name, policy in distinct.items()}
        on_round = partial(on_step, case.title())
        found = run_rounds(calls, make_timer(CPU), budget_s=budget_s / len(CASES), on_round=on_round)
        for name in distinct:
            over_table = ratios(found[name], found[table])
            assert over_table is not None
            times[name].append(over_table.p50)
    means = {name: geometric_mean(values) for name, values in times.items()}
    best = min(means, key=lambda name: means[name])
    return Tuned(policy=best if means[best] * TIE < 1 else table, table=table, times=times)


def experts_step(case: Case, policy: CpuPolicy) -> Callable[[], object]:
    """Return a call of the experts' forward and backward on random tokens."""
    work = make_workload(case, CPU)
    routing = route(work.hidden @ work.gate.T, case.top_k, backend="torch")
    call = ExpertCall(
        hidden=work.hidden,
        weights=routing.weights,
        dispatched=dispatch(routing.experts, case.experts, backend="torch"),
        parameters=work.parameters,
        spec=work.spec,
    )
    wanted = Wanted().of(call.parameters)
    forward = partial(experts_cpu.experts_forward, call, True, policy)

    def step() -> object:
        with plain_maths(call.hidden):
            out, preactivation = forward()
            return experts_cpu.experts_backward(call, out, preactivation, wanted, policy)

    return step


def keep(found: Tuned, path: Path, created: str) -> None:
    """Write the policy of this processor, threads and torch into the file, beside those of others.

    Raises ValueError, naming the file, where it is broken; OSError where it cannot be written.
    """
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() and read_policies(path) is not None else {}
    times = {name: [round(value, 3) for value in values] for name, values in found.times.items()}
    entry = {"policy": found.policy, "created": created, "time over the table's": times}
    write_json(path, {**kept, policy_key(this_processor()): entry})
