"""Products in fp8: codes that kernels make where their numbers are have the bits of codes that passes make of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from moe_triton.backends.triton import experts_fp8
from moe_triton.records import ExpertSpec, Wanted
from moe_triton_kernels import fp8
from moe_triton_kernels.fp8 import CodedRows
from tests.helpers.compare import TOLERANCE, assert_close
from tests.helpers.problems import make_problem, random_choices, run

E, K, D = 3, 2, 72
PLAIN = ExpertSpec(activation="swiglu", fp8=True)
PAIRS = ExpertSpec(activation="gpt_oss", is_concatenated=False, is_transposed=True, fp8=True)
RELU2 = ExpertSpec(activation="relu2", fp8=True)


def make(spec: ExpertSpec, n: int, **options: object):
    return make_problem(random_choices(30, K, E), E, spec=spec, d=D, n=n, dtype=torch.bfloat16, **options)


@pytest.mark.parametrize(
    ("spec", "n", "options"),
    [
        (PLAIN, 128, {"bias": False}),
        (PLAIN, 80, {"capacity": 15}),  # a group of gate and of up, and tokens of which one choice, or none, is kept
        (PAIRS, 72, {"bias": False}),
        (RELU2, 40, {"bias": False, "ranks": (4, 3)}),
    ],
    ids=str,
)
def test_the_bits_do_not_depend_on_who_makes_the_codes(spec, n, options):
    problem = make(spec, n, **options)
    apart = replace(problem, call=replace(problem.call, is_part=True))
    fused, expected = (run(one, experts_fp8) for one in (problem, apart))
    assert fused.keys() == expected.keys()
    for name, value in fused.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("frozen", ["gate_up", "down"])
def test_what_is_not_wanted_changes_nothing_else(frozen):
    problem = make(PLAIN, 128, bias=False)
    wanted = Wanted().of(problem.call.parameters)
    found, expected = run(problem, experts_fp8, wanted=wanted._replace(**{frozen: False})), run(problem, experts_fp8)
    assert found.keys() == expected.keys() - {frozen}
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("frozen", [(), ("gate_up",), ("down",), ("gate_up", "down")], ids=str)
def test_gradients_of_biases(frozen):
    """From sums of tiles, or where a frozen projection has no codes by columns, from the rows: sums in float64."""
    choices = random_choices(210, K, E)  # an expert has 140 rows or more, and the last one none
    problem = make_problem(choices, E, spec=PLAIN, d=D, n=72, dtype=torch.bfloat16)
    call, wanted = problem.call, Wanted().of(problem.call.parameters)._replace(**dict.fromkeys(frozen, False))
    found = run(problem, experts_fp8, wanted=wanted)
    _, h = experts_fp8.experts_forward(call, True)
    part = replace(call, is_part=True)
    grad_h = experts_fp8.experts_backward_rows(part, problem.grad_out, h, wanted).preactivation
    slots, offsets = call.dispatched.source.long(), call.dispatched.offsets.tolist()
    weighted = problem.grad_out[slots // K].double() * call.weights.view(-1)[slots].double()[:, None]
    for name, rows in (("gate_up_bias", grad_h.double()), ("down_bias", weighted)):
        expected = torch.stack([rows[first:end].sum(0) for first, end in pairwise(offsets)])
        assert_close(found[name], expected, tolerance=TOLERANCE[torch.bfloat16] / 4)
        assert not found[name][-1].any()


def test_what_is_written(monkeypatch):
    """Numbers only for adapters, and in parts of a call, whose rows are joined; the biases' gradients need none."""
    monkeypatch.setattr(fp8, "triton_version", lambda: (3, 7, 1))  # by others d_hidden may write numbers
    for options, kept in (({}, (False, False)), ({"ranks": (4, 4)}, (True, True))):
        problem = make(PLAIN, 128, **options)
        wanted = Wanted().of(problem.call.parameters)
        _, h = experts_fp8.experts_forward(problem.call, True)
        rows = experts_fp8.experts_backward_rows(problem.call, problem.grad_out, h, wanted)
        forms = (rows.preactivation, rows.weighted_a)
        assert all(isinstance(form, CodedRows) for form in forms)
        assert tuple(form.numbers is not None for form in forms) == kept
    part = experts_fp8.experts_backward_rows(replace(problem.call, is_part=True), problem.grad_out, h, wanted)
    assert part.preactivation.shape == h.shape
    assert part.weighted_a.shape == (60, 128)
