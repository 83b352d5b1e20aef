"""`moe-triton profile`: where the time of a layer, of a training step or of one kernel goes."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from moe_triton import runtime
from moe_triton.benchmarking import profiling
from moe_triton.benchmarking.cases import PRESETS, Case, Workload, make_workload
from moe_triton.benchmarking.environment import environment
from moe_triton.benchmarking.memory_chart import draw_memory
from moe_triton.benchmarking.report import milliseconds, three_digits, write_json
from moe_triton.benchmarking.results import first_line
from moe_triton.benchmarking.stage_report import print_stages
from moe_triton.benchmarking.stages import StageTable, trained
from moe_triton.benchmarking.text_tables import plain_console, print_table
from moe_triton.benchmarking.timing import make_timer, ready
from moe_triton.cli import arguments
from moe_triton.cli.arguments import SHAPE, Unmeasurable, checked, pick_device
from moe_triton.cli.display import StepDisplay
from moe_triton.cli.profile_ranks import profile_over_ranks
from moe_triton.metrics import load_statistics
from moe_triton.training.config import TrainConfig
from moe_triton.training.workers import check_exchange

NEAR_FLOOR = 0.9  # of the floor's time over a stage's: what a search would gain is less than what it costs
DEFAULT_MODELS = {"cpu": "cpu-fine", "cuda": "Qwen3-30B-A3B"}


def profile(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="A folder: trace.json, memory.png, profile.json.")] = Path("profile"),
    model: Annotated[
        str | None, typer.Option(help="A layer by name: cpu-fine, cpu-coarse, cpu-decode, OLMoE, Qwen3-30B-A3B, ...")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="T: tokens; alone, instead of the model's own number.")] = None,
    hidden: Annotated[int | None, typer.Option(help="d: hidden size. With the others: a layer by its shape.")] = None,
    intermediate: arguments.Intermediate = None,
    experts: arguments.NumExperts = None,
    top_k: arguments.TopK = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the model's.")] = None,
    skew: arguments.Skew = None,
    activation: arguments.Activation = None,
    bias: arguments.Bias = False,
    format: arguments.Format = None,
    fp8: arguments.Fp8 = False,
    training_step: Annotated[
        bool, typer.Option("--training-step", help="Profile a step of `moe-triton train` instead.")
    ] = False,
    kernel: Annotated[
        str | None, typer.Option(help="One kernel over its shipped configurations: up, down, d_hidden, d_rows, ...")
    ] = None,
    ep_mode: Annotated[
        str | None, typer.Option(help="Under torchrun: mode of the exchange. Default: dropless.")
    ] = None,
    ep_chunks: Annotated[int | None, typer.Option(help="Under torchrun: chunks of the exchange. Default: 1.")] = None,
    backend: Annotated[str, typer.Option(help="auto, torch or triton.")] = "auto",
    device: arguments.DeviceName = "auto",
    steps: Annotated[int, typer.Option(help="Steps that the profiler records.")] = 5,
    budget: Annotated[float, typer.Option(help="Seconds for the two speeds that floors need, or per --kernel.")] = 3.0,
    threads: arguments.Threads = None,
    seed: arguments.Seed = 0,
    as_json: arguments.AsJson = False,
) -> None:
    """Where the time goes: every stage with its share, FLOPs, bytes, floor, kernel and configuration.

    Writes a trace for Perfetto (ui.perfetto.dev), a memory timeline, and everything as JSON. On a GPU the ranges are
    NVTX ranges too, for nsys, and Triton's proton writes proton.hatchet where it is installed.
    Under torchrun the layer's experts are spread over the processes: the exchange, its overlap, and a trace per rank.
    Exit code: 0; 1 when a file cannot be written; 2 for bad arguments; 3 when a GPU is needed.
    """
    give = ctx.with_resource(arguments.json_instead(as_json))
    shape = dict(zip(SHAPE, (tokens, hidden, intermediate, experts, top_k), strict=True))
    overrides = {"dtype": dtype, "skew": skew, "activation": activation, "bias": bias or None, "format": format}
    overrides["fp8"] = fp8 or None
    with checked("profile", out):
        where = pick_device(device)
        arguments.check_settings(budget, threads, seed, [])
        if steps < 1:
            raise ValueError(f"steps: got {steps}, wanted at least 1")
        arguments.pick(backend, "backend", ("auto", "torch", "triton"), backend)
        if threads is not None:
            torch.set_num_threads(threads)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes == 1 and (ep_mode is not None or ep_chunks is not None):
            raise ValueError("ep-mode, ep-chunks: got one without torchrun; wanted torchrun -m moe_triton profile ...")
        if processes > 1 and (training_step or kernel is not None or format is not None or fp8):
            raise ValueError(
                "training-step, kernel, format, fp8: got one under torchrun, where a layer's exchange is profiled"
            )
        if fp8 and kernel is not None:
            raise ValueError("fp8: got it with kernel, wanted one of them: configurations are searched without fp8")
        of_a_layer = [model, kernel, tokens, *overrides.values()]
        if training_step and any(value is not None for value in of_a_layer):
            raise ValueError("training-step: got together with a layer's options, wanted sizes only")
        if training_step:
            sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_experts": experts, "top_k": top_k}
            given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
            config = TrainConfig(
                backend=backend, device=str(where), seed=seed, threads=torch.get_num_threads(), **given
            )
            arguments.check_backend(backend, where, torch.float32)
            arguments.make_directory(out, "--out")
            give(profile_training_step(out, where, config, steps))
            return
        case = pick_case(model, shape, {k: v for k, v in overrides.items() if v is not None}, where)
        arguments.check_backend(backend, where, case.torch_dtype)
        mode, chunks = "dropless" if ep_mode is None else ep_mode, 1 if ep_chunks is None else ep_chunks
        check_exchange(mode, chunks)
        arguments.make_directory(out, "--out")
        if processes > 1:
            found: Any = profile_over_ranks(out, case, where, backend, mode, chunks, steps, seed)
        elif kernel is not None:
            found = profile_kernel(kernel, case, where, budget, seed)
        else:
            found = profile_one_layer(out, case, where, backend, steps, budget, seed)
        if found is not None:
            give(found)


def pick_case(model: str | None, shape: dict[str, int | None], overrides: dict[str, Any], device: torch.device) -> Case:
    """The layer that is asked for: a model's, perhaps with another number of tokens, or one of this very shape."""

    sizes: dict[str, Any] = {name: value for name, value in shape.items() if value is not None}
    if set(sizes) - {"tokens"}:
        return Case(**arguments.whole_shape(shape, "model", model), **overrides)
    known = {case.name: case for name in ("cpu", "models") for case in reversed(PRESETS[name].cases)}
    return replace(arguments.pick_model(model or DEFAULT_MODELS[device.type], known), **sizes, **overrides)


def profile_one_layer(
    out: Path, case: Case, device: torch.device, backend: str, steps: int, budget: float, seed: int
) -> dict[str, Any]:
    with StepDisplay() as on_step:
        on_step(f"{case.title()}: making tensors", 0.0)
        workload = make_workload(case, device, seed)
        on_step(f"{case.title()}: {steps} steps under the profiler", 0.3)
        found = profiling.profile_layer(
            workload,
            backend=backend,
            steps=steps,
            timer=make_timer(device, ahead=True),
            budget_s=budget,
            path=out / "trace.json",
        )
    print_stages([found.table])
    print_inside(found.trace.inside, steps)
    statistics = load_statistics(torch.tensor(found.counts), dropped=0)
    print(f"experts: {statistics}")
    load = {"counts": found.counts, **statistics._asdict()}
    content = {"stages": asdict(found.table), "inside": found.trace.inside, "load": load}
    title = f"{case.title()}, backend {found.table.backend}: memory of one step, stage by stage"
    record, files = write_profile(out, device, found.trace, content, "gate", title)
    print(proton_line(out, workload, backend, steps))
    print(files)
    print(next_step(found.table, case, device))
    return record


def next_step(table: StageTable, case: Case, device: torch.device) -> str:
    """What to try next, in one sentence."""
    sizes = " ".join(f"--{name.replace('_', '-')} {getattr(case, name)}" for name in SHAPE)
    furthest = table.furthest
    if furthest is None or furthest.of_floor is None or furthest.of_floor.p50 > NEAR_FLOOR:
        return "next: every stage is near its floor; fewer bytes or operations are what is left (a lower dtype, a mask)"
    if case.fp8:
        return f"next: fewer bytes or operations in {furthest.full_name}: moe-triton tune searches nothing for fp8"
    if device.type == "cpu":
        return "next: moe-triton tune --cpu measures which products are fastest on this processor"
    sizes += f" --dtype {case.dtype}" + (f" --format {case.format}" if case.format is not None else "")
    return f"next: moe-triton tune {sizes} searches faster configurations, most of all for {furthest.full_name}"


def print_inside(inside: dict[str, dict[str, float]], steps: int) -> None:
    """What the operators inside the experts' stages are, where the profiler sees operators (on a CPU)."""
    for name in ("experts", "experts (backward)"):
        kinds = inside.get(name, {})
        total = sum(kinds.values())
        if total > 0:
            parts = sorted(kinds.items(), key=lambda item: -item[1])
            text = ", ".join(f"{kind} {seconds / total:.0%}" for kind, seconds in parts)
            print(f"inside {name}: {text} (of {total / steps * 1e3:.3g} ms in operators, under the profiler)")


def write_profile(
    out: Path, device: torch.device, trace: profiling.Trace, content: dict[str, Any], first: str, title: str
) -> tuple[dict[str, Any], str]:
    """profile.json and memory.png, of the step that begins with the range `first`; the former, and what there is."""
    has_matplotlib = runtime.installed_version("matplotlib") is not None
    drawn = has_matplotlib and draw_memory(out / "memory.png", trace, first, title)
    peak = max((m.bytes for m in trace.memory), default=0)
    record = {"schema": "moe-triton-profile/1", **environment(device), **content, "peak_bytes": peak}
    write_json(out / "profile.json", record)
    without = "" if has_matplotlib else "; no memory.png, which needs matplotlib: moe-triton[plot]"
    picture = f", {out}/memory.png" if drawn else without
    memory = f"memory: at most {peak / 2**20:.3g} MiB beyond what was held before{picture}"
    lines = [memory, f"trace: {out / 'trace.json'} (open it at ui.perfetto.dev)"]
    if not torch.cuda.is_available():
        lines.append("not measured on this machine, for want of a GPU: kernels' own times, NVTX ranges for nsys")
    return record, "\n".join(lines)


def proton_line(out: Path, workload: Workload, backend: str, steps: int) -> str:
    """Runs the layer once more under Triton's own profiler, where there is one and a GPU for it."""
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("triton.profiler") is None:
        return "proton: not measured: there is no triton.profiler here"
    if workload.hidden.device.type != "cuda":
        return "proton: not measured on this machine: needs a GPU"
    import triton.profiler as proton

    call = trained(backend, workload).call("full")
    try:
        proton.start(str(out / "proton"), hook="triton")
        for _ in range(steps):
            ready(call)()
        torch.cuda.synchronize()
        proton.finalize()
    except Exception as error:  # a second profiler, after torch's, may find the device's counters taken
        return f"proton: not measured: {first_line(error)}"
    return f"proton: {out / 'proton.hatchet'} (proton-viewer -m time/ms {out / 'proton.hatchet'})"


def profile_training_step(out: Path, device: torch.device, config: TrainConfig, steps: int) -> dict[str, Any]:
    with StepDisplay() as on_step:
        on_step(f"{steps} training steps under the profiler", 0.3)
        found = profiling.profile_step(config, steps=steps, path=out / "trace.json")
    print(
        f"a training step: {config.num_layers} layers, {config.batch_size * config.seq_len} tokens, "
        f"d={config.hidden_size} n={config.intermediate_size} E={config.num_experts} K={config.top_k}, "
        f"{milliseconds(found.step_s)} ms under the profiler"
    )
    cells = [(part, milliseconds(seconds), f"{share:.1%}") for part, seconds, share in found.rows]
    print_table(plain_console(), ("part", "ms", "share"), cells, text=("part",))
    for layer, counts in enumerate(found.load):
        print(f"experts of layer {layer}: {load_statistics(torch.tensor(counts), dropped=None)}")
    print(f"dropped: {found.dropped:.2%} of the assignments (capacity factor {config.capacity_factor:g})")
    parts = [{"part": part, "seconds": seconds, "share": share} for part, seconds, share in found.rows]
    content = {"config": config.as_dict(), "step_s": found.step_s, "parts": parts, "load": found.load}
    content["dropped"] = found.dropped
    title = "a training step: memory, forward by module"
    record, files = write_profile(out, device, found.trace, content, "step", title)
    print(files)
    return record


def profile_kernel(name: str, case: Case, device: torch.device, budget: float, seed: int) -> list[dict[str, Any]]:
    """The kernel with every configuration that ships for this device and dtype, fastest first."""
    from moe_triton.benchmarking import kernel_search  # needs Triton
    from moe_triton.kernel_stages import OP_OF, OVER_CODES

    try:
        runtime.choose("triton", device, case.torch_dtype)
    except RuntimeError as error:
        raise Unmeasurable(f"--kernel times Triton kernels: {error}") from error
    kernels = OP_OF if case.format is None else OVER_CODES
    stage = arguments.pick(name, "kernel", kernels, name)
    with StepDisplay() as on_step:
        workload = make_workload(case, device, seed)
        found = kernel_search.time_shipped(
            workload,
            stage,
            make_timer(device, ahead=True),
            budget,
            lambda what, share: on_step(f"{stage} {what}", share),
        )
    print(f"{stage}: {case.title()}, shipped configurations (the one that runs is marked)")
    rows = []
    for row in found:
        speed = "" if row.time_s is None else three_digits(row.flops / row.time_s / 1e12)
        share = "" if row.time_s is None else f"{row.floor_s / row.time_s:.2f}"
        rows.append((row.config, "" if row.time_s is None else milliseconds(row.time_s), speed, share, row.note))
    columns = ("configuration", "ms", "TFLOP/s", "of floor", "note")
    print_table(plain_console(), columns, rows, text=("configuration", "note"))
    if device.type == "cpu":
        print("these are times of Triton's interpreter: they say nothing about a GPU", file=sys.stderr)
    return [asdict(row) for row in found]
