"""One case, measured: check every provider, time all of them and the limits together, and relate the times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from moe_triton.benchmarking.cases import Case, Workload, make_workload
from moe_triton.benchmarking.correctness import Check, check
from moe_triton.benchmarking.limits import Limit, limits
from moe_triton.benchmarking.memory import peak_bytes, saved_bytes
from moe_triton.benchmarking.providers import PROVIDERS, Block, Provider, Unavailable
from moe_triton.benchmarking.timing import Call, Spread, Timer, Times, make_timer, ratios, run_rounds, spread

FAULTS = ("mismatch", "failed")  # these make the command fail
OnStep = Callable[[str, float], None]  # (what is being done, share of it that is done)


@dataclass(kw_only=True)
class Row:
    """What is known of one provider or limit.

    kind      "ours", "peer" or "limit"
    status    "ok"; else it has no times: "mismatch" or "failed" (faults), "not installed", "not applicable",
              "not measured", "too old" or "out of memory"; `note` says more
    errors    relative RMS error per tensor against float64; worst: of the worst row or expert
    moved     share of the router's choices that are not the reference's own (near-ties)
    times_s   seconds per call in each round, None in a round that was left out
    of        limit name -> limit time / this time, over the rounds
    """

    name: str
    label: str
    kind: str
    status: str = "ok"
    note: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)
    moved: float | None = None
    times_s: Times = field(default_factory=list)
    time_s: Spread | None = None
    tflops: float | None = None
    of: dict[str, Spread] = field(default_factory=dict)
    saved_bytes: int | None = None
    peak_bytes: int | None = None


@dataclass(kw_only=True)
class Run:
    """One case in one mode. speedups: provider name -> its time / our time over the rounds."""

    case: Case
    mode: str
    flops: int
    counts: list[int]
    rows: list[Row]
    ours: str | None
    speedups: dict[str, Spread]

    @property
    def faults(self) -> list[Row]:
        return [row for row in self.rows if row.status in FAULTS]

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)


@dataclass(kw_only=True)
class Prepared:
    """A provider after its check; no block when it cannot be measured or is wrong."""

    name: str
    provider: Provider
    label: str
    status: str = "ok"
    note: str = ""
    block: Block | None = None
    check: Check | None = None
    saved: int | None = None

    def row(self) -> Row:
        checked = self.check
        return Row(
            name=self.name,
            label=self.label,
            kind="ours" if self.provider.is_ours else "peer",
            status=self.status,
            note=self.note,
            errors=dict(checked.errors) if checked else {},
            worst=dict(checked.worst) if checked else {},
            moved=checked.moved if checked else None,
            saved_bytes=self.saved,
        )


def prepare(name: str, workload: Workload, provider: Provider | None = None) -> Prepared:
    """Builds a provider (None: that of the name) and checks its result. A wrong or broken one is not timed."""
    provider = PROVIDERS[name] if provider is None else provider
    found = Prepared(name=name, provider=provider, label=provider.label, note=provider.notes)
    try:
        block = provider.build(workload)
        found.label = block.label or provider.label
        found.check = check(block, workload)
        found.saved = saved_bytes(block, workload.hidden)
    except Unavailable as reason:
        found.status, found.note = reason.status, reason.reason
    except torch.OutOfMemoryError:
        found.status, found.note = "out of memory", "the GPU's memory does not hold it"
    except Exception as error:  # whatever a peer raises: it is shown, and the command fails
        found.status, found.note = "failed", f"{type(error).__name__}: {error}"
    else:
        found.block = block
        if found.check.problem is not None:
            found.status, found.note, found.block = "mismatch", found.check.problem, None
    return found


def block_call(block: Block, workload: Workload, mode: str) -> Call:
    """forward: without autograd, as in inference. full: forward, then the gradients of hidden states and parameters."""
    if mode == "forward":
        hidden = workload.hidden

        def forward() -> object:
            with torch.no_grad():
                return block.forward(hidden)

        return forward
    trained = workload.hidden.detach().clone().requires_grad_()
    wanted = [trained, *block.leaves()]

    def full() -> object:
        return torch.autograd.grad(block.forward(trained), wanted, workload.grad_out)

    return full


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
    calls = {p.name: block_call(p.block, workload, mode) for p in prepared if p.block is not None}
    label = f"{case.title()}, {mode}"
    times = run_rounds(
        {**calls, **{bound.name: bound.call for bound in bounds}},
        timer,
        budget_s=budget_s,
        on_round=None if on_step is None else lambda share: on_step(label, share),
    )
    rows = [p.row() for p in prepared]
    for row in rows:
        if row.name in calls:
            row.times_s = times[row.name]
            row.peak_bytes = peak_bytes(calls[row.name], device)
    rows += [limit_row(bound, times[bound.name]) for bound in bounds]
    return relate(case, mode, counts, rows)


def limit_row(bound: Limit, measured: Times) -> Row:
    scaled: Times = [None if t is None else t * bound.scale for t in measured]
    return Row(name=bound.name, label=f"limit: {bound.name}", kind="limit", note=bound.about, times_s=scaled)


def relate(case: Case, mode: str, counts: list[int], rows: list[Row]) -> Run:
    """Fills in percentiles, TFLOP/s, the ratio to each limit and our speed-up over everybody else."""
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
    speedups = {}
    if own is not None:
        for row in rows:
            factor = ratios(row.times_s, own.times_s) if row.times_s else None
            if row.kind != "limit" and row is not own and factor is not None:
                speedups[row.name] = factor
    return Run(
        case=case,
        mode=mode,
        flops=flops,
        counts=counts,
        rows=rows,
        ours=None if own is None else own.name,
        speedups=speedups,
    )


def measure_case(
    case: Case,
    *,
    device: torch.device,
    modes: Sequence[str],
    names: Sequence[str],
    budget_s: float,
    seed: int = 0,
    timer: Timer | None = None,
    on_step: OnStep | None = None,
) -> list[Run]:
    """A case in every mode, all of it on one set of tensors.

    Args:
        names: of `PROVIDERS`, ours first.
        budget_s: seconds of timing per mode; checks come on top.
        on_step: told what is being done, and the share of it that is done.
    """
    workload = make_workload(case, device, seed)
    prepared = []
    for index, name in enumerate(names):
        if on_step is not None:
            on_step(f"{case.title()}: checking {PROVIDERS[name].label}", index / len(names))
        prepared.append(prepare(name, workload))
    timer = make_timer(device) if timer is None else timer
    return [measure_mode(workload, prepared, mode, timer=timer, budget_s=budget_s, on_step=on_step) for mode in modes]
