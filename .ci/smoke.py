"""Try an installed wheel with nothing but its dependencies: run it with its Python, outside of the repository."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import torch

import moe_triton


def command(*arguments: str) -> str:
    """What `moe-triton ARGUMENTS` prints; it has to succeed."""
    program = Path(sys.executable).with_name("moe-triton")
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> None:
    version = moe_triton.__version__
    assert importlib.metadata.version("moe-triton") == version
    assert Path(moe_triton.__file__).is_relative_to(sys.prefix), f"{moe_triton.__file__} is not the wheel's"
    assert importlib.util.find_spec("matplotlib") is None, "the environment is not empty"

    layer = moe_triton.MoE(16, 32, num_experts=4, top_k=2, aux_loss_weight=0.01)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    x = torch.randn(64, 16)
    losses = []
    for _ in range(20):
        out = layer(x)
        loss = (out.output - x.sin()).square().mean()
        optimizer.zero_grad()
        (loss + out.aux_loss).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses

    assert command("--version").strip() == f"moe-triton {version}"
    assert json.loads(command("info", "--json"))["versions"]["moe-triton"] == version
    assert "deepseek-v3" in command("simulate", "--list")
    try:
        moe_triton.plot_load([{"layer": moe_triton.load_statistics(out.expert_counts)}], "load.png")
    except ImportError as error:
        assert "moe-triton[plot]" in str(error)  # noqa: PT017 (no pytest here)
    else:
        raise AssertionError("a chart without matplotlib")
    if sys.platform == "linux":
        from moe_triton_kernels.configs import shipped_table

        shipped_table()  # configs.json is in the wheel
    print(f"moe-triton {version}: the wheel works (loss {losses[0]:.3f} to {losses[-1]:.3f})")


if __name__ == "__main__":
    main()
