"""The experts of few rows in one loop: the reference's numbers, which calls run so, and bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_triton.backends.torch import experts_cpu, fused, small_experts
from moe_triton.backends.torch.cpu import CpuPolicy
from moe_triton.backends.torch.small_experts import runs_loops
from moe_triton.records import ExpertSpec, Wanted
from tests.helpers.compare import assert_close
from tests.helpers.problems import Problem, as_sequences, check, make_problem, random_choices, run

pytest.importorskip("numba")

SPECS = {
    "swiglu": ExpertSpec(),
    "cut, another alpha": ExpertSpec(activation_limit=0.5, activation_alpha=1.3),
    "gpt_oss, alternating": ExpertSpec(activation="gpt_oss", activation_limit=1.0, is_concatenated=False),
}


def small_problem(spec: ExpertSpec | None = None, capacity: int | None = 4) -> Problem:
    """One expert without rows, and dropped choices; sizes that are no multiple of a vector or of four."""
    return make_problem(random_choices(11, 2, 5), 5, spec=spec, bias=False, d=22, n=19, capacity=capacity)


@pytest.fixture(params=["vectors", "plain"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Products by vectors of 512 bits where the processor has them, or those for any processor."""
    if request.param == "plain":
        monkeypatch.setattr(small_experts, "this_cpu", lambda: CpuPolicy(shapes_recur=False))
    return str(request.param)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.usefixtures("products")
def test_results_of_the_reference(name: str, recompute: bool) -> None:
    problem = small_problem(SPECS[name])
    assert runs_loops(problem.call)
    found = run(problem, experts_cpu, recompute=recompute)
    check(found, problem, tolerance=2e-6)
    with pytest.raises(AssertionError):
        assert_close(found["gate_up"].roll(1, 2), problem.expected["gate_up"])


@pytest.mark.usefixtures("products")
def test_experts_of_many_rows() -> None:
    """More than 32 rows of an expert, and more columns than a panel has."""
    problem = make_problem(random_choices(150, 2, 3), 3, bias=False, d=70, n=45, capacity=None)
    assert runs_loops(problem.call)
    check(run(problem, experts_cpu), problem, tolerance=2e-6)


@pytest.mark.usefixtures("products")
def test_only_what_is_wanted_in_the_same_bits() -> None:
    problem = small_problem()
    everything = run(problem, experts_cpu)
    for name, place in (("hidden", 0), ("weights", 1), ("gate_up", 2), ("down", 3)):
        found = run(problem, experts_cpu, wanted=[i == place for i in range(len(Wanted._fields))])
        assert found.keys() == {"out", name}
        assert torch.equal(found[name], everything[name])


def test_which_calls_run_so(monkeypatch: pytest.MonkeyPatch) -> None:
    call = small_problem().call
    assert not runs_loops(as_sequences(call))
    assert not runs_loops(make_problem(random_choices(11, 2, 5), 5, bias=True).call)
    assert not runs_loops(make_problem(random_choices(11, 2, 5), 5, bias=False, dtype=torch.bfloat16).call)
    assert not runs_loops(make_problem(random_choices(0, 2, 5), 5, bias=False).call)
    for other in (ExpertSpec(batch_invariant=True), ExpertSpec(is_transposed=True), ExpertSpec(activation="geglu")):
        assert not runs_loops(replace(call, spec=other))
    turned = call.parameters._replace(gate_up=call.parameters.gate_up.mT.contiguous().mT)  # type: ignore[union-attr]
    assert not runs_loops(replace(call, parameters=turned))
    products, weights = 22 * 3 * 22 * 19, 5 * 3 * 22 * 19
    for most, many, cached in ((products, 0, 0), (0, products, weights)):
        for name, value in (("MOST_PRODUCTS", most), ("MANY_PRODUCTS", many), ("CACHED_WEIGHTS", cached)):
            monkeypatch.setattr(small_experts, name, value)
        assert runs_loops(call)
        for name, value in (("MOST_PRODUCTS", most), ("MANY_PRODUCTS", many), ("CACHED_WEIGHTS", cached)):
            if value > 0:
                monkeypatch.setattr(small_experts, name, value - 1)
                assert not runs_loops(call)
                monkeypatch.setattr(small_experts, name, value)
    assert runs_loops(call)
    monkeypatch.setenv(fused.VARIABLE, "0")
    assert not runs_loops(call)


def test_a_policy_asks_for_products_by_torch() -> None:
    problem = small_problem()
    by_loop = experts_cpu.experts_forward(problem.call, False)[0]
    by_torch = experts_cpu.experts_forward(problem.call, False, CpuPolicy(shapes_recur=False))[0]
    assert_close(by_torch, problem.expected["out"])
    assert not torch.equal(by_loop, by_torch)
