"""The gate: as exact as its fp32 definition on every path, with less saved, and its gradient added where it is made."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad

from moe_triton import MoE, Router, reference
from moe_triton.autograd import gate as module
from moe_triton.autograd.gate import _gate_backward_op, _gate_op, run_gate
from moe_triton.backends.torch import gate as by_torch
from moe_triton.records import Routing
from tests.helpers.compare import assert_close, relative_rms

TOKENS, WIDTH, EXPERTS = 70, 96, 10
PATHS = ("cpu", "matrix unit", "triton")  # of the backends: torch's two, and ours in the interpreter
DTYPES = [
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]  # of hidden states and of weights


def emulated(a: Tensor, b: Tensor, dtype: torch.dtype, addend: Tensor | None = None) -> Tensor:
    """What the matrix unit computes: exact products of 16-bit operands, summed in fp32, rounded once."""
    assert a.dtype == b.dtype
    assert a.dtype in module.NARROW
    out = a.float() @ b.float()
    return (out if addend is None else out + addend).to(dtype)


@pytest.fixture(params=PATHS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "matrix unit":
        monkeypatch.setattr(by_torch, "has_wide_products", lambda device: True)
        monkeypatch.setattr(by_torch, "TORCH", by_torch.MatrixUnit(by_torch.split, emulated))
    return "triton" if request.param == "triton" else "torch"


def operands(dtypes: tuple[torch.dtype, torch.dtype], bias: bool = True) -> list[Tensor | None]:
    hidden = torch.randn(TOKENS, WIDTH).to(dtypes[0]).requires_grad_()
    weight = (torch.randn(EXPERTS, WIDTH) / WIDTH**0.5).to(dtypes[1]).requires_grad_()
    return [hidden, weight, torch.randn(EXPERTS).to(dtypes[1]).requires_grad_() if bias else None]


def results(call: Callable[..., Tensor], inputs: list[Tensor | None], grad_logits: Tensor) -> dict[str, Tensor]:
    logits = call(*inputs)
    given = {name: x for name, x in zip(("hidden", "weight", "bias"), inputs, strict=True) if x is not None}
    return {
        "logits": logits.detach(),
        **dict(
            zip(given, torch.autograd.grad(logits, list(given.values()), grad_logits.to(logits.dtype)), strict=True)
        ),
    }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_as_exact_as_an_fp32_gate(dtypes: tuple[torch.dtype, torch.dtype], bias: bool, backend: str) -> None:
    inputs = operands(dtypes, bias)
    grad_logits = torch.randn(TOKENS, EXPERTS) * torch.logspace(-6, 0, TOKENS)[:, None]  # of tokens that matter little
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    expected = results(reference.gate, exact, grad_logits)
    plain = results(reference.gate, inputs, grad_logits)
    found = results(lambda *x: run_gate(*x, backend)[0], inputs, grad_logits)
    assert found.keys() == plain.keys()
    for name, value in found.items():
        assert value.dtype == plain[name].dtype
        error, of_plain = relative_rms(value, expected[name]), relative_rms(plain[name], expected[name])
        assert error <= 1.05 * of_plain + 2e-7, name
        assert_close(value, expected[name], tolerance=max(2 * of_plain, 1e-6))


@pytest.mark.parametrize("dtype", module.NARROW, ids=str)
def test_nothing_of_an_fp32_weight_is_rounded_away(dtype: torch.dtype, backend: str) -> None:
    """A token that is 1 in one place gives that column of the weights, to the last of their 24 bits."""
    weight = (0.1 + torch.rand(EXPERTS, WIDTH)) * torch.logspace(-5, 2, WIDTH)  # fp16's parts hold all from 2**-23 on
    logits, _ = run_gate(torch.eye(WIDTH, dtype=dtype), weight, None, backend)
    assert torch.equal(logits, weight.T)
    assert not torch.equal(weight.to(dtype).float(), weight)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_saved_bytes(dtypes: tuple[torch.dtype, torch.dtype], backend: str) -> None:
    """The hidden states and the weights as they came, and nothing of 4 T d bytes."""
    hidden, weight, bias = operands(dtypes)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        run_gate(hidden, weight, bias, backend)
    assert sorted(x.data_ptr() for x in saved) == sorted([hidden.data_ptr(), weight.data_ptr()])
    wide = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: wide.append(x) or x, lambda x: x):
        reference.gate(hidden, weight, bias)
    assert sum(x.nbytes for x in wide) - sum(x.nbytes for x in saved) >= 2 * TOKENS * WIDTH


def test_a_layer_saves_no_fp32_hidden_states() -> None:
    layer = MoE(32, 16, 4, 2, dtype=torch.bfloat16, z_loss_weight=0.1)
    x = torch.randn(40, 32, dtype=torch.bfloat16, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        layer(x)
    assert not [tensor for tensor in saved if tensor.shape == x.shape and tensor.dtype == torch.float32]
    assert len({tensor.data_ptr() for tensor in saved if tensor.shape == x.shape}) == 1


class Normalized(nn.Module):
    """A router of other hidden states than the experts get."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Router(WIDTH, EXPERTS, 2, dtype=torch.bfloat16)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> Routing:
        return self.inner(2 * hidden_states, token_mask)


class Doubled(Router):
    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> Routing:
        return super().forward(2 * hidden_states, token_mask)


@pytest.mark.parametrize("kind", ["plain", "wrapped", "override", "hook"])
def test_the_experts_get_what_the_layer_was_given(kind: str) -> None:
    router = Normalized() if kind == "wrapped" else (Doubled if kind == "override" else Router)(WIDTH, EXPERTS, 2)
    if kind == "hook":
        router.register_forward_pre_hook(lambda module, arguments: (2 * arguments[0], *arguments[1:]))
    layer = MoE(WIDTH, 8, EXPERTS, 2, router=router.bfloat16(), dtype=torch.bfloat16)
    x = torch.randn(6, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    given = []
    layer.experts.register_forward_pre_hook(lambda module, arguments: given.append(arguments[0]))
    layer(x)
    assert torch.equal(given[0], x)
    assert (type(given[0].grad_fn).__name__ == "_GateBackward") == (kind == "plain")  # else of the layer's own input


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_the_gradient_of_what_follows_is_an_addend(dtypes: tuple[torch.dtype, torch.dtype], backend: str) -> None:
    hidden, weight, bias = operands(dtypes)
    grad_logits, grad_out = torch.randn(TOKENS, EXPERTS), torch.randn(TOKENS, WIDTH).to(dtypes[0])
    logits, passed = run_gate(hidden, weight, bias, backend)
    assert torch.equal(passed, hidden)
    (found,) = torch.autograd.grad((logits, passed), hidden, (grad_logits, grad_out))
    exact = grad_logits.double() @ weight.detach().double() + grad_out.double()
    rounded_twice = (grad_logits @ weight.detach().float()).to(dtypes[0]) + grad_out
    assert relative_rms(found, exact) <= relative_rms(rounded_twice, exact)
    for index, given, wanted in ((0, grad_logits, exact - grad_out), (1, grad_out, grad_out)):  # of one use alone
        (alone,) = torch.autograd.grad(run_gate(hidden, weight, bias, backend)[index], hidden, given)
        assert_close(alone, wanted, tolerance=2.0**-8)


def test_blocks_of_tokens_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, grad_logits = operands(DTYPES[1]), torch.randn(TOKENS, EXPERTS)
    grad_out = torch.randn(TOKENS, WIDTH).bfloat16()

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(run_gate(*inputs, "torch"), inputs, (grad_logits, grad_out))

    whole = gradients()
    monkeypatch.setattr(by_torch, "COPIED_ELEMENTS", 32 * WIDTH)  # blocks of 32, 32 and 6 tokens
    for in_blocks, at_once in zip(gradients(), whole, strict=True):
        assert in_blocks.dtype == at_once.dtype
        assert_close(in_blocks, at_once.double())


def test_only_the_gradients_that_are_needed(backend: str) -> None:
    inputs = operands((torch.bfloat16, torch.bfloat16))
    grad_logits = torch.randn(TOKENS, EXPERTS)
    everything = results(lambda *x: run_gate(*x, backend)[0], inputs, grad_logits)
    for index, name in enumerate(("hidden", "weight", "bias")):
        leaves = [x.detach() for x in inputs]
        leaves[index].requires_grad_()
        logits, _ = run_gate(*leaves, backend)
        assert torch.equal(torch.autograd.grad(logits, leaves[index], grad_logits)[0], everything[name])
    with torch.no_grad():
        assert torch.equal(run_gate(*inputs, backend)[0], everything["logits"])


def test_a_second_derivative_is_refused() -> None:
    hidden, weight, _ = operands((torch.bfloat16, torch.bfloat16))
    (first,) = torch.autograd.grad(run_gate(hidden, weight, None)[0].square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.float().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_hidden_states_keep_the_bits_of_the_definition(dtype: torch.dtype, backend: str) -> None:
    inputs = operands((dtype, dtype))
    grad_logits = torch.randn(TOKENS, EXPERTS, dtype=dtype)
    found = results(lambda *x: run_gate(*x, backend)[0], inputs, grad_logits)
    expected = results(reference.gate, inputs, grad_logits)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    logits, _ = run_gate(inputs[0].detach().bfloat16(), inputs[1].double(), None)
    assert logits.dtype == torch.float64


def router_and_input(**options: object) -> tuple[Router, Tensor]:
    return Router(WIDTH, EXPERTS, 2, **options), torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)


def test_a_router_under_autocast_with_fp32_weights() -> None:
    router, x = router_and_input()
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x)
    assert torch.equal(router.gate(x), reference.gate(x, router.weight))
    assert routing.weights.dtype == torch.float32
    (routing.weights[:, 0].sum() + routing.hidden.float().sum()).backward()
    assert x.grad.dtype == torch.bfloat16
    assert router.weight.grad.dtype == torch.float32


def test_jitter_changes_the_logits_and_not_what_follows() -> None:
    router, x = router_and_input(jitter=0.1, dtype=torch.bfloat16)
    routing = router(x)
    assert routing.hidden is x
    assert not torch.equal(router.gate(x), router.eval().gate(x))


@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1]], ids=str)
def test_compiled_it_gives_the_same_bits(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    torch.compiler.reset()
    options = {"router": Router(32, 4, 2, bias=True, dtype=dtypes[1]), "dtype": dtypes[0], "aux_loss_weight": 0.1}
    layer = MoE(32, 16, 4, 2, shared_intermediate_size=8, **options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    outcomes = []
    for call in (layer, compiled):
        for training in (True, False):
            x = torch.linspace(-2, 2, 640).sin().view(20, 32).to(dtypes[0]).requires_grad_(training)
            with torch.set_grad_enabled(training):
                out = call(x)
            found = [out.output, out.aux_loss]
            if training:
                leaves = [x, *layer.parameters()]
                found += torch.autograd.grad(out.output.float().square().sum() + out.aux_loss, leaves)
            outcomes.append(found)
    for eager, graph in zip(outcomes[:2], outcomes[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(eager, graph, strict=True))


def test_the_ops_are_registered_soundly() -> None:
    hidden, weight, bias = (x.detach() for x in operands(DTYPES[1]))
    torch.library.opcheck(_gate_op, (hidden, weight, bias, "torch"))
    for addend in (None, torch.randn_like(hidden)):
        arguments = (torch.randn(TOKENS, EXPERTS), addend, hidden, weight, torch.float32, "torch", [True, False, True])
        torch.library.opcheck(_gate_backward_op, arguments)


def test_without_data_and_under_transforms() -> None:
    layer = MoE(WIDTH, 8, EXPERTS, 2, dtype=torch.bfloat16, router=Router(WIDTH, EXPERTS, 2, bias=True))
    x = torch.randn(6, WIDTH, dtype=torch.bfloat16)

    def total(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, parameters, (x,)).output.float().square().sum()

    parameters = dict(layer.named_parameters())
    got = grad(total)(parameters)
    total(parameters).backward()
    for name, parameter in parameters.items():
        assert_close(got[name], parameter.grad.double())
    with FakeTensorMode():
        shapes_of(Router(WIDTH, EXPERTS, 2, bias=True), torch.randn(6, WIDTH, dtype=torch.bfloat16))
    shapes_of(
        Router(WIDTH, EXPERTS, 2, bias=True, device="meta"), torch.empty(6, WIDTH, dtype=torch.bfloat16, device="meta")
    )


def shapes_of(router: nn.Module, x: Tensor) -> None:
    routing = router(x.requires_grad_())
    (routing.weights.sum() + routing.hidden.float().sum()).backward()
    for leaf in (x, *router.parameters()):
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)
