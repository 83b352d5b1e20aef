"""Right results: every operation on the device against the float64 reference, on fresh random inputs, over poison."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import cycle, islice
from typing import TypeVar

import torch
from torch import Tensor

import moe_triton
from gpu_checks.setting import Setting, Skipped, poisoned, warp_specialized
from moe_triton import MoE, reference
from moe_triton.backends.triton import dispatch as dispatch_kernels
from moe_triton.backends.triton import routing as routing_kernels
from moe_triton.benchmarking.cases import SKEWS, Case, make_workload
from moe_triton.benchmarking.providers import PROVIDERS
from moe_triton.benchmarking.ways import Runnable
from moe_triton.records import ACTIVATIONS, GATED, LIMITED, UNGATED, ExpertSpec, RouterSpec
from moe_triton.routing import route_by_spec
from moe_triton_kernels.gluon.schedules import DERIVATIVES
from moe_triton_kernels.permutation import permute
from moe_triton_kernels.tiles import TileTables, tile_tables
from tests.helpers.compare import TOLERANCE, assert_close
from tests.helpers.problems import check, make_problem, random_choices, run

LAYOUTS = ((False, True), (True, True), (False, False), (True, False))  # (is_transposed, is_concatenated)
Part = tuple[int, int]  # (i, n): every n-th problem of a check from the i-th on, so that n processes share it
WHOLE: Part = (0, 1)
REPEATS = 20  # of a warp-specialized kernel
Item = TypeVar("Item")
NEAR = 1e-5  # choice keys nearer than this are a tie in fp32


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def share(items: Iterable[Item], part: Part) -> Iterator[Item]:
    first, step = part
    return islice(items, first, None, step)


# Routing and dispatch -------------------------------------------------------------------------------------------------

ROUTERS = (  # experts, options
    (8, RouterSpec(top_k=2, normalize=True)),
    (64, RouterSpec(top_k=8)),
    (128, RouterSpec(top_k=8, normalize=True)),
    (32, RouterSpec(top_k=4, score="topk_softmax")),
    (256, RouterSpec(top_k=8, score="sigmoid", normalize=True, scale=2.5, num_groups=8, top_groups=4)),
    (96, RouterSpec(top_k=6, num_groups=6, top_groups=2, group_score="top2_sum")),
    (1000, RouterSpec(top_k=16, normalize=True)),
    (5, RouterSpec(top_k=5, score="sigmoid")),
    (256, RouterSpec(top_k=6, score="sqrt_softplus", normalize=True, scale=1.5)),
    (48, RouterSpec(top_k=12, normalize=True, weightless=16)),
)


def routing(setting: Setting) -> str:
    """Choices, weights, sums and the gradient of the logits, with and without choice bias, noise and token mask."""
    count = 0
    for experts, spec in ROUTERS[:2] if setting.tiny else ROUTERS:
        for dtype in setting.dtypes:
            for extras in (False, True):
                with poisoned():
                    route_once(setting, experts, spec, dtype, extras)
                count += 1
    return f"{count} routers"


def route_once(setting: Setting, num_experts: int, spec: RouterSpec, dtype: torch.dtype, extras: bool) -> None:
    tokens, device = (7 if setting.tiny else 3001), setting.device
    logits = (2 * torch.randn(tokens, num_experts, device=device)).to(dtype)
    options: dict[str, Tensor] = {}
    if extras:
        options = {
            "choice_bias": 0.1 * torch.randn(num_experts, device=device),
            "noise": torch.randn(tokens, num_experts, device=device),
            "token_mask": torch.rand(tokens, device=device) > 0.2,
        }
    mine, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found = route_by_spec(mine, spec, **options, backend="triton")
    wanted = reference.route(
        exact, spec, **{name: x.double() if x.is_floating_point() else x for name, x in options.items()}
    )
    same = (found.experts == wanted.experts).all(1)
    if not bool(same.all()):  # two keys that fp32 cannot tell apart: either choice is right
        keys = reference.choice_keys(exact.detach(), spec, options.get("choice_bias"), options.get("noise"))
        gap = keys.gather(1, found.experts.long().clamp_min(0)) - keys.gather(1, wanted.experts.long().clamp_min(0))
        assert gap.abs().max().item() <= NEAR, f"E={num_experts} {spec}: an expert that is not among the best"
        assert same.float().mean().item() > 0.99, f"E={num_experts} {spec}: too many near-ties"
    else:
        assert torch.equal(found.counts, wanted.counts)
    assert_close(found.weights[same], wanted.weights[same])
    assert_close(found.score_sums, wanted.score_sums)
    assert_close(found.z_sum, wanted.z_sum)
    grads = torch.randn_like(found.weights), torch.randn_like(found.score_sums), torch.randn_like(found.z_sum)
    outputs = (found.weights, found.score_sums, found.z_sum), (wanted.weights, wanted.score_sums, wanted.z_sum)
    (grad,) = torch.autograd.grad(outputs[0], mine, grads)
    (expected,) = torch.autograd.grad(outputs[1], exact, tuple(g.double() for g in grads))
    assert_close(grad[same], expected[same], tolerance=max(TOLERANCE[dtype], 1e-4))


def dispatch(setting: Setting) -> str:
    """Counts, offsets, source and position, bit for bit, for every priority, capacity and group."""
    sizes = ((9, 2, 4),) if setting.tiny else ((1, 1, 1), (7, 3, 5), (4096, 8, 128), (5000, 4, 300), (20000, 2, 8))
    count = 0
    for tokens, top_k, num_experts in sizes:
        experts = torch.rand(tokens, num_experts, device=setting.device).argsort(1)[:, :top_k].int()
        experts = torch.where(torch.rand(tokens, top_k, device=setting.device) < 0.05, num_experts, experts)
        experts = torch.where(torch.rand(tokens, top_k, device=setting.device) < 0.05, -1, experts)
        weights = torch.rand(tokens, top_k, device=setting.device)
        for capacity in (None, 0, max(1, tokens * top_k // (2 * num_experts))):
            for priority in ("position", "choice", "probability"):
                for ids in (experts, experts.long()):
                    with poisoned():
                        dispatch_once(ids, num_experts, capacity, priority, weights)
                    count += 1
    return f"{count} dispatches"


def dispatch_once(experts: Tensor, num_experts: int, capacity: int | None, priority: str, weights: Tensor) -> None:
    groups = 5 if experts.shape[0] % 5 == 0 else 1
    options = {"capacity": capacity, "capacity_groups": groups, "priority": priority, "weights": weights}
    found = moe_triton.dispatch(experts, num_experts, **options, backend="triton")
    wanted = moe_triton.dispatch(experts, num_experts, **options, backend="reference")
    for field in ("counts", "offsets", "source", "position"):
        assert torch.equal(getattr(found, field), getattr(wanted, field)), f"{field} with {capacity=}, {priority=}"


def few_tokens(setting: Setting) -> str:
    """One launch for a few tokens, of the dispatch and of the choice too: the bits of the launches that it replaces."""
    count = 0
    for experts, spec in ROUTERS[:1] if setting.tiny else ROUTERS:
        for tokens in (3,) if setting.tiny else (1, 2, 7, 31):
            logits = torch.randn(tokens, experts, device=setting.device)
            with poisoned():
                chosen = routing_kernels.route_forward(logits, spec, None, None, None)
                whole = permute(chosen[0], experts)
                at_once = routing_kernels.route_and_dispatch(logits, spec, None, None, None)
                found = [dispatch_kernels.build_small_dispatch(chosen[0], experts)]
            assert all(map(torch.equal, at_once[0], chosen)), f"choice: E={experts} {spec} T={tokens}"
            if at_once[1] is not None:
                found.append(at_once[1])
            for small in found:
                assert small is not None
                fields = (small.counts, small.offsets, small.source, small.position)
                assert all(map(torch.equal, fields, whole)), f"dispatch: E={experts} {spec} T={tokens}"
                same_tables(small.tiles, tile_tables(small.offsets, chosen[0].numel()))
                count += 1
    return f"{count} launches"


def same_tables(found: TileTables, wanted: TileTables) -> None:
    assert torch.equal(found.num_tiles, wanted.num_tiles)
    for number, table, other in zip(wanted.num_tiles.tolist(), found.tables, wanted.tables, strict=True):
        assert torch.equal(table[:number], other[:number])


# The experts ----------------------------------------------------------------------------------------------------------


def specs(activations: tuple[str, ...]) -> Iterator[tuple[ExpertSpec, bool]]:
    """Every activation in every layout that it has, half of them with biases, and those with a limit with another."""
    biases = cycle((True, False, False, True, False, True, True))
    for activation in activations:
        for transposed, concatenated in LAYOUTS:
            if concatenated or activation in GATED:
                spec = ExpertSpec(activation=activation, is_transposed=transposed, is_concatenated=concatenated)
                yield spec, next(biases)
    for activation in filter(LIMITED.__contains__, activations):
        yield ExpertSpec(activation=activation, activation_limit=0.5, activation_alpha=1.2), next(biases)


def experts(setting: Setting, dtype: torch.dtype, activations: tuple[str, ...], part: Part) -> str:
    """Forward and all gradients for every activation and layout, rows per expert in turn of every bucket.

    Three of five have adapters, of ranks below, at and above those of a step.
    """
    count = 0
    for number, (spec, bias) in share(enumerate(specs(activations)), part):
        if setting.tiny and count == 2:
            break
        num_experts, top_k = (4, 2) if setting.tiny else (9, 3)
        tokens = 9 if setting.tiny else (100, 24, 8, 48)[number % 4] * (num_experts - 1) // top_k
        d, n = (24, 20) if setting.tiny else (192, 160)
        choices = random_choices(tokens, top_k, num_experts)
        ranks = (None, (16, 8), None, (64, 3), (80, 32))[number % 5]
        problem = make_problem(choices, num_experts, spec=spec, bias=bias, ranks=ranks, d=d, n=n, dtype=dtype)
        with poisoned():
            found = run(problem, recompute=number % 3 == 1, sequence=number % 3 == 2)
        check(found, problem, TOLERANCE[dtype])
        count += 1
    return f"{count} problems in {name_of(dtype)}"


def experts_gated(dtype: torch.dtype, part: Part = WHOLE) -> Callable[[Setting], str]:
    return lambda setting: experts(setting, dtype, GATED, part)


def experts_ungated(dtype: torch.dtype, part: Part = WHOLE) -> Callable[[Setting], str]:
    return lambda setting: experts(setting, dtype, UNGATED, part)


def buckets(dtype: torch.dtype, part: Part = WHOLE) -> Callable[[Setting], str]:
    """Every bucket of rows per expert with sizes that fill their tiles and sizes that do not; capacity drops too."""

    def run_buckets(setting: Setting) -> str:
        sizes = ((24, 20),) if setting.tiny else ((512, 384), (320, 200), (130, 70), (33, 17))
        rows = (3,) if setting.tiny else (5, 20, 50, 300)
        count = 0
        for number, (d, n) in share(enumerate(sizes), part):
            for rows_per_expert in rows:
                choices = random_choices(rows_per_expert * 8 // 2, 2, 8)
                is_odd = (number + count) % 2
                capacity = None if is_odd else max(1, rows_per_expert // 2)
                weights_dtype = dtype if is_odd else torch.float32
                problem = make_problem(
                    choices, 8, bias=False, d=d, n=n, dtype=dtype, weights_dtype=weights_dtype, capacity=capacity
                )
                with poisoned():
                    found = run(problem)
                check(found, problem, TOLERANCE[dtype])
                count += 1
        return f"{count} problems in {name_of(dtype)}"

    return run_buckets


def gluon(schedule: str, part: Part = WHOLE) -> Callable[[Setting], str]:
    """A warp-specialized schedule of every operation that has it, against the reference and beside the plain kernels.

    Every product accumulates in the same order, so the two differ by roundings at most. Runs that are repeated, or have
    one tensor per expert, do not differ by a bit.
    """

    def run_gluon(setting: Setting) -> str:
        if not setting.tiny and torch.cuda.get_device_capability(setting.device) != (9, 0):
            raise Skipped("the warp-specialized kernels are for compute capability 9.0")
        count = 0
        for dtype in (torch.float16,) if setting.tiny else (torch.bfloat16, torch.float16):
            for d, n, activation, transposed, apart in share(GLUON_SHAPES, (0, 6) if setting.tiny else part):
                d, n, tokens = (64, 16, 5) if setting.tiny else (d, n, 900)
                spec = ExpertSpec(activation=activation, is_transposed=transposed, is_concatenated=apart)
                num_experts = 3 if setting.tiny else 9
                choices = random_choices(tokens, 2, num_experts)
                problem = make_problem(choices, num_experts, spec=spec, d=d, n=n, dtype=dtype)
                with poisoned(), warp_specialized(schedule) as launched:
                    found = run(problem)
                    is_derived = any(activation == known.name for known in DERIVATIVES)
                    own = run(problem, sequence=True)
                    expected = 2 * (GLUON_RUNS + ["d_hidden"] * is_derived)
                    assert setting.tiny or sorted(launched) == sorted(expected), f"launched: {launched}"
                    assert all(torch.equal(own[name], found[name]) for name in found), f"own: {d=} {n=} {dtype}"
                    for _ in range(1 if setting.tiny else REPEATS):
                        again = run(problem)
                        assert all(torch.equal(again[name], found[name]) for name in found), f"bits: {d=} {n=} {dtype}"
                check(found, problem, TOLERANCE[dtype])
                plain = run(problem)
                for name in found:
                    assert_close(found[name], plain[name], tolerance=TOLERANCE[dtype])
                count += 1
        return f"{count} problems"

    return run_gluon


GLUON_RUNS = ["down", "down", "up"]  # d_rows is a down
GLUON_SHAPES = (  # d, n, activation, transposed, gate and up apart
    (512, 256, "swiglu", False, True), (256, 192, "gpt_oss", True, False), (1024, 64, "silu", False, True),
    (128, 1024, "geglu_tanh", True, True), (336, 208, "swiglu", False, False), (80, 176, "gelu_tanh", True, True),
)  # fmt: skip


def empty(setting: Setting) -> str:
    """No token, one token, no kept row, all rows with one expert, every choice skipped: zeros where nothing came."""
    cases = {
        "no token": torch.zeros(0, 2),
        "one token": torch.tensor([[3, 1]]),
        "one expert has all rows": torch.full((33, 1), 2),
        "every choice is skipped": torch.full((5, 2), -1),
        "ids past the end": torch.full((5, 2), 6),
    }
    dtypes = setting.dtypes[:1] if setting.tiny else setting.dtypes
    for dtype in dtypes:
        for name, choices in cases.items():
            problem = make_problem(choices.int(), 6, dtype=dtype)
            with poisoned():
                found = run(problem)
            check(found, problem, TOLERANCE[dtype])
            assert all(torch.isfinite(x).all() for x in found.values()), name
    return f"{len(cases) * len(dtypes)} problems"


def nan_logits(setting: Setting) -> str:
    """NaN and infinite logits: distinct experts in range, and every other token as if they were not there."""
    tokens, num_experts, top_k = (6, 8, 2) if setting.tiny else (4097, 128, 8)
    for dtype in setting.dtypes:
        logits = torch.randn(tokens, num_experts, device=setting.device, dtype=torch.float32).to(dtype)
        clean = logits.clone()
        logits[0], logits[1, ::2], logits[2], logits[3, 0] = float("nan"), float("nan"), float("inf"), float("-inf")
        with poisoned():
            found = moe_triton.route(logits, top_k, backend="triton")
            expected = moe_triton.route(clean, top_k, backend="triton")
        chosen = found.experts.sort(1).values
        assert bool((chosen[:, 1:] > chosen[:, :-1]).all()), "a token chose an expert twice"
        assert int(chosen.min()) >= 0
        assert int(chosen.max()) < num_experts
        assert torch.equal(found.experts[4:], expected.experts[4:])
        assert torch.equal(found.weights[4:], expected.weights[4:])
    return f"{len(setting.dtypes)} dtypes"


# The layer ------------------------------------------------------------------------------------------------------------


def layer(dtype: str) -> Callable[[Setting], str]:
    """The whole layer, router included, and every gradient against the reference, in every skew."""

    def run_layer(setting: Setting) -> str:
        if setting.tiny:
            cases = [Case(tokens=9, hidden=24, intermediate=16, experts=4, top_k=2, skew=skew) for skew in SKEWS[:2]]
        else:
            base = Case(tokens=4096, hidden=1024, intermediate=384, experts=64, top_k=8, dtype=dtype)
            cases = [replace(base, skew=skew) for skew in SKEWS]
            cases += [replace(base, tokens=tokens) for tokens in (1, 37)]
            cases += [replace(base, activation="gpt_oss", bias=True)]
            cases += [replace(base, hidden=1000, intermediate=200, experts=11, top_k=3)]
        worst = 0.0
        for case in cases:
            workload = make_workload(case, setting.device, seed=setting.seed)
            with poisoned():
                found = Runnable(PROVIDERS["triton"].build(workload), workload).check()
            assert found.problem is None, f"{case.title()}: {found.problem}"
            worst = max(worst, *found.errors.values())
        return f"{len(cases)} layers, largest error {worst:.1e}"

    return run_layer


def mutations(setting: Setting) -> str:
    """The comparisons above can fail: zeros, swapped experts and one dropped token are each found out."""
    problem = make_problem(random_choices(11, 2, 4), 4, dtype=torch.float32)
    actual = run(problem)
    check(actual, problem)
    dropped = actual["out"].clone()
    dropped[3] = 0.0
    wrong = {
        "zeros": {"out": torch.zeros_like(actual["out"])},
        "swapped experts": {"down": actual["down"][[1, 0, 2, 3]]},
        "a dropped token": {"out": dropped},
        "one NaN": {"hidden": actual["hidden"].index_fill(0, torch.tensor([2], device=setting.device), float("nan"))},
    }
    for name, change in wrong.items():
        try:
            check({**actual, **change}, problem)
        except AssertionError:
            continue
        raise AssertionError(f"{name}: nobody noticed")
    return f"{len(wrong)} mutations noticed"


SMALL = {  # T, d, n, E, dtype
    "bf16, tiles of 128 rows": (900, 256, 128, 2, torch.bfloat16),
    "bf16": (40, 72, 40, 5, torch.bfloat16),
    "fp16, tiles of 128 rows": (900, 256, 128, 2, torch.float16),
    "fp32": (40, 72, 40, 5, torch.float32),
}


def small(name: str) -> Callable[[Setting], str]:
    """A few launches of every kernel, those of 128 rows with wgmma and gathered rows among them."""

    def run_small(setting: Setting) -> str:
        tokens, d, n, num_experts, dtype = (6, 16, 16, 5, torch.float32) if setting.tiny else SMALL[name]
        problem = make_problem(random_choices(tokens, 2, num_experts), num_experts, d=d, n=n, dtype=dtype)
        check(run(problem), problem, TOLERANCE[dtype])
        block = MoE(d, n, num_experts, 2, backend="triton", device=setting.device, dtype=dtype, capacity_factor=1.0)
        x = torch.randn(tokens, d, device=setting.device, dtype=dtype, requires_grad=True)
        out = block(x)
        (out.output.square().sum() + out.aux_loss).backward()
        assert x.grad is not None
        assert torch.isfinite(x.grad).all()
        return "the experts, and the layer with capacity"

    return run_small


assert set(GATED + UNGATED) == set(ACTIVATIONS)
