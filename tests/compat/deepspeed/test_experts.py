"""DeepSpeed's container of experts: fused and one by one, its marks, and what it keeps side by side."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

import moe_triton
from moe_triton.compat import opaque
from moe_triton.compat.deepspeed.experts import Experts
from tests.helpers.compare import assert_close
from tests.helpers.deepspeed_modules import EXPERTS, D, Gated, Mlp, N, sequential

E, K = 4, 2


def different(make, **options) -> Experts:
    experts = Experts(make(), E, "ep_size_1", "layer", **options)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return experts


def problem(capacity: int | None = None, dtype: torch.dtype = torch.float32):
    x = torch.randn(23, D, dtype=dtype)
    logits = torch.randn(23, E)
    logits[:, 2] = -50.0  # an idle expert
    routing = moe_triton.route(logits, K)
    return x, routing.weights, moe_triton.dispatch(routing.experts, E, capacity=capacity)


def by_hand(experts: Experts, x: Tensor, weights: Tensor, dispatched) -> Tensor:
    """Every expert on every token, in float64."""
    experts = copy.deepcopy(experts).double()
    out = torch.zeros(x.shape, dtype=torch.float64)
    offsets = dispatched.offsets.tolist()
    for e, expert in enumerate(experts.deepspeed_experts):
        y = expert(x.double())
        y = y[0] if isinstance(y, tuple) else y
        for slot in dispatched.source[offsets[e] : offsets[e + 1]].tolist():
            out[slot // K] += weights.double().reshape(-1)[slot] * y[slot // K]
    return out


def results(experts: Experts, x: Tensor, weights: Tensor, dispatched) -> list[Tensor]:
    x, weights = x.clone().requires_grad_(), weights.detach().clone().requires_grad_()
    experts.zero_grad()
    out = experts(x, weights, dispatched)
    (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return [out, x.grad, weights.grad, *(parameter.grad for parameter in experts.parameters())]


@pytest.mark.parametrize("capacity", [None, 5])
@pytest.mark.parametrize("name", EXPERTS)
def test_against_every_expert_on_every_token(name, capacity):
    experts = different(EXPERTS[name])
    x, weights, dispatched = problem(capacity)
    assert_close(experts(x, weights, dispatched), by_hand(experts, x, weights, dispatched))


@pytest.mark.parametrize("make", [Mlp, Gated, lambda: Gated(bias=True), sequential])
def test_fused_and_one_by_one_agree(make):
    experts = different(make)
    x, weights, dispatched = problem(capacity=6)
    assert experts.mlp is not None
    fused = results(experts, x, weights, dispatched)
    experts.mlp = None
    for ours, theirs in zip(fused, results(experts, x, weights, dispatched), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("name", EXPERTS)
def test_an_idle_expert_has_zero_gradients(name):
    """None gradients break the reduction over ranks (Colossal-AI #5426)."""
    experts = different(EXPERTS[name])
    results(experts, *problem())
    for parameter in experts.deepspeed_experts[2].parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    assert all(parameter.grad.any() for parameter in experts.deepspeed_experts[0].parameters())


@pytest.mark.parametrize("name", EXPERTS)
def test_no_tokens(name):
    experts = different(EXPERTS[name])
    dispatched = moe_triton.dispatch(torch.zeros(0, K, dtype=torch.int64), E)
    out = experts(torch.zeros(0, D, requires_grad=True), torch.zeros(0, K), dispatched)
    assert out.shape == (0, D)
    out.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in experts.parameters())


def test_other_modules_see_four_dimensions():
    seen = []

    class Looks(nn.Linear):
        def forward(self, x):
            seen.append(tuple(x.shape))
            return super().forward(x)

    experts = Experts(Looks(D, D), E)
    x, weights, dispatched = problem()
    experts(x, weights, dispatched)
    assert seen == [(1, 1, max(1, count), D) for count in dispatched.counts.tolist()]


def test_nothing_is_copied(monkeypatch):
    """The experts op gets the parameters themselves, and for a gated expert a view of both halves."""
    for make in (Mlp, lambda: Gated(bias=True)):
        experts = different(make)
        given = {}

        def spy(call, _given=given, _run=opaque.run_experts, **options):
            _given["parameters"] = [p for group in call.parameters if group is not None for p in group]
            return _run(call, **options)

        with monkeypatch.context() as patch:
            patch.setattr(opaque, "run_experts", spy)
            experts(*problem())
        storages = {p.untyped_storage().data_ptr() for p in experts.parameters()}
        assert all(p.untyped_storage().data_ptr() in storages for p in given["parameters"])


@pytest.mark.parametrize("how", ["new", "deepcopy", "half and back", "pickle", "assign"])
def test_gate_and_up_lie_side_by_side(how):
    experts = different(lambda: Gated(bias=True))
    if how == "deepcopy":
        experts = copy.deepcopy(experts)
    elif how == "half and back":
        experts = experts.half().float()
    elif how == "pickle":
        buffer = io.BytesIO()
        torch.save(experts, buffer)
        experts = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    elif how == "assign":
        experts.load_state_dict({k: v.clone() for k, v in experts.state_dict().items()}, assign=True)
    for number, expert in enumerate(experts.deepspeed_experts):
        for kind in ("weight", "bias"):
            gate, up = getattr(expert.gate_proj, kind), getattr(expert.up_proj, kind)
            assert up.data_ptr() == gate.data_ptr() + gate.nbytes
        for parameter in expert.parameters():
            marks = (parameter.allreduce, parameter.group_name, parameter.layer_name, parameter.expert_number)
            assert marks == (False, "ep_size_1", "layer", number)
    x, weights, dispatched = problem()
    assert_close(experts(x, weights, dispatched), by_hand(experts, x, weights, dispatched))


def test_an_optimizer_may_move_the_parameters():
    """A flat buffer, as ZeRO makes: in order the halves still adjoin; in another order they are joined by a copy."""
    x, weights, dispatched = problem()
    for order in (1, -1):
        experts = different(Gated)
        before = results(experts, x, weights, dispatched)
        parameters = list(experts.parameters())[::order]
        flat = torch.cat([p.data.reshape(-1) for p in parameters])
        start = 0
        for p in parameters:
            p.data = flat[start : start + p.numel()].view(p.shape)
            start += p.numel()
        experts.to("cpu")  # and `prepare` leaves it there
        assert all(p.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for p in parameters)
        for moved, found in zip(results(experts, x, weights, dispatched), before, strict=True):
            assert_close(moved, found)


def test_an_expert_that_is_changed_later_is_called():
    experts = different(Mlp)
    x, weights, dispatched = problem()
    calls = []
    experts.deepspeed_experts[0].up.register_forward_hook(lambda *_: calls.append(1))
    assert_close(experts(x, weights, dispatched), by_hand(experts, x, weights, dispatched))
    assert calls
    experts = different(sequential)
    for expert in experts.deepspeed_experts:
        expert[1] = nn.Tanh()
    assert_close(experts(x, weights, dispatched), by_hand(experts, x, weights, dispatched))


def test_frozen_parameters():
    experts = different(Gated)
    for expert in experts.deepspeed_experts:
        expert.gate_proj.weight.requires_grad_(False)
    results_before = results(experts, *problem())
    assert results_before[3] is None
    assert results_before[4] is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    experts = different(Gated).to(dtype)
    x, weights, dispatched = problem(dtype=dtype)
    out = experts(x, weights, dispatched)
    assert out.dtype == dtype
    assert_close(out, by_hand(experts, x, weights, dispatched))


def test_autocast():
    for make in (Mlp, EXPERTS["Tanh"]):
        experts = different(make)
        x, weights, dispatched = problem()
        with torch.autocast("cpu", torch.bfloat16):
            out = experts(x, weights, dispatched)
        assert out.dtype == torch.float32
        assert_close(out, by_hand(experts, x, weights, dispatched), tolerance=2e-2)


def test_compiled():
    experts = different(Gated)
    x, weights, dispatched = problem()
    compiled = torch.compile(experts, backend="aot_eager")
    assert_close(compiled(x, weights, dispatched), experts(x, weights, dispatched))


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"expert: got function, wanted a torch\.nn\.Module"):
        Experts(lambda x: x, 2)
    with pytest.raises(ValueError, match="num_local_experts: got 0"):
        Experts(Mlp(), 0)
    assert N != D  # so that a transposed weight cannot pass
