"""Measures what each format of quantised experts loses, in dB, and how many bits it takes.

    PYTHONPATH=src:kernels python benchmarks/quantization_error.py    # writes results/quantization/error.json

Signal to quantisation noise, 20 log10(|y| / |y - y'|), of the weights, of a layer's output and of the gradient of its
input, all for Gaussian numbers in float64: only the weights are quantised.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_triton import QuantizedWeight, moe_mlp
from moe_triton.benchmarking.environment import environment

OUT = Path(__file__).parent / "results" / "quantization" / "error.json"
FORMATS: dict[str, dict[str, Any]] = {
    "fp8": {},
    "int8": {},
    "int4": {},
    "int4, zero points": {"symmetric": False},
    "int4, groups of 128": {"group": 128},
    "nvfp4": {},
    "mxfp4": {},
}
T, D, N, E, K = 256, 512, 384, 8, 2


def sqnr(found: Tensor, wanted: Tensor) -> float:
    return 20 * math.log10(wanted.norm().item() / (found - wanted).norm().item())


def run(x: Tensor, ids: Tensor, weights: Tensor, up: Any, down: Any) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the hidden states for a fixed gradient of the output."""
    x = x.clone().requires_grad_()
    out = moe_mlp(x, ids, weights, up, down, backend="reference")
    out.backward(torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1)))
    assert x.grad is not None
    return out.detach(), x.grad


def measure() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    up, down = (torch.randn(E, out, size_in) / size_in**0.5 for out, size_in in ((2 * N, D), (D, N)))
    x, ids = torch.randn(T, D, dtype=torch.float64), torch.rand(T, E).topk(K).indices
    weights = torch.rand(T, K, dtype=torch.float64)
    exact = run(x, ids, weights, up.double(), down.double())
    rows = []
    for name, options in {"bf16": None, **FORMATS}.items():
        if options is None:
            numbers = [weight.bfloat16().double() for weight in (up, down)]
            bits = 16.0
        else:
            both = [QuantizedWeight.quantize(weight, name.split(",")[0], **options) for weight in (up, down)]
            numbers = [weight.dequantize(torch.float64) for weight in both]
            bits = 8 * sum(weight.nbytes for weight in both) / (up.numel() + down.numel())
        out, dx = run(x, ids, weights, *numbers)
        rows.append(
            {
                "format": name,
                "bits": bits,
                "weights_db": sqnr(numbers[0], up.double()),
                "output_db": sqnr(out, exact[0]),
                "grad_hidden_db": sqnr(dx, exact[1]),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="the file to write")
    out = parser.parse_args().out
    shape = {"tokens": T, "hidden": D, "intermediate": N, "experts": E, "top_k": K}
    found = {"environment": environment(torch.device("cpu")), "shape": shape, "rows": measure()}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for row in found["rows"]:
        print(f"{row['format']:20} {row['bits']:6.3f} bits  output {row['output_db']:5.1f} dB")


if __name__ == "__main__":
    main()
