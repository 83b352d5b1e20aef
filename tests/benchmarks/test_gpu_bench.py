"""benchmarks/gpu_bench.py: what it measures, tried in the interpreter; how it resumes; the page that it makes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_bench  # noqa: E402
from gpu_bench import Item  # noqa: E402
from gpu_benches import kernels, layers, page  # noqa: E402
from gpu_benches.kernels import kernel_calls, measure_kernels  # noqa: E402
from gpu_benches.layers import OURS, PEER, measure_layers  # noqa: E402
from gpu_benches.limits import measured_device  # noqa: E402

from moe_triton.benchmarking.cases import Case, make_workload  # noqa: E402
from moe_triton.benchmarking.timing import CpuTimer  # noqa: E402
from moe_triton_kernels.tools.floors import FLOORS  # noqa: E402

# numpy's, about the interpreter's infinities
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CPU = torch.device("cpu")
TINY = Case(tokens=6, hidden=16, intermediate=16, experts=3, top_k=2)
QUICK = {"budget_s": 0.0, "min_rounds": 1, "size": 32, "copied": 1024}
LAUNCHED_IN_PARTS = {"topk_sums", "permutation_count", "permutation_scan", "permutation_keep", "permutation_place"}
LAUNCHED_IN_PARTS |= {"row_pieces", "sum_pieces"}


class OneCall:
    """A timer that makes every call once, and says that it took a millisecond."""

    warm_up = long_warm_up = 0

    def measure(self, call, calls: int) -> float:
        call()
        return 1e-3


# What is measured -----------------------------------------------------------------------------------------------------


def test_every_kernel_is_measured_against_its_floor() -> None:
    case = Case(tokens=6, hidden=16, intermediate=16, experts=3, top_k=2, activation="gpt_oss", bias=True)
    found = measure_kernels(case, CPU, OneCall(), **QUICK)
    assert set(found["kernels"]) == set(FLOORS) - LAUNCHED_IN_PARTS == set(page.KERNELS)
    assert found["dense_flops"] == pytest.approx(2 * 32**3 / 1e-3)
    assert found["copy_bytes_s"] == pytest.approx(2 * 1024 / 1e-3)
    up = found["kernels"]["up"]
    work = FLOORS["up"](case.shape)
    assert (up["flops"], up["bytes"]) == (work.flops, work.bytes)
    floor = max(work.flops / found["dense_flops"], work.bytes / found["copy_bytes_s"])
    assert up["floor_s"] == pytest.approx(floor)
    assert up["of_floor"] == pytest.approx(floor / 1e-3)


def test_the_kernels_run_on_a_real_problem() -> None:
    """What is timed is a training step: its parts give the layer's own output and gradients."""
    case = Case(tokens=6, hidden=16, intermediate=16, experts=3, top_k=2)
    workload = make_workload(case, CPU)
    calls = kernel_calls(workload)
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
    item = Item(part="layers", case=TINY)
    found = gpu_bench.measure_item(item, CPU, OneCall(), **QUICK)
    assert found["status"] == "mismatch"
    assert "forward" not in found["rows"][PEER]
    assert "forward" in found["rows"][OURS]


def test_a_shape_that_the_peer_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tokens=6, hidden=16, intermediate=16, experts=3, top_k=2, activation="gpt_oss", bias=True)
    found = gpu_bench.measure_item(Item(part="layers", case=case), CPU, OneCall(), **QUICK)
    assert found["status"] == "ok"
    assert found["rows"][PEER]["status"] == "not applicable"


def test_backward_is_the_whole_less_its_forward() -> None:
    assert layers.difference([3.0, None, 5.0], [1.0, 1.0, None]) == [2.0, None, None]


def test_a_failure_belongs_to_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore words")

    for error, status in ((out_of_memory, "out of memory"), (lambda *_, **__: 1 / 0, "failed")):
        monkeypatch.setitem(gpu_bench.PARTS, "kernels", (error, ("sonic-12",)))
        found = gpu_bench.measure_item(Item(part="kernels", case=TINY), CPU, CpuTimer())
        assert found["status"] == status
        assert "\n" not in found["note"]


def test_limits_are_of_the_same_rounds() -> None:
    device = measured_device("x", {"dense": [2e-3, None, 4e-3], "copy": [1e-3, 1e-3, 1e-3]}, size=100, copied=500)
    assert device.flops("bf16") == pytest.approx(2e6 / 3e-3)
    assert device.bandwidth == pytest.approx(1e6)
    with pytest.raises(RuntimeError, match="were not measured"):
        measured_device("x", {"dense": [], "copy": [1.0]}, size=1, copied=1)


# Parts, and going on --------------------------------------------------------------------------------------------------


def test_the_parts_cover_the_shapes() -> None:
    counts = {part: len(gpu_bench.all_items([part])) for part in gpu_bench.PARTS}
    assert counts["kernels"] == counts["layers"] == 12 + 7
    keys = [item.key for item in gpu_bench.all_items(list(gpu_bench.PARTS))]
    assert len(keys) == len(set(keys))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def go_on(
    done: dict[str, dict], seconds: float, budget: float, status: str = "ok", note: str = ""
) -> tuple[list, list]:
    clock, tried = Clock(), []

    def measure(item: Item) -> dict:
        clock.now += seconds
        return {"status": status, "note": note}

    def on_item(item: Item, found: dict) -> None:
        tried.append(item.key)
        done[item.key] = found

    items = gpu_bench.all_items(["kernels"])
    left = gpu_bench.run_items(items, done, measure, budget_s=budget, on_item=on_item, clock=clock)
    return tried, left


def test_it_goes_on_where_it_stopped() -> None:
    done: dict[str, dict] = {}
    tried, left = go_on(done, seconds=10.0, budget=75.0)
    assert len(tried) == 7  # an eighth would end after 80 seconds
    assert len(left) == 12
    again, left = go_on(done, seconds=10.0, budget=1000.0)
    assert len(again) == 12
    assert left == []
    assert not set(tried) & set(again)
    assert go_on(done, seconds=10.0, budget=1000.0) == ([], [])


def test_what_failed_is_tried_again() -> None:
    done = {item.key: {"status": "ok", "note": ""} for item in gpu_bench.all_items(["kernels"])}
    key = next(iter(done))
    done[key] = {"status": "failed", "note": ""}
    assert go_on(done, seconds=1.0, budget=100.0)[0] == [key]


def test_nothing_follows_an_error_of_the_device() -> None:
    tried, left = go_on({}, 1.0, 100.0, status="failed", note="RuntimeError: CUDA error: an illegal memory access")
    assert len(tried) == 1
    assert len(left) == 18


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
    more = {"part": "layers", "title": title, "status": "ok", "note": "", "saved_of_limit": 1.012}
    return {**limits, **more, "rows": {OURS: ours, PEER: peer}}


def write(folder: Path, kind: str, content: dict) -> None:
    path = folder / "nvidia-h200" / f"{kind}-{content['commit']['hash'][:10]}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def test_a_page_without_results_says_so(tmp_path: Path) -> None:
    text = page.page(tmp_path)
    assert page.NONE in text
    assert page.NO_CHECK in text
    assert "|" not in text


def test_the_page_of_a_run(tmp_path: Path) -> None:
    kernel = {"part": "kernels", "title": "shape a", "status": "ok", "note": ""}
    kernel["kernels"] = {"up": {"of_floor": 0.875, "time_s": spread(1.25e-3)}}
    broken = {"part": "kernels", "title": "shape b", "status": "out of memory", "note": "no room"}
    items = {"1": layer_item("shape a", 0.4, 2.0), "2": layer_item("shape b", 0.9, 8.0), "3": kernel, "4": broken}
    write(tmp_path, "gpu-bench", {**FACTS, "items": items})
    checks = {"layer": {"result": "ok"}, "small": {"result": "ok"}, "nccl": {"result": "skipped"}}
    write(tmp_path, "gpu-check", {**FACTS, "checks": checks})
    text = page.page(tmp_path)
    assert page.NONE not in text
    assert page.NO_CHECK not in text
    assert "NVIDIA H200, 2026-05-04, torch 2.11.0, triton 3.6.0, commit 0123456789" in text
    assert "2 of 3 checks hold; skipped: nccl." in text
    row = "| shape a | 2.000 | 400 | 0.40 | 2.00x | 4.000 | 380 | 0.40 | 2.00x | 1.012 | 3072 |"
    assert row in text
    assert "| geometric mean |  |  | 0.60 | 4.00x |  |  | 0.60 | 4.00x |  |  |" in text
    assert "Dense product 790 TFLOP/s, copy 4.30 TB/s" in text
    assert "| shape a | 0.88 (1250 us) |" in text or "| shape a | 0.87 (1250 us) |" in text
    assert "shape b: out of memory (no room)" in text


def test_only_the_newest_run_of_a_device_is_shown(tmp_path: Path) -> None:
    for day, digit in (("04", "0"), ("06", "1"), ("05", "2")):
        found = copy.deepcopy(FACTS)
        found |= {"created": f"2026-05-{day}T00:00:00+00:00", "commit": {"hash": digit * 40, "dirty": True}}
        write(tmp_path, "gpu-bench", {**found, "items": {"1": layer_item("a", 0.5, 2.0)}})
    text = page.page(tmp_path)
    assert "commit 1111111111 with changes" in text
    assert "0000000000" not in text
    assert "| geometric mean" not in text  # of one row


# The command ----------------------------------------------------------------------------------------------------------


def test_a_run_writes_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    statuses = iter(["ok"] * 18 + ["mismatch"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_bench, "environment", lambda device: FACTS)
    monkeypatch.setattr(gpu_bench, "make_timer", lambda device: OneCall())

    def measure_item(item: Item, device: torch.device, timer, **options) -> dict:
        return {"part": item.part, "status": next(statuses), "note": ""}

    monkeypatch.setattr(gpu_bench, "measure_item", measure_item)
    assert gpu_bench.main(["--part", "kernels", "--out", str(tmp_path)]) == 1
    content = json.loads((tmp_path / "nvidia-h200" / "gpu-bench-0123456789.json").read_text())
    assert content["schema"] == gpu_bench.SCHEMA
    assert content["commit"] == FACTS["commit"]
    assert [item["status"] for item in content["items"].values()] == ["ok"] * 18 + ["mismatch"]
    statuses = iter(["ok"])
    assert gpu_bench.main(["--part", "kernels", "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize("name", ["budget", "seconds"])
def test_bad_arguments(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_bench.main([f"--{name}", "0"]) == 2
    assert f"{name}: got 0.0, wanted more than 0" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    root = BENCHMARKS.parent
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root / 'kernels'}"}
    command = [sys.executable, str(BENCHMARKS / "gpu_bench.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "gpu_bench: no GPU here: nothing was measured"


def test_every_part_measures_with_its_own_function() -> None:
    assert {part: found[0] for part, found in gpu_bench.PARTS.items()} == {
        "kernels": kernels.measure_kernels,
        "layers": layers.measure_layers,
        "skew": layers.measure_layers,
        "decode": layers.measure_layers,
    }
