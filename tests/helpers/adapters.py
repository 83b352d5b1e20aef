"""Tiny transformers models with PEFT's adapters on their experts, and what a training step of them computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import layer as peft_layers
from torch import nn

from moe_triton.integrations import transformers as hf
from tests.helpers.compare import relative_rms
from tests.helpers.families import VOCAB, tiny_model

TOLERANCE = 1e-6
EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def lora_config(**options: object) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "init_lora_weights": False, **EXPERTS, **options})


def adapted(family: str, dtype: torch.dtype = torch.float32, **options: object) -> PeftModel:
    """A tiny model on the eager implementation, with random adapters; ours is one `set_experts_implementation` away."""
    hf.register()
    model = tiny_model(family, dtype)
    torch.manual_seed(2)
    return get_peft_model(model, lora_config(**options))


def switch(model: PeftModel, name: str) -> None:
    model.get_base_model().set_experts_implementation(name)


def token_ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 12), generator=torch.Generator().manual_seed(5))


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def train_step(model: nn.Module) -> dict[str, torch.Tensor]:
    """Logits, loss and the gradient of everything that is trained."""
    model.train().zero_grad(set_to_none=True)
    torch.manual_seed(3)  # PhiMoE samples its experts in training
    out = model(input_ids=token_ids(), labels=token_ids())
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    grads = {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **grads}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, f"{name} is zero in the eager model: nothing would be compared"
        error = relative_rms(actual[name], value)
        assert error <= tolerance, f"{name}: relative RMS error {error:.2e} > {tolerance}"


@contextmanager
def nothing_materialised() -> Iterator[None]:
    """PEFT's parametrizations of experts' projections raise."""
    names = ("_LoraFactorsProxy", "_LoraParameterProxy")  # PEFT before 0.21 has the latter only
    proxies = [getattr(peft_layers, name) for name in names if hasattr(peft_layers, name)]
    before = [proxy.forward for proxy in proxies]

    def refusing(forward: Callable) -> Callable:
        def refuse(self: nn.Module, weight: torch.Tensor) -> torch.Tensor:
            assert weight.dim() < 3, f"{type(self).__name__} made a tensor of the weight's size"
            return forward(self, weight)

        return refuse

    try:
        for proxy in proxies:
            proxy.forward = refusing(proxy.forward)
        yield
    finally:
        for proxy, forward in zip(proxies, before, strict=True):
            proxy.forward = forward


def assert_equals_eager(model: PeftModel, tolerance: float = TOLERANCE) -> None:
    switch(model, "eager")
    expected = train_step(model)
    switch(model, "moe_triton")
    with nothing_materialised():
        actual = train_step(model)
    assert_same(actual, expected, tolerance)
