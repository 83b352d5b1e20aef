"""Every provider against the float64 reference, and the check itself against blocks that are wrong."""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moe_triton.benchmarking import correctness, runner, ways
from moe_triton.benchmarking.cases import Case, make_workload
from moe_triton.benchmarking.correctness import TOLERANCE
from moe_triton.benchmarking.memory import peak_bytes, saved_bytes
from moe_triton.benchmarking.providers import PROVIDERS, gpu_peers, huggingface
from moe_triton.benchmarking.providers.block import Block, Provider, Unavailable
from moe_triton.benchmarking.timing import ready
from moe_triton.benchmarking.ways import Runnable

CPU = torch.device("cpu")
CASE = Case(tokens=70, hidden=32, intermediate=20, experts=12, top_k=3)
MEASURABLE = ["auto", "torch", "grouped_mm", "hf-eager", "hf-grouped_mm", "hf-batched_mm"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("change", [{}, {"top_k": 1}, {"skew": "quarter-empty", "top_k": 2}, {"skew": "hot"}], ids=str)
@pytest.mark.parametrize("name", MEASURABLE)
def test_providers_are_right(name, change, dtype):
    # grouped_mm wants rows of a multiple of 16 bytes
    workload = make_workload(replace(CASE, intermediate=24, dtype=dtype, **change), CPU)
    found = Runnable(PROVIDERS[name].build(workload), workload).check()
    assert found.problem is None
    assert set(found.errors) == {"output", "hidden", "gate", "gate_up", "down"}
    assert 0 < max(found.errors.values()) <= TOLERANCE[workload.case.torch_dtype]


@pytest.mark.parametrize("change", [{"activation": "gpt_oss", "bias": True}, {"activation": "relu2"}], ids=str)
def test_our_layer_with_other_experts(change):
    workload = make_workload(replace(CASE, **change), CPU)
    found = Runnable(PROVIDERS["torch"].build(workload), workload).check()
    assert found.problem is None
    assert ("down_bias" in found.errors) == ("bias" in change)
    for peer in ("hf-eager", "hf-grouped_mm"):
        with pytest.raises(Unavailable, match="swiglu without biases"):
            PROVIDERS[peer].build(workload)


def test_grouped_mm_says_what_it_does_not_take():
    for change, message in (
        ({"intermediate": 22}, "multiple of 16 bytes"),
        ({"bias": True}, "no biases"),
        ({"dtype": "float16"}, "bfloat16 and float32"),
    ):
        with pytest.raises(Unavailable, match=message):
            PROVIDERS["grouped_mm"].build(make_workload(replace(CASE, **{"intermediate": 24, **change}), CPU))
    workload = make_workload(replace(CASE, intermediate=24, activation="relu2"), CPU)
    assert Runnable(PROVIDERS["grouped_mm"].build(workload), workload).check().problem is None


def test_every_provider_shares_the_workloads_memory():
    workload = make_workload(replace(CASE, intermediate=24), CPU)
    for name in MEASURABLE:
        block = PROVIDERS[name].build(workload)
        shared = {tensor.untyped_storage().data_ptr() for tensor in block.leaves()}
        assert shared == {
            tensor.untyped_storage().data_ptr() for tensor in (workload.gate, workload.gate_up, workload.down)
        }


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_the_named_implementation_of_transformers_is_the_one_that_runs(implementation, monkeypatch):
    moe = pytest.importorskip("transformers.integrations.moe")
    workload = make_workload(CASE, CPU)

    def other(*args, **kwargs):
        raise AssertionError("another implementation ran")

    def this(*args, **kwargs):
        raise LookupError("this one ran")

    for name in ("grouped_mm", "batched_mm"):
        chosen = this if name == implementation else other
        monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, name, chosen)
    with pytest.raises(LookupError, match="this one ran"):
        PROVIDERS[f"hf-{implementation}"].build(workload).forward(workload.hidden)
    PROVIDERS["hf-eager"].build(workload).forward(workload.hidden)


def test_deepspeed_is_right(monkeypatch):
    deepspeed = pytest.importorskip("deepspeed", reason="the optional extra [deepspeed] is not installed")
    monkeypatch.setitem(vars(deepspeed.ops), "__compatible_ops__", {})  # else it compiles a reduction for a minute
    for top_k in (1, 2, 3):
        for dtype in ("float32", "bfloat16"):
            workload = make_workload(replace(CASE, top_k=top_k, dtype=dtype), CPU)
            assert Runnable(PROVIDERS["deepspeed"].build(workload), workload).check().problem is None


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("hf-eager", "transformers"),
        ("deepspeed", "deepspeed"),
        ("scattermoe", "scattermoe"),
        ("liger", "liger_kernel"),
        ("sonicmoe", "sonicmoe"),
        ("megablocks", "megablocks"),
        ("triton_kernels", "triton_kernels"),
    ],
)
def test_a_missing_package_is_listed(name, package, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted, *a: None if wanted == package else real(wanted, *a))
    row = runner.prepare(name, make_workload(CASE, CPU)).row("forward")
    assert row.status == "not installed"
    assert row.note.endswith("is not installed")
    assert row.errors == {}


def test_triton_on_a_cpu_says_why_not(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    row = runner.prepare("triton", make_workload(CASE, CPU)).row("forward")
    assert row.status == "not measured"
    assert "need a CUDA or ROCm GPU" in row.note


def test_batched_mm_only_takes_few_tokens():
    with pytest.raises(Unavailable, match="only for T <= 256 tokens"):
        PROVIDERS["hf-batched_mm"].build(make_workload(replace(CASE, tokens=257), CPU))
    mixtral = Case(tokens=256, hidden=4096, intermediate=14336, experts=8, top_k=2, dtype="bfloat16")
    with pytest.raises(Unavailable, match="168 GiB of weights"):
        huggingface.require_few_copies(mixtral)


def test_the_reference_in_parts_is_the_whole_reference(monkeypatch):
    workload = make_workload(CASE, CPU)
    block = PROVIDERS["torch"].build(workload)
    whole = Runnable(block, workload).check()
    monkeypatch.setattr(correctness, "REFERENCE_BYTES", 5 * 2 * 8 * CASE.weight_elements)  # 5 + 5 + 2 experts
    parts = Runnable(block, workload).check()
    assert parts.errors == pytest.approx(whole.errors, rel=1e-6)
    assert parts.worst == pytest.approx(whole.worst, rel=1e-6)


# Blocks that are wrong ------------------------------------------------------------------------------------------------


class Wrong(nn.Module):
    """Our layer, spoiled after the fact."""

    def __init__(self, workload, forward=None, choose=None):
        super().__init__()
        good = PROVIDERS["torch"].build(workload)
        self.block = Block(
            forward=good.forward if forward is None else lambda x: forward(good.forward(x)),
            choose=good.choose if choose is None else lambda x: choose(good.choose(x)),
            parameters=good.parameters,
        )


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.1 * grad


def drop_a_token(out):
    keep = torch.ones_like(out)
    keep[5] = 0
    return out * keep


def swap_experts(workload):
    """The block computes with two experts' up projections swapped."""
    gate_up = workload.gate_up.clone()
    gate_up[[0, 1]] = workload.gate_up[[1, 0]]
    return PROVIDERS["torch"].build(replace(workload, gate_up=gate_up))


WRONG = {
    "zeros": lambda w: Wrong(w, forward=lambda out: out * 0).block,
    "swapped experts": swap_experts,
    "a dropped token": lambda w: Wrong(w, forward=drop_a_token).block,
    "NaN": lambda w: Wrong(w, forward=lambda out: out * float("nan")).block,
    "gradients 10% too large": lambda w: Wrong(w, forward=ScaledGradient.apply).block,
    "choices of another expert": lambda w: Wrong(w, choose=lambda chosen: (chosen + 1) % w.case.experts).block,
    "the same expert twice": lambda w: Wrong(w, choose=lambda chosen: chosen * 0).block,
    "an expert that does not exist": lambda w: Wrong(w, choose=lambda chosen: chosen + w.case.experts).block,
    "too few choices": lambda w: Wrong(w, choose=lambda chosen: chosen[:, 1:]).block,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", list(WRONG))
def test_wrong_blocks_are_flagged(kind, dtype, monkeypatch):
    # enough tokens and experts that one of them drowns in the mean
    workload = make_workload(replace(CASE, tokens=600, experts=32, dtype=dtype), CPU)
    monkeypatch.setitem(PROVIDERS, "torch-wrong", Provider(label="wrong", build=WRONG[kind]))
    found = runner.prepare("torch-wrong", workload)
    assert found.status == "mismatch"
    assert found.note
    assert found.runnable is None


def test_one_missing_expert_gradient_is_flagged():
    workload = make_workload(CASE, CPU)
    good = PROVIDERS["torch"].build(workload)
    hidden = workload.hidden.clone().requires_grad_()
    out = good.forward(hidden)
    grads = torch.autograd.grad(out, [hidden, *good.leaves()], workload.grad_out)
    chosen = good.choose(hidden).long()
    named = good.grouped(list(grads[1:]))
    assert (
        correctness.judge(
            correctness.compare(out.detach(), grads[0], named, chosen, workload), 0.0, torch.float32
        ).problem
        is None
    )
    named["down"] = named["down"].clone()
    named["down"][3] = 0
    spoiled = correctness.compare(out.detach(), grads[0], named, chosen, workload)
    assert "worst part of down" in correctness.judge(spoiled, 0.0, torch.float32).problem


@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float16], ids=str)
def test_a_float32_block_that_computes_in_a_lower_precision_is_a_mismatch(computed):
    """What goes in and comes out is float32; the experts' weights are rounded on the way."""
    workload = make_workload(CASE, CPU)
    lower = {name: getattr(workload, name).to(computed).float() for name in ("gate_up", "down")}
    assert Runnable(PROVIDERS["torch"].build(workload), workload).check().problem is None
    found = Runnable(PROVIDERS["torch"].build(replace(workload, **lower)), workload).check()
    assert found.problem is not None
    assert "output" in found.problem


@pytest.mark.parametrize("name", ["output", "hidden"])
@pytest.mark.parametrize(
    ("dtype", "right", "wrong", "wrong_row"),
    [
        (torch.float32, 1e-5, 1e-4, 1e-3),
        (torch.float16, 1e-3, 1e-2, 0.1),
        (torch.bfloat16, 1e-2, 5e-2, 0.6),
    ],
    ids=str,
)
def test_the_tolerance_of_every_dtype(dtype, right, wrong, wrong_row, name):
    expected = torch.randn(1000, 64, dtype=torch.float64)

    def problem(error, rows):
        actual = expected.clone()
        actual[:rows] *= 1 + error
        difference = correctness.Difference()
        difference.add(actual, expected)
        return correctness.judge({name: difference}, 0.0, dtype).problem

    assert problem(right, 1000) is None
    assert f"{name} {wrong:.1e}" in problem(wrong, 1000)
    assert f"worst part of {name} {wrong_row:.1e}" in problem(wrong_row, 1)
    assert problem(right, 1) is None


def test_an_expert_without_tokens_must_get_exactly_zero():
    difference = correctness.Difference()
    difference.add(torch.full((1, 4), 1e-30), torch.zeros(1, 4, dtype=torch.float64))
    assert difference.result() == (float("inf"), float("inf"))
    exact = correctness.Difference()
    exact.add(torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.float64))
    assert exact.result() == (0.0, 0.0)


def test_a_near_tie_may_go_either_way():
    workload = make_workload(replace(CASE, dtype="bfloat16"), CPU)
    logits = workload.hidden.double() @ workload.gate.double().T
    chosen = logits.topk(3, dim=1).indices
    runner_up = logits.topk(4, dim=1).indices[:, 3]
    gap = (logits.gather(1, chosen[:, 2:]) - logits.gather(1, runner_up[:, None])).squeeze(1)
    slack = 2 * torch.finfo(torch.bfloat16).eps * logits.abs().amax(1) + 1e-4
    close, far = gap < 0.9 * slack, gap > 1.1 * slack
    assert bool(close.any())
    assert bool(far.any())
    moved = chosen.clone()
    moved[close, 2] = runner_up[close]
    problem, share = correctness.check_choices(moved, workload)
    assert problem is None
    assert share == pytest.approx(close.sum().item() / chosen.numel())
    moved[far, 2] = runner_up[far]
    assert correctness.check_choices(moved, workload)[0] == "experts chosen that are not among the best K"


# Peers with another layout, and peers without a backward --------------------------------------------------------------


def test_the_layouts_of_gpu_peers_go_there_and_back():
    weight = torch.randn(3, 8, 5)
    assert torch.equal(gpu_peers.swap_halves(gpu_peers.swap_halves(weight)), weight)
    assert torch.equal(gpu_peers.swap_halves(weight)[:, :4], weight[:, 4:])
    assert torch.equal(gpu_peers.deinterleave(gpu_peers.interleave(weight)), weight)
    assert torch.equal(gpu_peers.interleave(weight)[:, 0::2], weight[:, :4])


def test_gradients_come_back_in_the_workloads_layout():
    """A block that works on a copy with gate and up swapped, as ScatterMoE does."""
    workload = make_workload(CASE, CPU)
    good = PROVIDERS["torch"].build(workload)
    swapped = nn.Parameter(gpu_peers.swap_halves(workload.gate_up))

    def forward(x):
        return torch.func.functional_call(layer, {"experts.gate_up_proj": gpu_peers.swap_halves(swapped)}, (x,)).output

    layer = next(cell.cell_contents for cell in good.forward.__closure__ if isinstance(cell.cell_contents, nn.Module))
    parameters = {**good.parameters, "gate_up": swapped}
    unpack = lambda named: {**named, "gate_up": gpu_peers.swap_halves(named["gate_up"])}  # noqa: E731
    block = Block(forward=forward, choose=good.choose, parameters=parameters, unpack=unpack)
    assert Runnable(block, workload).check().problem is None
    assert "gate_up" in Runnable(replace(block, unpack=None), workload).check().problem


def test_a_peer_without_a_backward_is_checked_and_timed_forward_only(monkeypatch):
    def build(workload):
        return replace(PROVIDERS["torch"].build(workload), is_trainable=False)

    monkeypatch.setitem(PROVIDERS, "liger", Provider(label="inference", build=build))
    workload = make_workload(CASE, CPU)
    found = runner.prepare("liger", workload)
    assert set(found.errors) == {"output"}
    assert found.row("forward").status == "ok"
    assert (found.row("backward").status, found.row("full").note) == ("not applicable", "inference only")


@pytest.mark.parametrize("name", ["scattermoe", "liger", "sonicmoe", "megablocks", "triton_kernels"])
def test_gpu_peers_say_that_they_need_a_gpu(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *a: object())
    row = runner.prepare(name, make_workload(CASE, CPU)).row("forward")
    assert row.status == "not measured"
    assert "needs a GPU" in row.note


def test_a_changed_peer_is_named():
    with pytest.raises(Unavailable, match="this ScatterMoE has another interface"):
        gpu_peers.members("ScatterMoE", "math", "GLUMLP")


# Memory ---------------------------------------------------------------------------------------------------------------


def test_saved_bytes_counts_each_activation_once_and_no_parameter():
    weight = nn.Parameter(torch.ones(8, 8))

    def forward(x):
        y = x.sin()  # keeps x
        return (y * y) @ weight  # keeps y twice, the product once, and the weight

    block = Block(forward=forward, choose=lambda x: x, parameters={"gate": weight})
    assert saved_bytes(block, torch.ones(16, 8)) == 3 * 16 * 8 * 4


def test_our_layer_keeps_the_hidden_states_and_the_preactivation():
    case = replace(CASE, tokens=512)
    workload = make_workload(case, CPU)
    ours = saved_bytes(PROVIDERS["torch"].build(workload), workload.hidden)
    floor = 4 * case.tokens * (case.hidden + 2 * case.top_k * case.intermediate)
    eager = saved_bytes(PROVIDERS["hf-eager"].build(workload), workload.hidden)
    assert floor <= ours < eager


def test_peak_bytes_are_for_gpus():
    assert peak_bytes(lambda: None, CPU) is None


# Ways to run ----------------------------------------------------------------------------------------------------------


def test_a_compiled_block_is_checked_and_named(monkeypatch):
    compiled = []

    def compile(function):
        compiled.append(function)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    found = runner.prepare("torch", make_workload(CASE, CPU), way="compile")
    assert (found.status, found.name, found.label) == ("ok", "torch+compile", "moe_triton (torch), compiled")
    assert len(compiled) == 1
    assert found.runnable is not None


@pytest.mark.parametrize(("name", "status"), [("torch", "failed"), ("hf-eager", "not measured")])
def test_a_peer_that_cannot_be_compiled_is_not_broken_but_ours_is(name, status, monkeypatch):
    def compile(function):
        raise RuntimeError("no compiler\nsecond line")

    monkeypatch.setattr(torch, "compile", compile)
    row = runner.prepare(name, make_workload(CASE, CPU), way="compile").row("full")
    assert (row.status, row.note) == (status, "RuntimeError: no compiler")


def test_graphs_need_a_gpu():
    row = runner.prepare("torch", make_workload(CASE, CPU), way="graph").row("forward")
    assert (row.status, row.note) == ("not measured", "CUDA graphs need a GPU")


def test_a_replayed_block_is_checked_by_what_its_graphs_leave(monkeypatch):
    """On a stand-in for CUDA graphs whose replay does nothing: the tensors of the capture are what is checked."""
    replayed = []

    class Graph:
        def replay(self):
            replayed.append(self)

        def pool(self):
            return None

    for name, value in {
        "CUDAGraph": Graph,
        "graph": lambda *a, **k: contextlib.nullcontext(),
        "Stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    workload = make_workload(CASE, CPU)
    block = ways.Replayed(PROVIDERS["torch"].build(workload), workload)
    assert block.check().problem is None
    assert replayed == [block.inference, block.forward, block.backward]
    for mode, graphs in (
        ("forward", [block.inference]),
        ("full", [block.forward, block.backward]),
        ("backward", [block.forward, block.backward]),
    ):
        replayed.clear()
        ready(block.call(mode))()
        assert replayed == graphs
    block.out = block.out * 0
    assert "output" in block.check().problem
