"""The key "moe_triton" under transformers' own parallelism: experts, tensors and FSDP2 over two ranks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.helpers.spread_models import save_with_expectations, token_ids

FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "olmoe")
WAYS = {
    "experts, all to all": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
    "experts, all reduce": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
    "experts and batches": {"fsdp_size": 2, "ep_size": 2},
    "tensors": {"tp_size": 2},
    "FSDP2": {"fsdp_size": 2},
}
TOLERANCE = 5e-6


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory) -> Path:
    return save_with_expectations(tmp_path_factory.mktemp(request.param), request.param, torch.float32)


def loaded(folder: Path, way: str) -> nn.Module:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from moe_triton.integrations.transformers import register

    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": "2", "LOCAL_RANK": str(dist.get_rank())}
    return AutoModelForCausalLM.from_pretrained(
        folder,
        experts_implementation=register(),
        distributed_config=DistributedConfig(**WAYS[way]),
        dtype=torch.float32,
    ).train()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def against_one_process(folder: Path) -> dict[str, str]:
    """What differs, by the way: all of them are tried."""
    from moe_triton.integrations import transformers as hf

    expected, failures = torch.load(folder / "expected.pt"), {}
    ran = []
    original = hf.moe_mlp
    for way, sizes in WAYS.items():
        ran.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hf, "moe_mlp", lambda *args, **options: ran.append(1) or original(*args, **options))
            model = loaded(folder, way)
            mine = token_ids().chunk(2)[dist.get_rank()] if sizes.get("fsdp_size") else token_ids()
            loss = model(input_ids=mine, labels=mine).loss
            loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        worst = ((total / 2 / expected["loss"] - 1).abs().item(), "loss")
        for name, parameter in model.named_parameters():
            wanted = expected[name]
            grad = torch.zeros_like(wanted) if parameter.grad is None else whole(parameter.grad)
            worst = max(worst, (((grad - wanted).norm() / wanted.norm().clamp_min(1e-30)).item(), name))
        if worst[0] > TOLERANCE or not ran:
            failures[way] = f"{worst[1]}: {worst[0]:.1e}, {len(ran)} calls of ours"
    return failures


def test_every_gradient(two_ranks, saved):
    for failures in two_ranks.run(against_one_process, saved):
        assert not failures


def watched(folder: Path, way: str) -> dict:
    from moe_triton import LoadMonitor, RoutingRecorder

    model = loaded(folder, way)
    monitor, recorder = LoadMonitor(model), RoutingRecorder(model)
    mine = token_ids().chunk(2)[dist.get_rank()] if WAYS[way].get("fsdp_size") else token_ids()
    with torch.no_grad(), recorder.record():
        logits = model(input_ids=mine).logits
    with torch.no_grad(), recorder.replay(recorder.data):
        assert torch.equal(whole(model(input_ids=mine).logits), whole(logits))
    readings = monitor.read(group=dist.group.WORLD)
    return {
        "data": recorder.data,
        "loads": {name: reading.loads for name, reading in readings.items()},
        "balance": {name: reading.balance for name, reading in readings.items()},
    }


@pytest.mark.parametrize("way", ["experts, all to all", "experts, all reduce", "experts and batches", "FSDP2"])
def test_the_monitor_and_the_recorder(two_ranks, tmp_path_factory, way):
    from transformers import AutoModelForCausalLM

    from moe_triton import LoadMonitor, RoutingRecorder

    folder = save_with_expectations(tmp_path_factory.mktemp("watched"), "qwen3_moe", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    monitor, recorder = LoadMonitor(model), RoutingRecorder(model)
    with torch.no_grad(), recorder.record():
        model(input_ids=token_ids())
    wanted, found = monitor.read(), two_ranks.run(watched, folder, way)
    parts = [part["data"] for part in found]
    data = torch.cat(parts) if WAYS[way].get("fsdp_size") else parts[0]
    assert torch.equal(data, recorder.data)
    for part in found:
        assert part["loads"] == {name: reading.loads for name, reading in wanted.items()}
        assert part["balance"] == {name: pytest.approx(reading.balance) for name, reading in wanted.items()}
