"""What every layer runs on a CPU."""

from __future__ import annotations

import torch

from moe_triton import MoE


def run_layers() -> None:
    """Compile what every layer runs on a CPU, or load what an earlier process kept, which takes a third of a second."""
    for width, hidden, dtype in ((8, 4, torch.float32), (64, 128, torch.float32), (64, 128, torch.bfloat16)):
        layer, x = MoE(width, hidden, 4, 2, dtype=dtype), torch.randn(width, width, dtype=dtype, requires_grad=True)
        layer(x).output.sum().backward()
        with torch.no_grad():
            layer(x)
