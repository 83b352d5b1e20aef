"""The products that are fast for an expert's rows on a CPU, and how many rows they like.

Which policy a processor gets is a table: nothing is timed when the library is imported, so that two runs on one machine
give the same bits. `moe-triton tune --cpu` measures, for a processor that the table does not know.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton.backends.torch.fused import loops_problem, multiplies_pairs, runs_on_threads
from moe_triton.backends.torch.processor import Processor, this_processor
from moe_triton.backends.torch.threads import knows_torchs_threads
from moe_triton.torch_internals import onednn_linear


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuPolicy:
    """Which products to use on a processor, and which blocks of rows suit them (measured in benchmarks/NOTES.md).

    shapes_recur        whether a product of a new shape costs the compilation of a kernel
    linear              by dtype, oneDNN's product where it is faster than torch.mm
    linear_from         the fewest FLOPs of a product that it is used for: each call packs the matrix anew
    gradient_from       the fewest numbers of a projection whose gradient it computes; torch.mm writes in place
    most_batched_rows   by dtype, up to how many rows (forward, backward) an expert may share one batched product with
                        its neighbours; not at all in other dtypes
    row_quantum         of what number the rows of a product are a multiple where shapes should recur
    shared_block_rows   the most rows of a block whose experts have products of their own
    batched_block_rows  the fewest and the most rows of a block with one batched product
    batched_overhead, alone_per_row, alone_overhead
                        MKL's cost of m rows, in rows of a batched product: m + batched_overhead in one, and
                        alone_per_row * m + alone_overhead in a product alone
    num_threads         None for torch's at the time of the call
    looped              the dtypes whose products are made by the loops of `looped`
    fixed_rows          the rows of every product where a row's bits must not depend on how many there are; 0: any
    """

    shapes_recur: bool
    linear: Mapping[torch.dtype, Callable[..., Tensor]] = field(default_factory=dict)
    linear_from: int = 1 << 24
    gradient_from: int = 0
    most_batched_rows: Mapping[torch.dtype, tuple[int, int]] = field(default_factory=dict)
    row_quantum: int = 16
    shared_block_rows: int = 256
    batched_block_rows: tuple[int, int] = (64, 1280)
    batched_overhead: int = 24
    alone_per_row: float = 1.1
    alone_overhead: int = 36
    num_threads: int | None = None
    looped: frozenset[torch.dtype] = frozenset()
    fixed_rows: int = 0

    @property
    def threads(self) -> int:
        return torch.get_num_threads() if self.num_threads is None else self.num_threads

    def most_batched(self, dtype: torch.dtype, *, backward: bool) -> int:
        """Return the most rows of an expert that goes through a batched product; 0 where only single ones are fast."""
        if self.threads == 1 and not self.shapes_recur:
            return 0  # without threads MKL's batches gain nothing that pays for padding
        return self.most_batched_rows.get(dtype, (0, 0))[backward]

    def loops(self, dtype: torch.dtype) -> bool:
        """Return whether the loops make the products of a dtype."""
        return dtype in self.looped and runs_on_threads(dtype)

    def padded(self, num_rows: int, *, batched: bool = False, flops_per_row: float = math.inf) -> int:
        """Return the number of rows to compute for `num_rows`, which recurs where shapes should.

        flops_per_row: of the larger product of these rows, where torch.mm multiplies what is below `linear_from`: it
        compiles nothing. 0 for our loops.
        """
        if self.fixed_rows and flops_per_row > 0:
            return -(-num_rows // self.fixed_rows) * self.fixed_rows
        if not self.shapes_recur or (num_rows <= self.row_quantum and not batched):
            return num_rows
        size = -(-num_rows // self.row_quantum) * self.row_quantum
        return num_rows if not batched and size * flops_per_row < self.linear_from else size

    def product(
        self, left_mk: Tensor, right_nk: Tensor, bias_n: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """Compute left @ right.T + bias; with `out` it is there too, and what is returned may be a copy in cache."""
        if not self.fixed_rows:
            return self._product(left_mk, right_nk, bias_n, out)
        size_n = right_nk.shape[0]
        more_k, more_n = -right_nk.shape[1] % WHOLE, -size_n % WHOLE
        if more_k or more_n:
            left_mk, right_nk = F.pad(left_mk, (0, more_k)), F.pad(right_nk, (0, more_k, 0, more_n))
            bias_n = None if bias_n is None else F.pad(bias_n, (0, more_n))
        y_mn = left_mk.new_empty(left_mk.shape[0], size_n + more_n) if out is None or more_n else out
        for start in range(0, left_mk.shape[0], self.fixed_rows):
            piece = slice(start, start + self.fixed_rows)
            self._product(left_mk[piece], right_nk, bias_n, y_mn[piece])
        if more_n:
            y_mn = y_mn[:, :size_n] if out is None else out.copy_(y_mn[:, :size_n])
        return y_mn

    def gradient(self, left_mO: Tensor, right_mI: Tensor, out_OI: Tensor) -> None:
        """Write left.T @ right, a sum over rows, into `out`."""
        if left_mO.dtype in self.linear and out_OI.numel() >= self.gradient_from:
            self.product(left_mO.T, right_mI.T, out=out_OI)
        else:
            torch.mm(left_mO.T, right_mI, out=out_OI)

    def by_mm(self, dtype: torch.dtype, flops: float) -> bool:
        """Return whether torch.mm computes a product of so many FLOPs."""
        return not self.fixed_rows and (dtype not in self.linear or flops < self.linear_from)

    def _product(self, left_mk: Tensor, right_nk: Tensor, bias_n: Tensor | None, out: Tensor | None) -> Tensor:
        """`product` in one call of a library."""
        linear = self.linear.get(left_mk.dtype)
        if linear is not None and 2 * left_mk.numel() * right_nk.shape[0] >= self.linear_from:
            y_mn = linear(left_mk, right_nk, bias_n, "none", [], "")
            if out is not None:
                out.copy_(y_mn)
            return y_mn
        if bias_n is not None:
            return torch.addmm(bias_n, left_mk, right_nk.T, out=out)
        return torch.mm(left_mk, right_nk.T, out=out)


class Rule(NamedTuple):
    """The policy of some processors, and how we know: what was measured, or "a guess"."""

    policy: str
    maker: str | None
    instruction_set: str | None
    evidence: str
    family: int | None = None  # of the processor, as its maker counts

    def fits(self, processor: Processor) -> bool:
        sets = self.instruction_set is None or processor.has(self.instruction_set)
        sets = sets and (self.policy != "loops" or has_loops(processor))
        return sets and self.maker in (None, processor.maker) and self.family in (None, processor.family)


# The first that fits counts. In GFLOP/s, fp32; torch.mm is MKL's product.
RULES = (
    Rule(
        "loops", "AMD", "avx512",
        "measured on AMD EPYC (Zen 4), torch 2.13, numba 0.68, two threads, GFLOP/s by the loops, MKL and oneDNN, of "
        "products, gradients of rows and gradients of weights: fp32 256x512x768 199, 174, 200, then 201, 171, 198 and "
        "207, 185, 180; 8x512x768 67, 35, 46, then 54, 32, 44 and 67, 36, 89; bf16 256x512x768 375, 393, 385, then "
        "390, 388, 388 and 418, 389, 346; 8x512x768 111, 70, 73, then 79, 71, 69 and 108, 85, 127",
        family=25,
    ),
    Rule(
        "onednn_large", "AMD", "avx512",
        "measured on AMD EPYC (Zen 4), torch 2.13, one thread: 128x512x768 85 by MKL, 88 by oneDNN, which also copies "
        "its result; 256x2048x2048 86 and 106; gradients of 512x768 90 and 85, of 2048x2048 90 and 100", family=25,
    ),
    Rule("onednn", "AMD", "avx512", "measured on AMD EPYC (Zen 5), torch 2.13: oneDNN twice MKL"),
    Rule(
        "mkl", "Intel", "avx512",
        "measured on an Intel Xeon without AMX, 2 cores, torch 2.13: 256x512x768 262 by MKL, 251 by oneDNN; 8x512x768 "
        "111 and 56",
    ),
    Rule("mkl", None, "avx512", "a guess, from Intel's"),
    Rule("mkl", "AMD", "avx2", "measured on AMD EPYC (Zen 3), torch 2.13: 256x512x768 81 by MKL, 72 by oneDNN"),
    Rule("mkl", None, "avx2", "a guess, from AMD's without AVX-512"),
    Rule("mm", None, None, "a guess: torch.mm"),
)  # fmt: skip
POLICIES = ("loops", "onednn", "onednn_large", "mkl", "mm")
VARIABLE = "MOE_TRITON_CPU_POLICY"


class Chosen(NamedTuple):
    """The policy's name, one of POLICIES, and why it was chosen, in words."""

    policy: str
    reason: str


def make_policy(name: str, processor: Processor) -> CpuPolicy:
    """Return one of POLICIES for a processor.

    onednn  fp32 products by oneDNN, which torch itself uses only in compiled graphs; every new shape costs the
            compilation of a kernel, so sizes are padded to recur
    onednn_large
            the same for products of 2^28 FLOPs or more, and gradients of projections of 2^20 numbers or more; below
            these torch.mm
    loops   products by our compiled loops (see `looped`), in bf16 where the processor multiplies it; gradients of more
            than 2048 rows an expert, and all else, as onednn_large. Only where the loops run, on processors with
            AVX-512.
    mkl     by torch.mm; up to 320 rows an expert forward and 48 backward, neighbours share one of MKL's batched
            products, which gives every thread products of its own (backward, where more is done to the padding, the
            gain ends sooner). Not where torch lacks MKL.
    mm      by torch.mm, one by one

    In bf16 a batched product pays up to 32 rows, where the weights' bytes rule the time, and only on processors that
    multiply bf16; elsewhere it is a naive loop in torch.
    """
    has_onednn = torch.backends.mkldnn.is_available()
    is_large = name in ("loops", "onednn_large")
    looped = [torch.float32] if name == "loops" and has_loops(processor) else []
    if looped and multiplies_pairs(processor):
        looped.append(torch.bfloat16)
    product = onednn_linear() if name == "onednn" or is_large else None
    most_batched_rows: dict[torch.dtype, tuple[int, int]] = {}
    if has_onednn and processor.has_bf16_products:
        most_batched_rows[torch.bfloat16] = (32, 32)
    if name == "mkl" and torch.backends.mkl.is_available():
        most_batched_rows[torch.float32] = (320, 48)
    return CpuPolicy(
        shapes_recur=product is not None,
        linear={} if product is None else {torch.float32: product},
        linear_from=1 << (28 if is_large else 24),
        gradient_from=1 << 20 if is_large else 0,
        most_batched_rows=most_batched_rows,
        looped=frozenset(looped),
    )


def has_loops(processor: Processor) -> bool:
    """Return whether the loops of `looped` run on a processor."""
    return processor.has("avx512") and knows_torchs_threads() and loops_problem() is None


def choose_policy(processor: Processor) -> Chosen:
    """Return the policy for a processor: the environment's, else the tuned one, else the table's.

    MOE_TRITON_CPU_POLICY is one of POLICIES, or the path of a file that `moe-triton tune --cpu` wrote; without it, the
    file in its default place is read where there is one. A file counts only for the processor and the number of threads
    that it was measured with.

    Raises ValueError, naming the variable or the file, for an unknown name and a broken file.
    """
    given = os.environ.get(VARIABLE, "")
    if given in POLICIES:
        return Chosen(given, f"{VARIABLE} asks for it")
    path = policy_path()
    if given and not path.exists():
        raise ValueError(f"{VARIABLE}: got {given!r}, wanted {', '.join(POLICIES)} or the path of an existing file")
    if path.exists() and (tuned := read_policies(path).get(policy_key(processor))) is not None:
        return Chosen(tuned, f"`moe-triton tune --cpu` measured it here ({path})")
    rule = next(rule for rule in RULES if rule.fits(processor))
    return Chosen(rule.policy, rule.evidence)


def policy_path() -> Path:
    """Return where `moe-triton tune --cpu` writes: MOE_TRITON_CPU_POLICY where it is a path, else in ~/.config."""
    given = os.environ.get(VARIABLE, "")
    if given and given not in POLICIES:
        return Path(given)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "moe_triton" / "cpu.json"


def policy_key(processor: Processor) -> str:
    """Return what a measurement is valid for: the processor, the threads and the version of torch."""
    version = ".".join(torch.__version__.split(".")[:2])
    return f"{processor}, {torch.get_num_threads()} threads, torch {version}"


def read_policies(path: Path) -> dict[str, str]:
    """Return the policy's name by `policy_key`, from a file that `moe-triton tune --cpu` wrote.

    Raises ValueError, naming the file, where it is broken.
    """
    try:
        found = {key: entry["policy"] for key, entry in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"CPU policies {path}: {type(error).__name__}: {error}") from error
    for key, name in found.items():
        if name not in POLICIES:
            raise ValueError(f"CPU policies {path}: {key!r}: got {name!r}, wanted {', '.join(POLICIES)}")
    return found


@functools.cache
def this_cpu() -> CpuPolicy:
    """Return the policy for the processor that this runs on, chosen at the first call."""
    processor = this_processor()
    return make_policy(choose_policy(processor).policy, processor)


WHOLE = 64  # what a product's columns and contraction are multiples of where a row's bits must not depend on its place


@functools.cache
def invariant_policy() -> CpuPolicy:
    """Return the policy with which a row's bits depend on this row alone: products of 32 rows each, padded.

    Which of its kernels a library takes depends on a product's sizes, and so does the order of its sums. With the rows
    fixed, MKL's still sums the rows at different places differently where the columns are fewer than 16 (fp32) or the
    contraction is odd (fp64); so both are multiples of WHOLE. tests/test_batch_invariance.py tries the processor
    at hand.
    """
    policy = this_cpu()
    return replace(policy, shapes_recur=True, most_batched_rows={}, fixed_rows=32)


def batched_product(
    left_Cmk: Tensor, right_Cnk: Tensor, bias_Cn: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """Compute left @ right.T + bias for each of C."""
    y_Cmn = torch.bmm(left_Cmk, right_Cnk.mT, out=out)
    return y_Cmn if bias_Cn is None else y_Cmn.add_(bias_Cn[:, None])


GROUPED_DTYPES = (torch.float32, torch.bfloat16)  # that `F.grouped_mm` takes on a CPU


def is_aligned(left_SI: Tensor, right_GIO: Tensor) -> bool:
    """Return whether `F.grouped_mm` takes these and returns dense rows: everything lies in steps of 16 bytes."""
    unit = 16 // left_SI.element_size()
    step_e, step_i, step_o = right_GIO.stride()
    is_dense = left_SI.stride(1) == 1 and (step_i == 1 or step_o == 1)
    steps = left_SI.stride(0) | step_e | (step_o if step_i == 1 else step_i)
    addresses = left_SI.data_ptr() | right_GIO.data_ptr()
    return is_dense and (steps | right_GIO.shape[2]) % unit == 0 and addresses % 16 == 0
