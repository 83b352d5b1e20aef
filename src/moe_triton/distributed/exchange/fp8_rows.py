"""Rows that travel as e4m3 codes with an fp32 scale for every 128 numbers of a row.

The format is that of DeepSeek-V3 (arXiv 2412.19437, 3.3) and of DeepEP's fp8 dispatch: number = code * scale, scale =
largest magnitude of the block / 448. A row is scaled by itself, so that what arrives depends on neither the other rows
nor the number of ranks. A block with a NaN or an infinity arrives as NaNs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton.distributed.exchange.tails import as_bytes
from moe_triton.quantization.formats import E4M3_MAX

BLOCK = 128


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [R, d] e4m3 and scales [R, ceil(d/128)] fp32 of contiguous rows x [R, d]."""
    blocks = _blocks(x if x.dtype == torch.float64 else x.float())
    scales = (blocks.abs().amax(-1) / E4M3_MAX).float()
    divisor = torch.where(scales == 0, 1, scales)[..., None]  # a block of zeros, and one too small for an fp32 scale
    codes = (blocks / divisor).clamp(-E4M3_MAX, E4M3_MAX)  # e4m3 has no infinity: beyond its largest number it is NaN
    codes = torch.where(divisor.isfinite(), codes, torch.nan).to(torch.float8_e4m3fn)
    return codes.flatten(1)[:, : x.shape[1]].contiguous(), scales


def dequantize_rows(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows [R, d] that codes and scales stand for."""
    wide = torch.promote_types(dtype, torch.float32)
    numbers = _blocks(codes.to(wide)) * scales.to(wide)[..., None]
    return numbers.flatten(1)[:, : codes.shape[1]].to(dtype)


def pack_rows(x: Tensor) -> Tensor:
    """Return rows x [R, d] as one message [R, d + 4 ceil(d/128)] uint8: the codes, then the bytes of the scales."""
    codes, scales = quantize_rows(x)
    return torch.cat([as_bytes(codes), as_bytes(scales)], 1)


def unpack_rows(message: Tensor, hidden_size: int, dtype: torch.dtype) -> Tensor:
    """Return the rows [R, d] of a message."""
    codes, scales = message[:, :hidden_size], message[:, hidden_size:]
    scales = scales.clone(memory_format=torch.contiguous_format)  # aligned, as fp32 has to be
    return dequantize_rows(codes.view(torch.float8_e4m3fn), scales.view(torch.float32), dtype)


def _blocks(x: Tensor) -> Tensor:
    missing = -x.shape[1] % BLOCK
    padded = F.pad(x, (0, missing)) if missing else x
    return padded.view(x.shape[0], padded.shape[1] // BLOCK, BLOCK)
