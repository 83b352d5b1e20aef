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
    "experts, our exchange": {"tp_size": 2, "ep_size": 2, "ep_implementation": "moe_triton"},
    "experts and batches": {"fsdp_size": 2, "ep_size": 2},
    "experts and batches, our exchange": {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "moe_triton"},
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
    from moe_triton.distributed import ExpertParallel
    from moe_triton.integrations import transformers as hf

    expected, failures = torch.load(folder / "expected.pt"), {}
    ran, exchanged = [], []
    mlp, exchange = hf.moe_mlp, ExpertParallel.exchange
    for way, sizes in WAYS.items():
        ran.clear()
        exchanged.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hf, "moe_mlp", lambda *args, **options: ran.append(1) or mlp(*args, **options))
            patch.setattr(
                ExpertParallel, "exchange", lambda *args, **options: exchanged.append(1) or exchange(*args, **options)
            )
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
        ours = exchanged if sizes.get("ep_implementation") == "moe_triton" else ran
        if worst[0] > TOLERANCE or not ours:
            failures[way] = f"{worst[1]}: {worst[0]:.1e}, {len(ours)} calls of ours"
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


OURS = "experts, our exchange"


def options_and_errors(folder: Path) -> None:
    """An exchange with options under a key of its own; experts that do not know of it."""
    from transformers.distributed.expert_parallel import EPImplementationInterface

    from moe_triton.integrations.ep_implementation import ep_implementation

    events: list[str] = []
    EPImplementationInterface.register("in chunks", ep_implementation(chunks=2, listener=events.append))
    WAYS["in chunks"] = {**WAYS[OURS], "ep_implementation": "in chunks"}
    model = loaded(folder, "in chunks")
    with torch.no_grad():
        model(input_ids=token_ids())
        assert "issue rows of chunk 1" in events
        model.set_experts_implementation("grouped_mm")
        with pytest.raises(ValueError, match="experts_implementation: got 'grouped_mm' with ep_implementation"):
            model(input_ids=token_ids())


def test_our_exchange_with_options(two_ranks, tmp_path):
    two_ranks.run(options_and_errors, save_with_expectations(tmp_path, "qwen3_moe", torch.float32))


@pytest.mark.parametrize("way", ["experts, all to all", "experts, all reduce", OURS, "experts and batches", "FSDP2"])
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
