"""Plain arithmetic for launchers: Triton's own functions of these names take microseconds on the host."""

from __future__ import annotations


def cdiv(x: int, y: int) -> int:
    """x / y rounded up."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n; 1 for n <= 1, 0 included."""
    return 1 if n <= 1 else 1 << (n - 1).bit_length()
