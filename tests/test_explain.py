"""What `explain` says is what runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moe_triton
from moe_triton import explain, kernel_stages, runtime
from moe_triton.benchmarking.cases import Case, make_workload
from moe_triton.benchmarking.stages import open_layer
from moe_triton.kernel_stages import KERNELS
from moe_triton_kernels import configs, launch
from moe_triton_kernels.configs import Found
from moe_triton_kernels.launch import Config

SHAPE = (20, 32, 16, 4, 2)


def test_a_shape_on_a_cpu():
    (found,) = explain(SHAPE, device="cpu")
    assert (found.backend, found.shape, found.name) == ("torch", SHAPE, "")
    assert found.reason == runtime.choose("auto", torch.device("cpu"), torch.bfloat16).reason
    assert [part.step for part in found.parts] == ["gate", "route", "dispatch", "experts, both passes"]
    assert "backend torch (the Triton kernels need a CUDA or ROCm GPU" in str(found)


@pytest.mark.parametrize("bias", [False, True])
def test_the_kernels_and_configurations_are_those_that_run(bias):
    """In the interpreter: what is explained against what the opened layer runs."""
    layer = moe_triton.MoE(32, 16, 4, 2, bias=bias, backend="triton")
    (found,) = explain(layer, tokens=20)
    case = Case(tokens=20, hidden=32, intermediate=16, experts=4, top_k=2, bias=bias)
    opened = open_layer(make_workload(case, torch.device("cpu")), "triton")
    running = [(s.kernel, s.config) for s in opened.stages if s.kernel in KERNELS.values()]
    assert [(p.runs, p.config) for p in found.parts if p.runs in KERNELS.values()] == running
    assert {p.origin for p in found.parts if p.config} == {"heuristic"}


@pytest.mark.parametrize(("tokens", "route", "dispatch"), [
    (4, "small_route_kernel", "small_dispatch_kernel"),
    (400, "small_route_kernel", "small_dispatch_kernel"),
    (1000, "top-k kernels", "permutation kernels"),
])  # fmt: skip
def test_few_tokens_take_fewer_launches(tokens, route, dispatch):
    (found,) = explain((tokens, 32, 16, 4, 2), device="cpu", backend="triton")
    assert route in found.parts[1].runs
    assert dispatch in found.parts[2].runs
    case = Case(tokens=tokens, hidden=32, intermediate=16, experts=4, top_k=2)
    if tokens < 100:
        stages = open_layer(make_workload(case, torch.device("cpu")), "triton").stages
        assert stages[2].kernel == "triton.dispatch.build_small_dispatch"
        assert stages[2].floors == ("small_dispatch",)


def test_a_schedule_is_named(monkeypatch):
    entry = Config(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=4, gluon="ping_pong")
    monkeypatch.setattr(kernel_stages, "find_config", lambda op, **_: Found(entry, "user table", {}))
    layer = moe_triton.MoE(32, 16, 4, 2, backend="triton")
    (found,) = explain(layer, tokens=20)
    up = next(part for part in found.parts if part.step == "up")
    assert (up.runs, up.config, up.origin) == (
        "gluon.up_kernel", "gluon ping_pong 128x128x64 stages 6 group 8", "user table"
    )  # fmt: skip
    monkeypatch.setattr(kernel_stages, "compile_error", lambda _: "ImportError: no tma")
    (found,) = explain(layer, tokens=20)
    assert next(part for part in found.parts if part.step == "up").runs.endswith("does not do: ImportError: no tma)")


def test_a_module_names_its_layers():
    model = nn.ModuleDict({"a": moe_triton.MoE(8, 4, 4), "b": moe_triton.MoE(8, 4, 4, recompute=True)}).double()
    first, second = explain(model)
    assert (first.name, second.name) == ("a", "b")
    assert first.dtype == torch.float64
    assert first.shape == (4096, 8, 4, 4, 2)
    assert "again" in second.parts[-1].runs
    assert "a: T=4096" in str(first)
    (reference,) = explain(moe_triton.MoE(8, 4, 4, backend="reference"))
    assert reference.backend == "reference"


def test_products_in_fp8(monkeypatch):
    def parts(backend):
        return {p.step: p for p in explain(moe_triton.MoE(8, 4, 4, fp8=True, backend=backend))[0].parts}

    emulated = parts("torch")
    assert list(emulated) == ["gate", "route", "dispatch", "experts, both passes"]
    assert emulated["experts, both passes"].runs.startswith("fp8 emulated")
    found = parts("triton")
    assert "quantize_rows_kernel" in found["operands in fp8"].runs
    assert found["d_weight_up (backward)"].runs == "fp8_d_weight_kernel"
    assert found["up"].config.startswith("32x128x128")
    monkeypatch.setattr("moe_triton.backends.triton.experts_fp8.fp8_supported", lambda architecture: False)
    assert parts("triton") == {**emulated, **{step: found[step] for step in ("gate", "route", "dispatch")}}


def test_adapters_over_a_frozen_base():
    layer = moe_triton.MoE(32, 16, 4, 2, bias=True, backend="triton")
    (plain,) = explain(layer)
    layer.experts.add_lora(3, 1.0, projections=["down"])
    (found,) = explain(layer)
    assert found.parts[-1].step == "adapters"
    assert "narrow_kernel" in found.parts[-1].runs
    assert found.parts[-1].runs.endswith("(down r=3)")
    gone = {part.step for part in plain.parts} - {part.step for part in found.parts}
    assert gone == {f"{name} (backward)" for name in ("d_weight_up", "d_weight_down", "d_bias_rows", "d_bias_gathered")}
    layer.experts.merge_lora()
    assert explain(layer)[0].parts == found.parts[:-1]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1, 2, 3), {}, "module_or_shape: got 3 sizes, wanted 5: tokens"),
        ((1, 2, 3, 4, 5), {}, "top_k: got 5, wanted 1 to 4"),
        ((0, 2, 3, 4, 2), {}, "tokens: got 0"),
        (SHAPE, {"activation": "tanh"}, "activation: got 'tanh'"),
        (SHAPE, {"backend": "tpu", "device": "cpu"}, "backend: got 'tpu'"),
        (nn.Linear(2, 2), {}, "without a moe_triton.MoE layer"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        explain(arguments, **options)


def test_where_the_kernels_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """In their main loops for few rows, to memory for many; n = 64: a block of fp8's scales holds gate and up."""
    layer = moe_triton.MoE(128, 64, 8, 2, backend="triton", dtype=torch.bfloat16)
    moe_triton.quantize(layer, "fp8")

    def words(tokens: int) -> str:
        (found,) = explain(layer, tokens=tokens)
        return found.parts[-1].runs

    assert words(16) == "decoded in the main loop of down, d_hidden, d_rows; decoded to memory for every up"
    assert words(65536) == "decoded to memory for every up, down, d_hidden, d_rows"
    monkeypatch.setattr(launch, "target_of", lambda device: launch.Target(architecture="sm_90", num_sms=132))
    (found,) = explain(layer, tokens=128)  # 32 rows of an expert, whose tiles have more warps with codes
    kernels = {part.step: part for part in found.parts}
    assert kernels["up"].runs == "up_kernel"
    assert kernels["d_rows (backward)"].runs == "down_kernel, which decodes"
    asked = {"d": 128, "n": 64, "dtype": torch.bfloat16, "num_rows": 256, "num_experts": 8, "architecture": "sm_90"}
    for step in ("down", "d_rows (backward)"):
        config = configs.choose_config(step.split()[0], **asked, format="fp8")
        assert kernels[step].config == kernel_stages.in_words(config)
        assert config != configs.choose_config(step.split()[0], **asked)
