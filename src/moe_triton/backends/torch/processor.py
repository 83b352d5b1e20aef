"""The processor that this process runs on: its maker, and the instruction sets that decide which product is fast."""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterable
from typing import NamedTuple

import torch

MAKERS = {"AuthenticAMD": "AMD", "GenuineIntel": "Intel", "0x41": "Arm", "0x61": "Apple", "0xc0": "Ampere"}
# An instruction set of ours: all of these capabilities of `torch.cpu.get_capabilities`.
INSTRUCTION_SETS = {
    "avx2": ("avx2", "fma3"),
    "avx512": ("avx512_f", "avx512_cd", "avx512_bw", "avx512_dq", "avx512_vl"),
    "avx512_bf16": ("avx512_bf16",),
    "amx_bf16": ("amx_tile", "amx_bf16"),
    "neon": ("neon",),
    "bf16": ("bf16",),
    "sve": ("sve",),
}
BF16_PRODUCTS = ("avx512_bf16", "amx_bf16", "bf16")  # each multiplies bf16 without a detour through fp32


class Processor(NamedTuple):
    """One kind of processor; the same machine always gives the same.

    maker             "AMD", "Intel", "Arm", "Apple", "Ampere"; "unknown" where the system does not say
    name              as the system gives it
    instruction_sets  keys of INSTRUCTION_SETS
    family            the maker's number of the design; None where the system does not say. AMD: 25 is Zen 3 and Zen 4,
                      26 Zen 5
    """

    maker: str
    name: str
    instruction_sets: tuple[str, ...]
    family: int | None = None

    def has(self, instruction_set: str) -> bool:
        return instruction_set in self.instruction_sets

    @property
    def has_bf16_products(self) -> bool:
        """Whether a product of bf16 matrices runs at the speed of fp32 or above.

        oneDNN says that it supports bf16 on every processor with AVX-512, also where it converts to fp32 first, at a
        third of the speed of fp32.
        """
        return any(map(self.has, BF16_PRODUCTS))

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.instruction_sets) or 'no instruction set that we know'})"


@functools.cache
def this_processor() -> Processor:
    """Return the processor that this process runs on."""
    found = torch.cpu.get_capabilities()
    sets = [name for name, needed in INSTRUCTION_SETS.items() if all(found.get(flag) for flag in needed)]
    facts = _cpuinfo()
    name = facts.get("model name") or str(found.get("cpu_name") or platform.processor() or platform.machine())
    family = facts.get("cpu family", "")
    return Processor(_maker(facts, name), name, tuple(sets), int(family) if family.isdigit() else None)


def _maker(facts: dict[str, str], name: str) -> str:
    """Return the maker that /proc/cpuinfo names, else the one whose name is in the processor's."""
    given = facts.get("vendor_id") or facts.get("CPU implementer") or ""
    in_name = (maker for maker in MAKERS.values() if maker in name.split())
    described = platform.processor()  # Windows: "Intel64 Family 6 ..., GenuineIntel"
    in_description = (maker for key, maker in MAKERS.items() if key in described)
    return MAKERS.get(given) or next(in_name, None) or next(in_description, "unknown")


def _cpuinfo() -> dict[str, str]:
    """Return the first processor's facts in /proc/cpuinfo; empty where there is no such file (not Linux)."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return _first_facts(file)
    except FileNotFoundError:
        return {}


def _first_facts(lines: Iterable[str]) -> dict[str, str]:
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    return facts
