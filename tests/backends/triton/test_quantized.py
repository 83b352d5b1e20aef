"""Quantised projections in the kernels: the bits of the same call over their dequantised numbers, forward and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_triton import QuantizedWeight
from moe_triton.backends.triton import problem as triton_problem
from moe_triton.records import ExpertSpec
from moe_triton_kernels import configs
from moe_triton_kernels.launch import Config
from tests.helpers.problems import Problem, make_problem, random_choices, replaced, run
from tests.kernels.test_quantized import KINDS

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in (exp|cast):RuntimeWarning")
T, E, K = 12, 3, 2
D, N = 96, 64
PLAIN = ExpertSpec(activation="swiglu")
PAIRS = ExpertSpec(activation="gpt_oss", is_concatenated=False, is_transposed=True)
LIKE_GPT_OSS = ExpertSpec(activation="gpt_oss", is_concatenated=False)
CASES = [
    ("mxfp4", LIKE_GPT_OSS, torch.bfloat16),
    ("nvfp4", PAIRS, torch.bfloat16),
    ("nvfp4", replace(PLAIN, is_transposed=True), torch.float32),
    ("fp8", LIKE_GPT_OSS, torch.bfloat16),
    ("fp8", ExpertSpec(activation="relu2"), torch.float32),
    ("int8", PLAIN, torch.bfloat16),
    ("int4", ExpertSpec(activation="gelu", is_transposed=True), torch.float16),
    ("int4, zeros", PLAIN, torch.bfloat16),
]


def quantized(problem: Problem, kind: str, *, stored_transposed: bool | None = None) -> tuple[Problem, Problem]:
    """The problem over quantised projections, and over the numbers that these stand for."""
    spec, dtype = problem.call.spec, problem.call.hidden.dtype
    transposed = spec.is_transposed if stored_transposed is None else stored_transposed
    projections = {
        name: QuantizedWeight.quantize(
            problem.inputs[name], kind.split(",")[0], is_transposed=transposed, **KINDS[kind]
        )
        for name in ("gate_up", "down")
    }
    numbers = {name: projection.dequantize(dtype) for name, projection in projections.items()}
    return with_projections(problem, projections), with_projections(problem, numbers)


def with_projections(problem: Problem, inputs: dict[str, Any]) -> Problem:
    return replace(problem, call=replaced(problem.call, **inputs), known={})


def make(spec: ExpertSpec = PLAIN, *, choices: Tensor | None = None, d: int = D, n: int = N, **options: Any) -> Problem:
    return make_problem(random_choices(T, K, E) if choices is None else choices, E, spec=spec, d=d, n=n, **options)


def check_bits(over_codes: Problem, over_numbers: Problem, **options: Any) -> dict[str, Tensor]:
    found, expected = run(over_codes, **options), run(over_numbers, **options)
    assert found.keys() == expected.keys() - {"gate_up", "down"}
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    return found


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The formats of the projections that were decoded to memory."""
    found: list[str] = []
    original = triton_problem.decode

    def spy(weight: Any, dtype: torch.dtype) -> Any:
        found.append(weight.decoding.format)
        return original(weight, dtype)

    monkeypatch.setattr(triton_problem, "decode", spy)
    return found


@pytest.fixture(autouse=True)
def wide_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 of the contraction at once, of 96: more than share a scale of most formats, and the last block is ragged."""
    config = Config(block_m=16, block_n=64, block_k=64, num_warps=4, num_stages=1, group=2, parts=2)
    monkeypatch.setattr(configs, "heuristic", lambda *args: config)
    monkeypatch.setattr(configs, "_find", configs._find.__wrapped__)
    monkeypatch.setattr(triton_problem, "_PREPARED", {})


@pytest.mark.parametrize(
    ("kind", "spec", "dtype"), [pytest.param(*case, id=f"{case[0]}-{case[1].activation}-{case[2]}") for case in CASES]
)
def test_the_bits_of_the_dequantised_projections(
    kind: str, spec: ExpertSpec, dtype: torch.dtype, decoded: list[str]
) -> None:
    check_bits(*quantized(make(spec, dtype=dtype), kind))
    assert decoded == []


def test_blocks_that_share_a_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 of the contraction at once, of the 32 and 128 numbers of one scale."""
    config = Config(block_m=16, block_n=32, block_k=16, num_warps=4, num_stages=1)
    monkeypatch.setattr(configs, "heuristic", lambda *args: config)
    monkeypatch.setattr(triton_problem, "_PREPARED", {})
    for kind in ("mxfp4", "fp8"):
        check_bits(*quantized(make(ExpertSpec(activation="relu2"), d=48 if kind == "fp8" else 64, n=32), kind))


@pytest.mark.parametrize("kind", ["mxfp4", "fp8", "int4, zeros"])
def test_decoded_to_memory(kind: str, decoded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As for many rows: once for each product, and never for the gradients of parameters."""
    monkeypatch.setattr(triton_problem, "decodes_in_loop", lambda *args, **options: False)
    check_bits(*quantized(make(LIKE_GPT_OSS), kind))
    assert decoded == [kind.split(",")[0]] * 4  # up, down, d_hidden, d_rows


def test_scales_of_fp8_that_gate_and_up_share(decoded: list[str]) -> None:
    """n = 64: a block of 128 rows reaches from gate into up, which only the other direction may read as codes."""
    check_bits(*quantized(make(), "fp8"))
    assert decoded == ["fp8"]


@pytest.mark.parametrize("spec", [PLAIN, replace(LIKE_GPT_OSS, is_transposed=True)])
def test_codes_along_the_columns(spec: ExpertSpec) -> None:
    """A layout that counts as [in, out] may be stored as such, with scales along `out`."""
    check_bits(*quantized(make(spec), "nvfp4", stored_transposed=not spec.is_transposed))


@pytest.mark.parametrize("kind", ["mxfp4", "int4, zeros"])
def test_adapters_and_recomputation(kind: str) -> None:
    problem = make(ranks=(3, 17), dtype=torch.float32)
    over_codes, over_numbers = quantized(problem, kind)
    first, again = check_bits(over_codes, over_numbers), run(over_codes, recompute=True)
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_only_one_projection_is_quantised() -> None:
    over_codes, over_numbers = quantized(make(), "int8")
    call = replaced(over_codes.call, down=over_numbers.call.parameters.down)
    found, expected = run(replace(over_codes, call=call)), run(over_numbers)
    assert found.keys() == expected.keys() - {"gate_up"}
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_batch_invariant() -> None:
    """A token's bits do not depend on the others, though many rows would be decoded to memory."""
    over_codes, _ = quantized(make(replace(PLAIN, batch_invariant=True)), "mxfp4")
    call = over_codes.call
    alone = make_problem(torch.tensor([[2, 0]]), E, spec=call.spec, d=D, n=N)
    many = make_problem(torch.tensor([[2, 0]]).expand(T, K), E, spec=call.spec, d=D, n=N)
    projections = {name: getattr(call.parameters, name) for name in ("gate_up", "down", "gate_up_bias", "down_bias")}
    rows = {"hidden": alone.call.hidden, "weights": alone.call.weights}
    first = run(replace(alone, call=replaced(alone.call, **projections)))["out"]
    repeated = {name: value.expand(T, -1).contiguous() for name, value in rows.items()}
    every = run(replace(many, call=replaced(many.call, **projections, **repeated)))["out"]
    assert torch.equal(every, first.expand(T, -1))


@settings(max_examples=4, deadline=None)
@given(st.data())
def test_ragged_routing(data: st.DataObject) -> None:
    """Experts without rows, and sizes of fp8 that are multiples of nothing."""
    top_k = data.draw(st.integers(1, 3))
    num_tokens = data.draw(st.integers(1, 30))
    choices = random_choices(num_tokens, top_k, E)
    kind = data.draw(st.sampled_from(["fp8", "mxfp4"]))
    d, n = (data.draw(st.integers(1, 140)), 40) if kind == "fp8" else (64, data.draw(st.sampled_from([32, 96])))
    check_bits(*quantized(make(ExpertSpec(activation="relu2"), choices=choices, d=d, n=n), kind))


def test_the_comparison_fails_on_mutations() -> None:
    over_codes, over_numbers = quantized(make(), "mxfp4")
    scales = over_codes.call.parameters.down.scales.clone()
    scales[0, 0, 0] += 1
    wrong = with_projections(over_codes, {"down": replace(over_codes.call.parameters.down, scales=scales)})
    with pytest.raises(AssertionError):
        check_bits(wrong, over_numbers)
