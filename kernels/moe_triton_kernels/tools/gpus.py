"""What GPUs can do: the one table, for the floors of kernels and for the cost model of `moe_triton.simulate`."""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """One GPU by its data sheet: FLOP/s of dense products, bytes per second and bytes of main memory.

    fp32_flops  in full precision: no tf32
    fp8_flops   None where there are no such products
    measured    (FLOP/s of an 8192^3 bf16 product, bytes/s of a device copy), where they were measured
    """

    product: str
    fp16_flops: float
    fp8_flops: float | None
    fp32_flops: float
    bandwidth: float
    memory: float
    measured: tuple[float, float] | None = None


GPUS = {
    "a100": Gpu("NVIDIA A100 80GB SXM", 312e12, None, 19.5e12, 2.039e12, 80e9),
    "h100": Gpu("NVIDIA H100 SXM", 989.4e12, 1978.9e12, 67e12, 3.35e12, 80e9),
    "h200": Gpu("NVIDIA H200 SXM", 989.4e12, 1978.9e12, 67e12, 4.8e12, 141e9, measured=(790e12, 4.3e12)),
    "a40": Gpu("NVIDIA A40", 149.7e12, None, 37.4e12, 0.696e12, 48e9),
    "l40s": Gpu("NVIDIA L40S", 362e12, 733e12, 91.6e12, 0.864e12, 48e9),
    "b200": Gpu("NVIDIA DGX B200", 2250e12, 4500e12, 75e12, 8e12, 180e9),
    "b300": Gpu("NVIDIA HGX B300", 2250e12, 4500e12, 77e12, 8e12, 288e9),
    "rtx-pro-6000": Gpu("NVIDIA RTX PRO 6000 Blackwell", 503.8e12, 1007.6e12, 126e12, 1.792e12, 96e9),
    "mi355x": Gpu("AMD Instinct MI355X", 2516.6e12, 5033.2e12, 157.3e12, 8e12, 288e9),
    "mi300x": Gpu("AMD Instinct MI300X", 1307.4e12, 2614.9e12, 163e12, 5.3e12, 192e9),
}
