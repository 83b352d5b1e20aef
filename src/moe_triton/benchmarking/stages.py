"""Our layer taken apart: the time of every stage beside its floor, on the tensors that the stage before it made.

A stage's floor is the least time that its FLOPs and bytes need (`moe_triton_kernels.tools.floors`) at the speed of a
dense product and at the bandwidth that are measured in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_triton import reference, runtime
from moe_triton.autograd.gate import NARROW
from moe_triton.benchmarking import stages_torch
from moe_triton.benchmarking.cases import Case, Workload
from moe_triton.benchmarking.environment import now
from moe_triton.benchmarking.limits import bandwidth_buffer, dense, dense_of_codes, multiplies_codes
from moe_triton.benchmarking.providers import PROVIDERS
from moe_triton.benchmarking.report import three_digits
from moe_triton.benchmarking.results import spread_from, spreads_from
from moe_triton.benchmarking.stage import Stage
from moe_triton.benchmarking.timing import Call, Fresh, Spread, Timer, Times, run_rounds, spread
from moe_triton.benchmarking.ways import Runnable
from moe_triton.records import Dispatch, ExpertCall, GateWanted, RouterSpec
from moe_triton_kernels.tools.floors import FLOORS, FP8_FLOORS, Work

DENSE_OF_CODES = "a dense product of e4m3 codes"
DENSE, BANDWIDTH = "a dense product", "a sum over a large buffer"
LAYER = ("layer forward", "layer backward")  # of a training step: besides its stages, autograd, checks, allocation
PASSES = {False: LAYER[0], True: LAYER[1]}


@dataclass(kw_only=True)
class StageRow:
    """One stage. share: of the summed stages of its pass; of_floor: floor time / its time, over the rounds."""

    name: str
    is_backward: bool
    kernel: str = ""
    config: str = ""
    flops: int | None = None
    bytes: int | None = None
    time_s: Spread | None = None
    share: float | None = None
    floor_s: float | None = None
    of_floor: Spread | None = None
    note: str = ""

    @property
    def full_name(self) -> str:
        return f"{self.name} (backward)" if self.is_backward else self.name

    def fill(
        self, parts: Sequence[Work], times: Sequence[float | None], flops_per_s: float, bytes_per_s: float
    ) -> None:
        """Its work, its times in seconds (one per round or step), and the floor at these speeds."""
        self.flops, self.bytes = sum(part.flops for part in parts), sum(part.bytes for part in parts)
        self.floor_s = sum(max(part.flops / flops_per_s, part.bytes / bytes_per_s) for part in parts)
        self.time_s = spread(times)
        self.of_floor = spread([None if time is None else self.floor_s / time for time in times])


def stage_row(stage: Stage) -> StageRow:
    """A stage's line, without times yet."""
    return StageRow(
        name=stage.name, is_backward=stage.is_backward, kernel=stage.kernel, config=stage.config, note=stage.note
    )


@dataclass(kw_only=True)
class StageTable:
    """The stages of one case. flops_per_s, bytes_per_s: measured beside them; layer_s: whole passes of the layer.

    codes_flops_per_s: of products of e4m3 codes, where the case has them and the device multiplies them.
    """

    case: Case
    backend: str
    stages: list[StageRow]
    flops_per_s: float
    bytes_per_s: float
    layer_s: dict[str, Spread]
    codes_flops_per_s: float | None = None
    measured: str = ""
    key: str = ""

    @property
    def title(self) -> str:
        rates = f"{three_digits(self.flops_per_s / 1e12)} TFLOP/s dense, {three_digits(self.bytes_per_s / 1e9)} GB/s"
        if self.codes_flops_per_s is not None:
            rates += f", {three_digits(self.codes_flops_per_s / 1e12)} TFLOP/s dense of e4m3 codes"
        elif self.case.fp8:
            rates += "; this device has no dense product of e4m3 codes: floors are those of products in the dtype"
        return f"{self.case.title()}, backend {self.backend} ({rates})"

    @property
    def furthest(self) -> StageRow | None:
        """The stage that spends the most time above its floor."""
        known = [s for s in self.stages if s.time_s is not None and s.floor_s is not None]
        return max(known, key=lambda s: s.time_s.p50 - s.floor_s if s.time_s and s.floor_s else 0.0, default=None)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A workload's layer, opened: its stages in order, the dispatch that they share, and the backend that runs them."""

    backend: str
    stages: list[Stage]
    dispatched: Dispatch

    @property
    def calls(self) -> dict[str, Call]:
        """Those that can be timed, by their full names."""
        return {stage_row(stage).full_name: stage.call for stage in self.stages if stage.call is not None}


def open_layer(workload: Workload, backend: str = "auto") -> Opened:
    """Run the layer once, keeping what every stage needs."""
    case, x = workload.case, workload.hidden
    name = runtime.choose(backend, x.device, case.torch_dtype).name
    if name == "reference":
        raise ValueError("backend: got 'reference', wanted auto, torch or triton: the reference has no stages")
    gating, routing = runtime.gate_backend(name), runtime.routing_backend(name)
    dispatching = runtime.dispatch_backend(name)
    spec = RouterSpec(top_k=case.top_k, normalize=case.top_k > 1)
    gate, is_narrow = workload.gate, case.torch_dtype in NARROW

    def gate_forward() -> Tensor:
        return gating.gate_forward(x, gate, None) if is_narrow else reference.gate(x, gate)

    def route_forward() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return routing.route_forward(logits, spec, None, None, None)

    def build_dispatch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return dispatching.build_dispatch(experts, case.experts, None, 1, False, None)

    def build_small_dispatch() -> Dispatch | None:
        return dispatching.build_small_dispatch(experts, case.experts)

    def route_backward() -> Tensor:
        return routing.route_backward(grad_weights, *zeros, logits, experts, spec)

    with runtime.plain_maths(x):
        logits = gate_forward()
        experts, weights, _, score_sums, z_sum = route_forward()
        is_small = build_small_dispatch() is not None
        counts, offsets, source, position = build_dispatch()
        dispatched = Dispatch(counts=counts, offsets=offsets, source=source, position=position)
        inner = expert_stages(name, workload.call(weights, dispatched), workload.grad_out)
        grad_weights = torch.randn_like(weights)
        zeros = torch.zeros_like(score_sums), torch.zeros_like(z_sum)
        grad_logits = route_backward()

    def gate_backward() -> tuple[Tensor | None, ...]:
        if is_narrow:  # with the experts' gradient, which has this shape, as its addend
            return gating.gate_backward(grad_logits, workload.grad_out, x, gate, GateWanted(bias=False))
        return grad_logits @ gate, grad_logits.T @ x

    def plain(call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with runtime.plain_maths(x):
                return call()

        return run

    outer = [
        Stage(name="gate", kernel=f"{name}.gate.gate_forward" if is_narrow else "linear", call=gate_forward),
        Stage(name="route", kernel=f"{name}.routing.route_forward", floors=("topk",), call=route_forward),
        Stage(
            name="dispatch",
            kernel=f"{name}.dispatch.{'build_small_dispatch' if is_small else 'build_dispatch'}",
            floors=("small_dispatch" if is_small else "permutation",),
            call=build_small_dispatch if is_small else build_dispatch,
        ),
    ]
    backward_gate = f"{name}.gate.gate_backward" if is_narrow else "two products"
    behind = [
        Stage(name="route", kernel=f"{name}.routing.route_backward", floors=("topk_backward",), call=route_backward),
        Stage(name="gate", kernel=backward_gate, call=gate_backward),
    ]
    stages = [*outer, *inner, *(replace(stage, is_backward=True) for stage in behind)]
    wrapped = [stage if stage.call is None else replace(stage, call=plain(stage.call)) for stage in stages]
    return Opened(backend=name, stages=wrapped, dispatched=dispatched)


def expert_stages(backend: str, call: ExpertCall, grad_out: Tensor) -> list[Stage]:
    """The stages of the experts by backend "torch" or "triton"."""
    if backend == "torch" or (call.spec.fp8 and not multiplies_codes(call.hidden.device)):
        return stages_torch.expert_stages(call, grad_out)
    if call.spec.fp8:
        from moe_triton.benchmarking import stages_fp8  # needs Triton

        return stages_fp8.expert_stages(call, grad_out)
    from moe_triton.benchmarking import stages_triton  # needs Triton

    return stages_triton.expert_stages(call, grad_out)


def works(stage: Stage, case: Case) -> list[Work]:
    """What a stage computes and moves, part by part."""
    size = case.torch_dtype.itemsize
    if stage.name == "gate":
        logits, products = case.tokens * case.experts, 2 if stage.is_backward else 1
        flops = products * 2 * logits * case.hidden
        elements = (case.tokens + case.experts) * case.hidden * products
        return [Work(flops=flops, bytes=size * elements + 4 * logits)]
    return [work_of(name, case, stage.decoded) for name in stage.floors]


def work_of(name: str, case: Case, decoded: bool = False) -> Work:
    """What a kernel of FLOORS or FP8_FLOORS computes and moves; decoded: with projections in the case's dtype."""
    return (FLOORS | FP8_FLOORS)[name](replace(case.shape, format=None) if decoded else case.shape)


def trained(backend: str, workload: Workload) -> Runnable:
    """Our layer with gradients; of all but the projections where these are codes, as below adapters."""
    return Runnable(replace(PROVIDERS[backend].build(workload), is_trainable=True), workload)


def whole_passes(opened: Opened, workload: Workload) -> dict[str, Call]:
    """A training step's forward and backward of the whole layer, by the same backend."""
    backward = trained(opened.backend, workload).call("backward")
    assert isinstance(backward, Fresh)
    return {LAYER[0]: backward.make, LAYER[1]: backward}


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What floors divide by: FLOP/s of a dense product, bytes/s of a sum over a large buffer, FLOP/s of codes."""

    flops_per_s: float
    bytes_per_s: float
    codes_flops_per_s: float | None = None

    def of(self, stage: Stage) -> tuple[float, float]:
        """FLOP/s and bytes/s of a stage."""
        is_coded = self.codes_flops_per_s is not None and any(name.startswith("fp8_") for name in stage.floors)
        return (self.codes_flops_per_s or 0.0) if is_coded else self.flops_per_s, self.bytes_per_s


def run_beside_speeds(
    calls: Mapping[str, Call],
    workload: Workload,
    timer: Timer,
    budget_s: float,
    on_round: Callable[[float], None] | None = None,
) -> tuple[dict[str, Times], Speeds]:
    """The calls' times, and the device's speeds in the same interleaved rounds."""
    buffer = bandwidth_buffer(workload.hidden.device)
    speeds: dict[str, Call] = {DENSE: dense(workload, "forward").call, BANDWIDTH: buffer.sum}
    if workload.case.fp8 and (codes := dense_of_codes(workload, "forward")) is not None:
        speeds[DENSE_OF_CODES] = codes.call
    times = run_rounds({**calls, **speeds}, timer, budget_s=budget_s, on_round=on_round)
    flops = workload.case.flops("forward")
    return times, Speeds(
        flops_per_s=flops / middle(spread(times[DENSE])),
        bytes_per_s=buffer.nbytes / middle(spread(times[BANDWIDTH])),
        codes_flops_per_s=flops / middle(spread(times[DENSE_OF_CODES])) if DENSE_OF_CODES in times else None,
    )


def measure_stages(
    workload: Workload,
    *,
    timer: Timer,
    budget_s: float,
    backend: str = "auto",
    on_round: Callable[[float], None] | None = None,
) -> StageTable:
    """Times every stage, the whole passes of the layer and the two speeds that floors need, in interleaved rounds."""
    opened = open_layer(workload, backend)
    calls = {**opened.calls, **whole_passes(opened, workload)}
    times, speeds = run_beside_speeds(calls, workload, timer, budget_s, on_round)
    return stage_table(opened, workload.case, times, speeds)


def stage_table(opened: Opened, case: Case, times: Mapping[str, Times], speeds: Speeds) -> StageTable:
    """The table of what was timed, by the stages' full names and LAYER."""
    rows = [stage_row(stage) for stage in opened.stages]
    for row, stage in zip(rows, opened.stages, strict=True):
        if row.full_name in times:
            row.fill(works(stage, case), times[row.full_name], *speeds.of(stage))
    fill_shares(rows)
    return StageTable(
        case=case, backend=opened.backend, stages=rows, **asdict(speeds),
        layer_s={name: found for name in LAYER if (found := spread(times.get(name, []))) is not None}, measured=now(),
    )  # fmt: skip


def table_from(value: dict[str, Any]) -> StageTable:
    """The StageTable of its `dataclasses.asdict`. Raises KeyError, TypeError or ValueError on anything else."""
    rows = [
        StageRow(**{**row, **{name: spread_from(row[name]) for name in ("time_s", "of_floor")}})
        for row in value["stages"]
    ]
    changed = {"case": Case(**value["case"]), "stages": rows, "layer_s": spreads_from(value["layer_s"])}
    return StageTable(**{**value, **changed})


def middle(found: Spread | None) -> float:
    assert found is not None, "every entry has at least one sample"
    return found.p50


def fill_shares(rows: list[StageRow]) -> None:
    """Each stage's share of the summed stages of its pass."""
    for is_backward in (False, True):
        own = [row for row in rows if row.is_backward == is_backward and row.time_s is not None]
        total = sum(middle(row.time_s) for row in own)
        for row in own:
            row.share = middle(row.time_s) / total if total > 0 else None
