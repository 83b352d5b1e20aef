"""The layer taken apart: every stage does what the layer does there, and its line in the table adds up."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch

from moe_triton.benchmarking import limits, stage_report, stages
from moe_triton.benchmarking.cases import Case, make_workload
from moe_triton.benchmarking.providers import PROVIDERS
from moe_triton.benchmarking.timing import CpuTimer
from tests.helpers.compare import assert_close

CPU = torch.device("cpu")
CASE = Case(tokens=20, hidden=32, intermediate=16, experts=4, top_k=2)
BACKWARD = ["d_hidden", "d_router_weights", "d_weight_down", "d_weight_up", "d_rows", "combine"]


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    monkeypatch.setattr(limits, "CPU_BUFFER_BYTES", 1 << 12)


def whole_layer(workload):
    """Output and gradients by the float64-checked layer."""
    block = PROVIDERS["torch"].build(workload)
    hidden = workload.hidden.clone().requires_grad_()
    out = block.forward(hidden)
    grads = torch.autograd.grad(out, [hidden, *block.leaves()], workload.grad_out)
    return out.detach(), dict(zip(("hidden", *block.parameters), grads, strict=True))


def test_the_torch_stages_are_the_layer():
    workload = make_workload(CASE, CPU)
    opened = stages.open_layer(workload)
    assert opened.backend == "torch"
    names = [(s.name, s.is_backward) for s in opened.stages if s.call is not None]
    assert names == [("gate", False), ("route", False), ("dispatch", False), ("experts", False)] + [
        (name, True) for name in ("experts", "route", "gate")
    ]
    unmeasured = [s for s in opened.stages if s.call is None]
    assert len(unmeasured) == 2
    assert all("not measured apart" in s.note for s in unmeasured)
    out, grads = whole_layer(workload)
    forward, backward = (s.call() for s in opened.stages if s.name == "experts")
    assert_close(forward[0], out)
    assert_close(backward[3], grads["down"])
    assert_close(backward[2], grads["gate_up"])


@pytest.mark.parametrize("change", [{}, {"activation": "gpt_oss", "bias": True}], ids=str)
def test_the_triton_stages_are_the_layer(change):
    """In the interpreter."""
    workload = make_workload(Case(**{**asdict(CASE), **change}), CPU)
    opened = stages.open_layer(workload, "triton")
    calls = {(s.name, s.is_backward): s.call for s in opened.stages}
    biases = ["d_bias_rows", "d_bias_gathered"] if "bias" in change else []
    assert [name for name, is_backward in calls if is_backward] == [*BACKWARD, *biases, "route", "gate"]
    out, grads = whole_layer(workload)
    assert_close(calls["combine", False](), out)
    assert_close(calls["d_weight_down", True](), grads["down"])
    assert_close(calls["d_weight_up", True](), grads["gate_up"])
    if biases:
        assert_close(calls["d_bias_rows", True](), grads["gate_up_bias"])
        assert_close(calls["d_bias_gathered", True](), grads["down_bias"])
    configured = {s.name for s in opened.stages if s.config}
    assert configured == {"up", "down", "d_hidden", "d_weight_down", "d_weight_up", "d_rows"}
    assert next(s.config for s in opened.stages if s.name == "up").startswith("16x16x16 warps 4 stages 1")


def quantised(format: str, **change) -> Case:
    return replace(CASE, hidden=32, intermediate=32, format=format, **change)


def test_the_torch_stages_over_codes():
    """They run from the codes, nothing has a gradient of a projection, and the floor is that of the packed bytes."""
    case = quantised("mxfp4")
    workload = make_workload(case, CPU)
    found = stages.measure_stages(workload, timer=CpuTimer(), budget_s=0.0)
    forward, backward = (row for row in found.stages if row.name == "experts")
    plain = replace(case, format=None)
    dense = sum(stages.work_of(name, plain).bytes for name in ("up", "down", "combine"))
    numbers = 3 * case.experts * case.hidden * case.intermediate
    assert dense - forward.bytes == 4 * numbers - 4.25 / 8 * numbers
    assert backward.flops == case.flops("forward")  # d_hidden and d_rows
    assert set(found.layer_s) == set(stages.LAYER)
    assert stages.table_from(asdict(found)) == found


def test_the_triton_stages_over_codes():
    """In the interpreter. A block of fp8 holds rows of gate and of up: so only up is decoded first."""
    case = quantised("fp8", tokens=4, experts=2)
    workload = make_workload(case, CPU)
    opened = stages.open_layer(workload, "triton")
    names = [(stage.name, stage.is_backward) for stage in opened.stages][3:-2]
    assert names == [
        ("tile_tables", False), ("decode for up", False), ("up", False), ("down", False), ("combine", False),
        ("d_hidden", True), ("d_router_weights", True), ("d_rows", True), ("combine", True),
    ]  # fmt: skip
    found = {(stage.name, stage.is_backward): stage for stage in opened.stages}
    up, down = found["up", False], found["down", False]
    assert (up.kernel, down.kernel) == ("up_kernel", "down_kernel, which decodes")
    numbers = 2 * case.experts * case.hidden * case.intermediate
    (decode,), (product,) = stages.works(found["decode for up", False], case), stages.works(up, case)
    assert decode.bytes == stages.FLOORS["up"](case.shape).bytes - product.bytes + 2 * 4 * numbers
    block = PROVIDERS["torch"].build(workload)
    with torch.no_grad():
        assert_close(found["combine", False].call(), block.forward(workload.hidden))
    matrix = found["decode for up", False].call()
    assert torch.equal(matrix.data.view(-1), workload.packed["gate_up"].dequantize(torch.float32).view(-1))


def test_the_triton_stages_in_fp8():
    """In the interpreter: every product, and what makes its codes, beside the floors of codes."""
    case = replace(CASE, tokens=4, experts=2, dtype="bfloat16", fp8=True, bias=True)
    workload = make_workload(case, CPU)
    opened = stages.open_layer(workload, "triton")
    names = [(stage.name, stage.is_backward) for stage in opened.stages][3:-2]
    assert names == [
        ("tile_tables", False), ("quantize W1", False), ("quantize X", False), ("up", False), ("quantize W2", False),
        ("down", False), ("combine", False),
        ("quantize dO", True), ("d_hidden", True), ("d_router_weights", True), ("d_weight_down", True),
        ("quantize gathered X", True), ("d_weight_up", True), ("d_rows", True), ("combine", True),
        ("d_bias_rows", True), ("d_bias_gathered", True),
    ]  # fmt: skip
    calls = {(stage.name, stage.is_backward): stage.call for stage in opened.stages}
    block = PROVIDERS["triton"].build(workload)
    out = block.forward(workload.hidden)
    grads = dict(zip(block.parameters, torch.autograd.grad(out, block.leaves(), workload.grad_out), strict=True))
    assert torch.equal(calls["combine", False](), out)
    assert torch.equal(calls["d_weight_down", True](), grads["down"])
    assert torch.equal(calls["d_weight_up", True](), grads["gate_up"])
    assert torch.equal(calls["d_bias_rows", True](), grads["gate_up_bias"])
    assert torch.equal(calls["d_bias_gathered", True](), grads["down_bias"])
    times = {name: [1e-3] for name in opened.calls}
    speeds = stages.Speeds(flops_per_s=1e12, bytes_per_s=1e12, codes_flops_per_s=1e6)
    table = stages.stage_table(opened, case, times, speeds)
    up = next(row for row in table.stages if row.name == "up")
    assert up.floor_s == up.flops / 1e6
    gate = next(row for row in table.stages if row.name == "gate")
    assert gate.floor_s < gate.flops / 1e6
    assert "TFLOP/s dense of e4m3 codes" in table.title


def test_a_cpu_says_that_it_emulates():
    case = replace(CASE, fp8=True)
    found = stages.measure_stages(make_workload(case, CPU), timer=CpuTimer(), budget_s=0.0, backend="torch")
    assert "products in fp8" in found.title
    assert "this device has no dense product of e4m3 codes" in found.title
    assert all("emulates" in row.kernel for row in found.stages if row.name == "experts")
    assert stages.table_from(asdict(found)) == found
    with pytest.raises(ValueError, match="fp8: got it with format 'mxfp4', wanted one or the other"):
        replace(CASE, fp8=True, format="mxfp4")


def test_the_table_adds_up():
    found = stages.measure_stages(make_workload(CASE, CPU), timer=CpuTimer(), budget_s=0.0)
    timed = [row for row in found.stages if row.time_s is not None]
    for is_backward in (False, True):
        own = [row for row in timed if row.is_backward == is_backward]
        assert sum(row.share for row in own) == pytest.approx(1.0)
    experts = next(row for row in timed if row.name == "experts")
    assert experts.flops == CASE.flops("forward")
    assert experts.floor_s >= experts.flops / found.flops_per_s * (1 - 1e-9)
    backward = next(row for row in timed if row.name == "experts" and row.is_backward)
    assert backward.flops == CASE.flops("backward")
    assert found.furthest in timed
    assert stages.table_from(asdict(found)) == found
    text = "\n".join(stage_report.stage_summary(found))
    assert "furthest from its floor: " in text
    assert "layer backward: " in text
    assert len(stage_report.stage_cells(timed[0])) == len(stage_report.STAGE_HEADER)
    unmeasured = next(row for row in found.stages if row.time_s is None)
    assert "not measured" in stage_report.stage_cells(unmeasured)


def test_the_reference_has_no_stages():
    with pytest.raises(ValueError, match="backend: got 'reference', wanted auto, torch or triton"):
        stages.open_layer(make_workload(CASE, CPU), "reference")
