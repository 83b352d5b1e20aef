"""An expert-parallel layer over the processes of one launch, under torch.profiler: its exchange, and what overlaps it.

    exchange   the time in which a collective of the layer is under way on a rank: gloo's or NCCL's, intervals merged
    exposed    the part of it in which the rank does nothing else: on a CPU it waits for a collective, on a GPU no other
               kernel runs
    overlap    1 - exposed / exchange

Waiting for a collective includes waiting for a rank that comes later: an uneven load shows as exposed exchange.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_triton.benchmarking.cases import Case
from moe_triton.benchmarking.profiling import PREFIX, WARM_UP, record, span
from moe_triton.distributed import ExpertParallel, make_groups
from moe_triton.distributed.exchange.channel import WAIT
from moe_triton.layers import MoE
from moe_triton.metrics import LoadMonitor

Interval = tuple[float, float]
STEP = "step"
RANGE, GPU_RANGE = "user_annotation", "gpu_user_annotation"  # the trace's categories of our ranges


@dataclass(frozen=True, kw_only=True)
class RankExchange:
    """One rank's seconds per step (forward and backward). waits: seconds by phase; tokens: this rank's.

    rows: those that come to this rank's experts in one step.
    """

    rank: int
    tokens: int
    step_s: float
    exchange_s: float
    exposed_s: float
    waits: dict[str, float]
    rows: int = 0

    @property
    def overlap(self) -> float:
        return 1 - self.exposed_s / self.exchange_s if self.exchange_s > 0 else 0.0


def merged(intervals: Sequence[Interval]) -> list[Interval]:
    """The union of intervals, as intervals that do not touch, in order."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def length(intervals: Sequence[Interval]) -> float:
    return sum(end - start for start, end in merged(intervals))


def common(left: Sequence[Interval], right: Sequence[Interval]) -> float:
    """The length of what lies in both unions: |A| + |B| - |A or B|."""
    return length(left) + length(right) - length([*left, *right])


def read_exchange(path: Path, device: torch.device, steps: int, rank: int, tokens: int) -> RankExchange:
    """One rank's trace -> its times."""
    events = [e for e in json.loads(path.read_text(encoding="utf-8"))["traceEvents"] if e.get("ph") == "X"]

    def intervals(category: str | None, wanted: Callable[[str], bool]) -> list[Interval]:
        """In seconds; category None: any."""
        return [
            (float(e["ts"]) / 1e6, (float(e["ts"]) + float(e["dur"])) / 1e6)
            for e in events
            if category in (None, e.get("cat")) and wanted(e["name"])
        ]

    waits: dict[str, float] = {}
    for event in events:
        if event["name"].startswith(WAIT) and event.get("cat") == RANGE:
            phase = event["name"].removeprefix(WAIT)
            waits[phase] = waits.get(phase, 0.0) + event["dur"] / 1e6 / steps
    on_gpu = device.type == "cuda"
    whole = intervals(GPU_RANGE if on_gpu else RANGE, lambda name: name == PREFIX + STEP)
    if on_gpu:
        collectives = intervals("kernel", lambda name: "nccl" in name.lower())
    else:
        collectives = intervals(None, lambda name: name.startswith("gloo:"))
    exchange = [(start, end) for start, end in collectives if any(a <= start < b for a, b in whole)]  # not the barriers
    if on_gpu:
        exposed = length(exchange) - common(exchange, intervals("kernel", lambda name: "nccl" not in name.lower()))
    else:
        exposed = common(exchange, intervals(RANGE, lambda name: name.startswith(WAIT)))
    return RankExchange(
        rank=rank, tokens=tokens, step_s=length(whole) / steps, exchange_s=length(exchange) / steps,
        exposed_s=exposed / steps, waits=waits,
    )  # fmt: skip


def profile_exchange(
    case: Case, device: torch.device, *, backend: str, mode: str, chunks: int, steps: int, seed: int, out: Path
) -> list[RankExchange]:
    """Forward and backward of the case's layer, its tokens and experts spread over all ranks; called on every rank.

    Every rank writes its trace to out/trace-rank-N.json. Returns all ranks' times, on every rank. mode and chunks: of
    `ExpertParallel`. Raises ValueError: experts or an exchange that do not fit the ranks.
    """
    groups = make_groups(ep=dist.get_world_size())
    torch.manual_seed(seed)
    layer = MoE(
        case.hidden, case.intermediate, case.experts, case.top_k, activation=case.activation, bias=case.bias,
        capacity_factor=1.25 if mode == "capacity" else None, backend=backend, device=device, dtype=case.torch_dtype,
        expert_parallel=ExpertParallel(groups, mode=mode, chunks=chunks),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed + 1 + groups.rank)
    tokens = case.tokens // groups.dp.size + (groups.dp.rank < case.tokens % groups.dp.size)
    x = torch.randn(tokens, case.hidden, generator=generator).to(device, case.torch_dtype).requires_grad_()
    grad = torch.randn(tokens, case.hidden, generator=generator).to(device, case.torch_dtype)

    def step() -> None:
        dist.barrier()  # the ranks begin together, so that a wait is for this step's work
        layer.zero_grad()
        x.grad = None
        with span(STEP):
            layer(x).output.backward(grad)

    for _ in range(WARM_UP):
        step()
    path = out / f"trace-rank-{groups.rank}.json"
    record(step, steps, device, path)
    with LoadMonitor(layer) as monitor:
        step()
    (statistics,) = monitor.read().values()
    rows = statistics.exchange.rows[0] if statistics.exchange is not None else 0
    mine = replace(read_exchange(path, device, steps, groups.rank, tokens), rows=rows)
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, mine)
    return everybody


def as_json(ranks: Sequence[RankExchange]) -> list[dict[str, Any]]:
    return [{**asdict(rank), "overlap": rank.overlap} for rank in ranks]
