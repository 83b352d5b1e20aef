"""Transformers models whose experts are spread over ranks, beside the same model in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_triton.distributed.checkpoint.global_tensors import as_global, model_tensors
from tests.helpers.families import VOCAB

SEQUENCES, POSITIONS = 4, 8


def token_ids() -> Tensor:
    return torch.randint(0, VOCAB, (SEQUENCES, POSITIONS), generator=torch.Generator().manual_seed(5))


def save_with_expectations(folder: Path, family: str, dtype: torch.dtype = torch.float64) -> Path:
    """A checkpoint as the hub has it, and beside it the loss, norm and gradients of eager experts in one process."""
    from transformers import AutoModelForCausalLM

    from tests.helpers.families import tiny_model

    tiny_model(family, dtype).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    expected = step(model.train(), token_ids())
    torch.save(expected, folder / "expected.pt")
    return folder


def step(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The loss of a batch, the norm of its gradients, and these by name."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.clip_grad_norm_(trained, 1e9)
    grads = {name: zeros_for_none(parameter) for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), "norm": norm, **grads}


def zeros_for_none(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def spread_model(folder: Path, parallel: Any, dtype: torch.dtype = torch.float64) -> nn.Module:
    """On the meta device until its experts are spread; not filled."""
    from transformers import AutoConfig, AutoModelForCausalLM

    import moe_triton

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    report = moe_triton.swap(model, expert_parallel=parallel)
    assert report.swapped
    assert all(" on this rank" in entry.action for entry in report.swapped), report
    return model.train()


def batch_of(group: Any) -> Tensor:
    """This rank's part of the batch."""
    return token_ids().chunk(group.size)[group.rank]


def mean_over_ranks(loss: Tensor) -> Tensor:
    total = loss.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def assert_gradients(model: nn.Module, expected: dict[str, Tensor], tolerance: float) -> int:
    """Every part of a gradient that is on this rank against one process's; returns how many experts' there were."""
    num_experts = 0
    for name, (live, layout, is_expert) in model_tensors(model).items():
        if not isinstance(live, nn.Parameter) or not live.requires_grad:
            continue
        assert live.grad is not None, name
        whole = expected[name]
        for offset, box in as_global(live.grad, layout).boxes.items():
            wanted = whole[tuple(slice(low, low + size) for low, size in zip(offset, box.shape, strict=True))]
            error = ((box - wanted).norm() / whole.norm().clamp_min(1e-30)).item()
            assert error <= tolerance, f"{name}: relative error {error:.1e}"
            num_experts += is_expert
    return num_experts
