"""Measures what each format of quantised experts loses, in dB, and how many bits it takes.

    PYTHONPATH=src:kernels python benchmarks/quantization_error.py    # writes results/quantization/error.json

Signal to quantisation noise, 20 log10(|y| / |y - y'|), of the weights, of a layer's output and of the gradient of its
input, all for Gaussian numbers in float64: only the weights are quantised. For products in fp8 (`MoE(fp8=True)`) that
of one product and of the experts, with the gradients of the projections; all of the experts' inputs are in bf16.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_triton import QuantizedWeight, moe_mlp
from moe_triton.benchmarking.environment import environment
from moe_triton.quantization.fp8 import BLOCKWISE, GROUP, MXFP8, quantize, rounded

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

Rounding = Callable[[Tensor], Tensor]
WIDE = torch.float64


def power_of_two(x: Tensor, rows: int, columns: int) -> Tensor:
    """Round to e4m3 with the scales of `rounded`, each raised to the next power of two."""
    _, scales = quantize(x, rows, columns)
    return scaled(x, scales.double().log2().ceil().exp2(), rows, columns)


def best_scale(x: Tensor, rows: int, columns: int) -> Tensor:
    """Round to e4m3 with the one of 32 scales between amax / 448 and half of it that loses least in each group."""
    _, scales = quantize(x, rows, columns)
    best, least = x, torch.full_like(scales, math.inf, dtype=WIDE)
    for step in range(32):
        tried = scaled(x, scales.double() * 2 ** (-step / 32), rows, columns)
        lost = blocks_of((tried - x).square(), rows, columns).sum((-3, -1))
        better = lost < least
        best = torch.where(better.repeat_interleave(rows, 0).repeat_interleave(columns, 1), tried, best)
        least = torch.where(better, lost, least)
    return best


def scaled(x: Tensor, scales: Tensor, rows: int, columns: int) -> Tensor:
    wide = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return (x / wide).clamp(-448, 448).float().to(torch.float8_e4m3fn).double() * wide


def blocks_of(x: Tensor, rows: int, columns: int) -> Tensor:
    return x.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))


def in_groups(how: Callable[[Tensor, int, int], Tensor], projections: tuple[int, int]) -> tuple[Rounding, Rounding]:
    """The rounding of rows, 1 x 128, and of projections."""
    return lambda x: how(x, 1, GROUP), lambda w: how(w, *projections)


BLOCKS = (GROUP, GROUP)
EVERY = ("x", "W1", "a", "W2")
AS_IT_IS = (lambda x: BLOCKWISE.rows(x, WIDE), lambda w: BLOCKWISE.projection(w, 1, WIDE))
PARTS: tuple[tuple[str, tuple[str, ...], tuple[Rounding, Rounding]], ...] = (
    ("x alone", ("x",), AS_IT_IS),
    ("W1 alone", ("W1",), AS_IT_IS),
    ("a alone", ("a",), AS_IT_IS),
    ("W2 alone", ("W2",), AS_IT_IS),
    ("up (x and W1)", ("x", "W1"), AS_IT_IS),
    ("down (a and W2)", ("a", "W2"), AS_IT_IS),
    ("both products: `fp8=True`", EVERY, AS_IT_IS),
    ("both, scales raised to powers of two", EVERY, in_groups(power_of_two, BLOCKS)),
    ("both, the best of 32 scales in each group", EVERY, in_groups(best_scale, BLOCKS)),
    ("both, projections in groups of 1 x 128", EVERY, in_groups(lambda x, r, c: rounded(x, r, c, WIDE), (1, GROUP))),
    ('both in MXFP8: `fp8="mxfp8"`', EVERY, (lambda x: MXFP8.rows(x, WIDE), lambda w: MXFP8.projection(w, 1, WIDE))),
    ("both, x and a kept as they are", ("W1", "W2"), AS_IT_IS),
)


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


def one_product() -> dict[str, Any]:
    """x W^T and its gradients."""
    x, weight, dy = torch.randn(T, D), torch.randn(N, D), torch.randn(T, N)
    in_blocks = rounded(weight, GROUP, GROUP)
    return {
        "what": "one product in fp8",
        "output_db": sqnr(rounded(x, 1, GROUP) @ in_blocks.T, x @ weight.T),
        "grad_hidden_db": sqnr(rounded(dy, 1, GROUP) @ in_blocks, dy @ weight),
        "grad_projections_db": sqnr(rounded(dy, GROUP, 1).T @ rounded(x, GROUP, 1), dy.T @ x),
    }


def measure_fp8() -> list[dict[str, Any]]:
    torch.manual_seed(0)
    rows = [one_product()]
    shapes = ((T, D), (E, 2 * N, D), (E, D, N))
    x, up, down = (torch.randn(shape).div(shape[-1] ** (0.5 * (len(shape) - 2))).bfloat16() for shape in shapes)
    ids, weights, grad = torch.rand(T, E).topk(K).indices, torch.rand(T, K), torch.randn(T, D).bfloat16()

    def results(dtype: torch.dtype, **options: Any) -> list[Tensor]:
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, up, down)]
        out = moe_mlp(leaves[0], ids, weights.to(torch.promote_types(dtype, torch.float32)), *leaves[1:], **options)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    exact = results(torch.float64, backend="reference")
    for name, fp8 in (("experts in fp8", True), ("experts in bf16", False)):
        found = results(torch.bfloat16, backend="torch", fp8=fp8)
        out, dx, *projections = (sqnr(a.double(), b) for a, b in zip(found, exact, strict=True))
        rows.append({"what": name, "output_db": out, "grad_hidden_db": dx, "grad_projections_db": min(projections)})
    return rows


def parts() -> list[dict[str, Any]]:
    """The output of gated experts in float64, with some of the four operands of their products rounded.

    The same numbers for every row of the table: x [T, d] and each expert's projections, Gaussian, silu(gate) * up.
    """
    torch.manual_seed(0)
    x, up, down = (torch.randn(shape, dtype=torch.float64) for shape in ((T, D), (2 * N, D), (D, N)))
    up, down = up / D**0.5, down / N**0.5

    def output(rounding: dict[str, Rounding]) -> Tensor:
        def operand(name: str, matrix: Tensor) -> Tensor:
            return rounding[name](matrix) if name in rounding else matrix

        gate, linear = (operand("x", x) @ operand("W1", up).T).chunk(2, 1)
        return operand("a", gate.sigmoid() * gate * linear) @ operand("W2", down).T

    exact = output({})
    rows = []
    for what, names, recipe in PARTS:
        rounding = {name: recipe[0] if name in ("x", "a") else recipe[1] for name in names}
        rows.append({"what": what, "output_db": sqnr(output(rounding), exact)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="the file to write")
    out = parser.parse_args().out
    shape = {"tokens": T, "hidden": D, "intermediate": N, "experts": E, "top_k": K}
    found = {"environment": environment(torch.device("cpu")), "shape": shape, "rows": measure()}
    found["fp8_products"] = measure_fp8()
    found["fp8_parts"] = parts()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    for row in found["rows"]:
        print(f"{row['format']:20} {row['bits']:6.3f} bits  output {row['output_db']:5.1f} dB")
    for row in [*found["fp8_products"], *found["fp8_parts"]]:
        print(f"{row['what']:44} output {row['output_db']:5.1f} dB")


if __name__ == "__main__":
    main()
