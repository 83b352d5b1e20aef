"""What `make gpu` proves, in the interpreter at tiny sizes; that it can fail; and how a worker reports it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
from gpu_checks import behaviour, numerics, setting, tools  # noqa: E402
from gpu_checks.setting import Setting, Skipped  # noqa: E402
from gpu_run import device, steps, worker  # noqa: E402

from moe_triton.benchmarking import environment  # noqa: E402

TINY = Setting(device=torch.device("cpu"), tiny=True, seconds=0.0)
ITEMS = {name: item for found in steps.all_steps() for name, item in found.items.items()}
ON_CPU = ("layer float32", "buckets float32 1 of 4", "stress", "beyond_int32", "routing", "determinism", "compile")
ON_CPU += (
    "fp8",
    "fp8_codes",
    "quantized",
    "gate",
    "few_tokens",
    "empty",
    "dispatch",
    "nan_logits",
    "mutations",
    "smoke: experts, fp32",
    "address_tables",
)
ON_CPU += ("experts gated float32 1 of 4", "experts ungated float16 2 of 2", "gluon: ping_pong")
ON_GPU = ("facts", "no_recompilation", "no_host_sync", "cuda_graph", "sanitizer", "nccl", "other assembler", "counters")

# numpy's, about the interpreter's infinities and NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("name", ON_CPU)
def test_a_check_holds_in_the_interpreter(name: str) -> None:
    assert ITEMS[name](TINY)


@pytest.mark.parametrize("name", ON_GPU)
def test_a_check_that_needs_a_gpu_says_so(name: str) -> None:
    with pytest.raises(Skipped, match="needs a GPU"):
        ITEMS[name](TINY)


def test_everything_that_is_built_or_measured_needs_a_gpu() -> None:
    for found in steps.all_steps():
        if found.step.phase in ("build", "measure", "look") and not found.step.name.startswith("smoke"):
            for name, item in found.items.items():
                with pytest.raises(Skipped, match="needs a GPU"):
                    item(TINY)
                assert name


def test_every_check_is_tested_here() -> None:
    proofs = [found.step.name for found in steps.all_steps() if found.step.phase == "prove"]
    kinds = {
        name.split(" float")[0].split(" bfloat")[0].replace("cooperative", "ping_pong").removesuffix("_cluster")
        for name in proofs
    }
    assert kinds <= {name.split(" float")[0] for name in (*ON_CPU, *ON_GPU)}


def test_shares_are_the_whole() -> None:
    parts = [list(numerics.share(range(11), (i, 4))) for i in range(4)]
    assert sorted(number for part in parts for number in part) == list(range(11))


def test_the_form_furthest_from_the_first_is_right_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transposed, interleaved, in tensors of their own."""
    monkeypatch.setattr(behaviour, "FORMS", behaviour.FORMS[-1:])
    assert "1 shapes against float64" in behaviour.stress(TINY)


# Each check can fail --------------------------------------------------------------------------------------------------


def unwritten(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Fresh memory through a function that the tests' own poison does not know."""
    return torch.empty_permuted(shape, tuple(range(len(shape))), dtype=dtype)


ORIGINAL = behaviour.run_experts


def test_a_race_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run a little different: as if a copy had been read too early."""
    original, calls = behaviour.run_problem, []

    def broken(problem, sequence):
        found = original(problem, sequence)
        calls.append(problem)
        found[0].view(-1)[0] += 1e-3 * len(calls)
        return found

    monkeypatch.setattr(behaviour, "run_problem", broken)
    with pytest.raises(AssertionError, match="bits: T="):
        behaviour.stress(TINY)


def test_wrong_bits_that_repeat_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = behaviour.run_problem

    def wrong(problem, sequence):
        found = original(problem, sequence)
        found[3][1] = 0  # one expert's gradient
        return found

    monkeypatch.setattr(behaviour, "run_problem", wrong)
    with pytest.raises(AssertionError, match="relative RMS error"):
        behaviour.stress(TINY)


def test_a_schedule_that_did_not_run_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that has it, the plain kernel behind the same function is no proof of it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(numerics, "GLUON_SHAPES", ((64, 16, "swiglu", False, True),))
    monkeypatch.setattr(numerics, "make_problem", lambda *_, **__: None)
    monkeypatch.setattr(numerics, "run", lambda problem, **_: {})
    with pytest.raises(AssertionError, match="launched: "):
        numerics.gluon("ping_pong")(Setting(device=torch.device("cpu")))


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
        numerics.buckets(torch.float32)(TINY)


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
    with setting.poisoned():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert unwritten(3, dtype=dtype).isnan().all()
        assert (unwritten(2, dtype=torch.int32) == 2**31 - 1).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_compilations_are_counted_and_the_hook_is_put_back() -> None:
    import triton

    class Fn:
        name = "up_kernel"

    before = triton.knobs.runtime.jit_post_compile_hook
    with setting.compilations() as names:
        triton.knobs.runtime.jit_post_compile_hook(key="k", repr="r", fn=Fn(), compile={}, already_compiled=False)
    assert names == ["up_kernel"]
    assert triton.knobs.runtime.jit_post_compile_hook is before


# The worker -----------------------------------------------------------------------------------------------------------


def test_an_item_in_this_process() -> None:
    def skipped(setting: Setting) -> str:
        raise Skipped("not here")

    def lost(setting: Setting) -> str:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def full(setting: Setting) -> str:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore words")

    items = {"good": lambda _: "fine", "figures": lambda _: {"ms": 3.0}, "skipped": skipped, "full": full}
    items |= {"wrong": lambda _: {"status": "mismatch", "note": "x"}, "lost": lost, "after": lambda _: "never"}
    reports: list[dict] = []
    code = worker.run_items(items, Setting(device=torch.device("cpu"), seconds=60.0), reports.append)
    assert code == worker.MISTAKE  # nothing follows an error of the device
    found = {report["item"]: report for report in reports if "status" in report}
    assert {name: report["status"] for name, report in found.items()} == {
        "good": "ok", "figures": "ok", "skipped": "skipped", "full": "out of memory", "wrong": "mismatch",
        "lost": "failed",
    }  # fmt: skip
    assert found["figures"]["ms"] == 3.0
    assert found["full"]["note"] == "CUDA out of memory. Tried"
    assert [report["item"] for report in reports if "status" not in report] == [*list(items)[:-1]]


def test_an_item_that_would_not_fit_is_not_begun() -> None:
    now = [0.0]

    def item(setting: Setting) -> str:
        now[0] += 10.0
        return f"{setting.seconds:.0f} s"

    reports: list[dict] = []
    setting = Setting(device=torch.device("cpu"), seconds=35.0)
    assert worker.run_items(dict.fromkeys("abcde", item), setting, reports.append, clock=lambda: now[0]) == 0
    assert [(r["item"], r["note"]) for r in reports if "status" in r] == [("a", "35 s"), ("b", "25 s"), ("c", "15 s")]


def test_a_worker_prints_its_results() -> None:
    root = BENCHMARKS.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(root / name) for name in ("src", "kernels"))}
    command = [*tools.worker("mutations", ["mutations"], 3), "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    begun, found = map(json.loads, done.stdout.splitlines())
    assert begun == {"item": "mutations"}
    assert (found["status"], found["note"]) == ("ok", "4 mutations noticed")


# Tools ----------------------------------------------------------------------------------------------------------------

COUNTED = """==PROF== Connected to process 1
{"item": "profiled"}
"ID","Process ID","Process Name","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","python3","up_kernel","GPU Speed Of Light Throughput","DRAM Frequency","hz","3,201,000,000"
"0","1","python3","up_kernel","GPU Speed Of Light Throughput","SM Busy","%","71.5"
"0","1","python3","up_kernel","","","",""
"1","1","python3","down_kernel","Occupancy","Waves","","2"
==PROF== Disconnected
"""


def test_counters_are_read() -> None:
    assert tools.read_counters(COUNTED) == [
        {"kernel": "up_kernel", "DRAM Frequency [hz]": "3,201,000,000", "SM Busy [%]": "71.5"},
        {"kernel": "down_kernel", "Waves": "2"},
    ]
    assert tools.read_counters("==ERROR== no device") == []


def test_the_assemblers_version(tmp_path: Path) -> None:
    ptxas = tmp_path / "ptxas"
    ptxas.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    ptxas.chmod(0o755)
    assert device.version_of(str(ptxas)) == "12.8.93"
    assert device.version_of(str(tmp_path / "none")) is None
    own = device.version_of(device.own_assembler()["TRITON_PTXAS_PATH"])
    assert own is not None  # Triton brings one, and since 3.9 another one for Hopper
    assert (device.assembler() == own) == device.torch_replaces_assembler()


def test_the_commit_where_there_is_no_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "__file__", "/usr/lib/none.py")
    monkeypatch.delenv("MOE_TRITON_COMMIT", raising=False)
    assert environment.commit() is None
    for given, dirty in (("ab" * 20, False), ("ab" * 20 + "-dirty", True)):
        monkeypatch.setenv("MOE_TRITON_COMMIT", given)
        assert environment.commit() == {"hash": "ab" * 20, "dirty": dirty}


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "sideways"], "only: got sideways, wanted some of smoke bf16, smoke gluon"),
        (["--only", ","], "only: got nothing"),
        (["--budget", "0"], "budget: got 0.0, wanted more than 0"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.strip() == "gpu: no GPU here: nothing was proved or measured"


def test_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OUT", raising=False)
    assert gpu.parse([]).out == BENCHMARKS / "results"
    monkeypatch.setenv("OUT", str(tmp_path))
    found = gpu.parse(["--again"])
    assert (found.out, found.budget, gpu.parse([]).budget) == (tmp_path, 200.0, 560.0)


FACTS = {
    "created": "2026-05-04T03:02:01+00:00",
    "device": {"name": "NVIDIA H200"},
    "versions": {"torch": "2.11.0", "triton": "3.6.0"},
    "commit": {"hash": "0123456789abcdef", "dirty": False},
}


def test_a_run_and_one_more(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real processes of toy steps: the file, the exit code, what `--again` and `--only` run."""
    program = (
        "import json, sys\nfor item in sys.argv[1].split('|'):\n"
        "    print(json.dumps({'item': item}), flush=True)\n"
        "    status = 'failed' if item == sys.argv[2] else 'ok'\n"
        "    print(json.dumps({'item': item, 'status': status, 'note': 'told', 'seconds': 1.0}), flush=True)\n"
    )
    bad = {"item": "empty"}
    ran: list[str] = []

    def command(seed: int):
        def of(step, items, seconds):
            ran.append(step.name)
            return [sys.executable, "-S", "-c", program, "|".join(items), bad["item"]]

        return of

    few = [
        found for found in steps.all_steps() if found.step.name in ("facts", "build 1", "empty", "nccl", "candidates")
    ]
    monkeypatch.setattr(steps, "all_steps", lambda: few)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda device: FACTS)
    monkeypatch.setattr(gpu, "command", command)
    out = ["--out", str(tmp_path)]
    assert gpu.main([*out, "--seed", "7"]) == 1
    path = tmp_path / "nvidia-h200" / "gpu-0123456789.json"
    content = json.loads(path.read_text())
    assert (content["commit"], content["seed"]) == (FACTS["commit"], 7)
    assert content["items"]["empty"] == {
        "phase": "prove", "step": "empty", "status": "failed", "note": "told", "seconds": 1.0
    }  # fmt: skip
    assert content["items"]["nccl"]["status"] == "ok"
    assert "failed: empty: told" in capsys.readouterr().out
    assert sorted(ran) == ["build 1", "candidates", "empty", "facts", "nccl"]
    ran.clear()
    bad["item"] = ""
    assert gpu.main([*out, "--again"]) == 0
    assert sorted(ran) == ["empty", "facts"]
    ran.clear()
    assert gpu.main([*out, "--only", "nccl"]) == 0
    assert sorted(ran) == ["facts", "nccl"]
    assert json.loads(path.read_text())["items"]["empty"]["status"] == "ok"  # kept
