"""The torch backend's experts against the float64 reference and its autograd, in each of the ways they run."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_triton.backends.torch import experts_cpu, experts_device, grouped, memory, products
from moe_triton.backends.torch.cpu import CpuPolicy, make_policy
from moe_triton.backends.torch.processor import this_processor
from moe_triton.records import ACTIVATIONS, Dispatch, ExpertSpec
from tests.helpers import problems
from tests.helpers.compare import TOLERANCE, assert_close
from tests.helpers.problems import (
    INPUTS,
    Problem,
    as_sequences,
    check,
    ragged_choices,
    replaced,
    run,
    with_inputs,
    with_policy,
)

LAYOUTS = ((False, True), (True, False), (True, True), (False, False))  # (is_transposed, is_concatenated)
make_problem = partial(problems.make_problem, device="cpu")


def on_cpu(*, batched: bool, recurring: bool) -> Any:
    """The CPU's blocks, as cut on a processor of that kind, with batches wherever they are possible or nowhere."""
    policy = replace(
        make_policy("onednn" if recurring else "mm", this_processor()),
        shapes_recur=recurring,
        linear_from=1,
        most_batched_rows=dict.fromkeys(TOLERANCE, (1000, 1000) if batched else (0, 0)),
        batched_block_rows=(1, 100),  # two batches of SIZES
        alone_overhead=1000,
        num_threads=2,
    )
    return with_policy(policy)


WAYS = {
    "alone": on_cpu(batched=False, recurring=False),
    "alone, padded": on_cpu(batched=False, recurring=True),
    "batched": on_cpu(batched=True, recurring=False),
    "batched together": on_cpu(batched=True, recurring=True),
    "device": experts_device,
}
CPU_WAYS = [way for way in WAYS if way != "device"]


def check_way(way: str, problem: Problem, keep: bool = True) -> None:
    # the router weights' gradient is fp32, of products in the hidden states' dtype
    check(run(problem, WAYS[way], recompute=not keep), problem, TOLERANCE[problem.call.hidden.dtype])


SIZES = [5, 0, 33, 1, 7, 20]  # an empty expert, experts that share a block, and two whose rows may be padded


@pytest.mark.parametrize("way", CPU_WAYS)
@pytest.mark.parametrize("bias", [False, True])
def test_many_blocks(way: str, bias: bool) -> None:
    sizes = [*SIZES, 16, 90, 90, 90, 0, 300]
    for spec in (ExpertSpec(), ExpertSpec(activation="gelu", is_transposed=True)):
        check_way(way, make_problem(ragged_choices(sizes), len(sizes), spec=spec, bias=bias))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_layouts(way: str, activation: str) -> None:
    for index, (is_transposed, is_concatenated) in enumerate(LAYOUTS):
        spec = ExpertSpec(activation=activation, is_transposed=is_transposed, is_concatenated=is_concatenated)
        problem = make_problem(ragged_choices(SIZES), len(SIZES), spec=spec, bias=index % 2 == 1)
        problem.call.hidden.mul_(5)  # gpt_oss clamps at 7
        check_way(way, problem)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation", ["swiglu", "gpt_oss", "relu2"])
@pytest.mark.parametrize("weights_dtype", [None, "hidden"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(way: str, activation: str, weights_dtype: str | None, dtype: torch.dtype) -> None:
    problem = make_problem(
        ragged_choices(SIZES),
        len(SIZES),
        spec=ExpertSpec(activation=activation),
        dtype=dtype,
        weights_dtype=dtype if weights_dtype else None,
        bias=True,
    )
    check_way(way, problem)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    top_k=st.integers(1, 3),
    capacity=st.one_of(st.none(), st.integers(0, 20)),
    d=st.integers(1, 20),
    n=st.integers(1, 20),
    is_transposed=st.booleans(),
    bias=st.booleans(),
    keep=st.booleans(),
)
def test_ragged_shapes(
    way: str,
    seed: int,
    sizes: list[int],
    top_k: int,
    capacity: int | None,
    d: int,
    n: int,
    is_transposed: bool,
    bias: bool,
    keep: bool,
) -> None:
    torch.manual_seed(seed)
    sizes = [*sizes, 0]
    spec = ExpertSpec(is_transposed=is_transposed)
    problem = make_problem(
        ragged_choices(sizes, top_k), len(sizes), spec=spec, dtype=torch.float64, bias=bias, capacity=capacity, d=d, n=n
    )
    check_way(way, problem, keep)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("sizes", [[0, 0, 0], [0, 50, 0], [64]])
def test_one_expert_with_all_rows_and_none_with_any(way: str, sizes: list[int]) -> None:
    choices = ragged_choices(sizes) if any(sizes) else torch.full((4, 2), -1)
    check_way(way, make_problem(choices, len(sizes), bias=True))


@pytest.mark.parametrize("way", WAYS)
def test_no_tokens(way: str) -> None:
    problem = make_problem(torch.zeros(0, 2, dtype=torch.long), 3, bias=True)
    found = run(problem, WAYS[way])
    assert found.pop("out").shape == (0, 24)
    for name, operand in problem.inputs.items():
        assert torch.equal(found[name], torch.zeros_like(operand))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("ranks", [(1, 1), (5, 16)])
def test_adapters(way: str, ranks: tuple[int, int], keep: bool, is_transposed: bool) -> None:
    spec = ExpertSpec(is_transposed=is_transposed, is_concatenated=keep)
    problem = make_problem(ragged_choices(SIZES), len(SIZES), spec=spec, bias=is_transposed, ranks=ranks)
    check_way(way, problem, keep)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_adapters_in_other_dtypes(way: str, dtype: torch.dtype) -> None:
    check_way(way, make_problem(ragged_choices(SIZES), len(SIZES), dtype=dtype, ranks=(3, 8), d=48, n=40))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["gate_up", "down"])
def test_an_adapter_of_one_projection(way: str, kind: str) -> None:
    """It lies as PEFT's does: neither of b's two dimensions is contiguous, and the expert runs fastest."""
    problem = make_problem(ragged_choices(SIZES), len(SIZES), ranks=(3, 2))
    names = [f"{kind}_lora_a", f"{kind}_lora_b"]
    given = {name: None for name in problem.parameters if "lora" in name and name not in names}
    b = problem.inputs[names[1]]
    call = replaced(problem.call, **given)
    expected = problems.expected_of(call, problem.grad_out)
    strided = replaced(call, **{names[1]: b.permute(1, 2, 0).contiguous().permute(2, 0, 1)})
    check_way(way, Problem(strided, problem.grad_out, expected))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_every_time_and_whatever_is_kept(way: str, dtype: torch.dtype) -> None:
    problem = make_problem(ragged_choices(SIZES), len(SIZES), dtype=dtype, ranks=(3, 8), d=48, n=40)
    found, again = run(problem, WAYS[way]), run(problem, WAYS[way])
    with torch.no_grad():
        alone, preactivation = WAYS[way].experts_forward(problem.call, False)
    assert preactivation.shape == (0,)
    assert torch.equal(found["out"], alone)
    assert all(torch.equal(found[name], again[name]) for name in ("out", *INPUTS))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_the_preactivation_is_in_dispatch_order(way: str, activation: str) -> None:
    problem = make_problem(
        ragged_choices(SIZES), len(SIZES), spec=ExpertSpec(activation=activation), bias=True, capacity=25
    )
    call, dispatched = problem.call, problem.call.dispatched
    kept = int(dispatched.offsets[-1])
    with torch.no_grad():
        preactivation = WAYS[way].experts_forward(call, True)[1]
    slots = dispatched.source[:kept].long()
    expert = torch.searchsorted(dispatched.offsets[1:].contiguous(), torch.arange(kept), right=True)
    x, parameters = call.hidden[slots // 2].double(), call.parameters
    expected = torch.einsum("si,soi->so", x, parameters.gate_up[expert].double()) + parameters.gate_up_bias[expert]
    assert preactivation.shape == (call.num_rows, expected.shape[1])
    assert_close(preactivation[:kept], expected)


@pytest.mark.parametrize("way", ["alone", "alone, padded", "device"])
def test_sequences_give_the_bits_of_stacked_weights(way: str) -> None:
    problem = make_problem(ragged_choices(SIZES), len(SIZES), ranks=(3, 2))
    found, listed = run(problem, WAYS[way]), run(problem, WAYS[way], sequence=True)
    for name in ("out", *problem.parameters):
        assert torch.equal(found[name], listed[name]), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", INPUTS)
def test_only_the_wanted_gradients(way: str, name: str) -> None:
    problem = make_problem(ragged_choices(SIZES), len(SIZES), ranks=(3, 2))
    alone = run(problem, WAYS[way], wanted=[other == name for other in INPUTS])
    assert alone.keys() == {"out", name}
    assert torch.equal(alone[name], run(problem, WAYS[way])[name])


@pytest.mark.parametrize("way", WAYS)
def test_expanded_and_strided_gradients(way: str) -> None:
    problem = make_problem(ragged_choices(SIZES), len(SIZES))
    call, shape = problem.call, problem.grad_out.shape
    check_way(way, Problem(call, torch.tensor(0.7).expand(shape)))
    check_way(way, Problem(call, torch.randn(shape[::-1]).T))
    strided = replace(call, weights=torch.rand(call.weights.shape[::-1]).T, hidden=torch.randn(shape[::-1]).T)
    check_way(way, Problem(strided, problem.grad_out))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("broken_expert", range(3))
def test_a_broken_token_stays_with_its_own_expert(way: str, broken_expert: int) -> None:
    choices = torch.tensor([0, 1, 2]).repeat_interleave(20)[:, None]
    problem = make_problem(choices, 3, ranks=(3, 2))
    clean = run(problem, WAYS[way])
    problem.call.hidden[choices[:, 0] == broken_expert] = float("inf")
    broken = run(problem, WAYS[way])
    for e in {0, 1, 2} - {broken_expert}:
        for name in problem.parameters:
            assert torch.equal(clean[name][e], broken[name][e])
    assert not torch.isfinite(broken["gate_up"][broken_expert]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("grouped_calls", ["all", "none over rows"])
@pytest.mark.parametrize("ranks", [None, (3, 2)])
def test_the_device_way_with_grouped_mm(
    ranks: tuple[int, int] | None,
    grouped_calls: str,
    keep: bool,
    is_transposed: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, calls = torch.nn.functional.grouped_mm, []

    def dirty(left: Tensor, right: Tensor, *, offs: Tensor) -> Tensor:
        """grouped_mm leaves the rows past offs[-1] as they were: here they are NaN."""
        calls.append(offs)
        out = original(left, right, offs=offs)
        if right.dim() == 3:
            out[offs[-1] :] = float("nan")
        return out

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", dirty)
    monkeypatch.setattr(grouped, "can_group", lambda left, right: right.dim() == 3 or grouped_calls == "all")
    spec = ExpertSpec(is_transposed=is_transposed)
    problem = make_problem(
        ragged_choices(SIZES), len(SIZES), spec=spec, dtype=dtype, ranks=ranks, capacity=18, d=16, n=8
    )
    check_way("device", problem, keep)
    products, outer = (4 if keep else 5), 4
    if ranks is not None:  # two narrow ones beside each product, and one for each gradient of an adapter
        products, outer = 3 * products + 4, outer + 4
    assert len(calls) == products + (outer if grouped_calls == "all" else 0)


@pytest.mark.parametrize("recurring", [False, True])
def test_without_onednn(recurring: bool) -> None:
    problem = make_problem(ragged_choices(SIZES), len(SIZES), bias=True)
    check(run(problem, with_policy(CpuPolicy(shapes_recur=recurring))), problem)


@pytest.mark.parametrize("way", CPU_WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_used_memory_holds_garbage(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LARGE", 1)
    monkeypatch.setattr(memory, "_idle", defaultdict(deque))
    lent: list[int] = []
    original = memory.np.empty

    def poisoned(size: int, dtype: type) -> object:
        lent.append(size)
        fresh = original(size, dtype=dtype)
        fresh.fill(0xFF)  # NaN in every float format
        return fresh

    monkeypatch.setattr(memory.np, "empty", poisoned)
    problem = make_problem(ragged_choices(SIZES), len(SIZES), dtype=dtype, ranks=(3, 2))
    check_way(way, problem)
    assert len(lent) >= 4
    check_way(way, problem)  # in the memory of the first


def test_only_stacked_weights_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[torch.Size] = []
    original = products.batched_product

    def spy(left: Tensor, *args: Tensor | None) -> Tensor:
        called.append(left.shape)
        return original(left, *args)

    monkeypatch.setattr(products, "batched_product", spy)
    problem = make_problem(ragged_choices([20, 20, 20]), 3)
    for call, wanted in ((problem.call, 2), (as_sequences(problem.call), 0)):
        called.clear()
        with torch.no_grad():
            out, _ = WAYS["batched"].experts_forward(call, False)
        assert_close(out, problem.expected["out"])
        assert len(called) == wanted


def test_the_device_way_never_looks_at_the_data() -> None:
    """Meta tensors have no data: whatever would make the host wait for a device raises on them."""
    problem = make_problem(ragged_choices(SIZES), len(SIZES), ranks=(3, 2))
    call = replaced(problem.call, **{name: x.to("meta") for name, x in problem.inputs.items()})
    dispatched = {f.name: getattr(call.dispatched, f.name).to("meta") for f in fields(Dispatch)}
    on_meta = Problem(replace(call, dispatched=Dispatch(**dispatched)), problem.grad_out.to("meta"))
    found = run(on_meta, experts_device)
    assert found["out"].shape == call.hidden.shape
    for name, operand in on_meta.inputs.items():
        assert (found[name].shape, found[name].dtype) == (operand.shape, operand.dtype)
    for way in CPU_WAYS:
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            run(on_meta, WAYS[way])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_comparison_can_fail(dtype: torch.dtype) -> None:
    problem = make_problem(ragged_choices(SIZES), len(SIZES), dtype=dtype)
    found = run(problem, experts_cpu)
    one_token_dropped = found["out"].clone()
    one_token_dropped[3] = 0
    for name in ("out", "hidden", "weights", "gate_up", "down"):
        wrong = [torch.zeros_like(found[name]), found[name].roll(1, 0)]
        for other in [*wrong, one_token_dropped] if name == "out" else wrong:
            with pytest.raises(AssertionError, match="relative RMS"):
                assert_close(other, problem.expected[name], tolerance=TOLERANCE[dtype])
    swapped = with_inputs(problem, gate_up=problem.call.parameters.gate_up.flip(0))
    with pytest.raises(AssertionError, match="relative RMS"):
        check(run(swapped, experts_cpu), swapped)
