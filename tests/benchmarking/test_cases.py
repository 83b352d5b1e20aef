"""The shapes, the routing that the workload produces, and the limits that are made of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_triton.backends.torch.processor import Processor
from moe_triton.benchmarking import limits
from moe_triton.benchmarking.cases import CPU_CASES, MODES, PRESETS, SKEWS, Case, make_workload
from moe_triton.benchmarking.runner import expert_counts, prepare
from tests.helpers.compare import assert_close

CPU = torch.device("cpu")
SMALL = Case(tokens=120, hidden=64, intermediate=24, experts=16, top_k=3)


def test_flops_of_a_published_shape():
    case = CPU_CASES["cpu-fine"]  # 6 T K n d forward, three times that with backward
    assert case.flops("forward") == 6 * 2048 * 8 * 384 * 512
    assert case.flops("backward") == 12 * 2048 * 8 * 384 * 512
    assert case.flops("full") == 18 * 2048 * 8 * 384 * 512
    assert replace(case, activation="relu2").flops("forward") == 4 * 2048 * 8 * 384 * 512


def test_presets():
    shapes = [(c.tokens, c.hidden, c.intermediate, c.experts, c.top_k) for c in CPU_CASES.values()]
    assert shapes == [(2048, 512, 384, 64, 8), (4096, 512, 1024, 8, 2), (64, 512, 384, 64, 8)]
    assert [(c.name, c.dtype) for c in PRESETS["cpu"].cases] == [
        (name, dtype) for name in CPU_CASES for dtype in ("float32", "bfloat16")
    ]
    assert {name for name, preset in PRESETS.items() if not preset.needs_gpu} == {"cpu", *CPU_CASES}
    assert len(PRESETS["sonic-12"].cases) == 12
    assert [(c.intermediate, c.experts, c.top_k) for c in PRESETS["scatter"].cases] == [
        (8192, 8, 1), (4096, 16, 2), (2048, 32, 4), (1024, 64, 8), (512, 128, 16),
    ]  # fmt: skip
    assert [c.skew for c in PRESETS["skew"].cases] == list(SKEWS)
    for preset in PRESETS.values():
        assert len(set(preset.cases)) == len(preset.cases)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens: got 0, wanted at least 1"),
        ({"top_k": 17}, "top_k: got 17, wanted 1 to 16"),
        ({"dtype": "fp8"}, "dtype: got 'fp8', wanted one of float32"),
        ({"skew": "odd"}, "skew: got 'odd', wanted one of uniform"),
        ({"activation": "tanh"}, "activation: got 'tanh'"),
        ({"experts": 65}, "experts: got 65, wanted at most hidden = 64"),
        ({"skew": "hot", "top_k": 16}, "skew: got 'hot' with top_k = experts"),
        ({"skew": "quarter-empty", "top_k": 13}, "wanted top_k <= 12"),
    ],
)
def test_bad_cases_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_a_case_of_the_wrong_type():
    with pytest.raises(TypeError, match=r"tokens: got 1\.5, wanted an int"):
        replace(SMALL, tokens=1.5)


def test_uniform_routing_uses_every_expert_evenly():
    counts = expert_counts(make_workload(replace(SMALL, tokens=4000), CPU))
    assert sum(counts) == 4000 * 3
    assert 0.8 * 750 < min(counts) <= max(counts) < 1.2 * 750


def test_zipf_routing_falls_with_the_rank():
    counts = expert_counts(make_workload(replace(SMALL, tokens=4000, skew="zipf"), CPU))
    assert sum(counts) == 4000 * 3
    assert counts[0] > 2 * counts[3] > 4 * counts[15] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hot_routing_gives_one_expert_exactly_half_of_the_tokens(dtype):
    counts = expert_counts(make_workload(replace(SMALL, tokens=501, skew="hot", dtype=dtype), CPU))
    assert counts[0] == 251
    assert sum(counts) == 501 * 3


@pytest.mark.parametrize("top_k", [3, 12])
def test_empty_routing_leaves_a_quarter_without_tokens(top_k):
    counts = expert_counts(make_workload(replace(SMALL, skew="quarter-empty", top_k=top_k), CPU))
    assert counts[12:] == [0] * 4
    assert min(counts[:12]) > 0


def test_a_seed_fixes_the_workload():
    first, again, other = (make_workload(SMALL, CPU, seed) for seed in (0, 0, 1))
    assert torch.equal(first.hidden, again.hidden)
    assert torch.equal(first.gate_up, again.gate_up)
    assert not torch.equal(first.down, other.down)


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("mode", MODES)
def test_the_limits_do_the_experts_flops(mode, activation):
    workload = make_workload(replace(SMALL, skew="quarter-empty", activation=activation), CPU)
    counts = expert_counts(workload)
    parts = limits.expert_products(workload, counts, mode)
    assert len(parts) == 12 * {"forward": 2, "backward": 4, "full": 6}[mode]  # a quarter of 16 experts has no rows
    assert counted(limits.by_mm(parts)) == workload.case.flops(mode)
    assert counted(limits.by_mm([limits.dense_product(workload, mode)])) == workload.case.flops(mode)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_ways_do_the_same_products(dtype):
    workload = make_workload(replace(SMALL, dtype=dtype), CPU)
    parts = limits.expert_products(workload, expert_counts(workload), "full")
    limits.by_mm(parts)()
    if limits.ONEDNN is None or workload.case.torch_dtype not in limits.onednn_dtypes():
        pytest.skip("oneDNN has no such product here")
    seen = []
    limits.by_onednn(parts, lambda *a: seen.append(limits.ONEDNN(*a)))()
    for mine, (_, _, out) in zip(seen, parts, strict=True):
        assert_close(mine, out, tolerance=1e-5 if dtype == "float32" else 6e-3)


@pytest.mark.parametrize(("mm", "onednn", "winner"), [(2.0, 1.0, "oneDNN"), (1.0, 2.0, "torch.mm")])
def test_the_faster_way_is_the_limit(mm, onednn, winner, monkeypatch):
    monkeypatch.setattr(limits, "ONEDNN", lambda *a: None)
    ticks = iter([0, 9, 9 + mm, 20, 0, 9, 9 + onednn, 20])  # the best of three counts
    parts = [limits.dense_product(make_workload(SMALL, CPU), "forward")]
    assert limits.fastest(parts, clock=lambda: next(ticks))[1] == winner
    monkeypatch.setattr(limits, "ONEDNN", None)
    assert limits.fastest(parts)[1] == "torch.mm"


def test_onednn_is_not_asked_for_a_bf16_product_that_it_does_not_have(monkeypatch):
    monkeypatch.setattr(limits, "onednn_dtypes", lambda: (torch.float32,))
    parts = [limits.dense_product(make_workload(replace(SMALL, dtype="bfloat16"), CPU), "forward")]
    assert limits.fastest(parts)[1] == "torch.mm"


def test_the_floor_is_the_bytes_that_must_move():
    case = Case(tokens=4, hidden=64, intermediate=24, experts=16, top_k=1, dtype="bfloat16")
    counts = [3, 0, 1] + [0] * 13
    one = 3 * 24 * 64 * 2
    assert limits.floor_bytes(case, counts, "forward") == 2 * one
    assert limits.floor_bytes(case, counts, "backward") == (2 + 16) * one
    assert limits.floor_bytes(case, counts, "full") == (2 * 2 + 16) * one
    assert limits.floor_bytes(replace(case, format="mxfp4"), counts, "forward") == 2 * one * 4.25 / 16
    found = limits.floor(make_workload(case, CPU), counts, "forward")
    assert found.scale * limits.CPU_BUFFER_BYTES == 2 * one
    assert found.call().item() == limits.CPU_BUFFER_BYTES // 4  # the sum really reads the buffer


def test_the_floor_is_only_measured_for_few_tokens():
    few = make_workload(replace(SMALL, tokens=limits.SMALL_TOKENS), CPU)
    many = make_workload(replace(SMALL, tokens=limits.SMALL_TOKENS + 1), CPU)
    assert [bound.name for bound in limits.limits(few, expert_counts(few), "forward")] == ["roof", "dense", "floor"]
    assert [bound.name for bound in limits.limits(many, expert_counts(many), "forward")] == ["roof", "dense"]


def test_onednn_is_no_limit_for_bf16_where_the_cpu_has_none(monkeypatch):
    monkeypatch.setattr(limits, "this_processor", lambda: Processor("Intel", "Xeon", ("avx2", "avx512")))
    case = replace(SMALL, dtype="bfloat16")
    parts = [limits.dense_product(make_workload(case, CPU), "forward")]
    assert limits.fastest(parts)[1] == "torch.mm"


def test_projections_in_a_format():
    """Everybody works on the numbers that the codes stand for; only ours has the codes."""
    case = replace(SMALL, intermediate=32, format="mxfp4")
    workload = make_workload(case, CPU)
    assert torch.equal(workload.down, workload.packed["down"].dequantize(torch.float32))
    assert case.title().endswith("mxfp4")
    found = prepare("auto", workload)
    assert found.status == "ok"
    assert found.block is not None
    assert not found.block.is_trainable
    assert set(found.errors) == {"output"}
    assert found.label == "moe_triton (torch, mxfp4)"
    with pytest.raises(ValueError, match="format: got 'int3'"):
        replace(SMALL, format="int3")
