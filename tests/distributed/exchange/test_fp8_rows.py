"""Rows that travel in fp8: what one row loses, and that a layer computes with exactly the rows that arrive."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_triton import dispatch
from moe_triton.distributed import DeepEP, ExpertParallel, SymmetricMemory
from moe_triton.distributed.exchange.channel import Channel
from moe_triton.distributed.exchange.fp8_rows import dequantize_rows, pack_rows, quantize_rows, unpack_rows
from tests.helpers import parity
from tests.helpers.compare import assert_close, relative_rms
from tests.helpers.exchanges import imitated_deep_ep, imitated_symmetric_memory
from tests.helpers.faults import fresh_groups
from tests.helpers.parity import Case

FP8 = torch.float8_e4m3fn
HALF_STEP = 2.0**-4  # of e4m3, relative to a number
SMALLEST = 2.0**-10  # half of its smallest number


@given(
    rows=st.integers(0, 3), hidden_size=st.sampled_from([1, 7, 127, 128, 129, 300]), exponent=st.integers(-30, 30),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_no_number_is_off_by_more_than_half_a_step(rows, hidden_size, exponent, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, hidden_size, generator=generator, dtype=torch.float64) * 2.0**exponent).to(dtype)
    codes, scales = quantize_rows(x)
    assert (codes.dtype, codes.shape) == (FP8, x.shape)
    assert (scales.dtype, scales.shape) == (torch.float32, (rows, -(-hidden_size // 128)))
    message = pack_rows(x)
    assert (message.dtype, message.shape) == (torch.uint8, (rows, hidden_size + 4 * scales.shape[1]))
    found = unpack_rows(message, hidden_size, dtype)
    assert torch.equal(found, dequantize_rows(codes, scales, dtype))
    scale = scales.double().repeat_interleave(128, 1)[:, :hidden_size]
    bound = torch.maximum(HALF_STEP * x.double().abs(), SMALLEST * scale)
    rounding = 0 if dtype == torch.float64 else torch.finfo(dtype).eps * x.double().abs()
    assert ((found.double() - x.double()).abs() <= 1.0001 * bound + rounding).all()
    alone = torch.cat([pack_rows(row) for row in x.split(1)]) if rows else message
    assert torch.equal(alone, message), "a row depends on the others"


def test_special_rows():
    x = torch.zeros(4, 256)
    x[1, 3], x[2, 130], x[3] = torch.nan, torch.inf, 1e-44
    found = unpack_rows(pack_rows(x), 256, x.dtype)
    assert torch.equal(found[0], x[0])
    assert found[1, :128].isnan().all()
    assert torch.equal(found[1, 128:], x[1, 128:])
    assert found[2, 128:].isnan().all()
    assert torch.equal(found[2, :128], x[2, :128])
    assert (found[3] <= 2e-44).all()


EXCHANGES = {
    "dropless": (None, {}),
    "chunks": (None, {"chunks": 3, "deduplicate": False}),
    "bounded": (None, {"mode": "bounded", "max_tokens_per_rank": 9}),
    "allgather": (None, {"mode": "allgather"}),
    "two levels": (None, {"ranks_per_node": 2}),
    "deep_ep": ((DeepEP, imitated_deep_ep), {"max_tokens_per_rank": 9}),
    "symmetric": ((SymmetricMemory, imitated_symmetric_memory), {"max_tokens_per_rank": 9}),
}


def outcome(experts: torch.nn.Module, x: Tensor, ids: Tensor, grad: Tensor) -> list[Tensor]:
    weights = torch.full(ids.shape, 0.4, dtype=x.dtype).requires_grad_()
    x = x.clone().requires_grad_()
    out = experts(x, weights, dispatch(ids, parity.EXPERTS))
    out.backward(grad)
    return [out.detach(), x.grad, weights.grad, *(p.grad for p in experts.parameters())]


def check_exact(name: str) -> None:
    """Given the choices: what one process computes for the rows that codes and scales stand for, to rounding."""
    other, options = EXCHANGES[name]
    case = Case([6, 1, 0, 5])
    x, grad = parity.global_batch(case)
    ids = torch.rand(len(x), parity.EXPERTS).topk(parity.TOP_K).indices.int()
    groups = fresh_groups(ep=4)
    start = sum(case.tokens[: groups.rank])
    here = slice(start, start + case.tokens[groups.rank])
    rounded = unpack_rows(pack_rows(x), parity.HIDDEN, x.dtype)
    assert relative_rms(rounded, x) > 0.01

    def run() -> list[Tensor]:
        exchange = None if other is None else other[0]()
        parallel = ExpertParallel(groups, dispatch_dtype=FP8, exchange=exchange, **options)
        return outcome(parity.make_layer(case, parallel).experts, x[here], ids[here], grad[here])

    if other is None:
        found = run()
    else:
        with other[1]():
            found = run()
    wanted = outcome(parity.make_layer(case, None).experts, rounded, ids, grad)
    mine = ExpertParallel(groups).experts_of(parity.EXPERTS)
    assert_close(found[0], wanted[0][here], tolerance=1e-14)
    assert_close(found[1], wanted[1][here], tolerance=1e-14)
    for a, b in zip(found[3:], wanted[3:], strict=True):
        assert_close(a, b[mine.start : mine.stop], tolerance=1e-14)


@pytest.mark.parametrize("name", EXCHANGES)
def test_the_layer_computes_with_the_rows_that_arrive(four_ranks, name):
    four_ranks.run(check_exact, name)


def errors() -> tuple[float, float]:
    """Relative RMS errors of the outputs and of the hidden states' gradients against rows as they are, d = 256."""
    found, groups = [], fresh_groups(ep=2)
    for dtype in (None, FP8):
        torch.manual_seed(0)
        layer = parity.MoE(256, 64, 8, 2, expert_parallel=ExpertParallel(groups, dispatch_dtype=dtype))
        x = torch.randn(64, 256, generator=torch.Generator().manual_seed(1 + groups.rank)).requires_grad_()
        out = layer(x).output
        out.square().sum().backward()
        found.append((out.detach(), x.grad))
    return tuple(relative_rms(fp8, exact) for exact, fp8 in zip(*found, strict=True))


def test_the_error_is_that_of_three_bits(two_ranks):
    """The bounds that docs/distributed.md names."""
    for output, gradient in two_ranks.run(errors):
        assert 0.025 < output < 0.05
        assert 0.025 < gradient < 0.05


def message_types() -> dict[str, tuple[torch.dtype, int]]:
    seen = {}
    original = Channel.all_to_all

    def all_to_all(self, out, rows, received, sent, phase):
        assert out.dtype == rows.dtype
        seen[phase] = (rows.dtype, rows[0].numel() if len(rows) else 0)
        return original(self, out, rows, received, sent, phase)

    layer = parity.MoE(
        200, 8, 4, 2, dtype=torch.bfloat16, expert_parallel=ExpertParallel(fresh_groups(ep=2), dispatch_dtype=FP8)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Channel, "all_to_all", all_to_all)
        layer(torch.randn(8, 200, dtype=torch.bfloat16, requires_grad=True)).output.float().sum().backward()
    return seen


def test_only_the_rows_of_forward_are_in_fp8(two_ranks):
    for seen in two_ranks.run(message_types):
        dtype, width = seen["rows of chunk 0"]
        assert dtype == torch.uint8
        assert 200 + 2 * 4 <= width < 250, "half of what bf16 would take"
        for phase in ("results of chunk 0", "output gradients of chunk 0", "row gradients of chunk 0"):
            dtype, width = seen[phase]
            assert dtype == torch.bfloat16
            assert 200 <= width < 225
