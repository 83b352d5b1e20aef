"""torch.compile sees no graph break and gives the same bits; the custom ops are registered soundly."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

import moe_triton
from moe_triton import MoE, Router
from moe_triton.autograd.experts import _experts_op, _fields
from moe_triton.autograd.flat import form_of, tensors_of
from moe_triton.autograd.routing import _route_op
from moe_triton.dispatch import _dispatch_op
from moe_triton.records import ExpertCall, ExpertParameters, ExpertSpec
from tests.helpers.compare import assert_close
from tests.layers.test_choices import RULES
from tests.layers.test_choices import make as make_layer_with


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> None:
    """Compilations of other tests in this process count towards dynamo's limit of 8 for a function."""
    torch.compiler.reset()


def run(layer, function, x):
    layer.zero_grad()
    x.grad = None
    torch.manual_seed(3)
    out = function(x)
    (out.output.square().sum() + out.aux_loss).backward()
    return [out.output, out.aux_loss, out.expert_counts, x.grad] + [p.grad for p in layer.parameters()]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "capacity_factor": 1.0, "renormalize": True, "drop_policy": "probability", "recompute": True},
        {"activation_limit": 0.3, "activation_alpha": 1.702, "shared_intermediate_size": 6},
        {"activation": "relu2", "shared_intermediate_size": 6, "residual": True, "drop_policy": "random"},
        {"router": Router(16, 8, 2, score="sigmoid", choice_bias=True, jitter=0.01, gumbel=True, backend="torch")},
    ],
    ids=str,
)
def test_fullgraph_gives_the_same_bits(options):
    layer = MoE(16, 12, 8, 2, aux_loss_weight=0.01, z_loss_weight=0.001, backend="torch", **options)
    if layer.experts.recompute:
        layer.experts.add_lora(3, 1.0)
        layer.experts.requires_grad_()
    x = torch.randn(2, 10, 16, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    eager = [t.clone() for t in run(layer, layer, x)]
    for a, b in zip(eager, run(layer, compiled, x), strict=True):
        assert torch.equal(a, b)
    if layer.router.load is not None:
        assert torch.equal(layer.router.load, 2 * eager[2])


def test_every_rule_of_choice_compiles_to_the_same_bits():
    """One graph with a layer of each: the noise of one would move if another drew more."""
    layers = [make_layer_with(rule) for rule in RULES]

    def run_all(x):
        outputs = [layer(x, **more) for layer, more in layers]
        return torch.stack([out.output for out in outputs]), torch.stack([out.aux_loss for out in outputs])

    x = torch.randn(3, 10, 8, requires_grad=True)
    found = []
    for call in (run_all, torch.compile(run_all, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        x.grad = None
        outputs, aux_losses = call(x)
        (outputs.square().sum() + aux_losses.sum()).backward()
        found.append([outputs, aux_losses, x.grad])
        for layer, _ in layers:
            found[-1] += [p.grad.clone() for p in layer.parameters()]
            found[-1] += [] if layer.router.load is None else [layer.router.load.clone()]
            layer.zero_grad()
            layer.router.load = None if layer.router.load is None else torch.zeros_like(layer.router.load)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_balance_accumulator_breaks_the_graph_and_says_the_same():
    layer = MoE(16, 12, 8, 2, aux_loss_weight=1.0, backend="torch")
    balance = moe_triton.BalanceAccumulator(layer)
    batches, found = torch.randn(2, 10, 16), []
    for call in (layer, torch.compile(layer, backend="aot_eager")):
        found.append(torch.stack([call(x).aux_loss for x in batches]))
        balance.step()
    assert torch.equal(*found)


def test_no_recompilation_when_only_the_token_count_changes():
    layer = MoE(16, 12, 8, 2, backend="torch")
    seen = []

    def count(graph, inputs):
        seen.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=count, dynamic=True)
    with torch.no_grad():
        for num_tokens in range(3, 40, 3):
            x = torch.randn(num_tokens, 16)
            assert torch.equal(compiled(x).output, layer(x).output)
    assert len(seen) == 1


def test_random_numbers_for_a_symbolic_number_of_tokens():
    router = Router(16, 8, 2, jitter=0.1, gumbel=True, backend="torch")
    layer = MoE(16, 12, 8, 2, router=router, capacity_factor=0.7, drop_policy="random", backend="torch")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_tokens in (9, 14):
        x = torch.randn(num_tokens, 16)
        outputs = []
        for call in (layer, compiled):
            torch.manual_seed(0)
            outputs.append(call(x).output)
        assert torch.equal(*outputs)


FACTORS = (1.5, 1.25, 1.0, 0.5, 0.3, 2.0, 1.1, 0.7, 0.9, 1.7, 3.0, 0.1)  # more than dynamo's limit of 8 recompilations


@pytest.mark.parametrize(("backend", "dynamic"), [("aot_eager", True), ("aot_eager", None), ("inductor", None)])
def test_a_capacity_factor_on_a_schedule_is_compiled_once_more_at_most(backend, dynamic):
    layer = MoE(16, 12, 8, 2, capacity_factor=1.5, min_capacity=0, backend="torch")
    seen = []

    def count(graph, inputs):
        seen.append(graph)
        return lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(layer, fullgraph=True, backend=count, dynamic=dynamic)
    for step, factor in enumerate(FACTORS):
        layer.capacity_factor = factor
        x = torch.randn(9 + step, 16, requires_grad=True)
        out, want = compiled(x), layer(x)
        assert torch.equal(out.expert_counts, want.expert_counts)
        assert_close(out.output, want.output)
        (got_grad,) = torch.autograd.grad(out.output.sum(), x)
        assert_close(got_grad, torch.autograd.grad(want.output.sum(), x)[0])
    assert len(seen) == 2  # for a constant factor, an attribute as any other at first, and for a symbolic one


def test_the_capacity_is_exact_where_the_factor_is_symbolic():
    torch.compiler.reset()
    factors = (1.1, 1.05, 0.1 + 0.2, 3, 1e19, 1e300, 5e-324)
    experts = torch.zeros(20, 1, dtype=torch.int32)

    def kept(factor, num_tokens):
        return moe_triton.dispatch(experts, 1, capacity=moe_triton.expert_capacity(num_tokens, 1, 1, factor)).offsets

    compiled = torch.compile(kept, fullgraph=True, backend="aot_eager", dynamic=True)
    for factor in factors:
        for num_tokens in (10, 17):
            assert torch.equal(compiled(factor, num_tokens), kept(factor, num_tokens)), (factor, num_tokens)
    assert compiled(1.1, 10)[-1] == 11  # eleven tenths of ten, not twelve


def test_a_varying_scale():
    torch.compiler.reset()
    seen = []

    def count(graph, inputs):
        seen.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    def weights(logits, scale):
        return moe_triton.route(logits, 2, scale=scale, backend="torch").weights

    compiled = torch.compile(weights, fullgraph=True, backend=count)
    for scale in FACTORS:
        logits = torch.randn(5, 8, requires_grad=True)
        got, want = compiled(logits, scale), weights(logits, scale)
        assert torch.equal(got, want)
        outer = torch.randn(5, 2)
        assert torch.equal(*(torch.autograd.grad(out, logits, outer)[0] for out in (got, want)))
    assert len(seen) == 2


OPTIONS = ["softmax", True, 1.0, 1, 1, "max", 0, 1]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend):
    logits, given = torch.randn(6, 8, requires_grad=True), torch.tensor([[1, 0], [-1, -1]] * 3, dtype=torch.int32)
    torch.library.opcheck(_route_op, (logits, None, None, None, given, 2, *OPTIONS, backend))
    torch.library.opcheck(_dispatch_op, (torch.randint(0, 8, (6, 2)), 8, 3, 1, False, None, backend))
    routing = moe_triton.route(logits.detach(), 2)
    plan = moe_triton.dispatch(routing.experts, 8)
    up, down = torch.randn(8, 12, 16), torch.randn(8, 16, 6)
    for stacked in (True, False):
        parameters = ExpertParameters(
            *(w.clone().requires_grad_() if stacked else [x.clone().requires_grad_() for x in w] for w in (up, down)),
            gate_up_lora_a=torch.randn(8, 3, 16, requires_grad=True),
            gate_up_lora_b=torch.randn(8, 12, 3, requires_grad=True),
        )
        call = ExpertCall(
            hidden=torch.randn(6, 16, requires_grad=True), weights=routing.weights.clone().requires_grad_(),
            dispatched=plan, parameters=parameters, spec=ExpertSpec(gate_up_scaling=0.5, activation_limit=2.0),
        )  # fmt: skip
        arguments = (tensors_of(call), form_of(parameters), *_fields(call.spec), backend, True)
        torch.library.opcheck(_experts_op, arguments)


def test_double_backward_is_refused_and_not_wrong():
    layer = MoE(8, 4, 4, 2)
    x = torch.randn(5, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).output.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
