"""DeepSpeed issue #5064's question: does it help to keep optimizer groups to one MoE layer, or to one expert?

    python benchmarks/deepspeed_groups.py [--layers 4 --experts 16 --hidden 256 --intermediate 512]

Times the optimizer's step over the experts' parameters grouped by process group, by layer and by expert: torch's AdamW,
for-loop and foreach, and the step of DeepSpeed's ZeRO-1 engine on one process (a forward and backward beforehand are
not counted). Providers are interleaved over rounds. Writes benchmarks/results/deepspeed/groups-NAME.json and prints the
table of docs/ports.md. Run it on a machine that does nothing else. Needs deepspeed for the last column.
"""

from __future__ import annotations

import json
import os
import platform
import socket
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tables import deepspeed_groups
from torch import nn

from moe_triton.backends.torch.processor import this_processor
from moe_triton.benchmarking.memory import peak_bytes
from moe_triton.benchmarking.timing import Call, Fresh, make_timer, run_rounds, spread
from moe_triton.compat.deepspeed.layer import MoE
from moe_triton.compat.deepspeed.utils import BY, configure_moe_param_groups
from moe_triton.runtime import installed_version

RESULTS = Path(__file__).parent / "results" / "deepspeed"


def make_model(layers: int, experts: int, hidden: int, intermediate: int, device: torch.device) -> nn.Module:
    """MoE layers only: their optimizer groups are what is measured."""
    torch.manual_seed(0)
    expert = nn.Sequential(nn.Linear(hidden, intermediate), nn.GELU(), nn.Linear(intermediate, hidden))
    return nn.ModuleList([MoE(hidden, expert, num_experts=experts, k=2) for _ in range(layers)]).to(device)


def torch_step(model: nn.Module, by: str, foreach: bool) -> tuple[Callable[[], object], list[dict[str, Any]]]:
    """AdamW's step over the groups; gradients stay as they are."""
    groups = configure_moe_param_groups(list(model.parameters()), by=by)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(groups, lr=1e-4, foreach=foreach)
    return optimizer.step, groups


class ZeroStep:
    """The step of DeepSpeed's ZeRO-1 engine; the gradients of a small batch are made before it, outside the clock."""

    def __init__(self, model: nn.Module, by: str, hidden: int, device: torch.device) -> None:
        import deepspeed

        self.x = torch.randn(64, hidden, device=device)
        groups: Any = configure_moe_param_groups(list(model.parameters()), by=by)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
            "zero_optimization": {"stage": 1},
            "steps_per_print": 10**9,
        }
        self.engine = deepspeed.initialize(model=Stack(model), model_parameters=groups, config=config)[0]

    def make(self) -> Callable[[], object]:
        output, l_aux = self.engine(self.x)
        self.engine.backward(output.square().mean() + l_aux)
        step: Callable[[], object] = self.engine.step
        return step


class Stack(nn.Module):
    """The layers one after the other, with residuals."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x.new_zeros(())
        for layer in self.layers:
            y, l_aux, _ = layer(x)
            x, total = x + y, total + l_aux
        return x, total


def start_one_process() -> None:
    """DeepSpeed's engine wants a process group, of one rank here."""
    import deepspeed

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(alone)
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def main(
    layers: Annotated[int, typer.Option(help="MoE layers.")] = 4,
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 16,
    hidden: Annotated[int, typer.Option(help="Hidden size.")] = 256,
    intermediate: Annotated[int, typer.Option(help="Intermediate size of an expert.")] = 512,
    budget: Annotated[float, typer.Option(help="Seconds of timing.")] = 60.0,
    zero: Annotated[bool, typer.Option(help="Also DeepSpeed's ZeRO-1 engine.")] = True,
    name: Annotated[str | None, typer.Option(help="Of the result file. Default: the processor or GPU.")] = None,
) -> None:
    """Measure, write the JSON and print the table."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    calls: dict[str, Call] = {}
    largest: dict[str, dict[str, Any]] = {}
    if zero:
        start_one_process()
    for by in BY:
        for way, foreach in (("for-loop", False), ("foreach", True)):
            step, groups = torch_step(make_model(layers, experts, hidden, intermediate, device), by, foreach)
            calls[f"{by}: AdamW, {way}"] = step
            sizes = [sum(p.numel() for p in group["params"]) for group in groups if group.get("moe")]
            largest[by] = {"groups": len(sizes), "largest_elements": max(sizes)}
        if zero:
            model = make_model(layers, experts, hidden, intermediate, device)
            calls[f"{by}: ZeRO-1"] = Fresh(ZeroStep(model, by, hidden, device).make)
    times = run_rounds(calls, make_timer(device), budget_s=budget)
    peaks = {key: peak_bytes(call, device) for key, call in calls.items() if not isinstance(call, Fresh)}
    found = {key: spread(values) for key, values in times.items()}

    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else this_processor().name
    record = {
        "device": device_name,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{p: installed_version(p) for p in ("torch", "deepspeed")}},
        "shape": {"layers": layers, "experts": experts, "hidden": hidden, "intermediate": intermediate},
        "groups": largest,
        "step_seconds": {key: asdict(value) for key, value in found.items() if value is not None},
        "rounds": times,
        "peak_bytes": peaks,
    }
    label = name or "".join(c if c.isalnum() else "-" for c in device_name.lower()).strip("-")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"groups-{label}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    print(f"{device_name}, {torch.get_num_threads()} threads, {record['versions']}, {record['shape']}\n")
    print(deepspeed_groups(record))
    if zero:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
