"""PEFT's adapters with the experts on two ranks: transformers' expert parallelism, and FSDP2."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.helpers.compare import relative_rms

FAMILIES = ("qwen3_moe", "gpt_oss")


def token_ids() -> torch.Tensor:
    return torch.randint(0, 64, (4, 8), generator=torch.Generator().manual_seed(5))


def with_adapters(model: torch.nn.Module) -> torch.nn.Module:
    """The same adapters on every rank."""
    from peft import LoraConfig, get_peft_model

    names = ["experts.gate_up_proj", "experts.down_proj"]
    torch.manual_seed(2)
    config = LoraConfig(r=3, target_modules=[], target_parameters=names, init_lora_weights=False)
    return get_peft_model(model, config)


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module", params=FAMILIES)
def expected(request, tmp_path_factory) -> Path:
    """A checkpoint, and beside it the loss and gradients of PEFT on the eager experts in one process."""
    from tests.helpers.families import tiny_model

    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model(request.param)
    model.save_pretrained(folder / "model")
    model = with_adapters(model).train()
    loss = model(input_ids=token_ids(), labels=token_ids()).loss
    loss.backward()
    torch.save({"loss": loss.detach(), **{n: p.grad for n, p in trained(model).items()}}, folder / "expected.pt")
    return folder


def compare(model: torch.nn.Module, loss: torch.Tensor, folder: Path) -> None:
    wanted = torch.load(folder / "expected.pt")
    assert relative_rms(loss, wanted.pop("loss")) <= 1e-6
    grads = {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for name, p in trained(model).items()
    }
    assert grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert grad.abs().max() > 0, name
        error = relative_rms(grads[name], grad)
        assert error <= 2e-6, f"{name}: {error:.2e}"


def loaded(folder: Path, **options: object) -> torch.nn.Module:
    import peft  # noqa: F401  (before `register`, which prepares it for experts that are spread)
    from transformers import AutoModelForCausalLM

    from moe_triton.integrations.transformers import register

    return AutoModelForCausalLM.from_pretrained(folder / "model", experts_implementation=register(), **options)


def expert_parallel(folder: Path) -> None:
    """Every rank has the whole batch."""
    from transformers.distributed import DistributedConfig

    os.environ |= {"RANK": str(dist.get_rank()), "WORLD_SIZE": "2", "LOCAL_RANK": str(dist.get_rank())}
    config = DistributedConfig(tp_size=2, ep_size=2)
    model = with_adapters(loaded(folder, distributed_config=config)).train()
    experts = next(m for m in model.modules() if type(m).__name__.endswith("Experts"))
    assert experts.gate_up_proj.to_local().shape[0] == experts.gate_up_proj.shape[0] // 2
    loss = model(input_ids=token_ids(), labels=token_ids()).loss
    loss.backward()
    compare(model, loss, folder)


def test_expert_parallelism_of_transformers(two_ranks, expected):
    two_ranks.run(expert_parallel, expected)


def fsdp2(folder: Path, experts_apart: bool) -> None:
    """Every rank has half of the batch, and FSDP2 averages."""
    from torch.distributed.fsdp import fully_shard

    model = with_adapters(loaded(folder)).train()
    inner = model.get_base_model()
    for layer in inner.model.layers:
        if experts_apart:
            fully_shard(layer.mlp.experts.get_base_layer())
        fully_shard(layer)
    fully_shard(model)
    mine = token_ids().chunk(2)[dist.get_rank()]
    loss = model(input_ids=mine, labels=mine).loss
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    compare(model, total / 2, folder)


@pytest.mark.parametrize("experts_apart", [False, True])
def test_fsdp2(two_ranks, expected, experts_apart):
    two_ranks.run(fsdp2, expected, experts_apart)


def own_layer() -> None:
    """A layer of ours over ranks: every rank has the adapters of all experts."""
    import peft

    from moe_triton import MoE
    from moe_triton.distributed import ExpertParallel, make_groups, reduce_gradients
    from moe_triton.integrations.peft import install

    install()
    groups, draw = make_groups(ep=2), torch.Generator().manual_seed(3)
    x, grad = (torch.randn(12, 16, dtype=torch.float64, generator=draw) for _ in range(2))
    grads = []
    for parallel, here in (
        (None, slice(None)),
        (ExpertParallel(groups), slice(6 * groups.dp.rank, 6 + 6 * groups.dp.rank)),
    ):
        torch.manual_seed(0)
        layer = MoE(16, 8, 4, top_k=2, expert_parallel=parallel, dtype=torch.float64)
        model = with_adapters(torch.nn.ModuleDict({"moe": layer}))
        assert isinstance(model.base_model.model.moe.experts, peft.tuners.lora.layer.ParamWrapper)
        ((model.base_model.model.moe(x[here]).output * grad[here]).sum() / (1 if parallel is None else 0.5)).backward()
        if parallel is not None:
            reduce_gradients(model)
        grads.append({name: p.grad for name, p in trained(model).items()})
    assert grads[0].keys() == grads[1].keys()
    for name, wanted in grads[0].items():
        assert relative_rms(grads[1][name], wanted) <= 1e-12, name


def test_our_own_layer_over_ranks(two_ranks):
    two_ranks.run(own_layer)


def cut_experts() -> None:
    from moe_triton import MoE
    from moe_triton.distributed import ExpertParallel, make_groups
    from moe_triton.integrations.peft import install

    install()
    layer = MoE(16, 8, 4, top_k=2, expert_parallel=ExpertParallel(make_groups(etp=2)))
    with pytest.raises(ValueError, match="target_parameters: got experts cut into 2 slices"):
        with_adapters(torch.nn.ModuleDict({"moe": layer}))


def test_adapters_of_slices_are_refused(two_ranks):
    two_ranks.run(cut_experts)
