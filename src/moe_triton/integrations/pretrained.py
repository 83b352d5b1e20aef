"""Fill a transformers model from a checkpoint where every rank needs its own part only."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from moe_triton.distributed.checkpoint.hub_names import pretrained
from moe_triton.distributed.checkpoint.whole_tensors import load_experts_from


def load_pretrained(model: nn.Module, source: str | PathLike[str], *, device: torch.device | str = "cpu") -> nn.Module:
    """Fill a transformers model from the files of a checkpoint, of which every rank reads its own part.

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
        moe_triton.swap(model, expert_parallel=ExpertParallel(groups))
        load_pretrained(model, folder, device="cuda")

    No rank ever has memory for more than its own experts, and with `apply_fsdp2` before it for more than its shards.
    Buffers that no checkpoint has, such as the frequencies of rotary embeddings, are computed as transformers does.

    Args:
        model: of transformers, on the meta device or in memory.
        source: as `moe_triton.distributed.load_experts_from` takes it: a folder, an index or a file of safetensors.
        device: where a model on the meta device gets its memory; one in memory stays where it is.

    Returns:
        The model.

    Raises:
        TypeError: model is none of transformers. ValueError: some of its parameters are on the meta device and some are
        not; a tensor of the source has another shape. CheckpointError: a file that cannot be read, a missing key.
    """
    if (of_transformers := pretrained(model)) is None:
        raise TypeError(f"model: got {type(model).__name__}, wanted a model of transformers")
    on_meta = {parameter.is_meta for parameter in model.parameters()}
    if len(on_meta) > 1:
        raise ValueError("model: got some parameters on the meta device and some in memory, wanted one or the other")
    if True in on_meta:
        _give_memory(of_transformers, torch.device(device))
    load_experts_from(source, model, only_experts=False)
    return model


@torch.no_grad()
def _give_memory(model: Any, device: torch.device) -> None:
    """Move a model from the meta device, with the values of the buffers that it does not save."""
    computed: list[tuple[nn.Module, str, Tensor]] = []
    missing: dict[nn.Module, None] = {}
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name in module._non_persistent_buffers_set:
                if buffer.is_meta:
                    missing[module] = None
                else:
                    computed.append((module, name, buffer))
    model.to_empty(device=device)
    for module, name, buffer in computed:
        setattr(module, name, buffer.to(device))
    for module in missing:
        model._init_weights(module)  # what transformers' models define to make buffers and parameters
    model.tie_weights()
