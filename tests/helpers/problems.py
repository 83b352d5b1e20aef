"""Small problems for the experts with the float64 reference's answers, and how an answer is compared with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moe_triton import reference, runtime
from moe_triton.backends.protocols import ExpertsBackend
from moe_triton.backends.torch import experts_cpu
from moe_triton.backends.torch.cpu import CpuPolicy
from moe_triton.records import Dispatch, ExpertCall, ExpertParameters, ExpertSpec, ExpertWeight, Wanted
from tests.helpers.compare import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PARAMETERS = ExpertParameters._fields
INPUTS = ("hidden", "weights", *PARAMETERS)


@dataclass(frozen=True)
class Problem:
    """A call of the experts and the gradient of its output."""

    call: ExpertCall
    grad_out: Tensor
    known: dict[str, Tensor] = field(default_factory=dict)

    @property
    def expected(self) -> dict[str, Tensor]:
        """The reference's `out` and gradients by the name of their input, in float64; computed once."""
        if not self.known:
            self.known.update(expected_of(self.call, self.grad_out))
        return self.known

    @property
    def inputs(self) -> dict[str, Any]:
        """What is differentiable, without the biases and adapters that are not there."""
        return inputs_of(self.call)

    @property
    def parameters(self) -> list[str]:
        """The names of the parameters that are there."""
        return list(self.inputs)[2:]


def inputs_of(call: ExpertCall) -> dict[str, Any]:
    given = zip(INPUTS, (call.hidden, call.weights, *call.parameters), strict=True)
    return {name: x for name, x in given if x is not None}


def replaced(call: ExpertCall, **inputs: ExpertWeight | None) -> ExpertCall:
    """The call with other tensors, by the names of INPUTS."""
    rows = {name: inputs.pop(name) for name in ("hidden", "weights") if name in inputs}
    return replace(call, parameters=call.parameters._replace(**inputs), **rows)


def with_inputs(problem: Problem, **inputs: ExpertWeight | None) -> Problem:
    """The same expectations for other inputs: what a mutated run is compared with."""
    return replace(problem, call=replaced(problem.call, **inputs), known=dict(problem.expected))


def expected_of(call: ExpertCall, grad_out: Tensor) -> dict[str, Tensor]:
    """Output and gradients of the reference on the CPU in float64, of the stacked call."""
    leaves = {name: x.detach().cpu().double().requires_grad_() for name, x in inputs_of(call).items()}
    found = {f.name: getattr(call.dispatched, f.name).cpu() for f in fields(Dispatch)}
    wide = replaced(replace(call, dispatched=Dispatch(**found)), **leaves)
    out = reference.moe_experts(wide)
    gradients = torch.autograd.grad(
        out, list(leaves.values()), grad_out.cpu().double(), allow_unused=True, materialize_grads=True
    )
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


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
    ranks: tuple[int, int] | None = None,
    d: int = 24,
    n: int = 20,
    dtype: torch.dtype = torch.float32,
    weights_dtype: torch.dtype | None = None,
    capacity: int | None = None,
    device: str = DEVICE,
) -> Problem:
    """The inputs are rounded to `dtype` before the reference sees them in float64. `ranks`: of the adapters."""
    spec = spec or ExpertSpec()
    num_tokens, top_k = choices.shape
    width = 2 * n if spec.is_gated else n
    shapes = {"gate_up": (num_experts, width, d), "down": (num_experts, d, n)}
    if spec.is_transposed:
        shapes = {name: (experts, columns, rows) for name, (experts, rows, columns) in shapes.items()}
    if bias:
        shapes |= {"gate_up_bias": (num_experts, width), "down_bias": (num_experts, d)}
    if ranks is not None:
        up_rank, down_rank = ranks
        shapes |= {"gate_up_lora_a": (num_experts, up_rank, d), "gate_up_lora_b": (num_experts, width, up_rank)}
        shapes |= {"down_lora_a": (num_experts, down_rank, n), "down_lora_b": (num_experts, d, down_rank)}
        spec = replace(spec, gate_up_scaling=0.75, down_scaling=1.5)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, dtype=torch.float64)).to(device, dtype)

    parameters = {
        name: random(*shape, scale=1.0 if name.endswith(("bias", "lora_b")) else 2.0 / shape[-1] ** 0.5)
        for name, shape in shapes.items()
    }
    dispatch = reference.dispatch(choices, num_experts, capacity=capacity)
    weights = torch.rand(num_tokens, top_k, dtype=torch.float64) + 0.1
    call = ExpertCall(
        hidden=random(num_tokens, d),
        weights=weights.to(device, weights_dtype or reference.wide(dtype)),
        dispatched=Dispatch(**{f.name: getattr(dispatch, f.name).to(device) for f in fields(Dispatch)}),
        parameters=ExpertParameters(**parameters),
        spec=spec,
    )
    return Problem(call, random(num_tokens, d))


def as_sequences(call: ExpertCall) -> ExpertCall:
    """The same call with one tensor per expert; adapters are always stacked."""
    lists = (None if x is None else list(x.unbind(0)) for x in call.parameters[:4])
    return replace(call, parameters=ExpertParameters(*lists, *call.parameters[4:]))


def stacked(x: ExpertWeight | None) -> Tensor | None:
    return x if x is None or isinstance(x, Tensor) else torch.stack(list(x))


def triton_backend() -> ExpertsBackend:
    return runtime.experts_backend("triton", torch.device(DEVICE))


@torch.no_grad()
def run(
    problem: Problem,
    backend: ExpertsBackend | None = None,
    *,
    recompute: bool = False,
    sequence: bool = False,
    wanted: Sequence[bool] | None = None,
) -> dict[str, Tensor]:
    """`out` and the gradients that are wanted (all that have an input), by the triton backend or another one."""
    backend = backend or triton_backend()
    call = as_sequences(problem.call) if sequence else problem.call
    present = [name in problem.inputs for name in INPUTS]
    out, h = backend.experts_forward(call, not recompute)
    gradients = backend.experts_backward(call, problem.grad_out, h, Wanted(*(wanted or present)))
    if sequence:
        assert [isinstance(gradient, list) for gradient in gradients] == [False, False, *present[2:6], *(False,) * 4]
    found = {name: stacked(gradient) for name, gradient in zip(INPUTS, gradients, strict=True)}
    return {"out": out, **{name: gradient for name, gradient in found.items() if gradient is not None}}


def addends_for_weights(problem: Problem) -> Tensor:
    """The root of the sum of squares of the addends of the router weights' gradient <dO W2, A> + <dO, b2>: [T, K].

    A 16-bit A has an error of its own in each addend, so that the sum's error grows with this, however small the sum.
    """
    call, spec, dispatched = problem.call, problem.call.spec, problem.call.dispatched
    wide = {name: None if x is None else stacked(x).cpu().double() for name, x in call.parameters._asdict().items()}
    gate_up, down, gate_up_bias, down_bias = list(wide.values())[:4]
    if spec.is_transposed:
        gate_up, down = gate_up.mT, down.mT
    if call.gate_up_lora is not None:
        gate_up = gate_up + spec.gate_up_scaling * wide["gate_up_lora_b"] @ wide["gate_up_lora_a"]
    if call.down_lora is not None:
        down = down + spec.down_scaling * wide["down_lora_b"] @ wide["down_lora_a"]
    squares = torch.zeros(dispatched.position.numel(), dtype=torch.float64)
    offsets = dispatched.offsets.tolist()
    for e, (start, end) in enumerate(pairwise(offsets)):
        slots = dispatched.source[start:end].cpu().long()
        tokens = slots // dispatched.top_k
        h = call.hidden.cpu().double()[tokens] @ gate_up[e].T
        a = reference.activate(
            h if gate_up_bias is None else h + gate_up_bias[e],
            spec.activation,
            spec.is_concatenated,
            spec.limit,
            spec.alpha,
        )
        grad = problem.grad_out.cpu().double()[tokens]
        squares[slots] = (grad @ down[e] * a).square().sum(-1)
        if down_bias is not None:
            squares[slots] += (grad * down_bias[e]).square().sum(-1)
    return squares.sqrt().view(dispatched.position.shape)


def check(actual: dict[str, Tensor], problem: Problem, tolerance: float | None = None) -> None:
    """Every expected tensor is there, in its input's dtype, and close to the reference.

    Where the addends of the router weights' gradient cancel, its error is one of the addends.
    """
    assert actual.keys() == problem.expected.keys()
    for name, expected in problem.expected.items():
        given = problem.inputs["hidden" if name == "out" else name]
        assert actual[name].dtype == given.dtype, name
        scale = torch.maximum(expected.abs(), addends_for_weights(problem)) if name == "weights" else None
        assert_close(actual[name], expected, tolerance=tolerance, scale=scale)


def ragged_choices(sizes: Sequence[int], top_k: int = 2) -> Tensor:
    """Choices [T, K] in which expert e has sizes[e] slots, in random order, and -1 fills up the last token."""
    ids = torch.cat([torch.full((size,), e) for e, size in enumerate(sizes)])
    ids = torch.cat([ids, torch.full((-len(ids) % top_k,), -1)])
    return ids[torch.randperm(len(ids))].view(-1, top_k)


def with_policy(policy: CpuPolicy) -> Any:
    """Return the CPU's experts as a backend, with a policy other than this processor's."""
    return SimpleNamespace(
        experts_forward=partial(experts_cpu.experts_forward, policy=policy),
        experts_backward=partial(experts_cpu.experts_backward, policy=policy),
    )
