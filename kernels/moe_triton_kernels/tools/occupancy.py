"""How many programs of a compiled kernel a multiprocessor holds at once: the occupancy calculators, on paper.

NVIDIA's limits are those of the CUDA C++ programming guide ("Technical specifications per compute capability"), AMD's
those of the CDNA3 instruction set guide.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Multiprocessor:
    """One streaming multiprocessor or compute unit. Its registers lie in `parts` equal files, each with its own warps.

    The defaults are NVIDIA's: four files of 16384 32-bit registers are 512 per lane of a 32-lane warp.

    warps             resident warps at most (waves on AMD)
    programs          resident programs at most
    registers         per part and lane, counted per warp: how many registers of one lane a part's file holds
    register_step     granularity in which a lane's registers are allocated
    shared_bytes      shared memory of all resident programs
    reserved_bytes    shared memory that the system takes of every program's
    shared_step       granularity in which shared memory is allocated, in bytes
    """

    shared_bytes: int
    warps: int = 64
    programs: int = 32
    registers: int = 512
    register_step: int = 8
    reserved_bytes: int = 1 << 10
    shared_step: int = 128
    parts: int = 4


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(shared_bytes=164 << 10),
    "sm_86": Multiprocessor(shared_bytes=100 << 10, warps=48, programs=16),
    "sm_89": Multiprocessor(shared_bytes=100 << 10, warps=48, programs=24),
    "sm_90": Multiprocessor(shared_bytes=228 << 10),
    "sm_100": Multiprocessor(shared_bytes=228 << 10),
    "sm_103": Multiprocessor(shared_bytes=228 << 10),
    "sm_120": Multiprocessor(shared_bytes=100 << 10, warps=48, programs=24),
    # four SIMDs of 8 waves, each with 512 vector registers per lane, accumulation registers included
    "gfx942": Multiprocessor(warps=32, shared_bytes=64 << 10, reserved_bytes=0, shared_step=512),
    "gfx950": Multiprocessor(warps=32, shared_bytes=160 << 10, reserved_bytes=0, shared_step=512),
}


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def resident_programs(arch: str, *, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Programs that one multiprocessor of `arch` holds at once; 0 where it cannot hold a single one.

    registers per thread, shared_bytes and num_warps per program, as a `Report` and a `Case` of `offline` have them.
    ValueError on an architecture without an entry in MULTIPROCESSORS.
    """
    if arch not in MULTIPROCESSORS:
        raise ValueError(f"arch: got {arch!r}, wanted one of {', '.join(MULTIPROCESSORS)}")
    unit = MULTIPROCESSORS[arch]
    warps_per_part = unit.warps // unit.parts
    if registers > 0:
        warps_per_part = min(warps_per_part, unit.registers // round_up(registers, unit.register_step))
    by_warps = warps_per_part * unit.parts // num_warps
    shared = round_up(shared_bytes + unit.reserved_bytes, unit.shared_step)
    by_shared = unit.shared_bytes // shared if shared else unit.programs
    return min(unit.programs, by_warps, by_shared)
