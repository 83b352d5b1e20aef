"""transformers' FP8Experts: projections that are codes beside scales (fp8 in blocks, and mxfp4 of DeepSeek-V4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_triton.integrations.experts_interface import KEY
from moe_triton.quantization import QuantizedWeight

BLOCK = 128
GATE = "transformers.integrations.finegrained_fp8.FP8Experts._apply_gate"


def register(experts_forward: Any) -> None:
    """Register our experts in the interface that transformers has for FP8Experts alone."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS

    ALL_FP8_EXPERTS_FUNCTIONS.register(KEY, experts_forward)


def has_codes(module: nn.Module, name: str) -> bool:
    """Return whether a projection is codes: FP8Experts may also hold numbers that were decoded while loading."""
    weight = getattr(module, name, None)
    has_scales = isinstance(getattr(module, f"{name}_scale_inv", None), Tensor)
    return has_scales and isinstance(weight, Tensor) and weight.element_size() == 1


def codes_of(module: nn.Module, name: str) -> QuantizedWeight | None:
    """Return a projection over its codes; None where it has none."""
    return quantized_projection(module, name) if has_codes(module, name) else None


def gate_name(module: nn.Module, name: str, plain: str) -> str:
    """Return the name of a gate, that of FP8Experts by what the module's settings make of it; plain: without any."""
    if name != GATE:
        return name
    if getattr(module, "gate_softcap", None) is not None:
        return GATE
    if getattr(module, "limit", None) is None:
        return plain
    return "FP8Experts" if getattr(module, "swiglu_alpha", None) is None else "FP8Experts, alpha"


def quantized_projection(module: nn.Module, name: str) -> QuantizedWeight:
    """Return a projection of FP8Experts over the module's own codes.

    One scale for a whole matrix counts for each of its blocks. Scales that activations have are not used: these stay
    in their dtype. Raises ValueError for what `obstacle` names.
    """
    reason = obstacle(module, name)
    if reason is not None:
        raise ValueError(f"{type(module).__name__}: {reason}")
    weight, scales = getattr(module, name).detach(), getattr(module, f"{name}_scale_inv").detach()
    if weight.dtype == torch.int8:
        return QuantizedWeight.from_mxfp4(weight.view(torch.uint8), scales.view(torch.uint8))
    if getattr(module, "block_size", None) is None:
        blocks = [-(-size // BLOCK) for size in weight.shape[1:]]
        first, rows = scales.shape[1], torch.arange(blocks[0], device=scales.device)
        scales = scales[:, rows * first // blocks[0]].expand(-1, -1, blocks[1])
    return QuantizedWeight.from_fp8_blocks(weight, scales.float())


def obstacle(module: nn.Module, name: str) -> str | None:
    """Return why a projection of codes cannot run here, or None; also None where it has no codes."""
    if not has_codes(module, name):
        return None
    weight: Tensor = getattr(module, name)
    scales: Tensor = getattr(module, f"{name}_scale_inv")
    if weight.dtype == torch.int8:
        wanted = [*weight.shape[:2], weight.shape[2] // 16]
        if scales.element_size() == 1 and list(scales.shape) == wanted:
            return None
        return f"{name}_scale_inv: got {scales.dtype} of shape {list(scales.shape)}, wanted E8M0 of {wanted} for fp4"
    if weight.dtype != torch.float8_e4m3fn:
        return f"{name}: got dtype {weight.dtype}, wanted float8_e4m3fn"
    block_size = getattr(module, "block_size", None)
    if block_size is None:
        halves = scales.shape[1]  # gate and up have a scale of their own
        if scales.shape[2] == 1 and (halves == 1 or (halves == 2 and weight.shape[1] % (2 * BLOCK) == 0)):
            return None
        which = "one scale for each of gate and up, of a multiple of 128 rows each"
        return f"{name}_scale_inv: got shape {list(scales.shape)} for {list(weight.shape)}, wanted {which}"
    if tuple(block_size) != (BLOCK, BLOCK):
        return f"block_size: got {tuple(block_size)}, wanted ({BLOCK}, {BLOCK})"
    wanted = [len(weight), *(-(-size // BLOCK) for size in weight.shape[1:])]
    if list(scales.shape) != wanted:
        return (
            f"{name}_scale_inv: got shape {list(scales.shape)}, wanted {wanted}: gate's rows fill no blocks of {BLOCK}"
        )
    return None
