"""Transformers models whose experts are spread over ranks: training, files, wrappers, adapters, the Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers.spread_models import (
    assert_gradients,
    batch_of,
    mean_over_ranks,
    save_with_expectations,
    spread_model,
    step,
    token_ids,
)

FAMILIES = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "olmoe")
TOLERANCE = 1e-6  # transformers computes norms, router and loss in float32 whatever the dtype


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory) -> Path:
    return save_with_expectations(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> Path:
    return save_with_expectations(tmp_path_factory.mktemp("qwen3_moe"), "qwen3_moe")


def trained_and_saved(folder: Path, sizes: dict) -> None:
    """Loaded from files, one step, and written back: no rank has more than its own experts at any time."""
    from moe_triton import export_safetensors
    from moe_triton.distributed import ExpertParallel, clip_grad_norm_, make_groups, reduce_gradients
    from moe_triton.integrations.pretrained import load_pretrained

    groups, expected = make_groups(**sizes), torch.load(folder / "expected.pt")
    model = load_pretrained(spread_model(folder, ExpertParallel(groups)), folder)
    mine = batch_of(groups.dp)
    loss = model(input_ids=mine, labels=mine).loss
    loss.backward()
    reduce_gradients(model)
    assert (mean_over_ranks(loss) / expected["loss"] - 1).abs() <= TOLERANCE
    num_layers = sum(type(module).__name__.endswith("Experts") for module in model.modules())
    assert assert_gradients(model, expected, TOLERANCE) >= 2 * num_layers > 0
    assert (clip_grad_norm_(model, 1e9) / expected["norm"] - 1).abs() <= TOLERANCE
    export_safetensors(folder / "exported" / "model.safetensors", model)


@pytest.mark.parametrize("sizes", [{"ep": 2}, {"ep": 1, "etp": 2}], ids=str)
def test_families(two_ranks, saved, sizes):
    from transformers import AutoModelForCausalLM

    two_ranks.run(trained_and_saved, saved, sizes)
    found, wanted = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64) for folder in (saved / "exported", saved)
    )
    assert type(found) is type(wanted)
    theirs = wanted.state_dict()
    assert found.state_dict().keys() == theirs.keys()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def wrapped(folder: Path, how: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    from moe_triton.distributed import ExpertParallel, apply_fsdp2, clip_grad_norm_, make_groups, wrap_ddp
    from moe_triton.integrations.pretrained import load_pretrained

    groups = make_groups(ep=2, dp_replicate=2 if how == "HSDP" else 1)
    dtype, tolerance = (torch.float32, 3e-2) if "bf16" in how else (torch.float64, TOLERANCE)
    model, expected = spread_model(folder, ExpertParallel(groups), dtype), torch.load(folder / "expected.pt")
    router_weights = []
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(lambda _, inputs: router_weights.append(inputs[2].dtype))
    if how == "DDP":
        called = wrap_ddp(load_pretrained(model, folder), groups)
    else:
        policy = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if "bf16" in how else {}
        called = apply_fsdp2(model, groups, blocks=model.model.layers, **policy)
        load_pretrained(model, folder)
    mine = batch_of(groups.dp)
    loss = called(input_ids=mine, labels=mine).loss
    loss.backward()
    assert (mean_over_ranks(loss) / expected["loss"] - 1).abs() <= tolerance
    if "bf16" not in how:  # the router's rounding may choose other experts there
        assert_gradients(model, expected, tolerance)
        assert (clip_grad_norm_(called, 1e9, groups) / expected["norm"] - 1).abs() <= tolerance


@pytest.mark.parametrize("how", ["DDP", "FSDP2", "HSDP", "FSDP2 in bf16"])
def test_wrappers(four_ranks, qwen3, how):
    four_ranks.run(wrapped, qwen3, how)


def watched(folder: Path) -> dict:
    """What the experts were given, and which choices the routers made, over all ranks."""
    from moe_triton import LoadMonitor, RoutingRecorder
    from moe_triton.distributed import ExpertParallel, make_groups
    from moe_triton.integrations.pretrained import load_pretrained

    groups = make_groups(ep=2)
    model = load_pretrained(spread_model(folder, ExpertParallel(groups)), folder)
    monitor, recorder = LoadMonitor(model), RoutingRecorder(model)
    mine = batch_of(groups.dp)
    with torch.no_grad(), recorder.record():
        logits = model(input_ids=mine).logits
    with torch.no_grad(), recorder.replay(recorder.data):
        assert torch.equal(model(input_ids=mine).logits, logits)
    readings = monitor.read(group=dist.group.WORLD)
    return {
        "data": recorder.data,
        "loads": {name: (reading.assignments, reading.loads) for name, reading in readings.items()},
        "balance": {name: reading.balance for name, reading in readings.items()},
    }


def test_the_monitor_and_the_recorder(two_ranks, qwen3):
    from transformers import AutoModelForCausalLM

    from moe_triton import LoadMonitor, RoutingRecorder

    model = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float64, experts_implementation="eager").train()
    monitor, recorder = LoadMonitor(model), RoutingRecorder(model)
    with torch.no_grad(), recorder.record():
        model(input_ids=token_ids())
        model(input_ids=token_ids())
    wanted, found = monitor.read(), two_ranks.run(watched, qwen3)
    half = len(recorder.data) // 2
    assert torch.equal(torch.cat([part["data"] for part in found]), recorder.data[:half])
    for part in found:
        assert part["loads"] == {name: (reading.assignments, reading.loads) for name, reading in wanted.items()}
        assert part["balance"] == {name: pytest.approx(reading.balance) for name, reading in wanted.items()}


def generated(folder: Path) -> list[torch.Tensor]:
    """By a model and by its deep copy; the second rank's sequences end earlier."""
    import copy

    from moe_triton.distributed import ExpertParallel, make_groups
    from moe_triton.integrations.pretrained import load_pretrained

    model = load_pretrained(spread_model(folder, ExpertParallel(make_groups(ep=2))), folder).eval()
    rank = dist.get_rank()
    prompt = token_ids()[rank : rank + 1, :3]
    options = {"do_sample": False, "max_new_tokens": 2 if rank else 5, "synced_gpus": True}
    return [each.generate(prompt, **options) for each in (model, copy.deepcopy(model))]


def test_generate(two_ranks, qwen3):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float64, experts_implementation="eager").eval()
    for rank, found in enumerate(two_ranks.run(generated, qwen3)):
        options = {"do_sample": False, "max_new_tokens": 2 if rank else 5}
        wanted = model.generate(token_ids()[rank : rank + 1, :3], **options)
        assert [tokens.tolist() for tokens in found] == [wanted.tolist()] * 2


def adapted(folder: Path, how: str) -> None:
    """PEFT's adapters: every rank has those of all experts, and what it saves one process loads."""
    import peft

    from moe_triton.distributed import ExpertParallel, apply_fsdp2, make_groups, reduce_gradients
    from moe_triton.integrations.pretrained import load_pretrained

    groups = make_groups(ep=2)
    parallel = ExpertParallel(groups)
    model = spread_model(folder, parallel)
    if how == "FSDP2":
        load_pretrained(model, folder)
        model = with_adapters(model)
        apply_fsdp2(model, groups, blocks=model.get_base_model().model.layers)
    else:
        model = with_adapters(load_pretrained(model, folder))
    mine = batch_of(groups.dp)
    loss = model(input_ids=mine, labels=mine).loss
    loss.backward()
    if how != "FSDP2":
        reduce_gradients(model)
    expected = torch.load(folder / "adapters.pt")
    assert (mean_over_ranks(loss) / expected["loss"] - 1).abs() <= TOLERANCE
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == expected.keys() - {"loss", "norm"} - {n for n in expected if "lora" not in n}
    for name, parameter in trained.items():
        grad = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
        assert ((grad - expected[name]).norm() / expected[name].norm()) <= TOLERANCE, name
    experts = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.layer.ParamWrapper))
    with pytest.raises(ValueError, match="merge: got experts over ranks"):
        experts.merge()


def with_adapters(model: torch.nn.Module) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    return get_peft_model(model, LoraConfig(r=3, target_modules=[], target_parameters=names, init_lora_weights=False))


@pytest.mark.parametrize("how", ["plain", "FSDP2"])
def test_adapters(two_ranks, qwen3, how):
    from transformers import AutoModelForCausalLM

    model = with_adapters(
        AutoModelForCausalLM.from_pretrained(qwen3, dtype=torch.float64, experts_implementation="eager").train()
    )
    torch.save(step(model, token_ids()), qwen3 / "adapters.pt")
    two_ranks.run(adapted, qwen3, how)
