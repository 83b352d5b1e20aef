"""Host time of a layer's forward pass with few tokens: on a CPU, with launches that stop short of the driver.

    python benchmarks/host_overhead.py --tokens 1,8,64 --repeats 2000

Five times of a forward under `torch.no_grad` in microseconds, each the least of many means of 4 calls:

forward  Every launch binds and specialises its arguments with Triton's own code for sm_90, and looks the compiled
         kernel up as Triton does; then it returns. What the driver takes for a launch is not in it.
python   The same with launches that do nothing at all.
torch    Of that, torch's own operators: every call of torch that returns a tensor (allocations, views, casts) is
         recorded once and then repeated by itself with the same arguments, on a CPU. Attributes of tensors, such as
         shapes, are not among them.
ours     python less torch: what this package adds to its operators and launches, with the calls of the three modules.
floor    Of ours, what nothing can do without: three modules that call each other, and the recorded launches.

Beside them, how many functions of Python and of C are called, without those of the launches: a number that does not
depend on what else runs on the machine.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import json
import os
import platform
import pstats
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "kernels")]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from moe_triton import MoE, runtime  # noqa: E402
from moe_triton.benchmarking.environment import caption, environment  # noqa: E402
from moe_triton_kernels import launch  # noqa: E402

LAUNCH_OPTIONS = ("num_warps", "num_stages")
BATCH = 4
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


class Launches:
    """Stands for `JITFunction.run`: everything up to the compiled kernel, or nothing."""

    def __init__(self) -> None:
        self.backend = make_backend(GPUTarget("cuda", 90, 32))
        self.binders: dict[Any, Any] = {}
        self.kernels: dict[Any, dict[str, object]] = {}
        self.bind = True
        self.seen: list[tuple[str, Callable[[], None]]] | None = None

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if self.seen is not None:
            self.seen.append((kernel.__name__, lambda: kernel[grid](*args, **kwargs)))
        if not self.bind:
            return
        binder = self.binders.get(kernel)
        if binder is None:
            binder = self.binders[kernel] = create_function_from_signature(
                kernel.signature, kernel.params, self.backend
            )
            self.kernels[kernel] = {}
        options = {name: kwargs.pop(name) for name in LAUNCH_OPTIONS if name in kwargs}
        bound, specialization, _ = binder(*args, **kwargs)
        self.kernels[kernel].setdefault(f"{specialization}{options}", bound)


def fake_gpu() -> Launches:
    """Make this process launch as on an H100, on CPU tensors, and launch nothing."""
    launches = Launches()
    JITFunction.run = lambda kernel, *args, **kwargs: launches.run(kernel, *args, **kwargs)
    runtime._unfit_gpu = lambda device: None
    target = launch.Target(architecture="sm_90", num_sms=132)
    real = launch.target_of
    for module in list(sys.modules.values()):
        if getattr(module, "target_of", None) is real:
            module.target_of = lambda device: target
    return launches


def keep_memory() -> None:
    """Make the C library keep what is freed, as the allocator of a GPU does: system calls are no part of our work."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def fastest_us(call: Callable[[], object], repeats: int) -> float:
    """The least mean of BATCH calls, in microseconds: what else runs on the machine only adds to it."""
    times = []
    for _ in range(max(2, repeats // BATCH)):
        start = time.perf_counter_ns()
        for _ in range(BATCH):
            call()
        times.append(time.perf_counter_ns() - start)
    return min(times) / BATCH / 1e3


class Operators(TorchFunctionMode):
    """Records the calls of torch that return a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = function(*args, **kwargs)
        if isinstance(found, Tensor) or (type(found) in (tuple, list) and any(isinstance(x, Tensor) for x in found)):
            self.calls.append(partial(function, *args, **kwargs))
        return found


class Chain(nn.Module):
    """Calls another module, or in the end some functions."""

    def __init__(self, then: nn.Module | Sequence[Callable[[], object]]) -> None:
        super().__init__()
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(x) if isinstance(self.then, nn.Module) else call_all(self.then, x)


def call_all(functions: Sequence[Callable[[], object]], x: Tensor) -> Tensor:
    for function in functions:
        function()
    return x


def count_calls(call: Callable[[], object]) -> int:
    """The functions that one call calls, of Python and of C."""
    events: list[str] = []
    sys.setprofile(lambda frame, event, argument: events.append(event))
    call()
    sys.setprofile(None)
    return sum(event in ("call", "c_call") for event in events)


def measure(layer: MoE, tokens: int, launches: Launches, repeats: int) -> dict[str, Any]:
    """What this file describes, of a forward; the launches by their kernels."""
    x = torch.randn(tokens, layer.hidden_size, dtype=torch.bfloat16)
    with torch.no_grad():
        launches.bind = True
        layer(x)
        launches.seen, operators = [], Operators()
        with operators:
            layer(x)
        kernels, seen = zip(*launches.seen, strict=True)
        launches.seen = None
        chain = Chain(Chain(Chain(seen)))
        times = {"forward": fastest_us(lambda: layer(x), repeats)}
        launches.bind = False
        times["python"] = fastest_us(lambda: layer(x), repeats)
        times["torch"] = fastest_us(lambda: call_all(operators.calls, x), repeats)
        times["floor"] = fastest_us(lambda: chain(x), repeats)
        calls = count_calls(lambda: layer(x)) - count_calls(lambda: call_all(seen, x))
    times["ours"] = times["python"] - times["torch"]
    counts = {"launches": kernels, "operators": len(operators.calls), "calls": calls}
    return counts | {f"{name}_us": round(time, 1) for name, time in times.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,8,64", help="numbers of tokens, comma-separated")
    parser.add_argument("--repeats", type=int, default=2000, help="forwards of each measurement")
    parser.add_argument("--profile", action="store_true", help="show where our part of the time goes")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_memory()
    launches = fake_gpu()
    with torch.device("cpu"):
        layer = MoE(2048, 768, 16, 8, backend="triton", dtype=torch.bfloat16).eval()  # Qwen3-30B's, with fewer experts
    found = {
        tokens: measure(layer, tokens, launches, options.repeats) for tokens in map(int, options.tokens.split(","))
    }
    facts = environment(torch.device("cpu"))
    print(f"{platform.processor() or platform.machine()}: {caption(facts)}")
    for tokens, row in found.items():
        print(
            f"T={tokens}: {len(row['launches'])} launches, {row['operators']} operators of torch, {row['calls']} calls;"
            f" forward {row['forward_us']} us "
            f"(python {row['python_us']}, torch {row['torch_us']}, ours {row['ours_us']}, floor {row['floor_us']})"
        )
    if options.json is not None:
        options.json.write_text(json.dumps({"environment": facts, "forward": found}, indent=1) + "\n")
    if options.profile:
        x, profile = torch.randn(1, layer.hidden_size, dtype=torch.bfloat16), cProfile.Profile()
        with torch.no_grad(), profile:
            for _ in range(options.repeats):
                layer(x)
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
