"""Whole transformers models on our experts against their own eager path: logits, losses, every gradient, generation."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import moe_triton
from moe_triton.integrations import transformers as hf
from tests.helpers.compare import assert_close
from tests.helpers.families import FAMILIES, VOCAB, experts_modules, only_ours, tiny_model

# GraniteMoE 5.17 cannot compute its aux loss on any implementation: it records no router logits.
WITHOUT_ROUTER_LOGITS = ("deepseek_v3", "glm4_moe", "granitemoe")


@pytest.fixture(autouse=True)
def registered() -> None:
    hf.register()


def token_ids(num_tokens: int = 12) -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, num_tokens), generator=torch.Generator().manual_seed(5))


def train_step(model: PreTrainedModel, family: str) -> dict[str, torch.Tensor]:
    """Everything that a training step computes, by name."""
    model.train().zero_grad(set_to_none=True)
    torch.manual_seed(3)  # PhiMoE samples its experts in training
    options = {} if family in WITHOUT_ROUTER_LOGITS else {"output_router_logits": True}
    ids = token_ids()
    out = model(input_ids=ids, labels=ids, **options)
    out.loss.backward()
    results = {"logits": out.logits, "loss": out.loss}
    if options:
        results["aux_loss"] = out.aux_loss
        results |= {f"router_logits.{layer}": logits for layer, logits in enumerate(out.router_logits)}
    return results | {f"grad.{name}": parameter.grad for name, parameter in model.named_parameters()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value is not None, f"{name} has no gradient in the eager model"
        assert value.abs().max() > 0, f"{name} is zero in the eager model: nothing would be compared"
        try:
            assert_close(actual[name], value)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_equals_its_eager_path(family, dtype):
    model = tiny_model(family, dtype)
    expected = train_step(model, family)
    model.set_experts_implementation("moe_triton")
    with only_ours(model):
        actual = train_step(model, family)
    assert_same(actual, expected)
    assert experts_modules(model)
    assert all(hf.fused_activation(module) is not None for module in experts_modules(model))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_family_on_the_triton_kernels(family):
    model = tiny_model(family)
    expected = train_step(model, family)
    moe_triton.swap(model, backend="triton")
    with only_ours(model):
        assert_same(train_step(model, family), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate(family):
    model = tiny_model(family).eval()
    prompt = token_ids(4)
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)
    model.set_experts_implementation("moe_triton")
    with only_ours(model):
        actual = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert expected.shape == (2, 10)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_bf16_errs_no_more_than_eager(family):
    exact = tiny_model(family, torch.float64).eval()
    model = tiny_model(family, torch.bfloat16).eval()
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})

    def errors(expected: torch.Tensor) -> torch.Tensor:
        """Of each token: a token whose experts flip by rounding is as wrong on both sides."""
        with torch.no_grad():
            difference = model(token_ids()).logits.double() - expected
        return difference.square().mean(-1).sqrt() / expected.square().mean(-1).sqrt()

    with torch.no_grad():
        expected = exact(token_ids()).logits
    eager = errors(expected)
    model.set_experts_implementation("moe_triton")
    with only_ours(model):
        ours = errors(expected)
    assert eager.median() > 0
    assert ours.median() <= 1.25 * eager.median()


def zeros(module, x, index, weights):
    return hf.experts_forward(module, x, index, weights) * 0


def swapped_experts(module, x, index, weights):
    return hf.experts_forward(module, x, torch.where(index < 2, 1 - index, index), weights)


def dropped_token(module, x, index, weights):
    return hf.experts_forward(module, x, torch.where(torch.arange(len(x))[:, None] == 7, -1, index), weights)


def no_gradient(module, x, index, weights):
    return hf.experts_forward(module, x, index, weights.detach())


@pytest.mark.parametrize("broken", [zeros, swapped_experts, dropped_token, no_gradient])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_comparison_can_fail(family, broken, monkeypatch):
    model = tiny_model(family)
    expected = train_step(model, family)
    model.set_experts_implementation("moe_triton")
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "moe_triton", broken)
    with pytest.raises(AssertionError, match="relative RMS error"):
        assert_same(train_step(model, family), expected)


def test_only_ours_refuses_the_others():
    model = tiny_model("mixtral").eval()
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        with only_ours(model), pytest.raises(AssertionError, match="ran"):
            model(token_ids())


def test_a_model_is_made_on_our_key():
    assert hf.register() == hf.register() == "moe_triton"
    config = tiny_model("mixtral").config
    config._experts_implementation = "moe_triton"
    model = type(tiny_model("mixtral"))(config)
    assert model.get_experts_implementation() == {"": "moe_triton"}


def test_from_pretrained(tmp_path):
    model = tiny_model("qwen3_moe").eval()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, experts_implementation="moe_triton").eval()
    with torch.no_grad(), only_ours(loaded):
        actual = loaded(token_ids()).logits
    with torch.no_grad():
        assert_close(actual, model(token_ids()).logits)
