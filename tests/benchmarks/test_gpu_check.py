"""benchmarks/gpu_check.py: its checks in the interpreter at tiny sizes, and how it runs and reports them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_check  # noqa: E402
from gpu_checks import behaviour, harness, numerics  # noqa: E402
from gpu_checks.harness import Setting, Skipped  # noqa: E402

TINY = Setting(device=torch.device("cpu"), tiny=True, seconds=0.0)
ON_CPU = ("layer", "buckets", "stress", "beyond_int32", "routing", "determinism", "compile", "empty", "dispatch")
ON_CPU += ("nan_logits", "mutations", "small", "experts_gated_float32", "experts_ungated_float16")
ON_GPU = ("no_recompilation", "no_host_sync", "cuda_graph", "sanitizer", "nccl")

# numpy's, about the interpreter's infinities and NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("name", ON_CPU)
def test_a_check_holds_in_the_interpreter(name: str) -> None:
    assert gpu_check.CHECKS[name](TINY)


@pytest.mark.parametrize("name", ON_GPU)
def test_a_check_that_needs_a_gpu_says_so(name: str) -> None:
    with pytest.raises(Skipped, match="needs a GPU"):
        gpu_check.CHECKS[name](TINY)


def test_every_check_is_tested_here() -> None:
    more = {f"experts_{kind}_{numerics.name_of(dtype)}" for kind in ("gated", "ungated") for dtype in gpu_check.DTYPES}
    assert {*ON_CPU, *ON_GPU, *more} == set(gpu_check.CHECKS)


# Each check can fail --------------------------------------------------------------------------------------------------


def broken_experts(arguments: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
    """Every run a little different: as if a copy had been read too early."""
    found = ORIGINAL(arguments, backend)
    broken_experts.calls += 1
    found[0].view(-1)[0] += 1e-3 * broken_experts.calls
    return found


def unwritten(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Fresh memory through a function that the tests' own poison does not know."""
    return torch.empty_permuted(shape, tuple(range(len(shape))), dtype=dtype)


ORIGINAL = behaviour.run_experts
broken_experts.calls = 0


def test_a_race_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behaviour, "run_experts", broken_experts)
    with pytest.raises(AssertionError, match="tokens="):
        behaviour.stress(TINY)


def test_changing_bits_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = behaviour.forward_backward

    def changing(*arguments):
        return [x + 1e-6 * torch.rand_like(x) for x in original(*arguments)]

    monkeypatch.setattr(behaviour, "forward_backward", changing)
    with pytest.raises(AssertionError, match="repeat 0"):
        behaviour.determinism(TINY)


def test_an_output_that_is_not_written_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert without rows whose gradient nobody writes: the poison shows."""
    from moe_triton.backends.triton import problem

    def forgetful(left, right, source, offsets, **options):
        return unwritten(offsets.shape[0] - 1, left.shape[1], right.shape[1], dtype=left.dtype)

    monkeypatch.setattr(problem, "d_weight", forgetful)
    with pytest.raises(AssertionError, match="not finite"):
        numerics.buckets(TINY)


def test_an_index_that_wraps_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an int32 offset would do: the last tokens get what belongs to the first ones."""

    def wrapped(arguments, backend):
        found = ORIGINAL(arguments, backend)
        found[0][-5:] = found[0][:5].clone()
        return found

    monkeypatch.setattr(behaviour, "run_experts", wrapped)
    with pytest.raises(AssertionError, match="relative RMS error"):
        behaviour.beyond_int32(TINY)


def test_poison_fills_what_nobody_wrote() -> None:
    with harness.poisoned():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert unwritten(3, dtype=dtype).isnan().all()
        assert (unwritten(2, dtype=torch.int32) == 2**31 - 1).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_compilations_are_counted_and_the_hook_is_put_back() -> None:
    import triton

    class Fn:
        name = "up_kernel"

    before = triton.knobs.runtime.jit_post_compile_hook
    with harness.compilations() as names:
        triton.knobs.runtime.jit_post_compile_hook(key="k", repr="r", fn=Fn(), compile={}, already_compiled=False)
    assert names == ["up_kernel"]
    assert triton.knobs.runtime.jit_post_compile_hook is before


# The runner -----------------------------------------------------------------------------------------------------------


def program(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_results_of_processes() -> None:
    """A good one, one that fails, one that is skipped, one that crashes and one that never ends."""
    lines = {
        "good": 'print(\'{"result": "ok", "detail": "3 cases", "seconds": 1}\')',
        "bad": 'print("noise"); print(\'{"result": "failed", "detail": "AssertionError: x", "seconds": 1}\')',
        "gone": 'print(\'{"result": "skipped", "detail": "no tool", "seconds": 1}\')',
        "crash": 'import os; print("before", flush=True); os._exit(7)',
        "hang": "import time; time.sleep(60)",
    }
    results: dict[str, dict] = {}
    begin = time.perf_counter()
    harness.run_apart(
        list(lines), lambda name: program(lines[name]), jobs=5, budget_s=3.0, on_result=results.__setitem__
    )
    assert time.perf_counter() - begin < 30
    found = {name: (result["result"], result["detail"]) for name, result in results.items()}
    assert found == {
        "good": ("ok", "3 cases"),
        "bad": ("failed", "AssertionError: x"),
        "gone": ("skipped", "no tool"),
        "crash": ("failed", "exit 7: before"),
        "hang": ("failed", "out of time: killed"),
    }
    lines = harness.table(results).splitlines()
    assert len(lines) == 6
    assert lines[0].split() == ["check", "result", "seconds", "detail"]


def test_what_gets_no_turn_is_not_run() -> None:
    results: dict[str, dict] = {}
    sleep = program("import time; time.sleep(60)")
    harness.run_apart(["a", "b", "c"], lambda name: sleep, jobs=1, budget_s=0.2, on_result=results.__setitem__)
    assert [results[name]["result"] for name in "abc"] == ["failed", "not run", "not run"]


def test_a_check_in_this_process() -> None:
    def skipped(setting: Setting) -> str:
        raise Skipped("not here")

    def failed(setting: Setting) -> str:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert harness.run_here(lambda setting: "fine", TINY)["result"] == "ok"
    assert harness.run_here(skipped, TINY)["detail"] == "not here"
    assert harness.run_here(failed, TINY)["detail"].startswith("RuntimeError: CUDA error")


FACTS = {"device": {"name": "NVIDIA H200"}, "versions": {}, "commit": {"hash": "0123456789abcdef", "dirty": False}}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A machine with a GPU of which every check has the result that the test says, else "ok"."""
    special: dict[str, str] = {}

    def run_apart(names, command, *, jobs, budget_s, on_result):
        for name in names:
            assert "--worker" in command(name)
            on_result(name, {"result": special.get(name, "ok"), "detail": "told so", "seconds": 1.0})

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "environment", lambda device: FACTS)
    monkeypatch.setattr(harness, "run_apart", run_apart)
    return special


def test_the_file_and_the_exit_code(gpu: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu["nccl"] = "skipped"
    assert gpu_check.main(["--out", str(tmp_path), "--seed", "7"]) == 0
    path = tmp_path / "nvidia-h200" / "gpu-check-0123456789.json"
    content = json.loads(path.read_text())
    assert content["schema"] == harness.SCHEMA
    assert content["commit"] == FACTS["commit"]
    assert content["settings"]["seed"] == 7
    assert list(content["checks"]) == list(gpu_check.CHECKS)
    assert str(path) in capsys.readouterr().out

    gpu["layer"] = "failed"
    assert gpu_check.main(["--out", str(tmp_path), "--only", "layer,empty"]) == 1
    content = json.loads(path.read_text())
    assert content["checks"]["layer"]["result"] == "failed"
    assert content["checks"]["nccl"]["result"] == "skipped"  # kept
    gpu["layer"] = "not run"
    assert gpu_check.main(["--out", str(tmp_path), "--only", "layer"]) == 1


def test_a_worker_prints_its_result(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu_check.main(["--worker", "mutations", "--device", "cpu", "--seed", "3"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["detail"] == "4 mutations noticed"


def test_the_name_of_the_file() -> None:
    dirty = {**FACTS, "commit": {"hash": "f" * 40, "dirty": True}}
    folder = Path("results")
    assert harness.result_path(dirty, "gpu-check", folder).name == "gpu-check-ffffffffff-dirty.json"
    assert harness.result_path({**FACTS, "commit": None}, "gpu-bench", folder).name == "gpu-bench-unknown.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "sideways"], "only: got sideways, wanted one of experts_gated_bfloat16"),
        (["--only", ","], "only: got nothing"),
        (["--budget", "0"], "budget: got 0.0, wanted more than 0"),
        (["--jobs", "-1"], "jobs: got -1, wanted more than 0"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    root = BENCHMARKS.parent
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root / 'kernels'}"}
    command = [sys.executable, str(BENCHMARKS / "gpu_check.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "gpu_check: no GPU here: nothing was checked"
