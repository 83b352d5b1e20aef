"""Tables of addresses: where the tensors of a sequence of experts lie, as int64 on their device.

A kernel writes a table from its arguments, so that nothing is copied from the host's memory: that would wait for the
stream, and a captured graph would copy it again at every replay, from memory that has another use by then.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

AT_A_TIME = 8
ARGUMENTS = [f"a{i}" for i in range(AT_A_TIME)]


@triton.jit(do_not_specialize=["start", "size", *ARGUMENTS])
def address_kernel(table, start, size, a0, a1, a2, a3, a4, a5, a6, a7):
    """table [size]: these addresses, from `start` on."""
    addresses = (a0, a1, a2, a3, a4, a5, a6, a7)
    for i in tl.static_range(8):
        tl.store(table + start + i, addresses[i].to(tl.int64), mask=start + i < size)


def fill_table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    table = torch.empty(len(addresses), dtype=torch.int64, device=device)
    for start in range(0, len(addresses), AT_A_TIME):
        some = addresses[start : start + AT_A_TIME]
        padded = (*some, *some[-1:] * (AT_A_TIME - len(some)))  # not 0, which is an argument of another type
        address_kernel[(1,)](table, start, len(addresses), *padded, num_warps=1)
    return table


@lru_cache(maxsize=1024)
def kept_table(addresses: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """A table that was filled on this stream: on another one, nothing would order its readers behind the kernel."""
    return fill_table(addresses, device)


def address_table(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """The addresses as int64 [E] on the device. Kept, because a training step asks for the same ones every time.

    While a graph is captured a table is the graph's own: what is recorded fills it when the graph runs, and no earlier.
    """
    if device.type != "cuda":
        return kept_table(addresses, device, 0)
    if torch.cuda.is_current_stream_capturing():
        return fill_table(addresses, device)
    return kept_table(addresses, device, torch.cuda.current_stream(device).cuda_stream)
