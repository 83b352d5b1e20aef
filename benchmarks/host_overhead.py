"""Host time of a layer's forward pass with few tokens: on a CPU, with launches that stop short of the driver.

    python benchmarks/host_overhead.py --tokens 1,8,64 --repeats 2000

Every launch binds and specialises its arguments with Triton's own code for sm_90, and looks the compiled kernel up as
Triton does; then it returns. What the driver takes for a launch is not in it; what torch takes on a CPU for
an operation that would be on a GPU stands for that. "ours" is the same with launches that do nothing at all.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import platform
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "kernels")]

import torch  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from moe_triton import MoE, runtime  # noqa: E402
from moe_triton.benchmarking.environment import caption, environment  # noqa: E402
from moe_triton_kernels import launch  # noqa: E402

LAUNCH_OPTIONS = ("num_warps", "num_stages")


class Launches:
    """Stands for `JITFunction.run`: everything up to the compiled kernel, or nothing."""

    def __init__(self) -> None:
        self.backend = make_backend(GPUTarget("cuda", 90, 32))
        self.binders: dict[Any, Any] = {}
        self.kernels: dict[Any, dict[str, object]] = {}
        self.count, self.bind = 0, True

    def run(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        self.count += 1
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


def median_us(call: Callable[[], object], repeats: int) -> float:
    for _ in range(max(3, repeats // 10)):
        call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times) / 1e3


def measure(layer: MoE, tokens: int, launches: Launches, repeats: int) -> dict[str, float]:
    """Launches of one forward, and its microseconds: as it is, and with launches that do nothing."""
    x = torch.randn(tokens, layer.hidden_size, dtype=torch.bfloat16)
    with torch.no_grad():
        launches.bind, launches.count = True, 0
        layer(x)
        count = launches.count
        forward = median_us(lambda: layer(x), repeats)
        launches.bind = False
        ours = median_us(lambda: layer(x), repeats)
    return {"launches": count, "forward_us": round(forward, 1), "ours_us": round(ours, 1)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,8,64", help="numbers of tokens, comma-separated")
    parser.add_argument("--repeats", type=int, default=2000, help="forwards that the median is of")
    parser.add_argument("--profile", action="store_true", help="show where our part of the time goes")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
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
            f"T={tokens}: {row['launches']} launches, {row['forward_us']} us a forward, {row['ours_us']} us of it ours"
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
