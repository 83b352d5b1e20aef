"""DeepSpeed's MoE layer and its mirror here, on one process: forward and backward, the same weights and decisions.

    python benchmarks/deepspeed_layer.py [--tokens 2048 --hidden 512 --intermediate 1024 --budget 20 --out FILE.json]

For 8 and 64 experts and k of 1, 2 and 4, with DeepSpeed's defaults (capacity factor 1, tokens dropped, experts Linear,
GELU, Linear) and with drop_tokens=False, where DeepSpeed pads every expert to the fullest one. The layers take turns
over rounds; what counts is the median of the rounds' ratios. Before that the same seed must give the same output.
bfloat16 too where the processor has it. Run it on a machine that does nothing else. Needs deepspeed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_triton.benchmarking.environment import environment
from moe_triton.benchmarking.limits import onednn_dtypes
from moe_triton.benchmarking.providers.deepspeed_moe import quiet, start_one_process
from moe_triton.benchmarking.report import write_json
from moe_triton.benchmarking.timing import make_timer, ratios, run_rounds, spread
from moe_triton.compat.deepspeed.layer import MoE

RESULT = Path(__file__).parent / "results" / "deepspeed" / "layer.json"
EXPERTS, CHOICES = (8, 64), (1, 2, 4)


def make_layers(
    hidden: int, intermediate: int, experts: int, k: int, dtype: torch.dtype, drop_tokens: bool = True
) -> dict[str, nn.Module]:
    """Both layers with the same weights."""
    with quiet():
        from deepspeed.moe.layer import MoE as UpstreamMoE

        start_one_process()
        layers: dict[str, nn.Module] = {}
        for name, layer_class in (("moe_triton", MoE), ("deepspeed", UpstreamMoE)):
            torch.manual_seed(0)
            expert = nn.Sequential(nn.Linear(hidden, intermediate), nn.GELU(), nn.Linear(intermediate, hidden))
            layer = layer_class(hidden, expert, num_experts=experts, k=k, drop_tokens=drop_tokens)
            layer.set_deepspeed_parallelism()
            layers[name] = layer.to(dtype)
    layers["deepspeed"].load_state_dict(layers["moe_triton"].state_dict())
    return layers


def step_of(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], object]:
    """A training step without an optimizer; gradients are made anew, as after zero_grad()."""

    def step() -> torch.Tensor:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        torch.manual_seed(1)
        output, l_aux, _ = layer(x)
        torch.autograd.backward([output, 0.01 * l_aux], [grad, torch.ones_like(l_aux)])
        return output.detach()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1024)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing for each row")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtypes = onednn_dtypes() if device.type == "cpu" else (torch.float32, torch.bfloat16)
    rows: list[dict[str, Any]] = []
    print("| dtype | tokens | experts | k | moe_triton, ms | deepspeed, ms | times faster (20% to 80%) |")
    print("|---|---|---|---|---|---|---|")
    for dtype, drops, experts, k in itertools.product(dtypes, (True, False), EXPERTS, CHOICES):
        layers = make_layers(options.hidden, options.intermediate, experts, k, dtype, drops)
        torch.manual_seed(2)
        x = torch.randn(options.tokens, options.hidden, dtype=dtype, device=device, requires_grad=True)
        grad = torch.randn_like(x)
        steps = {name: step_of(layer.to(device), x, grad) for name, layer in layers.items()}
        ours, theirs = (step().float() for step in steps.values())
        error = ((ours - theirs).norm() / theirs.norm()).item()
        if not error < (1e-4 if dtype == torch.float32 else 2e-2):
            raise SystemExit(f"{dtype}, {experts} experts, k={k}: the two outputs differ by {error:.1e}")
        times = run_rounds(steps, make_timer(device), budget_s=options.budget)
        faster = ratios(times["deepspeed"], times["moe_triton"])
        medians = {name: spread(values) for name, values in times.items()}
        assert faster is not None
        row = {"dtype": str(dtype).removeprefix("torch."), "drop_tokens": drops, "experts": experts, "k": k}
        seconds = {name: asdict(value) for name, value in medians.items() if value is not None}
        rows.append({**row, "error": error, "times_faster": asdict(faster), "seconds": seconds})
        cells = [row["dtype"], "dropped" if drops else "all kept", experts, k]
        cells += [f"{1e3 * value['p50']:.1f}" for value in seconds.values()]
        cells += [f"{faster.p50:.2f} ({faster.p20:.2f} to {faster.p80:.2f})"]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
    shape = {"tokens": options.tokens, "hidden": options.hidden, "intermediate": options.intermediate}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"schema": "moe-triton-deepspeed-layer/1", **environment(device), "shape": shape, "rows": rows}
    write_json(options.out, record)
    print(options.out)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
