"""A small MoE problem with the float64 reference's answers, and how a kernel's answers are compared with them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_triton import reference
from moe_triton.backends.triton.experts import experts_backward, experts_forward
from moe_triton.records import Dispatch, ExpertSpec
from tests.helpers.compare import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PARAMETERS = ("gate_up", "down", "gate_up_bias", "down_bias")
INPUTS = ("hidden", "weights", *PARAMETERS)


@dataclass(frozen=True)
class Problem:
    """Inputs (a missing bias is None), and the expected `out` and gradients by the name of their input."""

    spec: ExpertSpec
    dispatch: Dispatch
    inputs: dict[str, Tensor | None]
    grad_out: Tensor
    expected: dict[str, Tensor]


def random_choices(num_tokens: int, top_k: int, num_experts: int) -> Tensor:
    """Distinct experts for each token; the last expert is chosen by nobody where top_k leaves one out."""
    used = max(top_k, num_experts - 1)
    choices = torch.rand(num_tokens, used).argsort(1)[:, :top_k]
    return choices.int()


def make_problem(
    choices: Tensor,
    num_experts: int,
    *,
    spec: ExpertSpec | None = None,
    bias: bool = True,
    d: int = 24,
    n: int = 20,
    dtype: torch.dtype = torch.float32,
    weights_dtype: torch.dtype = torch.float32,
    capacity: int | None = None,
) -> Problem:
    """The inputs are rounded to `dtype` before the reference sees them in float64."""
    spec = spec or ExpertSpec()
    num_tokens, top_k = choices.shape
    width = 2 * n if spec.is_gated else n
    shapes = {"gate_up": (num_experts, width, d), "down": (num_experts, d, n)}
    if spec.is_transposed:
        shapes = {name: (experts, columns, rows) for name, (experts, rows, columns) in shapes.items()}
    if bias:
        shapes |= {"gate_up_bias": (num_experts, width), "down_bias": (num_experts, d)}
    inputs: dict[str, Tensor | None] = dict.fromkeys(INPUTS)
    inputs["hidden"] = torch.randn(num_tokens, d).to(dtype)
    inputs["weights"] = (torch.rand(num_tokens, top_k) + 0.1).to(weights_dtype)
    for name, shape in shapes.items():
        spread = 1.0 if name.endswith("bias") else 2.0 / shape[1] ** 0.5
        inputs[name] = (spread * torch.randn(shape)).to(dtype)
    grad_out = torch.randn(num_tokens, d).to(dtype)

    dispatch = reference.dispatch(choices, num_experts, capacity=capacity)
    wide = {name: None if x is None else x.double().requires_grad_() for name, x in inputs.items()}
    out = reference.moe_mlp(wide["hidden"], wide["weights"], dispatch, *(wide[name] for name in PARAMETERS), spec)
    given = {name: x for name, x in wide.items() if x is not None}
    gradients = torch.autograd.grad(out, list(given.values()), grad_out.double(), allow_unused=True)
    expected = {"out": out.detach()}
    for (name, x), gradient in zip(given.items(), gradients, strict=True):
        expected[name] = torch.zeros_like(x) if gradient is None else gradient
    fields = {name: getattr(dispatch, name).to(DEVICE) for name in ("counts", "offsets", "source", "position")}
    return Problem(
        spec=spec,
        dispatch=Dispatch(**fields),
        inputs={name: None if x is None else x.to(DEVICE) for name, x in inputs.items()},
        grad_out=grad_out.to(DEVICE),
        expected=expected,
    )


def with_inputs(problem: Problem, **inputs: Tensor) -> Problem:
    """The same expectations for other inputs: what a mutated run is compared with."""
    return replace(problem, inputs={**problem.inputs, **inputs})


def stacked(x: Tensor | list[Tensor] | None) -> Tensor | None:
    return torch.stack(x) if isinstance(x, list) else x


def run(
    problem: Problem, *, recompute: bool = False, sequence: bool = False, needs: tuple[bool, ...] = (True,) * 6
) -> dict[str, Tensor]:
    """`out` and the gradients that are asked for, computed by the triton backend."""
    hidden, weights, *parameters = (problem.inputs[name] for name in INPUTS)
    if sequence:
        parameters = [x if x is None else list(x.unbind(0)) for x in parameters]
    dispatch = problem.dispatch
    plan = (dispatch.offsets, dispatch.source, dispatch.position)
    out, h = experts_forward(hidden, weights, *plan, *parameters, problem.spec, not recompute)
    gradients = experts_backward(problem.grad_out, hidden, h, weights, *plan, *parameters, problem.spec, needs)
    if sequence:
        wanted = (True, True, *(x is not None for x in parameters))
        lists = [isinstance(gradient, list) for gradient in gradients]
        assert lists == [False, False, *wanted[2:]]
    found = {name: stacked(gradient) for name, gradient in zip(INPUTS, gradients, strict=True)}
    return {"out": out, **{name: gradient for name, gradient in found.items() if gradient is not None}}


def check(actual: dict[str, Tensor], problem: Problem, tolerance: float | None = None) -> None:
    """Every expected tensor is there, in its input's dtype, and close to the reference."""
    assert actual.keys() == problem.expected.keys()
    for name, expected in problem.expected.items():
        given = problem.inputs["hidden" if name == "out" else name]
        assert actual[name].dtype == given.dtype, name
        assert_close(actual[name], expected, tolerance=tolerance)
