"""Which compiler kernels are built with: Triton, and the assembler that it calls."""

from __future__ import annotations

import re
import subprocess
from functools import lru_cache

import triton


def triton_version() -> tuple[int, ...]:
    return _numbers(triton.__version__)


@lru_cache
def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())


def compiler_fences() -> bool:
    """True where Triton itself puts a proxy fence between cp.async and the matrix unit (see `grouped_gemm`)."""
    return _numbers(triton.__version__) >= (3, 7, 1)


@lru_cache
def version_of(assembler: str) -> str | None:
    """What `ptxas --version` says, such as 12.9.86; None where it cannot be run."""
    try:
        text = subprocess.run([assembler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\bV(\d+(?:\.\d+)+)", text)
    return found.group(1) if found else None


def ptxas_version(architecture: str) -> str | None:
    """The version of the ptxas that Triton calls now for "sm_90", ...; None for an architecture that has none.

    Triton has two: "ptxas-blackwell" is for Blackwell, and from Triton 3.9 on for Hopper too. Not of the process: the
    first compilation of torch.compile may make Triton call another ptxas, that of torch.
    """
    if not architecture.startswith("sm_"):
        return None
    from triton.backends.nvidia.compiler import get_ptxas  # a Triton for AMD alone has none

    return version_of(get_ptxas(int(architecture.removeprefix("sm_"))).path)


def compiler_versions(architecture: str) -> dict[str, str | None]:
    """The versions on which what a kernel compiles to depends: of triton and of ptxas."""
    return {"triton": triton.__version__.split("+")[0], "ptxas": ptxas_version(architecture)}
