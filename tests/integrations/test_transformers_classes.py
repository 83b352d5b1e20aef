"""Every experts class that the installed transformers has: equal to its own eager path, or left alone with a reason."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moe_triton
from moe_triton.integrations import transformers as hf
from tests.helpers.experts_classes import TinyConfig, classes_by_decorator, experts_class, tiny_experts
from tests.helpers.experts_modules import D, E, K, N, T, assert_same, make_inputs, results
from tests.helpers.families import only_ours

WITH_INTERFACE, WITHOUT_INTERFACE = classes_by_decorator()

# What the fused activation of a class is, where it is not "swiglu"; None: its gate is called.
ACTIVATIONS = {
    "gpt_oss.GptOssExperts": ("gpt_oss", 7.0, 1.702),
    "openai_privacy_filter.OpenAIPrivacyFilterExperts": ("gpt_oss", 7.0, 1.702),
    "minimax_m3_vl.MiniMaxM3VLExperts": ("gpt_oss", 7.0, 1.702),
    "nemotron_h.NemotronHExperts": ("relu2", None, None),
    "gemma4.Gemma4TextExperts": ("geglu_tanh", None, None),
    "diffusion_gemma.DiffusionGemmaTextExperts": ("geglu_tanh", None, None),
    "deepseek_v4.DeepseekV4Experts": ("swiglu", 10.0, None),
    "glm5_next.Glm5NextTextExperts": ("swiglu", 10.0, None),
    "hy_v4.HYV4Experts": ("swiglu", 10.0, None),
    "hy_v4_vl.HYV4VLExperts": ("swiglu", 10.0, None),
    "beam.BeamExperts": None,
    "inkling2.Inkling2Experts": None,
    "inkling2_loop.Inkling2LoopExperts": None,
}

# Classes whose eager path computes a part in float32 whatever the dtype, so that float64 agrees to its digits only.
FP32_PARTS = {
    "openai_privacy_filter.OpenAIPrivacyFilterExperts",  # the products
    "beam.BeamExperts",  # the gate
    "muse_spark.MuseSparkExperts",  # the norm
    "inkling2.Inkling2Experts",  # the gate and the sum over choices
    "inkling2_loop.Inkling2LoopExperts",
}


@pytest.fixture(autouse=True)
def registered() -> None:
    hf.register()


def expected_of_eager(module: nn.Module, x, index, weights) -> dict[str, torch.Tensor]:
    """The eager path's results, where a slot to skip is a slot of weight zero: not every class skips it itself."""
    skipped = (index < 0) | (index >= E)
    out = module(x, index.masked_fill(skipped, 0), weights.masked_fill(skipped, 0))
    return results(out.to(x.dtype), module, x, weights)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", WITH_INTERFACE)
def test_a_class_equals_its_eager_path(name, dtype):
    module = tiny_experts(name, dtype)
    assert hf.obstacle(module) is None
    assert hf.fused_activation(module) == ACTIVATIONS.get(name, ("swiglu", None, None))
    x, index, weights = make_inputs(dtype)
    expected = expected_of_eager(module, x, index, weights)
    assert [entry.kind for entry in moe_triton.swap(module).swapped] == [type(module).__name__]
    with only_ours(module):
        actual = results(module(x, index, weights), module, x, weights)
    in_fp32 = name in FP32_PARTS and dtype == torch.float64
    assert_same(actual, expected, 1e-6 if in_fp32 else None)
    if in_fp32:  # else it has no place in that list any more
        with pytest.raises(AssertionError, match="relative RMS error"):
            assert_same(actual, expected)


def test_every_decorated_class_is_found():
    """What the source says is what the classes say: a forward that looks its implementation up."""
    found = set()
    for family in {name.partition(".")[0] for name in [*WITH_INTERFACE, *WITHOUT_INTERFACE]}:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for cls in vars(module).values():
            code = getattr(getattr(cls, "forward", None), "__code__", None)
            if getattr(cls, "__module__", None) == module.__name__ and code and "experts_interface" in code.co_freevars:
                found.add(f"{family}.{cls.__name__}")
    assert found == set(WITH_INTERFACE)
    assert len(found) >= 55


# Classes called experts that have no interface: of each, how one is made and called, and its name in the
# part of docs/transformers_reference.md that says why. None: the report does not name it, since it holds no expert's
# weights itself.


def routed(num_choices: int = K) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([torch.randperm(E)[:num_choices] for _ in range(T)]), torch.rand(T, num_choices)


def rows(num_rows: int = T) -> torch.Tensor:
    return torch.randn(num_rows, D)


LEFT_ALONE = {
    "aria.AriaSharedExpertsMLP": (lambda cls, config: cls(config), lambda: (rows(),), None),
    "aria.AriaGroupedExpertsGemm": (
        lambda cls, config: cls(D, N, E),
        lambda: (rows(E), torch.ones(E, dtype=torch.long)),
        "Aria",
    ),
    "aria.AriaExperts": (lambda cls, config: cls(config), lambda: (rows(), torch.randn(T, E)), "Aria"),
    "dbrx.DbrxExpertGLU": (
        lambda cls, config: cls(config),
        lambda: (rows(), *(torch.randn(N, D) for _ in range(3))),
        "DBRX",
    ),
    "dbrx.DbrxExperts": (lambda cls, config: cls(config), lambda: (rows(), *routed()), "DBRX"),
    "inkling.InklingSharedExperts": (
        lambda cls, config: cls(config),
        lambda: (rows(), torch.rand(T, 2)),
        "shared experts",
    ),
    "jetmoe.JetMoeParallelExperts": (lambda cls, config: cls(E, D, N), lambda: (rows(E), [1] * E), "JetMoE"),
    "llama4.Llama4TextExperts": (lambda cls, config: cls(config), lambda: (rows(2 * E),), "Llama 4"),
    "longcat_flash.LongcatFlashExperts": (
        lambda cls, config: cls(config),
        lambda: (rows(), *routed()),
        "LongCat-Flash",
    ),
    "nllb_moe.NllbMoeExperts": (lambda cls, config: cls(config, N), lambda: (rows(), *routed()), "NLLB-MoE"),
    "step3p7.Step3p7Experts": (lambda cls, config: cls(config), lambda: (rows(), *routed()), "Step 3"),
    "switch_transformers.SwitchTransformersExperts": (
        lambda cls, config: cls(config),
        lambda: (rows(), F.one_hot(torch.randint(E, (T, 1)), E), torch.rand(T, 1)),
        "Switch",
    ),
}


def test_every_class_without_the_interface_is_known():
    assert set(WITHOUT_INTERFACE) <= set(LEFT_ALONE)


@pytest.mark.parametrize("name", WITHOUT_INTERFACE)
def test_a_class_without_the_interface_is_left_alone_and_named(name):
    make, inputs, documented = LEFT_ALONE[name]
    module = make(experts_class(name), TinyConfig(name.partition(".")[0])).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
        arguments = inputs()
        expected = module(*arguments)
        report = moe_triton.swap(nn.ModuleDict({"inner": module}))
        assert report.swapped == []
        assert torch.equal(module(*arguments), expected)
    if documented is None:
        assert report.skipped == []
        return
    assert "no interface that moe_triton knows" in str(report) or "a list of experts" in str(report)
    not_covered = (Path(__file__).parents[2] / "docs/transformers_reference.md").read_text().partition("Not covered")[2]
    assert documented in not_covered
