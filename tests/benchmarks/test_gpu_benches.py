"""What `make gpu` measures, tried in the interpreter, and the page that is made of it."""

from __future__ import annotations

import copy
import functools
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu_benches import candidates, decode, fences, kernel_sets, layers, page, prepare  # noqa: E402
from gpu_benches.kernels import measure_kernels, prepare_kernels  # noqa: E402
from gpu_benches.layers import OURS, PEER, measure_layers  # noqa: E402
from gpu_benches.limits import measured_device  # noqa: E402
from gpu_checks.setting import Setting, Skipped  # noqa: E402
from gpu_run import steps  # noqa: E402

from moe_triton.benchmarking import tuning  # noqa: E402
from moe_triton.benchmarking.cases import Case, make_workload  # noqa: E402
from moe_triton_kernels import launch  # noqa: E402
from moe_triton_kernels.configs import bucket_of  # noqa: E402
from moe_triton_kernels.tools.floors import FLOORS, FP8_FLOORS  # noqa: E402

# numpy's, about the interpreter's infinities
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CPU = torch.device("cpu")
TINY = Case(tokens=6, hidden=16, intermediate=16, experts=3, top_k=2)
LEAST = Case(tokens=2, hidden=16, intermediate=16, experts=2, top_k=1, dtype="float16")
QUICK = {"budget_s": 0.0, "min_rounds": 1, "size": 32, "copied": 1024}
# within the calls of others: "permutation", "topk", "d_weight_down" and "d_weight_up"
PARTS = {"topk_sums", "permutation_count", "permutation_scan", "permutation_keep", "permutation_place"}
PARTS |= {"row_pieces", "sum_pieces"}
ONLY_BLACKWELL = {"mxfp8_rows"}  # it is compiled there, and nothing calls it yet


LARGE = launch.Config(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4)


class OneCall:
    """A timer that makes every call once, and says that it took a millisecond."""

    warm_up = long_warm_up = 0

    def measure(self, call, calls: int) -> float:
        call()
        return 1e-3


def measure_one(part: str, case: Case, measure, monkeypatch: pytest.MonkeyPatch) -> dict:
    """An item of a step, on the CPU and in no time."""
    monkeypatch.setattr(Setting, "need_gpu", lambda self: None)
    monkeypatch.setattr(steps, "make_timer", lambda device, ahead: OneCall())
    quick = {name: value for name, value in QUICK.items() if name != "budget_s"}
    monkeypatch.setattr(steps, "ITEM_S", 0.0)
    return steps.measure_one(part, case, measure, quick, False, Setting(device=CPU))


# What is measured -----------------------------------------------------------------------------------------------------


@functools.cache
def measured(name: str) -> dict:
    """A set of kernels, at the smallest sizes that its operands allow."""
    case = {
        "training": replace(LEAST, activation="gpt_oss", bias=True),
        "fp8": replace(LEAST, bias=True),
        "quantized": replace(LEAST, hidden=32, intermediate=32, format="int4"),
    }.get(name, LEAST)
    return measure_kernels(case, CPU, OneCall(), kernels=getattr(kernel_sets, name), **QUICK)


def test_every_kernel_is_measured_against_its_floor() -> None:
    sets = ("training", "few_tokens", "fp8", "adapters", "quantized")
    assert {make.__name__ for make, _ in steps.SETS.values()} == set(sets[1:])
    names = {kernel.partition(",")[0] for name in sets for kernel in measured(name)["kernels"]}
    assert names == (FLOORS | FP8_FLOORS).keys() - PARTS - ONLY_BLACKWELL
    found, shape = measured("training"), LEAST.shape
    assert found["dense_flops"] == pytest.approx(2 * 32**3 / 1e-3)
    assert found["copy_bytes_s"] == pytest.approx(2 * 1024 / 1e-3)
    up, work = found["kernels"]["up"], FLOORS["up"](shape)
    assert (up["flops"], up["bytes"]) == (work.flops, work.bytes)
    floor = max(work.flops / found["dense_flops"], work.bytes / found["copy_bytes_s"])
    assert up["floor_s"] == pytest.approx(floor)
    assert up["of_floor"] == pytest.approx(floor / 1e-3)


def test_codes_have_a_limit_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"dense": [2e-3], "dense fp8": [1e-3], "copy": [1e-3]}
    device = measured_device("x", times, size=100, copied=500)
    assert device.flops("fp8") == 2 * device.flops("bf16") == pytest.approx(2e9)
    rows = measured("fp8")["kernels"]
    assert rows["fp8_up"]["flops"] == FP8_FLOORS["fp8_up"](LEAST.shape).flops
    monkeypatch.setattr(kernel_sets, "runs_kernels", lambda device: False)
    with pytest.raises(Skipped, match="no products of fp8"):
        kernel_sets.fp8(make_workload(TINY, CPU))


def test_only_kernels_are_timed_without_their_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer has to answer for its launches, a kernel has not."""
    asked: dict[str, bool] = {}
    monkeypatch.setattr(Setting, "need_gpu", lambda self: None)
    for found in steps.measure_steps() + steps.look_steps()[:1]:
        name = found.step.name
        monkeypatch.setattr(steps, "make_timer", lambda device, ahead, name=name: asked.update({name: ahead}))
        item = next(iter(found.items.values()))
        part, case, _, options, ahead = item.args
        steps.measure_one(part, case, lambda *_, **__: {}, options, ahead, Setting(device=CPU))
    assert {name for name, ahead in asked.items() if not ahead} == {"layers", "decode", "skew"}
    assert len(asked) == 8


def test_the_kernels_run_on_a_real_problem() -> None:
    """What is timed is a training step: its parts give the layer's own output and gradients."""
    case = Case(tokens=6, hidden=16, intermediate=16, experts=3, top_k=2)
    workload = make_workload(case, CPU)
    calls = {name: kernel.call for name, kernel in kernel_sets.training(workload).items()}
    block = layers.BLOCKS[OURS].build(workload)
    x = workload.hidden.clone().requires_grad_()
    out = block.forward(x)
    assert torch.equal(calls["combine"](), out)
    gate_up, down = (block.parameters[name] for name in ("gate_up", "down"))
    d_gate_up, d_down = torch.autograd.grad(out, [gate_up, down], workload.grad_out)
    assert torch.equal(calls["d_weight_up"](), d_gate_up)
    assert torch.equal(calls["d_weight_down"](), d_down)


def test_ungated_shapes() -> None:
    assert Case(**{**vars(TINY), "activation": "relu2"}).shape.gated is False
    assert TINY.shape.gated is True


def test_layers_beside_the_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    found = measure_layers(TINY, CPU, OneCall(), **QUICK)
    for name in (OURS, PEER):
        row = found["rows"][name]
        assert row["status"] == "ok", row["note"]
        assert row["forward"]["tflops"] == pytest.approx(TINY.flops("forward") / 1e-3 / 1e12)
        assert set(row["errors"]) == {"output", "hidden", "gate", "gate_up", "down"}
        assert row["saved_bytes"] > 0
    assert found["rows"][PEER]["forward"]["ours_is_faster"]["p50"] == pytest.approx(1.0)
    # X and H, then index and weights of 12 slots, 12 rows and 3 experts
    limit = layers.saved_limit(TINY)
    assert limit == 4 * (6 * 16 + 12 * 32)
    assert limit < found["experts_saved_bytes"] <= limit + 4 * (3 * 12 + 4) + 64
    assert found["saved_of_limit"] == pytest.approx(found["experts_saved_bytes"] / limit)


def test_a_wrong_peer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda h: 1.01 * function(h))
    found = measure_one("layers", TINY, layers.measure_layers, monkeypatch)
    assert found["status"] == "mismatch"
    assert "forward" not in found["rows"][PEER]
    assert "forward" in found["rows"][OURS]


def test_a_shape_that_the_peer_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tokens=6, hidden=16, intermediate=16, experts=3, top_k=2, activation="gpt_oss", bias=True)
    found = measure_one("layers", case, layers.measure_layers, monkeypatch)
    assert "status" not in found  # nothing is wrong
    assert found["rows"][PEER]["status"] == "not applicable"


def test_backward_is_the_whole_less_its_forward() -> None:
    assert layers.difference([3.0, None, 5.0], [1.0, 1.0, None]) == [2.0, None, None]


def test_limits_are_of_the_same_rounds() -> None:
    device = measured_device("x", {"dense": [2e-3, None, 4e-3], "copy": [1e-3, 1e-3, 1e-3]}, size=100, copied=500)
    assert device.flops("bf16") == pytest.approx(2e6 / 3e-3)
    assert device.bandwidth == pytest.approx(1e6)
    with pytest.raises(RuntimeError, match="were not measured"):
        measured_device("x", {"dense": [], "copy": [1.0]}, size=1, copied=1)


# Other configurations, few tokens, fences -----------------------------------------------------------------------------


def test_candidates_are_verified_and_related_to_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def two(problem, config):
        return [replace(config, block_m=32), replace(config, block_m=48)]

    monkeypatch.setattr(candidates, "first_candidates", two)
    found = candidates.measure_candidates(TINY, CPU, OneCall(), budget_s=0.0, ops=("down",))
    down = found["ops"]["down"]
    assert down["runs"].startswith("16x16x16")
    assert [(tried["status"], tried["ratio"]) for tried in down["tried"].values()] == [("ok", 1.0), ("failed", None)]
    assert candidates.prepare_candidates(TINY, "down", CPU, OneCall()) == "1 of 2 candidates of down run"


def test_a_wrong_candidate_is_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "first_candidates", lambda problem, config: [replace(config, block_m=32)])
    monkeypatch.setattr(candidates.Searched, "error", lambda self, config: 1.0)
    found = candidates.measure_candidates(TINY, CPU, OneCall(), budget_s=0.0, ops=("up",))
    assert found["status"] == "mismatch"
    assert found["note"].startswith("up 32x16x16")


def test_schedules_are_candidates_of_what_has_them() -> None:
    """And what has none, or an architecture that cannot run them, has no such candidate."""
    running = launch.Config(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4)
    for op, dtype, architecture, count in (
        ("up", "bfloat16", "sm_90", 2),
        ("d_rows", "float16", "sm_90", 2),
        ("d_weight", "bfloat16", "sm_90", 0),
        ("up", "float32", "sm_90", 0),
        ("up", "bfloat16", "sm_100", 0),
    ):
        case = replace(TINY, dtype=dtype)
        found = tuning.first_candidates(tuning.Problem(case=case, op=op, architecture=architecture), running)
        assert len([config for config in found if candidates.is_warp_specialized(config)]) == count
        assert running in found


def test_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU there is no graph; the floor is that of the touched experts' weights."""
    found = decode.measure_decode(replace(TINY, tokens=1), CPU, OneCall(), budget_s=0.0)
    assert found["experts_touched"] == 2
    assert found["ways"]["eager"]["status"] == "ok"
    assert found["ways"]["eager"]["of_floor"] == pytest.approx(found["floor_s"] / 1e-3)
    assert found["ways"]["graph"] == {"status": "not measured", "note": "CUDA graphs need a GPU"}
    assert "status" not in found


def test_fences_are_left_out_for_the_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "compiler_fences", lambda: True)
    with pytest.raises(Skipped, match="puts the fence itself"):
        fences.measure_fences(TINY, CPU, OneCall(), budget_s=0.0)
    monkeypatch.setattr(launch, "compiler_fences", lambda: False)
    seen = []
    call = fences.without_fence(lambda: seen.append(launch.tile_of("sm_90", LARGE).FENCE))
    assert launch.tile_of("sm_90", LARGE).FENCE
    call()
    assert seen == [False]
    assert launch.tile_of("sm_90", LARGE).FENCE
    assert fences.prepare_fences(TINY, CPU) == TINY.title()
    found = fences.measure_fences(TINY, CPU, OneCall(), budget_s=0.0)
    assert set(found["stages"]) == set(fences.STAGES)
    assert all(stage["same_bits"] for stage in found["stages"].values())


# What is compiled before ----------------------------------------------------------------------------------------------


def test_a_small_problem_runs_the_same_kernels() -> None:
    for case in (*steps.LAYER_CASES, *steps.DECODE_CASES):
        few = prepare.few(case)
        assert (few.hidden, few.intermediate, few.top_k, few.dtype) == (
            case.hidden, case.intermediate, case.top_k, case.dtype
        )  # fmt: skip
        assert bucket_of(few.tokens * few.top_k / few.experts) == bucket_of(case.tokens * case.top_k / case.experts)
        assert (few.experts % 16 == 0) == (case.experts % 16 == 0)
        assert few.experts * few.weight_elements * 2 < 8e9  # several fit beside each other
    assert len(prepare.targets([*steps.LAYER_CASES, *steps.SKEW_CASES])) == len(steps.LAYER_CASES) - 2  # T is no matter


def test_preparing_runs_the_layer_and_the_router() -> None:
    assert prepare.prepare(TINY, CPU) == prepare.few(TINY).title()


def test_preparing_a_set_runs_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    kernel = kernel_sets.Kernel(lambda: ran.append(1), FLOORS["up"](TINY.shape), "fp32")
    monkeypatch.setattr(Setting, "need_gpu", lambda self: None)
    make = lambda workload: dict.fromkeys((str(workload.case.tokens), str(workload.case.experts)), kernel)  # noqa: E731
    assert prepare_kernels(TINY, make, CPU) == f"2 kernels of {TINY.title()}"
    assert len(ran) == 2
    few = replace(TINY, tokens=8, experts=16)
    assert "T=8" in steps.build_kernels(few, make, Setting(device=CPU))  # as it is
    many = replace(few, tokens=4096)
    assert prepare.few(many).title() in steps.build_kernels(many, make, Setting(device=CPU))


def test_the_steps_cover_the_shapes() -> None:
    found = {step.step.name: step.items for step in steps.measure_steps()}
    assert len(found["layers"]) == 12 + 7 + 1
    assert len(found["kernels"]) == 8
    assert {case.tokens for case in steps.DECODE_CASES} == {1, 8, 64}


# The page -------------------------------------------------------------------------------------------------------------

FACTS = {
    "created": "2026-05-04T03:02:01+00:00",
    "device": {"name": "NVIDIA H200"},
    "versions": {"torch": "2.11.0", "triton": "3.6.0"},
    "commit": {"hash": "0123456789abcdef", "dirty": False},
}


def spread(value: float) -> dict[str, float]:
    return {"p20": value, "p50": value, "p80": value}


def mode(seconds: float, tflops: float, share: float, factor: float | None) -> dict:
    faster = None if factor is None else spread(factor)
    return {"time_s": spread(seconds), "tflops": tflops, "of_dense": share, "ours_is_faster": faster}


def layer_item(title: str, share: float, factor: float) -> dict:
    ours = {"status": "ok", "note": "", "label": "ours", "peak_bytes": 3 << 30}
    ours |= {"forward": mode(2e-3, 400.0, share, 1.0), "backward": mode(4e-3, 380.0, share, 1.0)}
    peer = {"status": "ok", "note": "", "label": "peer"}
    peer |= {"forward": mode(4e-3, 200.0, share / 2, factor), "backward": mode(8e-3, 190.0, share / 2, factor)}
    limits = {"dense_flops": 790e12, "copy_bytes_s": 4.3e12}
    more = {"phase": "measure", "title": title, "status": "ok", "note": "", "saved_of_limit": 1.012}
    return {**limits, **more, "rows": {OURS: ours, PEER: peer}}


def write(folder: Path, content: dict) -> None:
    path = folder / "nvidia-h200" / f"gpu-{content['commit']['hash'][:10]}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def test_a_page_without_results_says_so(tmp_path: Path) -> None:
    text = page.page(tmp_path)
    assert page.NONE in text
    assert "|" not in text
    assert page.gpu_table(tmp_path) == page.NONE


def test_the_page_of_a_run(tmp_path: Path) -> None:
    good = {"phase": "measure", "title": "shape a", "status": "ok", "note": ""}
    tried = {
        "gluon ping_pong": {"status": "ok", "ratio": 0.912, "note": ""},
        "64x64": {"status": "failed", "ratio": None, "note": "no shared memory"},
    }
    way = {"status": "ok", "time_s": spread(2e-5), "of_floor": 0.83}
    stage = {"time_s": spread(3e-4), "without_over_with": spread(0.9), "same_bits": False}
    facts = {"phase": "facts", "status": "ok", "nvidia_smi": "NVIDIA H200, 580", "note": "790 TFLOP/s, 4.30 TB/s"}
    items = {
        "facts": {**facts, "assemblers": {"triton": "12.8.93", "torch": "13.0.88"}},
        "layers: shape a": layer_item("shape a", 0.4, 2.0),
        "layers: shape b": layer_item("shape b", 0.9, 8.0),
        "kernels: shape a": {**good, "kernels": {"up": {"of_floor": 0.875, "time_s": spread(1.25e-3)}}},
        "fp8 kernels: shape a": {**good, "kernels": {"quantize_rows": {"of_floor": 0.5, "time_s": spread(1e-3)}}},
        "kernels: shape b": {**good, "title": "shape b", "status": "out of memory", "note": "no room"},
        "decode: shape a": {**good, "floor_s": 1.7e-5, "ways": {"graph": way, "eager": {"status": "failed"}}},
        "gluon: shape a": {**good, "ops": {"down": {"runs": "128x256x64", "tried": tried}}},
        "fences: shape a": {**good, "stages": {"up": stage}},
        "layer": {"phase": "prove", "status": "ok", "note": ""},
        "smoke: small": {"phase": "build", "status": "ok", "note": ""},
        "nccl": {"phase": "prove", "status": "not run", "note": ""},
    }
    write(tmp_path, {**FACTS, "items": items})
    text = page.page(tmp_path)
    assert page.NONE not in text
    assert "NVIDIA H200, 2026-05-04, torch 2.11.0, triton 3.6.0, commit 0123456789" in text
    assert "NVIDIA H200, 580: 790 TFLOP/s, 4.30 TB/s. Assemblers: triton's 12.8.93, torch's 13.0.88." in text
    assert "2 of 3 checks hold; not run: nccl." in text
    row = "| shape a | 2.000 | 400 | 0.40 | 2.00x | 4.000 | 380 | 0.40 | 2.00x | 1.012 | 3072 |"
    assert row in text
    assert "| geometric mean |  |  | 0.60 | 4.00x |  |  | 0.60 | 4.00x |  |  |" in text
    assert "Dense product 790 TFLOP/s, copy 4.30 TB/s" in text
    assert "| kernel | shape a |" in text
    assert "| up | 0.88 (1250 us) |" in text or "| up | 0.87 (1250 us) |" in text
    assert "| quantize_rows | 0.50 (1000 us) |" in text
    assert "kernels: shape b: out of memory (no room)" in text
    assert "| shape a | 20 | 0.83 | failed |  | 17 |" in text
    assert "| shape a | down | 128x256x64 | gluon ping_pong | 0.912 |" in text
    assert "| failed: no shared memory |" in text
    assert "| shape a | up | 300 | 0.900 | others |" in text
    assert "| 2 | 0.60 | 4.00x | 0.60 | 4.00x |" in page.gpu_table(tmp_path)
    first, _ = page.layer_lines(items)
    assert first == "layers: shape a: forward 0.40 of dense, backward 0.40 of dense"


def test_a_page_of_the_first_seconds(tmp_path: Path) -> None:
    """Every prefix of a run makes a page."""
    write(tmp_path, {**FACTS, "items": {name: {"phase": "prove", "status": "not run", "note": ""} for name in "ab"}})
    assert "0 of 2 checks hold; not run: a; b." in page.page(tmp_path)
    assert "| 0 | not measured |" in page.gpu_table(tmp_path)


def test_only_the_newest_run_of_a_device_is_shown(tmp_path: Path) -> None:
    for day, digit in (("04", "0"), ("06", "1"), ("05", "2")):
        found = copy.deepcopy(FACTS)
        found |= {"created": f"2026-05-{day}T00:00:00+00:00", "commit": {"hash": digit * 40, "dirty": True}}
        write(tmp_path, {**found, "items": {"layers: a": layer_item("a", 0.5, 2.0)}})
    text = page.page(tmp_path)
    assert "commit 1111111111 with changes" in text
    assert "0000000000" not in text
    assert "| geometric mean" not in text  # of one row
