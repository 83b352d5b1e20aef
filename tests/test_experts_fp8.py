"""fp8 products: the definition against sums of 128 by hand, every backend against the definition, and against bf16."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_triton import Lora, MoE, QuantizedWeight, dispatch, explain, moe_experts, moe_mlp, quantize
from moe_triton.distributed import ExpertParallel, apply_fsdp2, make_groups
from moe_triton.quantization import fp8
from moe_triton.quantization.fp8 import GROUP, rounded
from tests.helpers.compare import TOLERANCE, assert_close, relative_rms
from tests.helpers.problems import random_choices

T, D, N, E, K = 210, 144, 80, 4, 2  # 140 rows of an expert; no size is a multiple of 128
BACKENDS = ["reference", "torch", pytest.param("triton", marks=pytest.mark.interpreter)]
# An operand next to a tie may get the other code where sums have another order: rarely, and then 6% off.
ROUNDING = {torch.float32: 2e-3, torch.bfloat16: 5e-3, torch.float16: 2e-3}


def decibels(found: Tensor, expected: Tensor) -> float:
    """Signal to quantisation noise."""
    return -20 * math.log10(relative_rms(found, expected))


def make(
    dtype: torch.dtype = torch.float32, *, d: int = D, n: int = N, bias: bool = True, is_transposed: bool = False,
    activation: str = "swiglu", lora: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of moe_mlp; no token chooses expert 1."""
    choices = random_choices(T, K, E - 1)
    choices[choices == 1] = 3
    width = 2 * n if activation in ("swiglu", "gpt_oss") else n

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape)).to(dtype).requires_grad_()

    def projection(out: int, size_in: int) -> Tensor:
        shape = (E, size_in, out) if is_transposed else (E, out, size_in)
        return leaf(*shape, scale=size_in**-0.5)

    given: dict[str, Any] = {
        "hidden_states": leaf(T, d),
        "top_k_index": choices,
        "top_k_weights": (torch.rand(T, K) + 0.1).requires_grad_(),
        "gate_up_proj": projection(width, d),
        "down_proj": projection(d, n),
        "activation": activation,
        "is_transposed": is_transposed,
    }
    if bias:
        given |= {"gate_up_bias": leaf(E, width), "down_bias": leaf(E, d)}
    if lora:
        given["gate_up_lora"] = Lora(leaf(E, 3, d, scale=0.1), leaf(E, width, 3), 2.0)
        given["down_lora"] = Lora(leaf(E, 5, n, scale=0.1), leaf(E, d, 5), 0.5)
    return given


def leaves(given: dict[str, Any]) -> dict[str, Tensor]:
    """What has a gradient, by name."""
    adapters = {f"{name}.{part}": getattr(x, part) for name, x in given.items() if isinstance(x, Lora) for part in "ab"}
    return {name: x for name, x in (given | adapters).items() if isinstance(x, Tensor) and x.requires_grad}


def gradient_of(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)


def run(given: dict[str, Any], backend: str = "torch", *, fp8: bool | str = True, **options: Any) -> dict[str, Tensor]:
    """The output and every gradient."""
    of = leaves(given)
    out = moe_mlp(**given, backend=backend, fp8=fp8, **options)
    return {
        "out": out.detach(),
        **dict(zip(of, torch.autograd.grad(out, list(of.values()), gradient_of(out)), strict=True)),
    }


def check(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = ROUNDING[torch.float32]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert_close(value, expected[name], tolerance=tolerance)


# The definition -------------------------------------------------------------------------------------------------------


@dataclass
class Coded:
    """An operand [R, C] as a kernel sees it, contracted over C: codes, and a scale for each group."""

    codes: Tensor
    scales: Tensor
    rows: int

    def of_group(self, g: int) -> tuple[Tensor, Tensor]:
        """Codes [R, 128] and the scales of their rows [R]."""
        scales = self.scales[:, g].double().repeat_interleave(self.rows)[: len(self.codes)]
        return self.codes[:, g * GROUP : (g + 1) * GROUP].double(), scales


def coded(x: Tensor, rows: int = 1) -> Coded:
    return Coded(*fp8.quantize(x, rows, GROUP), rows)


def product(left: Coded, right: Coded) -> Tensor:
    """left right^T by partial sums of 128, each times its scales."""
    total = torch.zeros(len(left.codes), len(right.codes), dtype=torch.float64)
    for g in range(left.scales.shape[1]):
        (a, of_a), (b, of_b) = left.of_group(g), right.of_group(g)
        total += (a @ b.T) * of_a[:, None] * of_b
    return total


def by_hand(given: dict[str, Any]) -> dict[str, Tensor]:
    """One call with swiglu and without biases, formula by formula; only what is stored in fp32 is rounded to it."""
    x, w, up, down = (given[name].detach() for name in ("hidden_states", "top_k_weights", "gate_up_proj", "down_proj"))
    names = ("out", "hidden_states", "top_k_weights", "gate_up_proj", "down_proj")
    found = dict(zip(names, (torch.zeros_like(y, dtype=torch.float64) for y in (x, x, w, up, down)), strict=True))
    grad = gradient_of(x)
    for e in range(E):
        tokens, choices = (given["top_k_index"] == e).nonzero(as_tuple=True)
        factors = w[tokens, choices].double()[:, None]
        h = product(coded(x[tokens]), coded(up[e], GROUP)).float().double()
        gate, linear = h.chunk(2, 1)
        sigmoid = gate.sigmoid()
        a = gate * sigmoid * linear
        found["out"].index_add_(0, tokens, (factors * product(coded(a), coded(down[e], GROUP))).float().double())
        dy = grad[tokens]
        da = product(coded(dy), coded(down[e].T, GROUP))
        found["top_k_weights"][tokens, choices] = (da * a).sum(1)
        slope = sigmoid * (1 + gate * (1 - sigmoid))
        dh = (factors * torch.cat([da * linear * slope, da * gate * sigmoid], 1)).float()
        found["hidden_states"].index_add_(0, tokens, product(coded(dh), coded(up[e].T, GROUP)))
        found["gate_up_proj"][e] = product(coded(dh.T), coded(x[tokens].T))
        found["down_proj"][e] = product(coded(dy.T), coded((factors * a).float().T))
    return found


def test_the_definition_is_the_sum_of_partial_sums_times_their_scales() -> None:
    given = make(bias=False)
    found = run(given, "reference")
    for name, expected in by_hand(given).items():
        assert_close(found[name], expected, tolerance=1e-6)


def test_the_definition_of_mxfp8() -> None:
    """Groups of 32 along the contraction of every product, each decoded with torch's own E8M0."""
    given = make(bias=False, activation="relu2")
    found = run(given, "reference", fp8="mxfp8")
    x, w, up, down = (given[name].detach() for name in ("hidden_states", "top_k_weights", "gate_up_proj", "down_proj"))

    def mx(matrix: Tensor) -> Tensor:
        """A matrix that is contracted over its columns."""
        wide = torch.nn.functional.pad(matrix.float(), (0, -matrix.shape[1] % 32))
        codes, scales = fp8.quantize(wide, 1, 32, microscaled=True)
        powers = scales.view(torch.float8_e8m0fnu).double()
        return (codes.double() * powers.repeat_interleave(32, 1))[:, : matrix.shape[1]]

    out, grad = torch.zeros(T, D, dtype=torch.float64), gradient_of(x)
    for e in range(E):
        tokens, choices = (given["top_k_index"] == e).nonzero(as_tuple=True)
        factors = w[tokens, choices].double()[:, None]
        h = (mx(x[tokens]) @ mx(up[e]).T).float().double()
        a = h.relu().square()
        out.index_add_(0, tokens, (factors * (mx(a) @ mx(down[e]).T)).float().double())
        da = mx(grad[tokens]) @ mx(down[e].T).T
        dh = (factors * da * 2 * h.relu()).float()
        assert_close(found["gate_up_proj"][e], mx(dh.T) @ mx(x[tokens].T).T, tolerance=1e-6)
        assert_close(found["down_proj"][e], mx(grad[tokens].T) @ mx((factors * a).float().T).T, tolerance=1e-6)
    assert_close(found["out"], out, tolerance=1e-6)


# Every backend --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_the_definition(backend: str, dtype: torch.dtype) -> None:
    given = make(dtype)
    expected = run(given, "reference")
    found = run(given, backend)
    check(found, expected, ROUNDING[dtype])
    if dtype == torch.float32:  # most rows have no such operand
        errors = (found["out"] - expected["out"]).norm(dim=1) / expected["out"].norm(dim=1)
        assert errors.median() < TOLERANCE[dtype] / 10
    without = run(given, "torch", fp8=False)
    assert all(decibels(without[name], expected[name]) < 35 for name in expected if name != "down_bias")
    assert not expected["gate_up_proj"][1].any()  # of the expert without rows


@pytest.mark.parametrize(
    "options",
    [{"is_transposed": True}, {"activation": "gpt_oss"}, {"activation": "relu2", "bias": False}, {"lora": True}],
    ids=str,
)
def test_layouts_activations_adapters(options: dict[str, Any]) -> None:
    given = make(**options)
    if options.get("activation") == "gpt_oss":
        given |= {"is_concatenated": False, "activation_limit": 0.5}
    check(run(given), run(given, "reference"))


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_mxfp8(backend: str) -> None:
    """Emulated by every backend, and about as far from the exact products as blocks of 128 are."""
    given = make(bias=False)
    expected = run(given, "reference", fp8="mxfp8")
    check(run(given, backend, fp8="mxfp8"), expected)
    exact = run(given, "reference", fp8=False)
    assert 22 < decibels(expected["out"], exact["out"]) < 26
    assert not torch.equal(expected["out"], run(given, "reference")["out"])
    with pytest.raises(ValueError, match="fp8: got 'e5m2', wanted False, True or 'mxfp8'"):
        run(given, backend, fp8="e5m2")


def test_a_layer_in_mxfp8() -> None:
    layer = MoE(32, 16, 4, fp8="mxfp8", dtype=torch.bfloat16)
    assert layer.experts.spec.fp8_mode == "mxfp8"
    assert "fp8='mxfp8'" in repr(layer)
    assert "emulated" in str(explain(layer, tokens=8)[0])
    plain = MoE(32, 16, 4, dtype=torch.bfloat16)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(8, 32, dtype=torch.bfloat16)
    assert 20 < decibels(layer(x).output, plain(x).output) < 35


def test_adapters_in_bf16() -> None:
    given = make(torch.bfloat16, lora=True)
    check(run(given), run(given, "reference"), 2e-2)  # the narrow products are rounded to bf16


@pytest.mark.parametrize("options", [{"capacity": 70}, {"recompute": True}], ids=str)
def test_capacity_and_recompute(options: dict[str, Any]) -> None:
    given = make()
    check(run(given, **options), run(given, "reference", **options))


def test_recompute_changes_no_bit() -> None:
    given = make(torch.bfloat16)
    kept, computed_again = run(given), run(given, recompute=True)
    assert all(torch.equal(kept[name], computed_again[name]) for name in kept)


def test_one_tensor_per_expert() -> None:
    given = make()
    expected = run(given)
    lists = {name: [x.detach().requires_grad_() for x in given[name]] for name in ("gate_up_proj", "down_proj")}
    out = moe_mlp(**{**given, **lists}, backend="torch", fp8=True)
    assert torch.equal(out, expected["out"])
    for name, tensors in lists.items():
        gradients = torch.autograd.grad(out, tensors, gradient_of(out), retain_graph=True)
        assert torch.equal(torch.stack(gradients), expected[name])


def test_a_dispatch_that_exists() -> None:
    given = make()
    expected = moe_mlp(**given, backend="torch", fp8=True)
    x, index, weights = (given.pop(name) for name in ("hidden_states", "top_k_index", "top_k_weights"))
    out = moe_experts(x, weights, dispatch(index, E, backend="torch"), **given, backend="torch", fp8=True)
    assert torch.equal(out, expected)


def test_autocast() -> None:
    """As with everything cast to bf16 by hand."""
    given = make()
    halved = {name: x.detach().bfloat16() if name in leaves(given) else x for name, x in given.items()}
    expected = moe_mlp(**{**halved, "top_k_weights": given["top_k_weights"]}, backend="torch", fp8=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = moe_mlp(**given, backend="torch", fp8=True)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected.float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_token(backend: str, bad: float) -> None:
    given = make(d=256)
    with torch.no_grad():
        given["hidden_states"][5, 200] = bad
        out = moe_mlp(**given, backend=backend, fp8=True)
    expected = torch.zeros(T, dtype=torch.bool)
    expected[5] = True
    assert torch.equal(out.isnan().any(1), expected)
    assert torch.equal(out.isfinite().all(1), ~expected)


def test_no_token() -> None:
    given = make()
    for name in ("hidden_states", "top_k_index", "top_k_weights"):
        given[name] = given[name].detach()[:0].requires_grad_(given[name].is_floating_point())
    for name, value in run(given).items():
        assert not value.any(), name


def test_what_is_kept_for_backward() -> None:
    """The pre-activation, and no codes."""
    given, kept = make(torch.bfloat16), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        moe_mlp(**given, backend="torch", fp8=True)
    own = {x.data_ptr() for x in given.values() if isinstance(x, Tensor)}
    more = [x for x in kept if x.is_floating_point() and x.data_ptr() not in own]
    assert [(x.shape, x.dtype) for x in more] == [((T * K, 2 * N), torch.bfloat16)]


# Against bf16 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d", "n"), [(512, 256), (320, 200)])
def test_noise_of_every_product(d: int, n: int) -> None:
    """The bounds of torchao's tests of its grouped products in fp8: 27 dB for a product, 26 dB for its gradients."""
    x, weight, dy = torch.randn(d, d), torch.randn(n, d), torch.randn(d, n)
    in_blocks = rounded(weight, GROUP, GROUP)
    assert decibels(rounded(x, 1, GROUP) @ in_blocks.T, x @ weight.T) >= 27
    assert decibels(rounded(dy, 1, GROUP) @ in_blocks, dy @ weight) >= 26
    assert decibels(rounded(dy, GROUP, 1).T @ rounded(x, GROUP, 1), dy.T @ x) >= 26


@pytest.mark.parametrize(("d", "n"), [(512, 256), (320, 200)])
def test_noise_of_the_experts(d: int, n: int) -> None:
    """Three roundings lead to the output, and as many or more to a gradient: about 24 dB, as 1/3 of a product's."""
    given = make(torch.bfloat16, d=d, n=n, bias=False)
    found, plain = run(given), run(given, fp8=False)
    for name, value in found.items():
        assert decibels(value, plain[name]) >= 23, name


# Layers ---------------------------------------------------------------------------------------------------------------


def test_a_layer() -> None:
    layer = MoE(D, N, E, K, fp8=True, backend="torch")
    assert ", fp8" in repr(layer.experts)
    x = torch.randn(3, 20, D)
    layer(x).output.square().mean().backward()
    given = {name: getattr(layer.experts, name).detach() for name in ("gate_up_proj", "down_proj")}
    routing = layer.router(x.view(-1, D))
    expected = moe_mlp(x.view(-1, D), routing.experts, routing.weights, **given, backend="torch", fp8=True)
    assert torch.equal(layer(x).output.view(-1, D), expected)
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_torch_compile_gives_the_same_bits() -> None:
    layer, x = MoE(D, N, E, K, fp8=True, backend="torch"), torch.randn(20, D, requires_grad=True)

    def step(function: Any) -> list[Tensor]:
        out = function(x).output
        return [out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])]

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(step(layer), step(compiled), strict=True))


def test_batch_invariance() -> None:
    layer, x = MoE(D, N, E, K, fp8=True, batch_invariant=True, backend="torch"), torch.randn(100, D)
    with torch.no_grad():
        expected = layer(x).output
        for here in (slice(0, 1), slice(30, 63), slice(37, 100)):
            assert torch.equal(layer(x[here]).output, expected[here])


def test_training_falls() -> None:
    layer, x = MoE(D, N, E, K, fp8=True, dtype=torch.bfloat16), torch.randn(64, D, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (layer(x).output - x).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_refused(backend: str) -> None:
    given = make()
    wide = {name: x.detach().double() if name in leaves(given) else x for name, x in given.items()}
    if backend != "triton":
        with pytest.raises(
            TypeError, match=r"hidden_states: got dtype torch.float64 with fp8=True, wanted float32, flo"
        ):
            moe_mlp(**wide, backend=backend, fp8=True)
    frozen = QuantizedWeight.quantize(given["down_proj"].detach(), "fp8")
    with pytest.raises(TypeError, match="down_proj: got a QuantizedWeight with fp8=True, wanted a projection in a fl"):
        moe_mlp(**{**given, "down_proj": frozen}, backend=backend, fp8=True)


def test_quantize_refuses_a_layer_in_fp8() -> None:
    with pytest.raises(ValueError, match="quantize: got experts with fp8=True, wanted ones whose products are not"):
        quantize(MoE(D, N, E, K, fp8=True), "mxfp4")


# Over ranks -----------------------------------------------------------------------------------------------------------


def layer_step(parallel: ExpertParallel | None, x: Tensor, rank: int = 0) -> list[Tensor]:
    torch.manual_seed(3)
    layer = MoE(D, N, E, K, fp8=True, expert_parallel=parallel, backend="torch")
    x = x.clone().requires_grad_()
    out = layer(x).output
    (
        out * torch.linspace(-1, 1, 2 * out.numel()).view(2, *out.shape)[rank] if parallel else out * weights_of(out)
    ).sum().backward()
    return [
        out.detach(),
        x.grad,
        layer.router.weight.grad,
        layer.experts.gate_up_proj.grad,
        layer.experts.down_proj.grad,
    ]


def weights_of(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out.numel()).view(out.shape)


def tokens() -> Tensor:
    torch.manual_seed(5)
    return torch.randn(2, 90, D)


def on_a_rank() -> list[Any]:
    rank = torch.distributed.get_rank()
    parallel = ExpertParallel(make_groups(ep=2), loss_reduction="sum")
    return [x.numpy() for x in layer_step(parallel, tokens()[rank], rank)]


def test_expert_parallel(two_ranks: Any) -> None:
    out, dx, router, up, down = layer_step(None, tokens().flatten(0, 1))
    found = [[torch.from_numpy(x) for x in one] for one in two_ranks.run(on_a_rank)]
    for index, expected in enumerate((out, dx)):
        assert_close(torch.cat([one[index] for one in found]), expected, tolerance=TOLERANCE[torch.float32])
    assert_close(sum(one[2] for one in found), router)
    for index, expected in ((3, up), (4, down)):
        assert_close(torch.cat([one[index] for one in found]), expected, tolerance=ROUNDING[torch.float32])


def unequal() -> str:
    layer = MoE(D, N, E, K, fp8=torch.distributed.get_rank() == 0, expert_parallel=ExpertParallel(make_groups(ep=2)))
    try:
        layer(torch.randn(4, D))
    except Exception as error:
        return str(error)
    return "no error"


def test_ranks_that_differ(two_ranks: Any) -> None:
    assert all("fp8" in message for message in two_ranks.run(unequal))


def in_float64() -> str:
    layer = MoE(D, N, E, K, fp8=True, dtype=torch.float64, expert_parallel=ExpertParallel(make_groups(ep=2)))
    with pytest.raises(TypeError) as error:
        layer(torch.randn(4, D, dtype=torch.float64))
    return str(error.value)


def test_float64_over_ranks(two_ranks: Any) -> None:
    assert all("got dtype torch.float64 with fp8=True" in message for message in two_ranks.run(in_float64))


def sharded() -> list[Any]:
    groups = make_groups(ep=1)
    torch.manual_seed(3)
    layer = MoE(D, N, E, K, fp8=True, backend="torch")
    apply_fsdp2(layer, groups, rule="sum")
    out = layer(tokens()[torch.distributed.get_rank()]).output
    out.sum().backward()
    return [out.detach().numpy(), layer.experts.down_proj.grad.full_tensor().numpy()]


def test_fsdp2(two_ranks: Any) -> None:
    """Each rank rounds its own rows: the gradient is the sum of two, not that of all rows."""
    found = two_ranks.run(sharded)
    total = torch.zeros(E, D, N)
    for x, (out, gradient) in zip(tokens(), found, strict=True):
        torch.manual_seed(3)
        layer = MoE(D, N, E, K, fp8=True, backend="torch")
        expected = layer(x).output
        expected.sum().backward()
        assert torch.equal(torch.from_numpy(out), expected)
        total += layer.experts.down_proj.grad
        assert torch.equal(torch.from_numpy(gradient), torch.from_numpy(found[0][1]))
    assert_close(torch.from_numpy(found[0][1]), total)
