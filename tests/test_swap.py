"""moe_triton.swap: what it switches, what it leaves alone and says so, and that it changes nothing else."""

from __future__ import annotations

import copy
import importlib
import pickle
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import moe_triton
from moe_triton.integrations import transformers as hf
from tests.helpers.compare import assert_close, relative_rms
from tests.helpers.families import COMMON, FAMILIES, VOCAB, experts_modules, only_ours, tiny_model

swap_module = importlib.import_module("moe_triton.swap")  # moe_triton.swap is the function


def token_ids() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))


def experts_input() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(10, 32), torch.stack([torch.randperm(6)[:2] for _ in range(10)]), torch.rand(10, 2)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model(family):
    model = tiny_model(family).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    with torch.no_grad():
        expected = model(token_ids()).logits
    report = moe_triton.swap(model)
    assert isinstance(report, moe_triton.SwapReport)
    experts = [name for name, module in model.named_modules() if type(module).__name__.endswith("Experts")]
    assert [entry.name for entry in report.swapped] == experts
    assert report.skipped == []
    assert model.get_experts_implementation() == {"": "moe_triton"}
    with torch.no_grad(), only_ours(model):
        assert_close(model(token_ids()).logits, expected)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers


def test_swapping_again_changes_nothing_but_the_backend():
    model = tiny_model("mixtral").eval()
    assert moe_triton.swap(model) == moe_triton.swap(model)
    assert "backend='auto': fused, swiglu" in moe_triton.swap(model).swapped[0].action
    assert "backend='reference'" in moe_triton.swap(model, backend="reference").swapped[0].action


def test_the_backend_reaches_the_experts(monkeypatch):
    asked = []
    model = tiny_model("mixtral").eval()
    original = hf.moe_mlp
    monkeypatch.setattr(hf, "moe_mlp", lambda *args, **kw: asked.append(kw["backend"]) or original(*args, **kw))
    moe_triton.swap(model, backend="reference")
    model(token_ids())
    moe_triton.swap(model)
    model(token_ids())
    assert asked == ["reference", "reference", "auto", "auto"]


def test_fp8_reaches_the_experts():
    model = tiny_model("mixtral")
    plain = model(token_ids()).logits
    assert "fused, swiglu, in fp8" in moe_triton.swap(model, fp8=True).swapped[0].action
    rounded = model(token_ids()).logits
    assert 1e-3 < relative_rms(rounded, plain) < 0.1
    rounded.square().sum().backward()
    assert all(module.gate_up_proj.grad.any() for module in experts_modules(model))
    assert moe_triton.explain(model)[0].parts[-1].runs.startswith("fp8 emulated")
    with pytest.raises(ValueError, match="was swapped with fp8=True, wanted experts whose products are not in fp8"):
        moe_triton.quantize(model, "int4")
    moe_triton.swap(model)
    assert_close(model(token_ids()).logits, plain)


def test_what_has_no_fp8_is_left_alone():
    model = tiny_model("mixtral")
    moe_triton.swap(model)
    _, called = experts_modules(model)
    moe_triton.quantize(model.model.layers[0], "fp8")
    called._apply_gate = MethodType(lambda self, gate_up: torch.relu(gate_up.chunk(2, -1)[0]), called)
    report = moe_triton.swap(model, fp8=True)
    assert report.swapped == []
    assert [entry.reason.partition(",")[0] for entry in report.skipped] == [
        "fp8: got True for quantised projections",
        "fp8: got True for a gate that has to be called",
    ]


def test_the_models_own_switch_undoes_it():
    model = tiny_model("mixtral").eval()
    moe_triton.swap(model)
    model.set_experts_implementation("eager")
    with only_ours(model), pytest.raises(AssertionError, match="the eager forward ran"):
        model(token_ids())


def test_one_layer_of_a_model():
    model = tiny_model("mixtral").eval()
    with torch.no_grad():
        expected = model(token_ids()).logits
    report = moe_triton.swap(model.model.layers[1])
    assert [entry.name for entry in report.swapped] == ["mlp.experts"]
    assert model.get_experts_implementation() == {"": "eager"}
    first, second = experts_modules(model)
    assert [m.config._experts_implementation for m in (first, second)] == ["eager", "moe_triton"]
    with torch.no_grad():
        assert_close(model(token_ids()).logits, expected)
    with only_ours(model):
        second(*experts_input())
        with pytest.raises(AssertionError, match="the eager forward ran"):
            first(*experts_input())


@pytest.mark.parametrize("config", ["transformers", "plain"])
def test_a_bare_experts_module(config):
    if config == "transformers":
        config = tiny_model("mixtral").config
    else:
        config = SimpleNamespace(hidden_size=32, intermediate_size=24, num_local_experts=6, hidden_act="silu")
        config._experts_implementation = "eager"
    module = MixtralExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    inputs = experts_input()
    expected = module(*inputs)
    report = moe_triton.swap(module)
    assert [(entry.name, entry.kind) for entry in report.swapped] == [("", "MixtralExperts")]
    assert config._experts_implementation == "eager"  # another module may share it
    for same in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with only_ours(same):
            assert_close(same(*inputs), expected)


def test_a_model_whose_own_switch_does_nothing(monkeypatch):
    model = tiny_model("mixtral").eval()
    monkeypatch.setattr(type(model), "_can_set_experts_implementation_cached_value", False, raising=False)
    model.set_experts_implementation(hf.register())
    assert model.config._experts_implementation == "eager"
    assert len(moe_triton.swap(model).swapped) == 2
    with only_ours(model):
        model(token_ids())


def test_a_module_that_cannot_be_swapped_keeps_its_implementation():
    model = tiny_model("mixtral").eval()
    first, second = experts_modules(model)
    first.has_post_expert_norm = True
    report = moe_triton.swap(model)
    assert [entry.name for entry in report.swapped] == ["model.layers.1.mlp.experts"]
    assert [entry.name for entry in report.skipped] == ["model.layers.0.mlp.experts"]
    assert "post_expert_norm: got NoneType" in report.skipped[0].reason
    assert first.config._experts_implementation == "eager"
    assert second.config._experts_implementation == "moe_triton"
    model(token_ids())


def test_a_registry_of_its_own():
    class OtherInterface(ExpertsInterface):
        _global_mapping = {}  # noqa: RUF012

    @use_experts_implementation(experts_interface=OtherInterface())
    class Fp8Experts(nn.Module):
        def __init__(self, config):
            super().__init__()

        def forward(self, x):
            return x

    module = Fp8Experts(SimpleNamespace(_experts_implementation="eager"))
    report = moe_triton.swap(module)
    assert report.swapped == []
    assert "registry of its own (OtherInterface)" in report.skipped[0].reason
    assert module.config._experts_implementation == "eager"


def test_a_gate_that_is_called_is_named_in_the_report():
    model = tiny_model("gpt_oss").eval()
    for module in experts_modules(model):
        module._apply_gate = MethodType(type(module)._apply_gate, module)  # on the module itself, it may be anything
    with torch.no_grad():
        expected = model(token_ids()).logits
    report = moe_triton.swap(model)
    assert all("the module's own gate called" in entry.action for entry in report.swapped)
    with torch.no_grad(), only_ours(model):
        assert_close(model(token_ids()).logits, expected)


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))


class ListOfExperts(nn.Module):
    """A block as transformers 4 had them: a list of MLPs that the block itself routes."""

    def __init__(self):
        super().__init__()
        self.gate = Gate()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))


class HiddenMoE(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)


def test_what_looks_like_moe_is_listed_with_a_reason():
    config = SimpleNamespace(
        hidden_size=8, ffn_hidden_size=8, moe_num_experts=4, intermediate_size=8, num_local_experts=4, hidden_act="silu"
    )
    config.ffn_act_fn = {"name": "silu"}
    model = nn.ModuleDict(
        {
            "listed": ListOfExperts(),
            "dbrx": DbrxExperts(config),
            "llama4": Llama4TextExperts(config),
            "block": HiddenMoE(),
            "ours": moe_triton.MoE(8, 8, 4),
            "dense": nn.Sequential(nn.Linear(8, 8), nn.Conv1d(8, 8, 3)),
            "one": nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(8, 8)])}),
        }
    )
    report = moe_triton.swap(model)
    assert report.swapped == []
    found = {entry.name: entry for entry in report.skipped}
    assert set(found) == {"listed.experts", "dbrx.mlp", "llama4", "block", "ours"}
    assert "list of experts" in found["listed.experts"].reason
    assert "no interface that moe_triton knows" in found["dbrx.mlp"].reason
    assert "no interface that moe_triton knows" in found["block"].reason
    assert "moe_triton's own" in found["ours"].reason


def test_a_dense_model_is_left_in_peace():
    model = LlamaForCausalLM(LlamaConfig(**COMMON, intermediate_size=40))
    report = moe_triton.swap(model)
    assert report.swapped == report.skipped == []
    assert str(report) == "moe_triton.swap: found no mixture-of-experts layers, and changed nothing"


def test_the_report_is_readable():
    model = nn.ModuleDict({"a": tiny_model("mixtral"), "b": ListOfExperts()})
    lines = str(moe_triton.swap(model)).splitlines()
    assert lines[0] == "moe_triton.swap: 2 swapped, 1 left alone"
    assert lines[1].startswith("  + a.model.layers.0.mlp.experts [MixtralExperts]: experts_implementation='moe_triton'")
    assert lines[3].startswith("  - b.experts [ModuleList]: a list of experts")


def test_a_recognizer_of_ones_own(monkeypatch):
    def own_recognizer(model, name, module, backend):
        if not isinstance(module, HiddenMoE):
            return None
        model.get_submodule(name).inner = nn.Identity()
        return swap_module.Swapped(name, "HiddenMoE", "replaced its inner part")

    monkeypatch.setattr(swap_module, "RECOGNIZERS", (own_recognizer, *swap_module.RECOGNIZERS))
    model = nn.ModuleDict({"block": HiddenMoE()})
    report = moe_triton.swap(model)
    assert [entry.name for entry in report.swapped] == ["block"]
    assert isinstance(model["block"].inner, nn.Identity)


def test_bad_input():
    with pytest.raises(TypeError, match="model: got dict, wanted a"):
        moe_triton.swap({})
    with pytest.raises(ValueError, match="backend: got 'cuda'"):
        moe_triton.swap(nn.Linear(2, 2), backend="cuda")
