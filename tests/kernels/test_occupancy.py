"""Resident programs against the vendors' occupancy rules, worked out by hand."""

from __future__ import annotations

import pytest

from moe_triton_kernels.tools.occupancy import resident_programs


@pytest.mark.parametrize(
    ("arch", "registers", "shared_bytes", "num_warps", "expected"),
    [
        # 65536 / (255 -> 256 registers * 256 threads) = 1
        ("sm_90", 255, 0, 8, 1),
        # 128 registers * 128 threads = 16384 of 65536
        ("sm_90", 128, 0, 4, 4),
        # 129 are allocated as 136: 3 warps in each of the four files, 12 warps, 3 programs of 4
        ("sm_90", 129, 0, 4, 3),
        # 64 warps, however few registers they take
        ("sm_90", 32, 0, 4, 16),
        # at most 32 programs
        ("sm_90", 32, 0, 1, 32),
        # the largest program: 227 KiB and the KiB that the system keeps
        ("sm_90", 32, 232448, 4, 1),
        ("sm_90", 32, 232448 + 1, 4, 0),
        # 113 KiB + 1 KiB twice
        ("sm_90", 32, 113 << 10, 4, 2),
        ("sm_90", 32, (113 << 10) + 1, 4, 1),
        # Ampere has 164 KiB
        ("sm_80", 32, 81 << 10, 4, 2),
        ("sm_80", 32, 82 << 10, 4, 1),
        ("sm_100", 255, 64 << 10, 4, 2),
        # CDNA3: 512 registers per lane of each SIMD, 8 waves, 64 KiB
        ("gfx942", 256, 0, 4, 2),
        ("gfx942", 257, 0, 4, 1),
        ("gfx942", 512, 0, 8, 0),
        ("gfx942", 64, 32 << 10, 4, 2),
        ("gfx942", 16, 0, 4, 8),
    ],
)
def test_by_hand(arch: str, registers: int, shared_bytes: int, num_warps: int, expected: int) -> None:
    found = resident_programs(arch, registers=registers, shared_bytes=shared_bytes, num_warps=num_warps)
    assert found == expected


def test_an_unknown_architecture() -> None:
    with pytest.raises(ValueError, match=r"arch: got 'sm_00', wanted one of sm_80, sm_86, sm_89, sm_90, "):
        resident_programs("sm_00", registers=32, shared_bytes=0, num_warps=4)
