"""Everything that `make gpu` does, in order: what is most decisive comes first in its phase."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from gpu_benches import candidates, decode, fences, kernel_sets, kernels, layers, prepare
from gpu_benches.layers import BLOCKS, PEER
from gpu_checks import behaviour, narrow, numerics, tools
from gpu_checks.setting import Setting

from gpu_run.device import facts
from gpu_run.schedule import PHASES, Step
from gpu_run.worker import Item
from moe_triton.benchmarking.cases import MODELS, PRESETS, Case, make_workload
from moe_triton.benchmarking.kernel_search import open_kernels
from moe_triton.benchmarking.providers.block import Provider
from moe_triton.benchmarking.results import FAULTS
from moe_triton.benchmarking.timing import make_timer
from moe_triton.kernel_stages import STAGES_OF
from moe_triton.quantization.formats import FORMATS
from moe_triton_kernels.gluon.schedules import available

BUILDERS = 12  # beside the three processes of smoke_steps
ITEM_S = 2.0  # of timing per shape
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # the one that matters most first
SONIC = {case.name: case for case in PRESETS["sonic-12"].cases}
NAMED = {f"{case.name} T={case.tokens}": case for case in MODELS}
SMALL_K = (SONIC["7B n=256"], SONIC["1.4B n=256"], SONIC["7B n=512"])
LARGE_K = (SONIC["30B n=512"], NAMED["Mixtral-8x7B T=16384"], SONIC["120B n=2048"])
KERNEL_CASES = (
    SONIC["7B n=256"], SONIC["30B n=512"], NAMED["Qwen3-30B-A3B T=32768"], NAMED["Mixtral-8x7B T=16384"],
    SONIC["120B n=2048"], SONIC["1.4B n=256"], NAMED["gpt-oss-20b T=16384"], NAMED["DeepSeek-V3 T=16384"],
)  # fmt: skip
FENCE_CASES = (SONIC["7B n=256"], SONIC["30B n=512"])
GOALS = (replace(NAMED["Mixtral-8x7B T=16384"], tokens=8192),)  # what the goals name besides
LAYER_CASES = tuple(dict.fromkeys((*GOALS, *MODELS[1:3], *KERNEL_CASES, *MODELS, *SONIC.values())))
FEW = (1, 8, 64)
DECODE_CASES = tuple(replace(case, tokens=tokens) for tokens in FEW for case in (MODELS[1], *MODELS[:1], *MODELS[3:]))
FORMAT_CASES = (
    replace(NAMED["gpt-oss-20b T=16384"], tokens=1, format="mxfp4"),  # as it is published
    *(replace(MODELS[1], tokens=1, format=format) for format in FORMATS),
)
# one by one: decoding's kernels; products of codes; with adapters; over quantized projections, in the loop or in memory
FEW_CASES = tuple(replace(case, tokens=tokens) for tokens in FEW for case in (MODELS[1], MODELS[0]))
FP8_CASES = (
    NAMED["Qwen3-30B-A3B T=32768"], SONIC["30B n=512"], *GOALS, replace(NAMED["Qwen3-30B-A3B T=32768"], bias=True),
)  # fmt: skip
ADAPTER_CASES = (MODELS[1], *GOALS)
QUANTIZED_CASES = (
    *(replace(MODELS[1], tokens=64, format=format) for format in FORMATS),
    *(replace(MODELS[1], format=format) for format in ("mxfp4", "int4")),
)
SETS: dict[str, tuple[kernels.Kernels, tuple[Case, ...]]] = {
    "few tokens": (kernel_sets.few_tokens, FEW_CASES),
    "fp8 kernels": (kernel_sets.fp8, FP8_CASES),
    "quantized": (kernel_sets.quantized, QUANTIZED_CASES),
    "adapters": (kernel_sets.adapters, ADAPTER_CASES),
}
GLUON: dict[str, Any] = {"keep": candidates.is_warp_specialized, "ops": ("d_hidden", "down", "up", "d_rows")}
SKEW_CASES = PRESETS["skew"].cases[1:]  # without the uniform one, which is among the layers


class Listed(NamedTuple):
    step: Step
    items: Mapping[str, Item]


def listed(name: str, phase: str, items: Mapping[str, Item], **options: Any) -> Listed:
    return Listed(Step(name=name, phase=phase, items=tuple(items), **options), items)


def check(name: str, run: Item) -> Listed:
    return listed(name, "prove", {name: run})


def measured(
    part: str, cases: Iterable[Case], measure: Callable[..., dict[str, Any]], *, ahead: bool = True, **options: Any
) -> dict[str, Item]:
    """An item for each case, with ITEM_S of timing. ahead: kernels, whose time is not to hold that of their launch."""
    return {f"{part}: {case.title()}": partial(measure_one, part, case, measure, options, ahead) for case in cases}


def measure_one(
    part: str,
    case: Case,
    measure: Callable[..., dict[str, Any]],
    options: Mapping[str, Any],
    ahead: bool,
    setting: Setting,
) -> dict[str, Any]:
    """What a part measures of a case; the first row that is wrong or failed gives the item its status."""
    setting.need_gpu()
    timer = make_timer(setting.device, ahead=ahead)
    found = {"part": part, "title": case.title(), **measure(case, setting.device, timer, budget_s=ITEM_S, **options)}
    for row in found.get("rows", {}).values():
        if row["status"] in FAULTS:
            found |= {"status": row["status"], "note": f"{row['label']}: {row['note']}"}
    return found


def build_steps() -> list[Listed]:
    """The compilations of whatever is measured, dealt out to the builders in turn."""
    cases = prepare.targets([*SMALL_K, *LARGE_K, *KERNEL_CASES, *LAYER_CASES, *DECODE_CASES, *FORMAT_CASES])
    items: dict[str, Item] = {f"build: {case.title()}": partial(build, case) for case in cases}
    items |= {f"build: without fences, {case.title()}": partial(build_fences, case) for case in FENCE_CASES}
    items["build: the peer"] = partial(build, LAYER_CASES[1], provider=BLOCKS[PEER])
    for case in SMALL_K:
        for op in STAGES_OF:
            items[f"build: candidates of {op}, {case.title()}"] = partial(build_candidates, case, op)
    for case in LARGE_K:
        for op in GLUON["ops"]:
            items[f"build: gluon {op}, {case.title()}"] = partial(build_candidates, case, op, keep=GLUON["keep"])
    for part, (make, several) in SETS.items():
        for case in several if part == "few tokens" else prepare.targets(several):
            items[f"build: {part}, {case.title()}"] = partial(build_kernels, case, make)
    names = list(items)
    shares = [names[first::BUILDERS] for first in range(BUILDERS)]
    return [
        listed(f"build {number}", "build", {name: items[name] for name in share}, needed_by=("look", "measure"))
        for number, share in enumerate(shares, 1)
    ]


def build(case: Case, setting: Setting, provider: Provider | None = None) -> str:
    setting.need_gpu()
    return prepare.prepare(case, setting.device, provider)


def build_fences(case: Case, setting: Setting) -> str:
    setting.need_gpu()
    return fences.prepare_fences(prepare.few(case), setting.device)


def build_candidates(case: Case, op: str, setting: Setting, keep: candidates.Keep = candidates.every) -> str:
    setting.need_gpu()
    timer = make_timer(setting.device)
    return candidates.prepare_candidates(prepare.few(case), op, setting.device, timer, keep=keep)


def build_kernels(case: Case, make: kernels.Kernels, setting: Setting) -> str:
    """Few tokens are few already, and their kernels are compiled for all experts."""
    setting.need_gpu()
    return kernels.prepare_kernels(case if case.tokens in FEW else prepare.few(case), make, setting.device)


def smoke_steps() -> list[Listed]:
    """Every operation once, the first time that bf16, TMA, wgmma and Gluon run."""
    small = {f"smoke: experts, {name}": numerics.small(name) for name in numerics.SMALL}
    names = list(small)
    gluon = {
        f"smoke: gluon, {schedule}": numerics.gluon(schedule, (0, len(numerics.GLUON_SHAPES)))
        for schedule in available()
    }
    return [
        listed("smoke bf16", "build", {name: small[name] for name in names if "bf16" in name}),
        listed("smoke gluon", "build", gluon),
        listed("smoke others", "build", {name: small[name] for name in names if "bf16" not in name}),
    ]


def profiled(case: Case, setting: Setting) -> str:
    """What `counters` looks at: one launch of the four products that take the most time."""
    setting.need_gpu()
    opened = open_kernels(make_workload(case, setting.device))
    calls = [opened.call(name) for name in ("up", "down", "d_hidden", "d_weight_up")]
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()
    return "4 launches"


def look_steps() -> list[Listed]:
    return [
        listed("fences", "look", measured("fences", FENCE_CASES, fences.measure_fences), seconds=15),
        listed("counters", "look", {"counters": partial(tools.counters, "profiled", "profiled")}, seconds=25),
    ]


def hidden_steps() -> list[Listed]:
    """What only other items start, under a tool."""
    small = {f"sanitized: {name}": numerics.small(name) for name in numerics.SMALL}
    counted = {"profiled": partial(profiled, SONIC["7B n=256"])}
    return [listed("sanitized", "prove", small), listed("profiled", "look", counted)]


def prove_steps() -> list[Listed]:
    """Those that last longest first, so that none begins last; bf16 before the other types."""
    first = [
        check("sanitizer", tools.sanitizer),
        check("stress", behaviour.stress),
        *(check(f"gluon: {schedule}", numerics.gluon(schedule)) for schedule in available()),
        check("other assembler", tools.other_assembler),
        check("beyond_int32", behaviour.beyond_int32),
        check("no_recompilation", behaviour.no_recompilation),
    ]
    by_dtype = []
    for dtype in DTYPES:
        name = numerics.name_of(dtype)
        by_dtype += [
            *shared(f"experts gated {name}", partial(numerics.experts_gated, dtype), 4),
            *shared(f"buckets {name}", partial(numerics.buckets, dtype), 4),
            check(f"layer {name}", numerics.layer(name)),
            *shared(f"experts ungated {name}", partial(numerics.experts_ungated, dtype), 2),
        ]
    others: dict[str, Item] = {
        "address_tables": behaviour.address_tables,
        "no_host_sync": behaviour.no_host_sync,
        "cuda_graph": behaviour.cuda_graph,
        "routing": numerics.routing,
        "gate": narrow.gate,
        "few_tokens": numerics.few_tokens,
        "fp8": narrow.fp8,
        "fp8_codes": narrow.fp8_codes,
        "quantized": narrow.quantized,
        "determinism": behaviour.determinism,
        "compile": behaviour.compiled,
        "dispatch": numerics.dispatch,
        "empty": numerics.empty,
        "nan_logits": numerics.nan_logits,
        "mutations": numerics.mutations,
        "nccl": behaviour.nccl,
    }
    few = [check(name, run) for name, run in others.items()]
    return [*first, *by_dtype[: len(by_dtype) // 3], *few, *by_dtype[len(by_dtype) // 3 :]]


def shared(name: str, make: Callable[[numerics.Part], Item], count: int) -> list[Listed]:
    """A check in `count` processes."""
    return [check(f"{name} {i + 1} of {count}", make((i, count))) for i in range(count)]


def measured_sets() -> dict[str, Item]:
    """The first case of every set, then the second of every one, and so on."""
    sets = [measured(part, cases, kernels.measure_kernels, kernels=make) for part, (make, cases) in SETS.items()]
    turns = zip_longest(*(found.items() for found in sets))
    return dict(item for turn in turns for item in turn if item is not None)


def measure_steps() -> list[Listed]:
    few = measured("decode", (*DECODE_CASES, *FORMAT_CASES), decode.measure_decode, ahead=False)
    return [
        listed("kernels", "measure", measured("kernels", KERNEL_CASES, kernels.measure_kernels), seconds=50),
        listed("candidates", "measure", measured("candidates", SMALL_K, candidates.measure_candidates), seconds=40),
        listed("layers", "measure", measured("layers", LAYER_CASES, layers.measure_layers, ahead=False), seconds=75),
        listed("decode", "measure", few, seconds=25),
        listed("kernel sets", "measure", measured_sets(), seconds=42),
        listed("gluon", "measure", measured("gluon", LARGE_K, candidates.measure_candidates, **GLUON), seconds=13),
        listed("skew", "measure", measured("skew", SKEW_CASES, layers.measure_layers, ahead=False), seconds=5),
    ]


def all_steps() -> list[Listed]:
    """Every step that a run starts."""
    device = listed("facts", "facts", {"facts": facts}, needed_by=tuple(phase.name for phase in PHASES))
    return [device, *smoke_steps(), *build_steps(), *look_steps(), *prove_steps(), *measure_steps()]


def find(name: str) -> Listed:
    return next(found for found in [*all_steps(), *hidden_steps()] if found.step.name == name)
