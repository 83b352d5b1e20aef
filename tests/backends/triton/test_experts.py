"""The experts op on the triton backend, forward and every gradient, against the float64 reference and its autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_triton.backends.triton import problem as triton_problem
from moe_triton.backends.triton.experts import experts_forward
from moe_triton.records import ACTIVATIONS, GATED, ExpertSpec
from moe_triton_kernels import configs, d_hidden, descriptors, down, up
from tests.helpers.compare import TOLERANCE
from tests.helpers.pairs import every_pair
from tests.helpers.problems import (
    DEVICE,
    INPUTS,
    Problem,
    check,
    expected_of,
    make_problem,
    random_choices,
    replaced,
    run,
    with_inputs,
)

# the sigmoid of a far negative number is 1 / (1 + inf) = 0, as it should be
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
LAYOUTS = ((False, True), (True, True), (False, False), (True, False))  # (is_transposed, is_concatenated)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECS = [
    ExpertSpec(activation=activation, is_transposed=transposed, is_concatenated=concatenated)
    for activation in ACTIVATIONS
    for transposed, concatenated in LAYOUTS
    if concatenated or activation in GATED
]
RELU2 = ExpertSpec(activation="relu2")
# Limits that about a third of the pre-activations exceed; 0.3 is no number of 16 bits.
LIMITED = [
    ExpertSpec(activation="swiglu", activation_limit=0.3),
    ExpertSpec(activation="swiglu", activation_limit=0.5, activation_alpha=1.702, is_concatenated=False),
    ExpertSpec(activation="gpt_oss", activation_limit=0.5, activation_alpha=0.7, is_transposed=True),
]


def name_of(spec: ExpertSpec) -> str:
    return spec.activation + "-transposed" * spec.is_transposed + "-interleaved" * (not spec.is_concatenated)


def is_covered(spec: ExpertSpec, bias: bool) -> bool:
    """All of swiglu; of the others, each order of gate and up in one layout, with a bias in one of the two."""
    if spec.activation == "swiglu":
        return True
    index = list(ACTIVATIONS).index(spec.activation)
    return spec.is_transposed == (index % 2 == spec.is_concatenated) and bias == (
        (index // 2) % 2 == spec.is_transposed
    )


CASES = [(spec, bias) for spec in SPECS for bias in (False, True) if is_covered(spec, bias)]


@pytest.mark.parametrize(
    ("spec", "bias", "dtype"),
    [
        pytest.param(spec, bias, DTYPES[index % 3], id=f"{name_of(spec)}{'-bias' * bias}-{DTYPES[index % 3]}")
        for index, (spec, bias) in enumerate(CASES)
    ],
)
def test_every_activation_and_layout(spec: ExpertSpec, bias: bool, dtype: torch.dtype) -> None:
    problem = make_problem(random_choices(9, 2, 4), 4, spec=spec, bias=bias, dtype=dtype)
    check(run(problem), problem, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        *((LIMITED[0], dtype) for dtype in DTYPES),
        (LIMITED[1], torch.float32),
        (LIMITED[1], torch.bfloat16),
        (LIMITED[2], torch.float16),
    ],
    ids=str,
)
def test_limits(spec: ExpertSpec, dtype: torch.dtype) -> None:
    problem = make_problem(random_choices(9, 2, 4), 4, spec=spec, bias=True, dtype=dtype)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype)
    check(run(problem), problem, tolerance)


@pytest.mark.parametrize(
    ("spec", "dtype", "ranks"), [(SPECS[0], torch.bfloat16, None), (SPECS[3], torch.float32, (3, 17))], ids=str
)
def test_sequences_and_recomputation_give_the_same_bits(
    spec: ExpertSpec, dtype: torch.dtype, ranks: tuple[int, int] | None
) -> None:
    problem = make_problem(random_choices(7, 2, 3), 3, spec=spec, dtype=dtype, ranks=ranks)
    actual = run(problem)
    check(actual, problem, tolerance=TOLERANCE[dtype])
    for other in (run(problem), run(problem, recompute=True), run(problem, sequence=True)):
        assert actual.keys() == other.keys()
        for name in actual:
            assert torch.equal(actual[name], other[name]), name


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [pytest.param(spec, DTYPES[i % 3], id=name_of(spec)) for i, spec in enumerate((*SPECS[:4], RELU2))],
)
def test_tensor_descriptors_give_the_same_bits(
    spec: ExpertSpec, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem(random_choices(19, 2, 4), 4, d=24, n=24, spec=spec, dtype=dtype)
    expected = run(problem)
    heuristic, place, made = configs.heuristic, descriptors.at, []
    monkeypatch.setattr(configs, "heuristic", lambda *key: replace(heuristic(*key), descriptors=True))
    monkeypatch.setattr(configs, "_find", configs._find.__wrapped__)

    monkeypatch.setattr(triton_problem, "_PREPARED", {})

    def at(data: Tensor, described: object) -> object:
        placed = place(data, described)
        made.extend([placed] * (placed is not None))
        return placed

    for module in (descriptors, up, down, d_hidden):
        monkeypatch.setattr(module, "at", at)
    actual = run(problem)
    # the weights of up, down, d_hidden and d_rows; the rows of down, d_rows and twice d_weight
    assert len(made) == (7 if spec.is_transposed and spec.is_concatenated else 8)
    check(actual, problem, tolerance=TOLERANCE[dtype])
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@every_pair(
    spec=[ExpertSpec(), ExpertSpec(activation="gelu", is_transposed=True)],
    dtype=[torch.float16, torch.bfloat16],
    weights_dtype=[None, torch.float32],
)
def test_router_weights_in_either_dtype(
    spec: ExpertSpec, dtype: torch.dtype, weights_dtype: torch.dtype | None
) -> None:
    problem = make_problem(
        random_choices(9, 2, 4), 4, spec=spec, dtype=dtype, weights_dtype=weights_dtype or dtype, ranks=(8, 20)
    )
    check(run(problem), problem, tolerance=TOLERANCE[dtype])


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_ragged_routing(data: st.DataObject) -> None:
    """Any number of tokens, choices, experts and capacity; one expert is empty; ids out of range are skipped."""
    torch.manual_seed(data.draw(st.integers(0, 2**20), label="seed"))
    num_experts = data.draw(st.integers(1, 6), label="experts")
    top_k = data.draw(st.integers(1, num_experts), label="choices")
    num_tokens = data.draw(st.sampled_from([0, 1, 2, 15, 16, 17, 33]), label="tokens")
    capacity = data.draw(st.sampled_from([None, 0, 1, 5, 16]), label="capacity")
    choices = torch.rand(num_tokens, num_experts).argsort(1)[:, :top_k].int()
    if data.draw(st.booleans(), label="one expert with all rows"):
        choices = choices.clamp(max=0)
    choices = choices.where(choices != num_experts - 1, data.draw(st.sampled_from([-1, num_experts]), label="skipped"))
    d, n = data.draw(st.tuples(st.sampled_from([1, 8, 16, 24]), st.sampled_from([1, 16, 20])), label="sizes")
    # a single number may cancel down to the rounding of its 16-bit terms
    dtype = data.draw(st.sampled_from(DTYPES if min(d, n) > 1 else DTYPES[:1]), label="dtype")
    spec = ExpertSpec(activation="geglu_tanh")
    problem = make_problem(choices, num_experts, d=d, n=n, capacity=capacity, spec=spec, dtype=dtype)
    tolerance = TOLERANCE[dtype] * (1 if dtype == torch.float32 else 2)  # of a few numbers the errors do not average
    check(run(problem, recompute=data.draw(st.booleans(), label="recompute")), problem, tolerance=tolerance)


@pytest.mark.parametrize(
    ("spec", "ranks"),
    [
        (SPECS[0], (17, 70)),
        (SPECS[1], (3, 16)),
        (SPECS[2], (3, 16)),
        (SPECS[3], (17, 70)),
        (ExpertSpec(activation="relu2", is_transposed=True), (16, 17)),
    ],
    ids=str,
)
def test_adapters(spec: ExpertSpec, ranks: tuple[int, int]) -> None:
    """Ragged rows with an empty expert; ranks below, at and above a step of the contraction."""
    problem = make_problem(random_choices(19, 2, 4), 4, spec=spec, bias=spec.is_transposed, ranks=ranks)
    check(run(problem), problem)


@pytest.mark.parametrize("kind", ["gate_up", "down"])
def test_an_adapter_of_one_projection(kind: str) -> None:
    """It lies as PEFT's does: neither of b's two dimensions is contiguous, and the expert runs fastest."""
    problem = make_problem(random_choices(9, 2, 3), 3, ranks=(3, 2))
    names = [f"{kind}_lora_a", f"{kind}_lora_b"]
    given = {name: None for name in problem.parameters if "lora" in name and name not in names}
    b = problem.inputs[names[1]]
    call = replaced(problem.call, **given)
    expected = expected_of(call, problem.grad_out)
    strided = replaced(call, **{names[1]: b.permute(1, 2, 0).contiguous().permute(2, 0, 1)})
    check(run(Problem(strided, problem.grad_out, expected)), Problem(call, problem.grad_out, expected))


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_ragged_adapters(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**20), label="seed"))
    num_experts = data.draw(st.integers(1, 5), label="experts")
    choices = torch.randint(-1, num_experts, (data.draw(st.sampled_from([0, 1, 16, 33]), label="tokens"), 2))
    d, n = data.draw(st.tuples(st.sampled_from([1, 8, 24]), st.sampled_from([1, 16, 20])), label="sizes")
    ranks = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)), label="ranks")
    capacity = data.draw(st.sampled_from([None, 0, 5]), label="capacity")
    problem = make_problem(choices, num_experts, d=d, n=n, ranks=ranks, capacity=capacity)
    check(run(problem, recompute=data.draw(st.booleans(), label="recompute")), problem)


def test_top_k_of_every_expert() -> None:
    problem = make_problem(random_choices(5, 4, 4), 4)
    check(run(problem), problem)


def test_only_the_gradients_that_are_needed() -> None:
    problem = make_problem(random_choices(7, 2, 3), 3, ranks=(3, 2))
    everything = run(problem)
    for name in problem.inputs:
        alone = run(problem, wanted=[other == name for other in INPUTS])
        assert alone.keys() == {"out", name}
        assert torch.equal(alone[name], everything[name])


def test_inputs_that_are_not_contiguous() -> None:
    problem = make_problem(random_choices(9, 2, 4), 4)
    expected = run(problem)
    strided = {}
    for name, x in problem.inputs.items():
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype, device=DEVICE)
        strided[name] = wide[..., ::2].copy_(x)
    actual = run(with_inputs(problem, **strided))
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_expanded_inputs() -> None:
    """One expert's parameters, one token and one gradient row stand for all."""
    problem = make_problem(random_choices(6, 2, 3), 3, ranks=(3, 2))
    shared = {
        name: problem.inputs[name][:1].expand_as(problem.inputs[name]) for name in ("hidden", *problem.parameters)
    }
    expanded = replace(with_inputs(problem, **shared), grad_out=problem.grad_out[:1].expand_as(problem.grad_out))
    copied = replace(
        with_inputs(problem, **{name: x.clone() for name, x in shared.items()}), grad_out=expanded.grad_out.clone()
    )
    actual, expected = run(expanded), run(copied)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_a_sequence_of_unaligned_and_strided_tensors() -> None:
    """Views at odd offsets, one of them with strides of its own: read where they are, or made contiguous."""
    problem = make_problem(random_choices(9, 2, 4), 4)

    def unaligned(x: torch.Tensor) -> list[torch.Tensor]:
        pieces = [torch.cat([piece.new_zeros(1), piece.reshape(-1)])[1:].view(piece.shape) for piece in x]
        assert pieces[0].data_ptr() % 16 != 0
        pieces[1] = pieces[1].mT.contiguous().mT if x.dim() == 3 else pieces[1]
        return pieces

    check(run(with_inputs(problem, **{name: unaligned(problem.inputs[name]) for name in problem.parameters})), problem)


def test_no_bits_change_without_the_preactivation() -> None:
    problem = make_problem(random_choices(9, 2, 4), 4)
    kept, h = experts_forward(problem.call, True)
    alone, nothing = experts_forward(problem.call, False)
    assert h.shape == (18, 40)
    assert nothing.shape == (0,)
    assert torch.equal(kept, alone)


def test_float64_is_refused() -> None:
    problem = make_problem(random_choices(3, 1, 2), 2, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"hidden: .* got torch\.float64"):
        run(problem)


def cancelling_problem() -> Problem:
    """The gradient of a router weight is -2.5, two of its addends are 24 and -10: bf16's error is 6% of the sum."""
    torch.manual_seed(2396)
    torch.rand(2, 2)
    choices = torch.tensor([[0], [2]], dtype=torch.int32)
    return make_problem(choices, 2, d=8, spec=ExpertSpec(activation="geglu_tanh"), dtype=torch.bfloat16)


@pytest.mark.parametrize("cancels", [False, True])
def test_the_comparison_fails_on_mutations(cancels: bool) -> None:
    """Zeros, swapped experts and one dropped token are each far outside the tolerance, for every result."""
    problem = cancelling_problem() if cancels else make_problem(random_choices(11, 2, 4), 4, ranks=(3, 2))
    token, tolerance = (0, 2 * TOLERANCE[torch.bfloat16]) if cancels else (3, None)
    actual = run(problem)
    check(actual, problem, tolerance=tolerance)

    swap = [1, 0, *range(2, problem.call.num_experts)]
    swapped = run(with_inputs(problem, **{name: problem.inputs[name][swap] for name in problem.parameters}))
    swapped |= {name: actual[name][swap] for name in problem.parameters}
    grad_out = problem.grad_out.clone()
    grad_out[token] = 0.0
    dropped = run(replace(problem, grad_out=grad_out))
    dropped["out"] = actual["out"].index_fill(0, torch.tensor([token], device=DEVICE), 0.0)
    for name in actual:
        for mutated in (torch.zeros_like(actual[name]), swapped[name], dropped[name]):
            with pytest.raises(AssertionError, match="relative RMS error"):
                check({**actual, name: mutated}, problem, tolerance=tolerance)
