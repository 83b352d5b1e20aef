"""torch.func transforms, forward mode, meta tensors and FakeTensorMode: each works, or refuses in one sentence."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, linearize, vmap

from moe_triton import MoE, Router, dispatch, moe_mlp, renormalize, route
from tests.helpers.compare import assert_close

TOKENS, WIDTH, INNER, EXPERTS = 6, 8, 5, 4
BACKENDS = ["torch", "triton"]


def operands():
    x = torch.randn(TOKENS, WIDTH)
    gate = torch.randn(WIDTH, EXPERTS)
    return x, gate, torch.randn(EXPERTS, 2 * INNER, WIDTH), torch.randn(EXPERTS, WIDTH, INNER)


def loss(x, gate, up, down, backend="torch"):
    """Every differentiable operation, with drops."""
    routing = route(x @ gate, 2, backend=backend)
    plan = dispatch(routing.experts, EXPERTS, capacity=2, backend=backend)
    weights = renormalize(routing.weights, plan)
    kept = torch.where(plan.position >= 0, routing.experts, -1)
    out = moe_mlp(x, kept, weights, up, down, backend=backend)
    return out.square().sum() + routing.z_sum + routing.score_sums.square().sum()


def by_backward(*tensors, backend="torch"):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    loss(*leaves, backend=backend).backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("backend", BACKENDS)
def test_func_grad_gives_the_bits_of_backward(backend):
    tensors = operands()
    got = grad(lambda *t: loss(*t, backend=backend), argnums=(0, 1, 2, 3))(*tensors)
    for a, b in zip(got, by_backward(*tensors, backend=backend), strict=True):
        assert torch.equal(a, b)


def test_a_second_derivative_is_refused():
    """Eager backward records nothing for one; what was asked to is an error once it is differentiated."""
    leaves = [t.requires_grad_() for t in operands()]
    found = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    for gradient, wanted in zip(found, by_backward(*leaves), strict=True):
        assert gradient.requires_grad
        assert torch.equal(gradient, wanted)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        found[2].sum().backward()


def test_per_sample_gradients():
    parameters = operands()[1:]
    batch = torch.randn(TOKENS, 3, WIDTH)  # batched along dimension 1
    got = vmap(grad(loss, argnums=(0, 1, 2, 3)), in_dims=(1, None, None, None))(batch, *parameters)
    for sample in range(3):
        for a, b in zip(got, by_backward(batch[:, sample], *parameters), strict=True):
            assert torch.equal(a[sample], b)


def test_vmap_over_every_operand_and_jacrev():
    x, gate, up, down = operands()
    batched = [torch.stack([t, 2 * t]) for t in (x, gate, up, down)]
    got = vmap(loss)(*batched)
    assert torch.equal(got, torch.stack([loss(*(t[i] for t in batched)) for i in range(2)]))
    experts, weights = torch.randint(0, EXPERTS, (TOKENS, 2)), torch.rand(TOKENS, 2)
    jacobian = jacrev(lambda x: moe_mlp(x, experts, weights, up, down))(x)
    direction = torch.randn_like(x)
    step = 1e-4 * direction.double()
    exact = [t.double() for t in (weights, up, down)]
    ends = [moe_mlp(x.double() + sign * step, experts, *exact) for sign in (1, -1)]
    assert_close(torch.einsum("adtj,tj->ad", jacobian, direction), (ends[0] - ends[1]) / 2e-4, tolerance=1e-4)


def test_functional_call_of_a_layer():
    layer = MoE(WIDTH, INNER, EXPERTS, 2, capacity_factor=1.0, bias=True, aux_loss_weight=0.1)
    x = torch.randn(TOKENS, WIDTH)

    def total(parameters):
        out = functional_call(layer, parameters, (x,))
        return out.output.square().sum() + out.aux_loss

    got = grad(total)(dict(layer.named_parameters()))
    total(dict(layer.named_parameters())).backward()
    for name, parameter in layer.named_parameters():
        assert torch.equal(got[name], parameter.grad), name


def test_a_load_is_not_counted_under_a_transform():
    layer = MoE(WIDTH, INNER, EXPERTS, 2, router=Router(WIDTH, EXPERTS, 2, choice_bias=True))
    x = torch.randn(TOKENS, WIDTH)

    def squares(x):
        return layer(x).output.square().sum()

    for transformed, argument in ((grad(squares), x), (vmap(squares), x[:, None])):
        with pytest.raises(NotImplementedError, match=r"load: got a torch\.func transform in training"):
            transformed(argument)
    layer.eval()
    leaf = x.clone().requires_grad_()
    assert torch.equal(grad(squares)(x), torch.autograd.grad(squares(leaf), leaf)[0])


def test_forward_mode_is_refused_and_not_dropped():
    x, _, up, down = operands()
    experts, weights = torch.randint(0, EXPERTS, (TOKENS, 2)), torch.rand(TOKENS, 2)
    calls = {
        "moe_mlp": (lambda x, backend: moe_mlp(x, experts, weights, up, down, backend=backend)),
        "route": (lambda x, backend: route(x, 2, backend=backend).weights),
    }
    for name, call in calls.items():
        refused = pytest.raises(NotImplementedError, match=rf"^{name}: got forward-mode .* wanted reverse mode")
        for backend in BACKENDS:
            with refused:
                jvp(lambda x, call=call, backend=backend: call(x, backend), (x,), (x,))
            with refused, forward_ad.dual_level():
                call(forward_ad.make_dual(x, x), backend)
            with forward_ad.dual_level():  # without a tangent nothing is lost
                assert torch.equal(call(x, backend), call(x, backend))
    with pytest.raises(NotImplementedError, match="moe_mlp: got forward-mode"):
        linearize(lambda x: moe_mlp(x, experts, weights, up, down), x)


@pytest.mark.parametrize("outer", [grad, jacrev])
@pytest.mark.parametrize("operation", ["route", "moe_mlp"])
def test_second_derivatives_are_refused_and_not_zero(operation, outer):
    x, _, up, down = operands()
    experts, weights = torch.randint(0, EXPERTS, (TOKENS, 2)), torch.rand(TOKENS, 2)

    def first(x):
        out = route(x, 2).weights if operation == "route" else moe_mlp(x, experts, weights, up, down)
        return out.square().sum()

    with pytest.raises(NotImplementedError, match="got a second derivative, wanted the first only"):
        outer(lambda x: grad(first)(x).sum())(x)
    leaf = x.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="got a second derivative"):
        grad(first)(leaf).sum().backward()


def check_shapes(make):
    """A whole step on tensors without data; `make` gives one of a shape."""
    options = {"bias": True, "capacity_factor": 1.0, "shared_intermediate_size": 3, "aux_loss_weight": 0.1}
    layer = MoE(WIDTH, INNER, EXPERTS, 2, device=make(1).device, **options)
    x = make(3, TOKENS, WIDTH).requires_grad_()
    out = layer(x)
    assert out.output.shape == x.shape
    assert out.expert_counts.shape == (EXPERTS,)
    (out.output.sum() + out.aux_loss).backward()
    assert x.grad.shape == x.shape
    assert all(p.grad.shape == p.shape for p in layer.parameters())
    up, down = make(EXPERTS, 2 * INNER, WIDTH), make(EXPERTS, WIDTH, INNER)
    ids = make(TOKENS, 2).long()
    with torch.no_grad():
        assert moe_mlp(x[0], ids, make(TOKENS, 2), up, list(down)).shape == (TOKENS, WIDTH)
    plan = dispatch(ids, EXPERTS, capacity=1, priority="random")
    shapes = [tuple(getattr(plan, name).shape) for name in ("counts", "offsets", "source", "position")]
    assert shapes == [(EXPERTS,), (EXPERTS + 1,), (2 * TOKENS,), (TOKENS, 2)]
    assert grad(lambda x: moe_mlp(x, ids, make(TOKENS, 2), up, down).sum())(x[0].detach()).shape == (TOKENS, WIDTH)


def test_meta_tensors():
    check_shapes(lambda *shape: torch.empty(shape, device="meta"))
    with pytest.raises(RuntimeError, match="backend: got 'reference' for tensors on the meta device"):
        route(torch.empty(3, 4, device="meta"), 2, backend="reference")
    with pytest.raises(RuntimeError, match="the tensors are on meta"):
        route(torch.empty(3, 4, device="meta"), 2, backend="triton")


def test_fake_tensors():
    with FakeTensorMode():
        check_shapes(lambda *shape: torch.randn(shape))
        routing = route(torch.randn(TOKENS, EXPERTS), 2, backend="triton")  # as under torch.compile: no kernel runs
        assert routing.experts.dtype == torch.int32
        assert routing.weights.shape == (TOKENS, 2)
