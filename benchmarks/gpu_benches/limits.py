"""What the device reaches in the same rounds: one dense product and one copy. Every floor is made of these two."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moe_triton.benchmarking.timing import Call, Times, spread
from moe_triton_kernels.tools.floors import Device

DENSE_SIZE = 8192
COPY_BYTES = 2 << 30
DENSE, COPY = "dense", "copy"


def limit_calls(device: torch.device, dtype: torch.dtype, *, size: int, copied: int) -> dict[str, Call]:
    """A product of two [size, size] matrices, and a copy of `copied` bytes."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.zeros(copied, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return {DENSE: lambda: torch.mm(a, b, out=out), COPY: lambda: target.copy_(source)}


def measured_device(name: str, times: Mapping[str, Times], *, size: int, copied: int) -> Device:
    """The device with the medians of these rounds as its limits; a copy reads and writes every byte."""
    dense, copy = spread(times[DENSE]), spread(times[COPY])
    if dense is None or copy is None:
        raise RuntimeError("the dense product and the copy were not measured")
    flops = 2 * size**3 / dense.p50
    bandwidth = 2 * copied / copy.p50
    source = f"measured: {size}^3 product, copy of {copied} bytes"
    return Device(name=name, flops_8=flops, flops_16=flops, flops_32=flops, bandwidth=bandwidth, source=source)
