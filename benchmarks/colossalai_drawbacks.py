"""The drawback that Colossal-AI's tutorial names, large batches and long sequences: ours beside a dense dispatch.

    python benchmarks/colossalai_drawbacks.py [--tokens 1024] [--growth 16] [--rounds 5] [--out FILE.json]

Forward and backward of one MoE layer, top-2, capacity factor 1.25, as the number of tokens grows: tokens per second
(the median of interleaved rounds) and peak memory above what was there before (a process per size and provider). The
dense dispatch multiplies by a [S, E, C] mask, as GShard's einsums do, over the same routing and the same weights: its
mask grows with S**2, since C grows with S.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton.backends.torch.processor import this_processor
from moe_triton.compat.colossalai.context.random import moe_set_seed
from moe_triton.compat.colossalai.nn.layer.moe import FFNExperts, MoeLayer, Top2Router
from moe_triton.compat.colossalai.utils import get_current_device


def make_layer(size: dict[str, int]) -> MoeLayer:
    torch.manual_seed(0)
    moe_set_seed(0)
    experts = FFNExperts(size["experts"], size["d_model"], size["d_ff"])
    router = Top2Router(capacity_factor_train=1.25, capacity_factor_eval=1.25, min_capacity=4)
    return MoeLayer(size["d_model"], size["experts"], router, experts).to(get_current_device())


def dense(layer: MoeLayer, x: Tensor) -> Tensor:
    """The same layer by einsums over masks [S, E, C]."""
    routed = layer.router(layer.logits(x))
    num_tokens, num_experts = x.shape[0], layer.num_experts
    places = layer.router.get_capacity((num_tokens, num_experts))
    experts, weights, dispatched = routed.routing.experts.long(), routed.routing.weights, routed.dispatched
    place = dispatched.position - dispatched.offsets[experts]
    slot = torch.where(dispatched.position >= 0, experts * places + place, num_experts * places)
    combine = x.new_zeros(num_tokens, num_experts * places + 1).scatter(1, slot, weights)[:, :-1]
    combine = combine.view(num_tokens, num_experts, places)
    rows = torch.einsum("sec,sd->ecd", (combine > 0).to(x.dtype), x)
    hidden = F.gelu(torch.baddbmm(layer.experts.b1, rows, layer.experts.w1))
    out = torch.baddbmm(layer.experts.b2, hidden, layer.experts.w2)
    return torch.einsum("sec,ecd->sd", combine, out)


PROVIDERS: dict[str, Callable[[MoeLayer, Tensor], Tensor]] = {"moe_triton": lambda layer, x: layer(x), "dense": dense}


def check(size: dict[str, int]) -> None:
    """The two compute the same."""
    layer = make_layer(size)
    x = torch.randn(256, size["d_model"], device=get_current_device())
    ours, theirs = (provider(layer, x) for provider in PROVIDERS.values())
    error = ((ours - theirs).norm() / theirs.norm()).item()
    if not error < 1e-4:
        raise SystemExit(f"the two dispatches differ by {error:.1e}")


def step(provider: str, layer: MoeLayer, x: Tensor) -> float:
    """Seconds of one forward and backward."""
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    PROVIDERS[provider](layer, x).square().mean().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(provider: str, size: dict[str, int], num_tokens: int, answer: Any) -> None:
    """Bytes at the peak of one step above those before it, measured in a process of its own."""
    layer = make_layer(size)
    x = torch.randn(num_tokens, size["d_model"], device=get_current_device(), requires_grad=True)
    step(provider, layer, x[: size["experts"] * 4])  # what the first step loads is no activation
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(provider, layer, x)
        answer.send(torch.cuda.max_memory_allocated() - before)
        return
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = memory_status("VmRSS")
    step(provider, layer, x)
    answer.send(memory_status("VmHWM") - before)


def memory_status(name: str) -> int:
    """Bytes of this process (Linux): VmRSS, what it has now, or VmHWM, the most it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure(size: dict[str, int], tokens: list[int], rounds: int, memory_limit: int) -> list[dict[str, Any]]:
    context = mp.get_context("spawn")
    rows = []
    for num_tokens in tokens:
        row: dict[str, Any] = {"tokens": num_tokens, "providers": {}}
        places = 2 * num_tokens * 1.25 / size["experts"]
        runs = []
        for provider in PROVIDERS:
            mask_bytes = 4 * num_tokens * size["experts"] * places
            if provider == "dense" and 4 * mask_bytes > memory_limit:
                row["providers"][provider] = {"left out": f"its masks want {4 * mask_bytes / 2**30:.1f} GiB"}
                continue
            ours, theirs = context.Pipe()
            process = context.Process(target=peak_memory, args=(provider, size, num_tokens, theirs))
            process.start()
            peak = ours.recv()
            process.join()
            row["providers"][provider] = {"peak_bytes": peak, "seconds": []}
            runs.append(provider)
        layer = make_layer(size)
        x = torch.randn(num_tokens, size["d_model"], device=get_current_device(), requires_grad=True)
        for provider in runs:
            step(provider, layer, x)
        for _ in range(rounds):
            for provider in runs:
                row["providers"][provider]["seconds"].append(step(provider, layer, x))
        for provider in runs:
            found = row["providers"][provider]
            found["tokens_per_second"] = num_tokens / statistics.median(found["seconds"])
        rows.append(row)
        print_row(row)
    return rows


def print_row(row: dict[str, Any]) -> None:
    for provider, found in row["providers"].items():
        if "left out" in found:
            print(f"{row['tokens']:8d} tokens  {provider:10s}  left out: {found['left out']}")
            continue
        per_token = found["peak_bytes"] / row["tokens"]
        print(
            f"{row['tokens']:8d} tokens  {provider:10s}  {found['tokens_per_second']:12,.0f} tokens/s  "
            f"peak {found['peak_bytes'] / 2**20:9.1f} MiB  {per_token / 1024:8.2f} KiB per token"
        )


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """For each provider: its slowest size as a share of its best, and how memory per token grew."""
    found = {}
    for provider in PROVIDERS:
        mine = [(r["tokens"], r["providers"][provider]) for r in rows if "seconds" in r["providers"][provider]]
        rates = [m["tokens_per_second"] for _, m in mine]
        memory = [m["peak_bytes"] / tokens for tokens, m in mine]
        found[provider] = {
            "largest": mine[-1][0],
            "largest_over_best": rates[-1] / max(rates),
            "memory_per_token_growth": memory[-1] / max(memory[0], 1),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="the smallest batch x sequence")
    parser.add_argument("--growth", type=int, default=16, help="the largest is so many times the smallest")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--d-ff", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-limit", type=int, default=12, help="GiB that the dense masks may take")
    parser.add_argument("--out", type=Path, help="where to write the measurements as JSON")
    arguments = parser.parse_args()
    size = {"experts": arguments.experts, "d_model": arguments.d_model, "d_ff": arguments.d_ff}
    check(size)
    tokens = [arguments.tokens]
    while tokens[-1] * 2 <= arguments.tokens * arguments.growth:
        tokens.append(tokens[-1] * 2)
    rows = measure(size, tokens, arguments.rounds, arguments.memory_limit * 2**30)
    found = summary(rows)
    for provider, entry in found.items():
        print(
            f"{provider}: at {entry['largest']} tokens {entry['largest_over_best']:.0%} of its best speed, "
            f"memory per token {entry['memory_per_token_growth']:.2f} times that of the smallest"
        )
    if arguments.out is not None:
        device = get_current_device()
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else this_processor().name
        versions = {"python": sys.version.split()[0], "torch": torch.__version__}
        record = {"device": where, "threads": torch.get_num_threads(), "versions": versions, "size": size}
        arguments.out.write_text(json.dumps({**record, "summary": found, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
