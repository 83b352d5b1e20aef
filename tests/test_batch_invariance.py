"""Batch invariance: a token's output bits depend on this token alone. Without it, what holds is in docs/numbers.md."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import moe_triton
from moe_triton import MoE, Router, runtime
from moe_triton.autograd.linear import linear
from moe_triton.backends.torch import experts_cpu, experts_device
from moe_triton.backends.torch.cpu import WHOLE, CpuPolicy, invariant_policy
from moe_triton.distributed import ExpertParallel
from moe_triton.records import ExpertSpec
from moe_triton.torch_internals import by_full_vectors
from tests.helpers.compare import assert_close
from tests.helpers.problems import make_problem, random_choices

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SIZES = (1, 2, 3, 7, 16, 31, 32, 33, 100, 255, 512)  # of batches, all out of the same 512 tokens
KINDS = {
    "default": {},
    # sizes that fill no vector, both biases, every dense part beside the experts
    "ragged": {
        "bias": True, "activation": "gpt_oss", "latent_size": 18, "shared_intermediate_size": 21, "shared_gate": True,
        "residual": True,
    },
    "ungated": {"activation": "gelu", "router": partial(Router, score="sigmoid", choice_bias=True, bias=True)},
}  # fmt: skip


def make_layer(kind: str, dtype: torch.dtype = torch.float32, *, d: int = 50, n: int = 37, **options) -> MoE:
    torch.manual_seed(5)
    options = {"batch_invariant": True, **KINDS[kind], **options}
    if "router" in options:
        options["router"] = options["router"](d, 7, 3, dtype=dtype)
    layer = MoE(d, n, 7, 3, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    return layer


def assert_invariant(layer: MoE, x: torch.Tensor, sizes: tuple[int, ...] = SIZES) -> torch.Tensor:
    """Equal bits in every size of batch, wherever in the batch, in a permuted one, with and without gradients."""
    with torch.no_grad():
        expected = layer(x).output
        for size in sizes:
            for start in {(len(x) - size) // 3, len(x) - size}:
                here = slice(start, start + size)
                assert torch.equal(layer(x[here]).output, expected[here]), (size, start)
        order = torch.randperm(len(x))
        assert torch.equal(layer(x[order]).output, expected[order])
    assert torch.equal(layer(x).output, expected)
    return expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_s_bits_do_not_depend_on_its_batch(kind, dtype):
    layer = make_layer(kind, dtype)
    assert_invariant(layer, torch.randn(512, 50, dtype=dtype))


@pytest.mark.parametrize("threads", [1, 2])
def test_wide_rows_that_threads_share(threads):
    """An elementwise operation of 2^15 elements is spread over threads, whose ranges end anywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_invariant(make_layer("default", d=32, n=700), torch.randn(192, 32), (1, 50, 191))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("kind", "dtype"), [("default", torch.float32), ("ragged", torch.bfloat16)], ids=str)
def test_the_triton_backend(kind, dtype):
    layer = make_layer(kind, dtype, backend="triton")
    assert_invariant(layer, torch.randn(12, 50, dtype=dtype), (1,))


def test_the_triton_backend_has_one_configuration(monkeypatch):
    """On GPUs configurations go by the rows per expert; in the interpreter they are all the same."""
    from moe_triton.backends.triton import experts, problem

    asked = []
    original = problem.choose_config

    def choose(op, **key):
        asked.append((op, key["num_rows"] / key["num_experts"] > experts.BUCKETS[-1]))
        return original(op, **key)

    for module in (experts, problem):
        monkeypatch.setattr(module, "choose_config", choose)
    monkeypatch.setattr(problem, "_PREPARED", {})
    layer = make_layer("ragged", backend="triton")
    with torch.no_grad():
        layer(torch.randn(3, 50))
        assert {op for op, _ in asked} == {"up_gated", "down"}
        assert all(is_last_bucket for _, is_last_bucket in asked)
        asked.clear()
        layer.batch_invariant = False
        layer(torch.randn(3, 50))
        assert asked
        assert not any(is_last_bucket for _, is_last_bucket in asked)


def device_rows(num_tokens: int, hidden: torch.Tensor, choices: torch.Tensor, spec: ExpertSpec, like) -> torch.Tensor:
    problem = make_problem(choices[:num_tokens], 4, spec=spec, d=24, n=64, dtype=torch.float32)
    call = problem.call.__class__(
        hidden=hidden[:num_tokens],
        weights=like.call.weights[:num_tokens],
        dispatched=problem.call.dispatched,
        parameters=like.call.parameters,
        spec=spec,
    )
    return experts_device.experts_forward(call, False)[0]


def test_devices_without_our_kernels():
    """Every product has as many rows as any other, however many an expert has."""
    spec = ExpertSpec(batch_invariant=True)
    choices, hidden = random_choices(150, 2, 4), torch.randn(150, 24)
    like = make_problem(choices, 4, spec=spec, d=24, n=64, dtype=torch.float32)
    expected = device_rows(150, hidden, choices, spec, like)
    for num_tokens in (1, 2, 40, 149):
        assert torch.equal(device_rows(num_tokens, hidden, choices, spec, like), expected[:num_tokens])
    plain = device_rows(150, hidden, choices, ExpertSpec(), like)
    assert_close(expected, plain.double(), tolerance=1e-5)


def test_the_context_is_the_option():
    layer, x = make_layer("ragged"), torch.randn(40, 50)
    expected = layer(x).output
    layer.batch_invariant = False
    with moe_triton.batch_invariant():
        assert torch.equal(layer(x).output, expected)
        with moe_triton.batch_invariant():
            pass
        assert runtime.is_batch_invariant()
    assert not runtime.is_batch_invariant()
    assert_close(layer(x).output, expected.double())


def test_the_functions_inside_the_context():
    x, index, weights = torch.randn(65, 20), random_choices(65, 2, 4), torch.rand(65, 2)
    up, down = torch.randn(4, 26, 20), torch.randn(4, 20, 13)
    lora = moe_triton.Lora(torch.randn(4, 3, 20), torch.randn(4, 26, 3), 0.5)
    quantised = moe_triton.QuantizedWeight.quantize(torch.randn(4, 20, 128), "int8")
    wide_up = torch.randn(4, 256, 20)
    for up_proj, down_proj, options in ((up, down, {"gate_up_lora": lora}), (wide_up, quantised, {})):
        run = partial(moe_triton.moe_mlp, gate_up_proj=up_proj, down_proj=down_proj, **options)
        with moe_triton.batch_invariant():
            expected = run(x, index, weights)
            for size in (1, 9, 33):
                assert torch.equal(run(x[-size:], index[-size:], weights[-size:]), expected[-size:])
        assert_close(run(x, index, weights), expected.double())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_without_it(kind):
    x = torch.randn(30, 50, dtype=torch.float64)
    grad = torch.randn(30, 50, dtype=torch.float64)
    found = []
    for invariant in (True, False):
        layer, leaf = make_layer(kind, torch.float64, batch_invariant=invariant), x.clone().requires_grad_()
        layer(leaf).output.backward(grad)
        found.append([leaf.grad, *(p.grad for p in layer.parameters())])
    for ours, plain in zip(*found, strict=True):
        assert_close(ours, plain, tolerance=1e-10)


def test_under_autocast():
    layer, x = make_layer("ragged"), torch.randn(64, 50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_invariant(layer, x, (1, 5, 63))


def test_compiled_gives_the_same_bits():
    layer, x = make_layer("ragged"), torch.randn(20, 50, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for function in (compiled, layer):
        x.grad = None
        out = function(x).output
        out.square().sum().backward()
        found.append((out, x.grad))
    assert all(map(torch.equal, *found))
    assert not runtime.is_batch_invariant()


def over_ranks(dtype: torch.dtype, options: dict) -> None:
    layer = make_layer("ragged", dtype, expert_parallel=ExpertParallel(**options))
    alone = make_layer("ragged", dtype)
    # the same parameters: those of the experts are a run of the whole
    first = layer.experts.local_experts
    with torch.no_grad():
        for (name, ours), whole in zip(layer.named_parameters(), alone.parameters(), strict=True):
            ours.copy_(whole[list(first)] if name.startswith("experts.") else whole)
    torch.manual_seed(9)
    x = torch.randn(90, 50, dtype=dtype)
    mine = x[:50] if torch.distributed.get_rank() == 0 else x[50:]
    with torch.no_grad():
        expected = alone(x).output
        out = layer(mine).output
    assert torch.equal(out, expected[:50] if torch.distributed.get_rank() == 0 else expected[50:])


@pytest.mark.parametrize("options", [{}, {"mode": "bounded"}, {"chunks": 2}], ids=str)
def test_the_number_of_ranks_changes_no_bit(two_ranks, options):
    for dtype in (torch.float32, torch.bfloat16):
        two_ranks.run(over_ranks, dtype, options)


def refused() -> None:
    layer = make_layer("default", expert_parallel=ExpertParallel(mode="allgather"))
    with pytest.raises(ValueError, match="mode: got 'allgather' with batch_invariant, wanted 'dropless'"):
        layer(torch.randn(3, 50))


def test_ranks_that_add_up_their_own_experts_are_refused(two_ranks):
    two_ranks.run(refused)


def test_without_it_a_library_may_choose_by_the_rows():
    """What the option is for: this processor's own policy multiplies other numbers of rows in other ways."""
    layer, x = make_layer("default", d=256, n=192, batch_invariant=False), torch.randn(512, 256)
    with torch.no_grad():
        whole, single = layer(x).output, torch.cat([layer(row).output for row in x[:40].split(1)])
    assert_close(single, whole[:40].double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_s_place_in_a_product_changes_no_bit(dtype):
    """The products alone: what invariance on this processor rests on. MKL's own fail this for 7 columns, unpadded."""
    policy = invariant_policy()
    for k, n in ((37, 7), (64, 64), (77, 130), (320, 192)):
        row, weight = torch.randn(k).to(dtype), torch.randn(n, k).to(dtype)
        for right in (weight, weight.T.contiguous().T):
            found = []
            for place in range(policy.fixed_rows):
                x = torch.randn(policy.fixed_rows, k).to(dtype)
                x[place] = row
                found.append(policy.product(x, right)[place])
            assert all(torch.equal(other, found[0]) for other in found), (k, n)


def test_full_vectors_are_the_plain_function():
    x = torch.randn(5, 3)
    torch.testing.assert_close(by_full_vectors(torch.sigmoid, x), torch.sigmoid(x))
    assert by_full_vectors(torch.sigmoid, torch.randn(0, 3)).shape == (0, 3)


def test_every_product_has_the_same_number_of_rows(monkeypatch):
    rows, product = [], CpuPolicy._product

    def seen(self, left, right, bias=None, out=None):
        rows.append(left.shape)
        return product(self, left, right, bias, out)

    monkeypatch.setattr(CpuPolicy, "_product", seen)
    with moe_triton.batch_invariant():
        linear(torch.randn(33, 8), torch.randn(4, 8), None)
        experts_cpu.linear(torch.randn(1, 8), torch.randn(4, 8), torch.randn(4))
    assert rows == [(invariant_policy().fixed_rows, WHOLE)] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity_factor": 1.0}, "capacity_factor: got 1.0 with batch_invariant=True, wanted None"),
        ({"eval_capacity_factor": 2.0}, "eval_capacity_factor: got 2.0 with batch_invariant=True"),
        ({"latent_size": 0}, "latent_size: got 0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MoE(8, 6, 4, 2, batch_invariant=True, **options)


def test_the_reference_is_refused():
    layer = MoE(8, 6, 4, 2, batch_invariant=True, backend="reference")
    with pytest.raises(ValueError, match="batch_invariant: got True with backend 'reference'"):
        layer(torch.randn(3, 8))
    with moe_triton.batch_invariant(), pytest.raises(ValueError, match="batch_invariant: got True"):
        moe_triton.moe_mlp(
            torch.randn(3, 8), torch.zeros(3, 1).int(), torch.ones(3, 1), torch.randn(2, 6, 8), torch.randn(2, 8, 3),
            backend="reference",
        )  # fmt: skip
