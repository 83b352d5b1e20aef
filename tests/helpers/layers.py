"""What every layer runs on a CPU: `python -m tests.helpers.layers float32` compiles that of one dtype."""

from __future__ import annotations

import sys

import torch

from moe_triton import MoE

DTYPES = ("float32", "bfloat16")


def run_layers(names: tuple[str, ...] = DTYPES) -> None:
    """Compile what every layer runs on a CPU, or load what an earlier process kept, which takes a third of a second."""
    small = [(8, 4, torch.float32)] * ("float32" in names)
    for width, hidden, dtype in (*small, *((64, 128, getattr(torch, name)) for name in names)):
        layer, x = MoE(width, hidden, 4, 2, dtype=dtype), torch.randn(width, width, dtype=dtype, requires_grad=True)
        layer(x).output.sum().backward()
        with torch.no_grad():
            layer(x)


if __name__ == "__main__":
    run_layers(tuple(sys.argv[1:]))
