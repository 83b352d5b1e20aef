"""What clusters with TMA multicast save, and what they waste, on paper. It is no measurement.

    python -m moe_triton_kernels.tools.multicast                 # every schedule, and the layers of `layer_model`
    python -m moe_triton_kernels.tools.multicast --device h100

A step of a CTA's tile reads its rows of A and its columns of B from the L2 cache: TMA and cp.async keep nothing in L1.
In a cluster of two, each block of B is read once for both CTAs. Where the L2 cache delivers less than the matrix units
ask for, that is the share of their speed that a main loop can reach.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from moe_triton_kernels.gluon.schedules import BLOCK_K, BLOCK_M, SCHEDULES, Schedule
from moe_triton_kernels.tools.floors import DEVICES
from moe_triton_kernels.tools.layer_model import ITEMSIZE, shapes

L2_BANDWIDTHS = (6e12, 7.5e12)  # bytes/s: between these lie published measurements of reads on an H100


def l2_bytes(schedule: Schedule) -> int:
    """Bytes that a CTA's step reads from the L2 cache, its share of what a cluster reads once."""
    return ITEMSIZE * BLOCK_K * (BLOCK_M + schedule.block_n // schedule.ctas)


def wanted_bandwidth(schedule: Schedule, flops: float) -> float:
    """Bytes/s from the L2 cache with which the main loops reach so many FLOP/s."""
    return flops / (2 * BLOCK_M * schedule.block_n * BLOCK_K) * l2_bytes(schedule)


def wasted_tiles(counts: Sequence[int]) -> int:
    """Tiles of BLOCK_M rows, for each tile column, that experts with so many rows have only to make pairs.

    With ping-pong they are multiplied for nothing; the cooperative schedule multiplies half as many rows in both CTAs.
    """
    return sum(-(-count // BLOCK_M) % 2 for count in counts)


def wasted_share(rows: float) -> float:
    """The expected share of such tiles, for experts with about so many rows: any remainder is as likely as another."""
    needed = rows / BLOCK_M + 0.5
    return 0.5 / (needed + 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="h200", choices=["h100", "h200"])
    device = DEVICES[parser.parse_args().device]
    print(f"{device.name}: on paper, not measured; P = {device.flops_16:.3g} FLOP/s")
    limits = "".join(f"{f'of P at {limit / 1e12:.1f} TB/s':>20}" for limit in L2_BANDWIDTHS)
    print(f"{'schedule':22}{'bytes a step':>13}{'TB/s at P':>11}{limits}")
    for name, schedule in SCHEDULES.items():
        wanted = wanted_bandwidth(schedule, device.flops_16)
        reached = "".join(f"{min(1.0, limit / wanted):20.2f}" for limit in L2_BANDWIDTHS)
        print(f"{name:22}{l2_bytes(schedule):13}{wanted / 1e12:11.1f}{reached}")
    print(f"\n{'layer':22}{'rows an expert':>15}{'tiles wasted in clusters':>26}")
    for name, shape in shapes().items():
        rows = shape.rows / shape.experts
        print(f"{name:22}{rows:15.0f}{wasted_share(rows):26.1%}")


if __name__ == "__main__":
    main()
