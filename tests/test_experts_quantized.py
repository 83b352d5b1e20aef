"""Quantised projections on every backend: the results of the dequantised ones, and what is kept for backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_triton import Lora, QuantizedWeight, moe_mlp
from moe_triton.backends.torch import decoded
from moe_triton.backends.torch.cpu import CpuPolicy
from tests.helpers.compare import TOLERANCE, assert_close
from tests.helpers.problems import random_choices

T, D, N, E, K = 21, 64, 32, 4, 2
FORMATS = {"mxfp4": {}, "nvfp4": {}, "fp8": {}, "int8": {"group": 32}, "int4": {}, "int4, zeros": {"symmetric": False}}
BACKENDS = ["reference", "torch", "loops", "device", pytest.param("triton", marks=pytest.mark.interpreter)]


def make(kind: str, *, dtype: torch.dtype = torch.float32, is_transposed: bool = False, n: int = N) -> dict[str, Any]:
    """Arguments of moe_mlp over quantised projections; no token chooses expert 1."""
    choices = random_choices(T, K, E)
    choices[choices == 1] = 3

    def projection(*shape: int) -> QuantizedWeight:
        dense = torch.randn(*shape) / shape[2] ** 0.5
        options = {**FORMATS[kind], "is_transposed": is_transposed}
        return QuantizedWeight.quantize(dense.mT if is_transposed else dense, kind.split(",")[0], **options)

    return {
        "hidden_states": torch.randn(T, D, dtype=dtype).requires_grad_(),
        "top_k_index": choices,
        "top_k_weights": torch.rand(T, K).requires_grad_(),
        "gate_up_proj": projection(E, 2 * n, D),
        "down_proj": projection(E, D, n),
        "gate_up_bias": torch.randn(E, 2 * n, dtype=dtype).requires_grad_(),
        "down_bias": torch.randn(E, D, dtype=dtype).requires_grad_(),
        "is_transposed": is_transposed,
    }


def with_lora(given: dict[str, Any], r: int = 3) -> dict[str, Any]:
    dtype, n = given["hidden_states"].dtype, given["down_proj"].shape[1 if given["is_transposed"] else 2]

    def lora(out: int, size_in: int) -> Lora:
        factors = [torch.randn(E, *shape, dtype=dtype) / 8 for shape in ((r, size_in), (out, r))]
        return Lora(*(factor.requires_grad_() for factor in factors), 2.0)

    return {**given, "gate_up_lora": lora(2 * n, D), "down_lora": lora(D, n)}


def leaves(given: dict[str, Any]) -> dict[str, Tensor]:
    """What has a gradient, by name."""
    adapters = {f"{name}.{part}": getattr(x, part) for name, x in given.items() if isinstance(x, Lora) for part in "ab"}
    return {name: x for name, x in (given | adapters).items() if isinstance(x, Tensor) and x.requires_grad}


def run(given: dict[str, Any], backend: str, **options: Any) -> dict[str, Tensor]:
    """The output and every gradient."""
    of = leaves(given)
    out = moe_mlp(**given, backend=backend, **options)
    grads = torch.autograd.grad(out, list(of.values()), torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype))
    return {"out": out.detach(), **dict(zip(of, grads, strict=True))}


def expected_of(given: dict[str, Any]) -> dict[str, Tensor]:
    """The reference's answers in float64 over the numbers that the projections stand for."""

    def wide(x: Any) -> Any:
        if isinstance(x, QuantizedWeight):
            return x.dequantize(torch.float64)
        if isinstance(x, Lora):
            return Lora(wide(x.a), wide(x.b), x.scaling)
        is_float = isinstance(x, Tensor) and x.is_floating_point()
        return x.detach().double().requires_grad_(x.requires_grad) if is_float else x

    return run({name: wide(x) for name, x in given.items()}, "reference")


def check(given: dict[str, Any], backend: str, **options: Any) -> None:
    found, expected = run(given, backend, **options), expected_of(given)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert_close(value, expected[name], tolerance=TOLERANCE[given["hidden_states"].dtype])


@pytest.fixture(params=["0", "1"], ids=["by torch", "by loops"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether compiled loops decode on the CPU."""
    if request.param == "1":
        pytest.importorskip("numba")
    monkeypatch.setenv("MOE_TRITON_CPU_LOOPS", request.param)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend; "loops" is the torch backend with them, "device" what it does where the tensors are not on a CPU."""
    if request.param == "loops":
        pytest.importorskip("numba")
        return "torch"
    monkeypatch.setenv("MOE_TRITON_CPU_LOOPS", "0")
    if request.param != "device":
        return request.param
    from moe_triton import runtime
    from moe_triton.backends.torch import experts_device

    monkeypatch.setattr(runtime, "experts_backend", lambda name, device, fp8: experts_device)
    return "torch"


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_results_of_the_dequantised_projections(kind: str, is_transposed: bool, backend: str) -> None:
    check(make(kind, is_transposed=is_transposed), backend, recompute=is_transposed)


@pytest.mark.parametrize("kind", ["mxfp4", "int4, zeros"])
@pytest.mark.parametrize("backend_name", ["reference", "torch"])
def test_adapters_over_a_quantised_base(kind: str, backend_name: str) -> None:
    check(with_lora(make(kind)), backend_name)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.usefixtures("loops")
def test_bf16(kind: str) -> None:
    check(make(kind, dtype=torch.bfloat16), "torch")


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_only_one_projection_is_quantised(kind: str, backend: str) -> None:
    given = make(kind)
    given["down_proj"] = given["down_proj"].dequantize(torch.float32).requires_grad_()
    check(given, backend)


@pytest.mark.parametrize("kind", FORMATS)
def test_decoded_in_parts(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large projections are: 128 outputs at a time."""
    monkeypatch.setenv("MOE_TRITON_CPU_LOOPS", "0")
    monkeypatch.setattr(decoded, "PART_BYTES", 1)
    sizes: list[int] = []
    original = QuantizedWeight.dequantize

    def spy(self: QuantizedWeight, *args: Any, **kwargs: Any) -> Tensor:
        found = original(self, *args, **kwargs)
        sizes.append(found.shape[0])
        return found

    given = make(kind, n=192)
    expected = expected_of(given)
    monkeypatch.setattr(QuantizedWeight, "dequantize", spy)
    found = run(given, "torch")
    assert set(sizes) == {128, 64}  # of 384 and 192 outputs; of d
    for name, value in found.items():
        assert_close(value, expected[name])


def test_nothing_of_the_size_of_the_base_is_kept() -> None:
    given = make("mxfp4")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        moe_mlp(**given, backend="torch")
    parts = {part.data_ptr() for name in ("gate_up_proj", "down_proj") for part in given[name].parts().values()}
    base = [x for x in kept if x.data_ptr() in parts]
    assert len(base) == 4  # codes and scales of both, as they were given
    others = sum(x.nbytes for x in kept if x.data_ptr() not in parts)
    rows = T * K
    assert others <= 4 * (T * D + rows * 2 * N + rows + E * (2 * N + D) + 4 * rows + 4 * E)


@pytest.mark.usefixtures("loops")
def test_the_same_bits_every_time() -> None:
    given = make("mxfp4")
    first, second = run(given, "torch"), run(given, "torch")
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        assert torch.equal(moe_mlp(**given, backend="torch"), first["out"])


@pytest.mark.parametrize("kind", ["nvfp4", "int8"])
def test_compiled(kind: str) -> None:
    given = make(kind)
    eager = run(given, "torch")
    compiled = torch.compile(moe_mlp, fullgraph=True, backend="aot_eager")
    out = compiled(**given, backend="torch")
    assert torch.equal(out, eager["out"])
    grad = torch.linspace(-1, 1, out.numel()).view_as(out)
    (dx,) = torch.autograd.grad(out, [given["hidden_states"]], grad)
    assert torch.equal(dx, eager["hidden_states"])


def test_under_autocast() -> None:
    given = make("fp8")
    with torch.autocast("cpu", torch.bfloat16):
        out = moe_mlp(**given, backend="torch")
    lower = {name: x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in given.items()}
    lower["top_k_weights"] = given["top_k_weights"]
    assert torch.equal(out, moe_mlp(**lower, backend="torch").float())


def test_what_does_not_fit() -> None:
    given = make("mxfp4")
    with pytest.raises(ValueError, match=r"gate_up_proj: got shape \[4, 64, 64\], wanted \[4, 64, 32\]"):
        moe_mlp(**{**given, "hidden_states": torch.randn(T, 32)})
    with pytest.raises(ValueError, match=r"down_proj: got shape \[4, 32, 64\], wanted \[4, 64, 32\]"):
        moe_mlp(**{**given, "down_proj": given["down_proj"].mT})
    with pytest.raises(ValueError, match=r"down_proj: got shape \[3, 64, 32\]"):
        moe_mlp(**{**given, "down_proj": given["down_proj"][:3]})


def test_no_tokens() -> None:
    given = make("mxfp4")
    empty = {"hidden_states": torch.zeros(0, D), "top_k_index": given["top_k_index"][:0]}
    out = moe_mlp(**{**given, **empty, "top_k_weights": torch.zeros(0, K)})
    assert out.shape == (0, D)


def test_small_products_of_a_policy() -> None:
    """oneDNN's products take parts of a result as well."""
    given = make("mxfp4")
    weight, x = given["gate_up_proj"], torch.randn(5, D)
    policy = CpuPolicy(shapes_recur=True, linear={torch.float32: lambda x, w, b, *_: x @ w.T + (0 if b is None else b)})
    for linear_policy in (policy, replace(policy, linear={})):
        out, bias = torch.full((5, 2 * N), float("nan")), given["gate_up_bias"].detach()[2]
        decoded.Decoded(weight, torch.float32).product(linear_policy, x, 2, bias, out)
        assert_close(out, x @ weight.dequantize(torch.float32, expert=2).T + bias)


def test_a_comparison_can_fail() -> None:
    given = make("int4")
    expected = expected_of(given)
    swapped = {**given, "down_proj": replace(given["down_proj"], codes=given["down_proj"].codes.flip(0))}
    with pytest.raises(AssertionError):
        assert_close(run(swapped, "torch")["out"], expected["out"])
