"""One case, measured: check every provider, time all of them and the limits together, and relate the times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, fields

import torch

from moe_triton.benchmarking.cases import Case, Workload, make_workload
from moe_triton.benchmarking.environment import now
from moe_triton.benchmarking.limits import Limit, limits
from moe_triton.benchmarking.memory import peak_bytes, saved_bytes
from moe_triton.benchmarking.providers import PROVIDERS
from moe_triton.benchmarking.providers.block import Block, Provider, Unavailable
from moe_triton.benchmarking.results import Row, Run, first_line
from moe_triton.benchmarking.timing import (
    FAR_SLOWER,
    MIN_ROUNDS,
    Timer,
    Times,
    make_timer,
    ratios,
    run_rounds,
    samples,
    spread,
)
from moe_triton.benchmarking.ways import LABELS, Runnable, runnable

OnStep = Callable[..., None]  # (what is being done, share of the case's present mode that is done, who runs: "")


@dataclass(kw_only=True)
class Prepared(Row):
    """A provider in one way, after its check; nothing to run when it cannot be measured or is wrong."""

    provider: Provider
    runnable: Runnable | None = None

    @property
    def block(self) -> Block | None:
        return None if self.runnable is None else self.runnable.block

    def row(self, mode: str) -> Row:
        """Its row in a run of the mode, without times yet."""
        row = Row(**{field.name: copy(getattr(self, field.name)) for field in fields(Row)})
        if self.block is not None and not self.block.is_trainable and mode != "forward":
            row.status, row.note = "not applicable", "inference only"
        return row


def prepare(name: str, workload: Workload, provider: Provider | None = None, way: str = "eager") -> Prepared:
    """Builds a provider (None: that of the name) and checks its result. A wrong or broken one is not timed."""
    provider = PROVIDERS[name] if provider is None else provider
    found = Prepared(
        name=name if way == "eager" else f"{name}+{way}", provider=provider, label=provider.label + LABELS[way],
        way=way, kind="ours" if provider.is_ours else "peer", note=provider.notes,
    )  # fmt: skip
    try:
        block = provider.build(workload)
        found.label = (block.label or provider.label) + LABELS[way]
        ready = runnable(block, workload, way)
        checked = ready.check()
        found.errors, found.worst, found.moved = checked.errors, checked.worst, checked.moved
        if block.is_trainable and way != "graph":  # a replay keeps its memory whatever happens
            found.saved_bytes = saved_bytes(ready.block, workload.hidden)
    except Unavailable as reason:
        found.status, found.note = reason.status, reason.reason
    except torch.OutOfMemoryError:
        found.status, found.note = "out of memory", "the GPU's memory does not hold it"
    except Exception as error:  # whatever a peer raises: it is shown, and the command fails
        # a peer that runs, but cannot be compiled or captured, is not broken
        found.status = "failed" if way == "eager" or provider.is_ours else "not measured"
        found.note = first_line(error)
    else:
        if checked.problem is None:
            found.runnable = ready
        else:
            found.status, found.note = "mismatch", checked.problem
    return found


def twin_of(own: Prepared, workload: Workload) -> Prepared:
    """The same provider, built once more under another name: what differs between the two is the measurement's."""
    return Prepared(
        name=f"{own.name} again", provider=own.provider, label=f"self-check: {own.label} again", way=own.way,
        kind="check", runnable=runnable(own.provider.build(workload), workload, own.way),
    )  # fmt: skip


def expert_counts(workload: Workload) -> list[int]:
    """How many tokens choose each expert, from the float64 logits."""
    logits = workload.hidden.double() @ workload.gate.double().T
    chosen = logits.topk(workload.case.top_k, dim=1).indices
    return torch.bincount(chosen.reshape(-1), minlength=workload.case.experts).tolist()


def measure_mode(
    workload: Workload,
    prepared: Sequence[Prepared],
    mode: str,
    *,
    timer: Timer,
    budget_s: float,
    on_step: OnStep | None = None,
) -> Run:
    """Times what was prepared, beside the limits, in one interleaved run."""
    case, device = workload.case, workload.hidden.device
    counts = expert_counts(workload)
    bounds = limits(workload, counts, mode)
    rows = [p.row(mode) for p in prepared]
    calls = {
        p.name: p.runnable.call(mode)
        for p, row in zip(prepared, rows, strict=True)
        if p.runnable is not None and row.status == "ok"
    }
    own = next((row.name for row in rows if row.kind == "ours" and row.name in calls), None)
    labels = {row.name: row.label for row in rows} | {bound.name: f"limit: {bound.name}" for bound in bounds}
    done = 0.0

    def on_round(share: float) -> None:
        nonlocal done
        done = share

    def on_call(name: str) -> None:
        if on_step is not None:
            on_step(f"{case.title()}, {mode}", done, labels[name])

    times = run_rounds(
        {**calls, **{bound.name: bound.call for bound in bounds}},
        timer,
        budget_s=budget_s,
        on_round=on_round,
        on_call=on_call,
        against=own,
    )
    for row in rows:
        if row.name in calls:
            row.times_s = times[row.name]
            if row.way != "graph":  # a graph holds its memory between replays
                row.peak_bytes = peak_bytes(calls[row.name], device)
    rows += [limit_row(bound, times[bound.name]) for bound in bounds]
    run = relate(case, mode, counts, rows)
    for row in rows:
        if row.times_s and samples(row.times_s) < MIN_ROUNDS:
            row.note = "; ".join(filter(None, (row.note, few_samples(row, run))))
    return run


def few_samples(row: Row, run: Run) -> str:
    """How many there are, and why; the table and the JSON have it as a note."""
    count = samples(row.times_s)
    slower = run.speedups.get(row.name)
    why = "" if slower is None or slower.p50 < FAR_SLOWER else f", for it takes {slower.p50:.0f} times as long as ours"
    return f"{count} sample{'s' * (count != 1)} only{why}"


def limit_row(bound: Limit, measured: Times) -> Row:
    scaled: Times = [None if t is None else t * bound.scale for t in measured]
    return Row(name=bound.name, label=f"limit: {bound.name}", kind="limit", note=bound.about, times_s=scaled)


def relate(case: Case, mode: str, counts: list[int], rows: list[Row]) -> Run:
    """Fills in percentiles, TFLOP/s, the ratio to each limit, our speed-up over everybody else, and the self-check."""
    flops = case.flops(mode)
    bounds = [row for row in rows if row.kind == "limit"]
    for row in rows:
        row.time_s = spread(row.times_s)
        if row.time_s is None:
            continue
        if row.name != "floor":  # it moves bytes and computes nothing
            row.tflops = flops / row.time_s.p50 / 1e12
        if row.kind != "limit":
            shares = {bound.name: ratios(bound.times_s, row.times_s) for bound in bounds}
            row.of = {name: share for name, share in shares.items() if share is not None}
    own = next((row for row in rows if row.kind == "ours" and row.time_s is not None), None)
    speedups, self_check = {}, None
    if own is not None:
        for row in rows:
            factor = ratios(row.times_s, own.times_s) if row.times_s else None
            if row.kind == "check":
                self_check = factor
            elif row.kind != "limit" and row is not own and factor is not None:
                speedups[row.name] = factor
    return Run(
        case=case, mode=mode, flops=flops, counts=counts, rows=rows, ours=None if own is None else own.name,
        speedups=speedups, self_check=self_check, measured=now(),
    )  # fmt: skip


def measure_case(
    case: Case,
    *,
    device: torch.device,
    modes: Sequence[str],
    names: Sequence[str],
    ways: Sequence[str] = ("eager",),
    budget_s: float,
    seed: int = 0,
    timer: Timer | None = None,
    on_step: OnStep | None = None,
) -> Iterator[Run]:
    """A case in every mode, one run after the other, all of it on one set of tensors.

    Args:
        names: of `PROVIDERS`, ours first.
        ways: of `ways.WAYS`; every provider is measured in each of them.
        budget_s: seconds of timing per mode; checks come on top.
        on_step: gets what is being done and the share of the mode that is done (checks come before it, at 0); while
            times are taken, also the label of who runs.
    """
    workload = make_workload(case, device, seed)
    if "compile" in ways:
        # the code of a provider is the same function for every shape: its earlier graphs would count as recompilations
        torch.compiler.reset()
    prepared = []
    for name, way in [(name, way) for way in ways for name in names]:
        if on_step is not None:
            on_step(f"{case.title()}: checking {PROVIDERS[name].label}{LABELS[way]}", 0.0)
        prepared.append(prepare(name, workload, way=way))
    own = next((p for p in prepared if p.kind == "ours" and p.runnable is not None), None)
    if own is not None:
        prepared.append(twin_of(own, workload))
    timer = make_timer(device) if timer is None else timer
    for mode in modes:
        yield measure_mode(workload, prepared, mode, timer=timer, budget_s=budget_s, on_step=on_step)
