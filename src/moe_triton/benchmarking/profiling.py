"""A layer, or a training step, under torch.profiler: the time of every part, a trace, and memory over time.

Parts are ranges of torch.profiler (and NVTX ranges on a GPU, for nsys). On a GPU a part's time is that of its kernels,
on a CPU it is wall-clock time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from moe_triton.benchmarking.cases import Workload
from moe_triton.benchmarking.stages import LAYER, StageTable, open_layer, run_beside_speeds, stage_table, whole_passes
from moe_triton.benchmarking.timing import Timer, Times, ready
from moe_triton.layers import Experts, MoE, Router
from moe_triton.training.config import TrainConfig
from moe_triton.training.loop import make_optimizer, train_step
from moe_triton.training.model import Attention, LanguageModel

# of a profiler that starts or ends; the second where a driver's counters cannot be read
OWN_LINE = re.compile(rb"USDT:|.*\bcode 35\b")
WARM_UP = 2  # calls of everything before the profiler looks
PREFIX = "moe::"  # of our ranges in a trace
OPERATORS = {
    "matrix products": ("mkldnn::_linear_pointwise", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "gather and sum of rows": ("aten::index_select", "aten::index", "aten::_embedding_bag", "aten::index_add_"),
    "activation and scaling": (
        "aten::silu", "aten::silu_", "aten::gelu", "aten::relu", "aten::sigmoid", "aten::mul", "aten::mul_",
        "aten::add", "aten::add_", "aten::clamp", "aten::addcmul", "aten::addcmul_", "aten::linalg_vecdot", "aten::sub",
        "aten::rsub", "aten::silu_backward", "aten::sum", "aten::gelu_backward",
    ),
    "copies": ("aten::copy_", "aten::clone", "aten::contiguous", "aten::fill_", "aten::zero_"),
}  # fmt: skip


@contextlib.contextmanager
def span(name: str) -> Iterator[None]:
    """A named range in torch.profiler's trace, and in NVTX where there is a GPU."""
    has_nvtx = torch.cuda.is_available()
    if has_nvtx:
        torch.cuda.nvtx.range_push(PREFIX + name)
    try:
        with record_function(PREFIX + name):
            yield
    finally:
        if has_nvtx:
            torch.cuda.nvtx.range_pop()


@dataclass(frozen=True, kw_only=True)
class Allocated:
    """Bytes that torch holds on the device, at a moment in microseconds."""

    at_us: float
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Range:
    """One of our ranges in the trace, in microseconds."""

    name: str
    start_us: float
    end_us: float


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What was recorded.

    seconds   by range: one entry per time that it ran
    inside    range -> kind of operator -> seconds in all (on a CPU, where a range holds operators and no kernels)
    path      the file in Chrome's trace format, for Perfetto (ui.perfetto.dev)
    memory    what torch held over time; ranges: ours, in order
    """

    seconds: dict[str, list[float]]
    inside: dict[str, dict[str, float]]
    path: Path
    memory: list[Allocated]
    ranges: list[Range]


def record(step: Callable[[], None], steps: int, device: torch.device, path: Path) -> Trace:
    """Runs `steps` steps under torch.profiler and writes the trace."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    # backward in this thread, too: a range counts the kernels that its own thread launches
    prof = torch.profiler.profile(activities=activities, profile_memory=True, record_shapes=True)
    with torch.autograd.set_multithreading_enabled(False):
        with without_own_lines():
            prof.start()
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        with without_own_lines():
            prof.stop()
    # a range shows up on the device too
    events = [event for event in prof.events() or () if event.device_type == torch.autograd.DeviceType.CPU]
    seconds: dict[str, list[float]] = {}
    for event in events:
        microseconds = event.device_time_total if device.type == "cuda" else event.cpu_time_total
        seconds.setdefault(event.name, []).append(microseconds / 1e6)
    temporary = path.with_name(f".{path.name}.tmp.json")
    try:
        prof.export_chrome_trace(str(temporary))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    memory, ranges = read_trace(path, device)
    inside = {} if device.type == "cuda" else operators_inside(events)
    return Trace(seconds=seconds, path=path, memory=memory, ranges=ranges, inside=inside)


@contextlib.contextmanager
def without_own_lines() -> Iterator[None]:
    """Holds back what the profiler's library writes to stderr of itself; other lines come when the context ends."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            held.seek(0)
            others = [line for line in held.read().splitlines(keepends=True) if not OWN_LINE.match(line)]
            os.write(2, b"".join(others))
            os.close(stderr)


def operators_inside(events: Sequence[Any]) -> dict[str, dict[str, float]]:
    """Range -> kind of operator -> seconds that operators of this kind spent in it themselves."""
    found: dict[str, dict[str, float]] = {}
    for event in events:
        outer, name = event.cpu_parent, ""
        while outer is not None and not name:
            name = outer.name.removeprefix(PREFIX) if outer.name.startswith(PREFIX) else ""
            outer = outer.cpu_parent
        if name and not event.name.startswith(PREFIX):
            kind = next((kind for kind, operators in OPERATORS.items() if event.name in operators), "other operators")
            kinds = found.setdefault(name, {})
            kinds[kind] = kinds.get(kind, 0.0) + event.self_cpu_time_total / 1e6
    return found


def read_trace(path: Path, device: torch.device) -> tuple[list[Allocated], list[Range]]:
    """Memory and our ranges, from a trace file."""
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    kind = 1 if device.type == "cuda" else 0  # torch's numbers of device types
    memory = [
        Allocated(at_us=float(event["ts"]), bytes=int(event["args"]["Total Allocated"]))
        for event in events
        if event.get("name") == "[memory]" and event["args"].get("Device Type") == kind
    ]
    ranges = [
        Range(
            name=event["name"].removeprefix(PREFIX),
            start_us=float(event["ts"]),
            end_us=float(event["ts"]) + float(event.get("dur", 0)),
        )
        for event in events
        if event.get("cat") == "user_annotation" and str(event.get("name", "")).startswith(PREFIX)
    ]
    return sorted(memory, key=lambda m: m.at_us), sorted(ranges, key=lambda r: r.start_us)


@dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """The stages by the profiler's own times, the trace, and how many tokens chose each expert (none is dropped)."""

    table: StageTable
    trace: Trace
    counts: list[int]


def profile_layer(
    workload: Workload, *, backend: str, steps: int, timer: Timer, budget_s: float, path: Path
) -> LayerProfile:
    """Every stage `steps` times, and the whole layer as often, under the profiler.

    The speeds that floors need (a dense product, a sum over a large buffer) are timed first, for `budget_s`.
    """
    opened = open_layer(workload, backend)
    calls, backward = opened.calls, whole_passes(opened, workload)[LAYER[1]]
    _, speeds = run_beside_speeds({}, workload, timer, budget_s)

    def step() -> None:
        for name, call in calls.items():
            run = ready(call)
            with span(name):
                run()
        with span(LAYER[0]):
            run = ready(backward)
        with span(LAYER[1]):
            run()

    for _ in range(WARM_UP):
        step()
    trace = record(step, steps, workload.hidden.device, path)
    times: dict[str, Times] = {
        name.removeprefix(PREFIX): list(found) for name, found in trace.seconds.items() if name.startswith(PREFIX)
    }
    table = stage_table(opened, workload.case, times, speeds)
    return LayerProfile(table=table, trace=trace, counts=opened.dispatched.counts.tolist())


@contextlib.contextmanager
def annotated(parts: Sequence[tuple[str, nn.Module]]) -> Iterator[None]:
    """While inside, every forward of these modules is a range of the given name."""
    open_spans: list[contextlib.AbstractContextManager[None]] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            open_spans.append(span(name))
            open_spans[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        open_spans.pop().__exit__(None, None, None)

    handles = []
    for name, module in parts:
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """rows: (part, seconds per step, share of the step), in order; step_s: the whole; load [L, E] and dropped share."""

    rows: list[tuple[str, float, float]]
    step_s: float
    trace: Trace
    load: list[list[int]]
    dropped: float


BACKWARD = "autograd::engine::evaluate_function: "
# part -> the names in the trace that it sums; a later part does not count what an earlier one has
STEP_PARTS = {
    "attention (forward)": (PREFIX + "attention",),
    "router: gate and route (forward)": (PREFIX + "router",),
    "experts (forward)": (PREFIX + "experts",),
    "experts (backward)": (BACKWARD + "_ExpertsBackward",),
    "route (backward)": (BACKWARD + "_RouteBackward",),
}
MOE = PREFIX + "moe layer"


def profile_step(config: TrainConfig, *, steps: int, path: Path) -> StepProfile:
    """`steps` optimizer steps of the model that `moe-triton train` trains, on random bytes, under the profiler."""
    device = torch.device(config.device)
    torch.manual_seed(config.seed)
    model = LanguageModel(config, "moe").to(device)
    optimizer = make_optimizer(model, config)
    tokens = torch.randint(0, 256, (config.batch_size, config.seq_len + 1), device=device)
    kinds: tuple[tuple[str, type], ...] = (
        ("moe layer", MoE), ("router", Router), ("experts", Experts), ("attention", Attention),
    )  # fmt: skip
    parts = [(name, module) for module in model.modules() for name, kind in kinds if isinstance(module, kind)]
    records: list[dict[str, Any]] = []

    def step() -> None:
        with span("step"):
            records.append(train_step(model, optimizer, tokens, config.lr, config.grad_clip))

    with annotated(parts):
        for _ in range(WARM_UP):
            step()
        trace = record(step, steps, device, path)
    total = sum(trace.seconds.get(PREFIX + "step", [])) / steps
    spent = {
        part: sum(sum(trace.seconds.get(name, [])) for name in names) / steps for part, names in STEP_PARTS.items()
    }
    inside = spent["router: gate and route (forward)"] + spent["experts (forward)"]
    layers = sum(trace.seconds.get(MOE, [])) / steps
    spent["dispatch, losses and the rest of the MoE layers (forward)"] = layers - inside
    spent["optimizer"] = sum(sum(s) for name, s in trace.seconds.items() if name.startswith("Optimizer.step")) / steps
    spent["everything else: embedding, head, loss, their backward"] = total - sum(spent.values())
    rows = [(part, seconds, seconds / total if total > 0 else 0.0) for part, seconds in spent.items()]
    last = records[-1]
    return StepProfile(rows=rows, step_s=total, trace=trace, load=last["expert_load"], dropped=last["dropped"])
