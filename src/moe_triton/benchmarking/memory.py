"""What a block keeps for backward, and its peak memory on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_triton.benchmarking.providers.block import Block
from moe_triton.benchmarking.timing import Call, ready


def saved_bytes(block: Block, hidden: Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps between forward and backward, parameters left out.

    The router's and the hidden states' own are counted. A tensor that hides outside save_for_backward is not seen.
    """
    parameters = {tensor.untyped_storage().data_ptr() for tensor in block.leaves()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor  # kept alive by the graph, so no address is used twice

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block.forward(hidden.detach().requires_grad_())
    total = sum(kept.values())
    del out
    return total


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """The most memory that one call holds beyond what was allocated before it; None where the device does not count."""
    if device.type != "cuda":
        return None
    run = ready(call)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak
