"""Every kernel in the interpreter, over tensors beside protected memory: `python -m tests.helpers.guarded_kernels`.

Arguments: "end" or "start", where the protected page lies; "planted" runs a kernel with a fault instead of ours.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import triton
import triton.language as tl

from moe_triton import reference
from moe_triton.backends.torch import gate as by_torch
from moe_triton.backends.triton import gate
from moe_triton.backends.triton.routing import route_and_dispatch, route_backward, route_forward
from moe_triton.quantization import QuantizedWeight
from moe_triton.records import ExpertSpec, GateWanted, RouterSpec
from moe_triton_kernels import configs, mxfp8
from moe_triton_kernels.d_weight import d_bias, d_weight
from moe_triton_kernels.launch import Config
from moe_triton_kernels.permutation import permute
from moe_triton_kernels.small_dispatch import small_dispatch
from tests.helpers.compare import TOLERANCE, assert_close
from tests.helpers.guarded import guard_launches, guarded
from tests.helpers.interpreter import compute_in_bf16, spare_time
from tests.helpers.poison import poisoned
from tests.helpers.problems import check, make_problem, random_choices, replaced, run, with_inputs

CONFIG = Config(block_m=16, block_n=16, block_k=16, num_warps=4, num_stages=1)


@triton.jit
def planted_kernel(x, out, AT: tl.constexpr, SIZE: tl.constexpr):
    """Reads SIZE elements from AT on, however many there are."""
    tl.store(out, tl.sum(tl.load(x + AT + tl.arange(0, SIZE)), 0))


@contextmanager
def descriptors() -> Iterator[None]:
    heuristic = configs.heuristic
    configs.heuristic = lambda *key: replace(heuristic(*key), descriptors=True)
    try:
        yield
    finally:
        configs.heuristic = heuristic


def run_routing() -> None:
    for spec, num_experts, num_tokens in (
        (RouterSpec(top_k=3, normalize=True), 5, 37),
        (RouterSpec(top_k=2, score="sigmoid", num_groups=3, top_groups=2, group_score="top2_sum"), 18, 37),
        (RouterSpec(top_k=4, score="topk_softmax"), 60, 261),  # more than one program chooses for
    ):
        logits, noise = torch.randn(num_tokens, num_experts), torch.randn(num_tokens, num_experts)
        mask, bias = torch.rand(num_tokens) < 0.7, torch.randn(num_experts)
        outputs = route_forward(logits, spec, bias, noise, mask)
        expected = reference.route(logits, spec, choice_bias=bias, noise=noise, token_mask=mask)
        assert torch.equal(outputs[0], expected.experts)
        grads = torch.randn(num_tokens, spec.top_k), torch.randn(num_experts), torch.randn(())
        assert route_backward(*grads, logits, outputs[0], spec).isfinite().all()


def run_dispatch() -> None:
    experts = random_choices(70, 3, 9)
    for options in ({}, {"capacity": 11}, {"capacity": 5, "capacity_groups": 2, "by_choice": True}):
        found, expected = permute(experts, 9, **options), reference.dispatch(experts, 9, **options)
        for tensor, name in zip(found, ("counts", "offsets", "source", "position"), strict=True):
            assert torch.equal(tensor, getattr(expected, name)), name
    assert permute(experts, 9, capacity=7, keys=torch.rand(70, 3))[0].sum() == 210


def run_small_dispatch() -> None:
    experts = random_choices(70, 3, 9)
    found, expected = small_dispatch(experts, 9), reference.dispatch(experts, 9)
    for tensor, name in zip(found[:4], ("counts", "offsets", "source", "position"), strict=True):
        assert torch.equal(tensor, getattr(expected, name)), name


def run_small_route() -> None:
    spec, logits = RouterSpec(top_k=2, normalize=True), torch.randn(7, 5)
    found = route_and_dispatch(logits, spec, None, None, None, None)
    assert found[1] is not None
    assert torch.equal(found[0][0], reference.route(logits, spec).experts)


def run_codes() -> None:
    """Quantised projections decoded in the loop, and into memory where a block of scales spans gate and up."""
    for kind in ("mxfp4", "fp8"):
        problem = make_problem(random_choices(13, 2, 4), 4, dtype=torch.bfloat16, d=96, n=32)
        names = ("gate_up", "down")
        codes = {name: QuantizedWeight.quantize(problem.inputs[name], kind) for name in names}
        numbers = {name: weight.dequantize(torch.bfloat16) for name, weight in codes.items()}
        found, expected = (
            run(replace(problem, call=replaced(problem.call, **given), known={})) for given in (codes, numbers)
        )
        assert torch.equal(found["out"], expected["out"])


def run_fp8() -> None:
    problem = make_problem(random_choices(13, 2, 4), 4, spec=ExpertSpec(fp8=True), dtype=torch.bfloat16, d=96, n=40)
    for name, found in run(problem).items():
        assert found.isfinite().all(), name
    weight = problem.inputs["down"]
    for x in (weight, weight.mT):
        assert mxfp8.quantize_mx(x).codes.float().isfinite().all()


def run_experts(at_end: bool) -> None:
    for spec, dtype, d, n in (
        (ExpertSpec(is_transposed=True, is_concatenated=False), torch.float32, 7, 9),
        (ExpertSpec(activation="relu2", is_transposed=True), torch.float16, 16, 24),
        (ExpertSpec(), torch.bfloat16, 24, 24),
    ):
        ranks = (3, 16) if spec.is_transposed else None
        problem = make_problem(random_choices(13, 2, 4), 4, spec=spec, dtype=dtype, d=d, n=n, capacity=6, ranks=ranks)
        check(run(problem), problem, TOLERANCE[dtype])
    with descriptors():
        check(run(problem), problem, TOLERANCE[dtype])
    apart = {
        name: [guarded(one, at_end) for one in problem.inputs[name]]
        for name in ("gate_up", "down", "gate_up_bias", "down_bias")
    }  # read by addresses
    check(run(with_inputs(problem, **apart)), problem, TOLERANCE[dtype])


def run_pieces() -> None:
    offsets, source = torch.tensor([0, 50, 50, 83], dtype=torch.int32), torch.randperm(86).int()
    source[83:] = -1
    tokens, rows, weights = torch.randn(43, 20), torch.randn(86, 24), torch.rand(43, 2)
    for piece_rows in (9, 1000):
        options = {"top_k": 2, "piece_rows": piece_rows}
        for gather_left, operands in ((True, (tokens, rows)), (False, (rows, tokens))):
            d_weight(*operands, source, offsets, gather_left=gather_left, config=CONFIG, **options)
        d_bias(rows, source, offsets, **options)
        d_bias(tokens, source, offsets, router_weights=weights, **options)


def run_gate() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        hidden, weight = torch.randn(37, 20).bfloat16(), torch.randn(5, 20).to(dtype)
        grad_logits, addend = torch.randn(37, 5), torch.randn(37, 20).bfloat16()
        assert_close(gate.gate_forward(hidden, weight, None), reference.gate(hidden, weight))
        arguments = (grad_logits, addend, hidden, weight, GateWanted())
        for found, wanted in zip(gate.gate_backward(*arguments), by_torch.wide_backward(*arguments), strict=True):
            assert_close(found, wanted, tolerance=2.0**-8)


def main(side: str, planted: bool) -> None:
    at_end = {"end": True, "start": False}[side]
    compute_in_bf16()
    spare_time()
    guard_launches(at_end)
    if planted:
        planted_kernel[(1,)](torch.ones(5), torch.empty(1), AT=0 if at_end else -1, SIZE=8 if at_end else 4)
        return
    with poisoned():
        run_routing()
        run_dispatch()
        run_small_dispatch()
        run_small_route()
        run_codes()
        run_fp8()
        run_experts(at_end)
        run_pieces()
        run_gate()


if __name__ == "__main__":
    main(sys.argv[1], "planted" in sys.argv[2:])
