"""DeepSpeed's AutoEP with its experts on ours, beside its own."""

from __future__ import annotations

import copy

import pytest
import torch
from deepspeed.moe import ep_experts
from deepspeed.moe.ep_experts import GroupedExperts
from torch import nn

import moe_triton
from tests.helpers.compare import assert_close

D, N, E = 16, 12, 4


def made(activation: str = "swiglu", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.experts = GroupedExperts(D, N, E, use_grouped_mm=False, activation=activation, activation_limit=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.to(dtype)


def results(model: nn.Module, x: torch.Tensor, counts: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    out = model.experts(x, counts)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=out.dtype))
    return {"output": out.detach(), "x": x.grad, **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("activation", ["swiglu", "geglu_tanh", "swiglu_clamped", "swiglu_oai"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_grouped_experts(activation, backend):
    """Some rows are padding past the end, and one expert has none."""
    theirs, ours = made(activation), made(activation)
    report = moe_triton.swap(ours, backend=backend)
    assert [entry[:2] for entry in report.swapped] == [("experts", "GroupedExperts")]
    assert not report.skipped
    x, counts = torch.randn(20, D), torch.tensor([5, 0, 9, 3], dtype=torch.int32)
    wanted, found = results(theirs, x, counts), results(ours, x, counts)
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert_close(found[name], tensor)


def engine_losses(on_ours: bool) -> tuple[list[float], int]:
    """The losses of a Qwen3-MoE that DeepSpeed's engine has spread over two ranks."""
    import deepspeed
    import torch.distributed as dist
    from deepspeed.module_inject import auto_ep

    from tests.helpers.deepspeed_parity import reset, start_deepspeed
    from tests.helpers.families import VOCAB, tiny_model

    reset()
    start_deepspeed()
    model = tiny_model("qwen3_moe")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 1000,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "expert_parallel": {"enabled": True, "autoep_size": 2, "preset_model": "qwen3_moe", "use_grouped_mm": False},
    }
    with pytest.MonkeyPatch.context() as patch:
        # how deepspeed 0.19.8 records router logits does not fit transformers 5.24, and is not what runs here
        patch.setattr(auto_ep.AutoEP, "_retarget_transformers_output_recorders", lambda *_: None)
        engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)[0]
    swapped = len(moe_triton.swap(engine.module).swapped) if on_ours else 0
    losses = []
    for step in range(3):
        draw = torch.Generator().manual_seed(10 * step + dist.get_rank())
        ids = torch.randint(0, VOCAB, (2, 8), generator=draw)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    reset()
    return losses, swapped


def test_the_engine(two_ranks):
    theirs, ours = two_ranks.run(engine_losses, False), two_ranks.run(engine_losses, True)
    for (wanted, none), (found, swapped) in zip(theirs, ours, strict=True):
        assert (none, swapped) == (0, 2)
        assert found == pytest.approx(wanted, rel=2e-5)
        assert found[-1] != pytest.approx(found[0], rel=1e-2), "it trains"


def test_what_stays_as_it_is():
    model = made()
    before = dict(model.named_parameters())
    calls = []
    model.experts.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs)))
    for backend in ("torch", "auto"):
        moe_triton.swap(model, backend=backend)
    assert model.experts.moe_triton_backend == "auto"
    assert isinstance(model.experts, GroupedExperts)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert all(parameter.is_expert_group for parameter in model.parameters())
    model.experts(torch.randn(3, D), torch.tensor([1, 1, 1, 0]))
    assert calls == [2]
    copy.deepcopy(model).experts(torch.randn(3, D), torch.tensor([1, 1, 1, 0]))


def test_what_is_left_alone(monkeypatch):
    monkeypatch.setitem(ep_experts.EXPERT_ACTIVATIONS, "mine", ep_experts.EXPERT_ACTIVATIONS["swiglu"])
    forward = made()
    forward.experts.forward = lambda x, counts: x

    class Derived(GroupedExperts):
        pass

    derived = made()
    derived.experts.__class__ = Derived
    for model, reason in (
        (made("mine"), "activation: got 'mine', wanted one of swiglu"),
        (forward, "has a forward of its own"),
        (derived, "got Derived, wanted DeepSpeed's GroupedExperts itself"),
    ):
        report = moe_triton.swap(model)
        assert not report.swapped
        assert reason in report.skipped[0].reason
