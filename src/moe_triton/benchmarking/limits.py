"""What no implementation can beat by much: the bare products, one dense product, and reading the weights once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton import runtime
from moe_triton.backends.torch.processor import this_processor
from moe_triton.benchmarking.cases import PASSES, Case, Workload
from moe_triton.torch_internals import onednn_linear

Product = tuple[Tensor, Tensor, Tensor]  # (a, b, out): a @ b
SMALL_TOKENS = 256  # up to here reading the weights bounds the time, so the bandwidth floor is shown
CPU_BUFFER_BYTES = 256 << 20  # far beyond the caches
GPU_BUFFER_BYTES = 2 << 30
# oneDNN's own product: torch.mm takes MKL for float32, which is half as fast on some CPUs. None where torch lacks it.
ONEDNN = onednn_linear()


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A call whose time, multiplied by `scale`, is the limit."""

    name: str
    about: str
    call: Callable[[], object]
    scale: float = 1.0


def by_mm(parts: Sequence[Product]) -> Callable[[], None]:
    def run() -> None:
        for a, b, out in parts:
            torch.mm(a, b, out=out)

    return run


def by_onednn(parts: Sequence[Product], linear: Callable[..., Tensor]) -> Callable[[], None]:
    """The results are dropped: this product has no `out`."""
    transposed = [(a, b.T) for a, b, _ in parts]

    def run() -> None:
        for a, b in transposed:
            linear(a, b, None, "none", [], "")

    return run


def onednn_dtypes() -> tuple[torch.dtype, ...]:
    """What oneDNN's product is fast for: bf16 only on processors that multiply bf16."""
    return (torch.float32, torch.bfloat16) if this_processor().has_bf16_products else (torch.float32,)


def fastest(parts: Sequence[Product], clock: Callable[[], float] = time.perf_counter) -> tuple[Callable[[], None], str]:
    """The quicker way to do the products on this device, and its name; a limit has to use the best there is."""
    ways = {"torch.mm": by_mm(parts)}
    if ONEDNN is None or parts[0][0].device.type != "cpu" or parts[0][0].dtype not in onednn_dtypes():
        return ways["torch.mm"], "torch.mm"
    ways["oneDNN"] = by_onednn(parts, ONEDNN)
    best = {}
    for name, run in ways.items():
        run()  # oneDNN compiles a kernel for every new shape
        ticks = [clock()]
        for _ in range(3):
            run()
            ticks.append(clock())
        best[name] = min(end - begin for begin, end in pairwise(ticks))
    name = min(best, key=lambda way: best[way])
    return ways[name], name


def expert_products(workload: Workload, counts: Sequence[int], mode: str) -> list[Product]:
    """The experts' products on contiguous rows, `counts` [E] of them: per expert 2 forward, 4 backward, 6 for full."""
    case = workload.case
    slots = torch.arange(sum(counts), device=workload.hidden.device) % case.tokens
    x_Sd, dy_Sd = workload.hidden[slots], workload.grad_out[slots]
    h_Sr = x_Sd.new_zeros(len(slots), case.expert_rows)
    a_Sn = torch.randn_like(h_Sr[:, : case.intermediate], memory_format=torch.contiguous_format)
    used = [e for e in range(case.experts) if counts[e]]
    x, h, a, y = (tensor.split(list(counts)) for tensor in (x_Sd, h_Sr, a_Sn, torch.zeros_like(x_Sd)))
    gate_up, down = workload.gate_up, workload.down
    parts: list[Product] = []
    if mode != "backward":
        for e in used:
            parts += [(x[e], gate_up[e].T, h[e]), (a[e], down[e].T, y[e])]
    if mode != "forward":
        backward = (dy_Sd, torch.zeros_like(a_Sn), torch.randn_like(h_Sr), torch.zeros_like(x_Sd))
        dy, da, dh, dx = (tensor.split(list(counts)) for tensor in backward)
        d_gate_up, d_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        for e in used:
            parts += [
                (dy[e], down[e], da[e]),
                (dy[e].T, a[e], d_down[e]),
                (dh[e], gate_up[e], dx[e]),
                (dh[e].T, x[e], d_gate_up[e]),
            ]
    return parts


def roof(workload: Workload, counts: Sequence[int], mode: str) -> Limit:
    """The experts' own products back to back and nothing else: no routing, gather, activation or combine."""
    run, way = fastest(expert_products(workload, counts, mode))
    return Limit(name="roof", about=f"the experts' products back to back, by {way}", call=run)


def dense_product(workload: Workload, mode: str) -> Product:
    """One product with the experts' FLOPs: [T, K 3n] @ [K 3n, d] (2n when ungated), 2 T for backward, 3 T for full."""
    case = workload.case
    rows = case.tokens * PASSES[mode]
    inner = case.top_k * (case.expert_rows + case.intermediate)
    like = workload.hidden
    a = torch.randn(rows, inner, device=like.device, dtype=like.dtype)
    b = torch.randn(case.hidden, inner, device=like.device, dtype=like.dtype)
    return a, b.T, like.new_zeros(rows, case.hidden)


def dense(workload: Workload, mode: str) -> Limit:
    run, way = fastest([dense_product(workload, mode)])
    return Limit(name="dense", about=f"one dense product of the same FLOPs, by {way}", call=run)


def multiplies_codes(device: torch.device) -> bool:
    """Return whether products in fp8 are kernels of the triton backend on this device; elsewhere they are emulated."""
    if not runtime.TRITON_INSTALLED or not (device.type == "cuda" or runtime.interpreting()):
        return False
    from moe_triton.backends.triton.experts_fp8 import runs_kernels  # needs Triton

    return runs_kernels(device)


def dense_of_codes(workload: Workload, mode: str) -> Limit | None:
    """`dense` of e4m3 codes with one scale each, by torch's scaled product; None where the device has none.

    Its sums are the fastest that there are. Sizes are padded to multiples of 16, as it wants.
    """
    if workload.hidden.device.type != "cuda" or not multiplies_codes(workload.hidden.device):
        return None
    a, b, _ = dense_product(workload, mode)
    a, b = (F.pad(x, (0, -x.shape[1] % 16, 0, -x.shape[0] % 16)).to(torch.float8_e4m3fn) for x in (a, b.T))
    one, whole = torch.ones((), device=a.device), F.ScalingType.TensorWise
    run = partial(F.scaled_mm, output_dtype=torch.bfloat16, use_fast_accum=True)
    return Limit(
        name="dense fp8",
        about="one dense product of codes of the same FLOPs, by torch's scaled_mm",
        call=lambda: run(a, b.T, one, whole, one, whole),
    )


def bandwidth_buffer(device: torch.device) -> Tensor:
    """fp32 ones that no cache holds: their sum reads at the memory's bandwidth."""
    size = GPU_BUFFER_BYTES if device.type == "cuda" else CPU_BUFFER_BYTES
    return torch.ones(size // 4, dtype=torch.float32, device=device)


def floor_bytes(case: Case, counts: list[int], mode: str) -> int:
    """Bytes of weights that must move: each pass reads the touched experts' weights once, and backward writes every
    expert's gradient once."""
    one = case.shape.packed(case.weight_elements)
    touched = sum(count > 0 for count in counts)
    return one * {"forward": touched, "backward": touched + case.experts, "full": 2 * touched + case.experts}[mode]


def floor(workload: Workload, counts: list[int], mode: str) -> Limit:
    """The time to move `floor_bytes` at the read bandwidth of this machine, from a sum over a buffer beyond the caches.

    Writing is taken to be as fast as reading, so it stays a floor.
    """
    buffer = bandwidth_buffer(workload.hidden.device)
    return Limit(
        name="floor",
        about="moving the touched weights at the measured read bandwidth",
        call=buffer.sum,
        scale=floor_bytes(workload.case, counts, mode) / buffer.nbytes,
    )


def limits(workload: Workload, counts: list[int], mode: str) -> list[Limit]:
    """The limits of a case: roof and dense, and for few tokens the bandwidth floor."""
    found = [roof(workload, counts, mode), dense(workload, mode)]
    if workload.case.tokens <= SMALL_TOKENS:
        found.append(floor(workload, counts, mode))
    return found
