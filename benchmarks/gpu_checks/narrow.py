"""Right results of what computes in few bits: the gate in 16, products of fp8 codes, quantized projections."""

from __future__ import annotations

from itertools import count, pairwise

import torch
from torch import Tensor

from gpu_checks.setting import Setting, poisoned
from moe_triton import QuantizedWeight, reference, runtime
from moe_triton.quantization import fp8 as fp8_definition
from moe_triton.quantization.formats import FORMATS
from moe_triton.records import ExpertSpec, GateWanted
from moe_triton_kernels import gate as gate_kernels
from moe_triton_kernels.fp8 import GROUP
from moe_triton_kernels.fp8_d_weight import tile_offsets
from moe_triton_kernels.operands import per_expert
from moe_triton_kernels.quantize import quantize_columns, quantize_rows, quantize_weight
from moe_triton_kernels.tiles import tile_tables
from tests.helpers.compare import TOLERANCE, assert_close
from tests.helpers.problems import INPUTS, make_problem, random_choices, replaced, run, with_inputs

# The gate -------------------------------------------------------------------------------------------------------------


def gate(setting: Setting) -> str:
    """Logits and gradients against float64: the products as they run, and each form of them by our own kernel."""
    sizes = ((9, 24, 5),) if setting.tiny else ((1, 2048, 128), (3001, 1536, 64), (4096, 4096, 256), (700, 1000, 9))
    found = count()
    for tokens, d, num_experts in sizes:
        for dtype in (torch.float16,) if setting.tiny else (torch.bfloat16, torch.float16):
            for weight_dtype in (dtype,) if setting.tiny else (dtype, torch.float32):
                with poisoned():
                    gate_once(setting, (tokens, d, num_experts), dtype, weight_dtype)
                next(found)
    return f"{next(found)} gates"


def gate_once(setting: Setting, sizes: tuple[int, int, int], dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    (tokens, d, num_experts), device = sizes, setting.device
    hidden, addend = (torch.randn(tokens, d, device=device).to(dtype) for _ in range(2))
    weight = (torch.randn(num_experts, d, device=device) * d**-0.5).to(weight_dtype)
    grad_logits = torch.randn(tokens, num_experts, device=device)
    backend = runtime.gate_backend("triton")
    logits = backend.gate_forward(hidden, weight, None)
    grad_x, grad_w, _ = backend.gate_backward(grad_logits, addend, hidden, weight, GateWanted(bias=False))
    wide = [x.double() for x in (hidden, weight, grad_logits, addend)]
    assert_close(logits, wide[0] @ wide[1].T, tolerance=2e-6)
    assert_close(grad_x, wide[2] @ wide[1] + wide[3])
    assert_close(grad_w, wide[2].T @ wide[0], tolerance=2e-5 if weight_dtype == torch.float32 else None)
    if weight_dtype == torch.float32:
        return
    halves = gate_kernels.split(grad_logits, dtype, (0, 1), stacked=False)
    narrow = halves.double()
    assert_close(gate_kernels.product(hidden, weight.mT, torch.float32), wide[0] @ wide[1].T, tolerance=2e-6)
    assert_close(gate_kernels.product(halves.mT, hidden, torch.float32), narrow.T @ wide[0], tolerance=1e-5)
    stacked = torch.cat([weight, weight])
    assert_close(gate_kernels.product(halves, stacked, dtype, addend), narrow @ stacked.double() + wide[3])


# fp8 ------------------------------------------------------------------------------------------------------------------


def fp8(setting: Setting) -> str:
    """Products of codes against their emulation in fp32: the output and all gradients, with and without adapters."""
    sizes = ((24, 20),) if setting.tiny else ((512, 384), (320, 200), (256, 128))
    number = 0
    for d, n in sizes:
        for dtype in (torch.bfloat16, torch.float16)[: 1 if setting.tiny else 2]:
            spec = ExpertSpec(fp8=True, is_transposed=bool(number % 2))
            choices = random_choices(9 if setting.tiny else 700, 2, 8)
            problem = make_problem(
                choices, 8, spec=spec, ranks=(16, 8) if number % 3 == 1 else None, d=d, n=n, dtype=dtype
            )
            wanted = run(problem, runtime.experts_backend("torch", setting.device, fp8=True))
            with poisoned():
                found = run(problem, runtime.experts_backend("triton", setting.device, fp8=True))
            assert found.keys() == wanted.keys()
            for name, value in found.items():  # a sum in another order may give an operand next to a tie another code
                assert_close(value, wanted[name], tolerance=2 * TOLERANCE[torch.bfloat16])
            number += 1
    return f"{number} problems"


def fp8_codes(setting: Setting) -> str:
    """Codes and scales of rows, of projections and of each expert's columns: those of the definition, bit for bit."""
    tokens, d, num_experts = (40, 136, 3) if setting.tiny else (2000, 1000, 9)
    choices = random_choices(tokens, 2, num_experts).to(setting.device)
    dispatched = reference.dispatch(choices, num_experts)
    tiles = tile_tables(dispatched.offsets, choices.numel())
    for dtype in setting.dtypes:
        x = torch.randn(tokens, d, device=setting.device).to(dtype)
        x[0], x[1, :128] = 0, 1e-6
        weight = torch.randn(num_experts, d - 8, d, device=setting.device).to(dtype)
        with poisoned():
            rows = quantize_rows(x)
            columns = quantize_columns(x, tiles, source=dispatched.source, top_k=2)
            matrices = quantize_weight(per_expert(weight).transposed(), size_k=d, size_columns=d - 8)
        same_codes(rows.codes[:, :d], rows.scales, x, 1, GROUP.value)
        for expert, projection in enumerate(weight):
            forward, backward = matrices.forward, matrices.backward
            same_codes(forward.data[expert, :, :d], forward.scales[expert].T, projection, GROUP.value, GROUP.value)
            same_codes(backward.data[expert, :, : d - 8].T, backward.scales[expert], projection, *[GROUP.value] * 2)
        first_tiles = tile_offsets(dispatched.offsets).tolist()
        for expert, (start, end) in enumerate(pairwise(dispatched.offsets.tolist())):
            if start == end:
                continue
            own = x[dispatched.source[start:end].long() // 2]
            first, last = first_tiles[expert : expert + 2]
            at = GROUP.value * first
            same_codes(columns.codes[:, at : at + end - start].T, columns.scales[first:last], own, GROUP.value, 1)
    return f"{len(setting.dtypes)} dtypes"


def same_codes(codes: Tensor, scales: Tensor, x: Tensor, rows: int, columns: int) -> None:
    wanted, wanted_scales = fp8_definition.quantize(x, rows, columns)
    assert torch.equal(scales, wanted_scales), "scales"
    assert torch.equal(codes.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8)), "codes"


# Quantized projections ------------------------------------------------------------------------------------------------


def quantized(setting: Setting) -> str:
    """Every format, decoded in the main loop and in memory, half of it with adapters: as the numbers of its codes."""
    sizes = (32, 32) if setting.tiny else (512, 256)
    found = 0
    for number, format in enumerate(list(FORMATS)[-1:] if setting.tiny else FORMATS):
        for tokens in (4,) if setting.tiny else (24, 2000):
            for is_transposed in (False,) if setting.tiny else (False, True):
                quantized_once(setting, format, tokens, sizes, is_transposed, bool((number + found) % 2))
                found += 1
    return f"{found} problems"


def quantized_once(
    setting: Setting, format: str, tokens: int, sizes: tuple[int, int], is_transposed: bool, is_adapted: bool
) -> None:
    (d, n), dtype = sizes, setting.dtypes[-1]
    num_experts, options = 3 if setting.tiny else 9, {"group": 32} if format == "int8" and setting.tiny else {}
    problem = make_problem(
        random_choices(tokens, 2, num_experts),
        num_experts,
        spec=ExpertSpec(is_transposed=is_transposed),
        ranks=(16, 8) if is_adapted else None,
        d=d,
        n=n,
        dtype=dtype,
    )
    parts = problem.call.parameters
    packed = {
        name: QuantizedWeight.quantize(x, format, is_transposed=is_transposed, **options)
        for name, x in (("gate_up", parts.gate_up), ("down", parts.down))
        if isinstance(x, Tensor)
    }
    numbers = {name: weight.dequantize(torch.float64) for name, weight in packed.items()}
    exact = type(problem)(replaced(problem.call, **numbers), problem.grad_out)
    present = [name in problem.inputs and name not in packed for name in INPUTS]
    with poisoned():
        actual = run(with_inputs(exact, **packed), wanted=present)
    for name, value in actual.items():
        assert_close(value, exact.expected[name], tolerance=TOLERANCE[dtype])
