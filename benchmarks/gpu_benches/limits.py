"""What the device reaches in the same rounds: a dense product and a copy. Every floor is made of such limits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F

from moe_triton.benchmarking.timing import Call, Times, spread
from moe_triton_kernels.tools.floors import Device

DENSE_SIZE = 8192
COPY_BYTES = 2 << 30
DENSE, DENSE_8, COPY = "dense", "dense fp8", "copy"


def limit_calls(device: torch.device, dtype: torch.dtype, *, size: int, copied: int) -> dict[str, Call]:
    """A product of two [size, size] matrices, and a copy of `copied` bytes."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.zeros(copied, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return {DENSE: lambda: torch.mm(a, b, out=out), COPY: lambda: target.copy_(source)}


def codes_limit(device: torch.device, *, size: int) -> dict[str, Call]:
    """A product of two [size, size] matrices of e4m3 codes, one scale each, with the fastest sums that there are."""
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    whole = F.ScalingType.TensorWise
    run = partial(F.scaled_mm, output_dtype=torch.bfloat16, use_fast_accum=True)
    return {DENSE_8: lambda: run(a, b.T, one, whole, one, whole)}


def measured_device(name: str, times: Mapping[str, Times], *, size: int, copied: int) -> Device:
    """The device with the medians of these rounds as its limits; a copy reads and writes every byte.

    Where no product of codes was timed, its limit is the other products'.
    """
    dense, copy = spread(times[DENSE]), spread(times[COPY])
    if dense is None or copy is None:
        raise RuntimeError("the dense product and the copy were not measured")
    codes = spread(times.get(DENSE_8, []))
    flops, flops_8 = (2 * size**3 / time.p50 for time in (dense, codes or dense))
    bandwidth = 2 * copied / copy.p50
    source = f"measured: {size}^3 product, copy of {copied} bytes"
    return Device(name=name, flops_8=flops_8, flops_16=flops, flops_32=flops, bandwidth=bandwidth, source=source)
