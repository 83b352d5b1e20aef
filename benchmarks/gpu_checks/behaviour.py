"""How results come about: the same bits every time, no host sync, one graph, no recompilation, beyond int32."""

from __future__ import annotations

import contextlib
import random
import time
from dataclasses import replace

import torch
from torch import Tensor

import moe_triton
from gpu_checks.setting import Setting, compilations, poisoned, warp_specialized
from moe_triton import MoE, reference
from moe_triton.records import ExpertCall, ExpertParameters, ExpertSpec
from tests.helpers.compare import TOLERANCE, assert_close
from tests.helpers.problems import Problem, inputs_of, make_problem, random_choices, replaced, run

REPEATS = 20
STRESS_S = 60.0
JUDGED = 5  # of so many shapes under stress one is held against float64: the others must repeat their bits
# how the experts' matrices lie: (options of the spec, one tensor per expert, warp-specialized schedule)
FORMS: tuple[tuple[dict[str, bool], bool, str | None], ...] = (
    ({}, False, None),
    ({}, False, "cooperative"),
    ({}, False, "ping_pong"),
    ({"is_transposed": True}, False, None),
    ({"is_concatenated": False}, False, None),
    ({"is_transposed": True}, False, "cooperative"),
    ({}, True, None),
    ({"is_transposed": True, "is_concatenated": False}, True, None),
)


def make_layer(setting: Setting, dtype: torch.dtype | None = None, **options) -> MoE:
    sizes = (16, 16, 3, 2) if setting.tiny else (1024, 512, 32, 4)
    dtype = dtype or (torch.float32 if setting.tiny else torch.bfloat16)
    torch.manual_seed(torch.initial_seed())
    return MoE(*sizes, backend="triton", device=setting.device, dtype=dtype, aux_loss_weight=0.01, **options)


def make_input(setting: Setting, layer: MoE, tokens: int | None = None) -> Tensor:
    tokens = (9 if setting.tiny else 2048) if tokens is None else tokens
    x = torch.randn(tokens, layer.hidden_size, device=setting.device, dtype=layer.experts.gate_up_proj.dtype)
    return x.requires_grad_()


def forward_backward(layer, x: Tensor, grad_out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Output, auxiliary loss and the gradients of x and of every parameter; nothing accumulates."""
    out = layer(x)
    grads = torch.autograd.grad((out.output, out.aux_loss), leaves, (grad_out, torch.ones_like(out.aux_loss)))
    return [out.output.detach(), out.aux_loss.detach(), *grads]


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# The same bits --------------------------------------------------------------------------------------------------------


def determinism(setting: Setting) -> str:
    """The layer forward and backward again and again, while the memory it runs in changes: every bit the same."""
    repeats = 1 if setting.tiny else REPEATS
    for options in ({}, {"bias": True, "capacity_factor": 1.0}, {"recompute": True, "activation": "relu2"}):
        layer = make_layer(setting, **options)
        x = make_input(setting, layer)
        grad_out, leaves = torch.randn_like(x), [x, *layer.parameters()]
        first = forward_backward(layer, x, grad_out, leaves)
        for number in range(repeats):
            # shifts what is allocated where
            held = torch.full((number * 4097 + 1,), float("nan"), device=setting.device)
            with poisoned() if number % 2 else contextlib.nullcontext():
                assert same_bits(first, forward_backward(layer, x, grad_out, leaves)), f"{options}: repeat {number}"
            del held
    return f"3 layers, {repeats} repeats each"


def stress(setting: Setting) -> str:
    """The main loops under load: random shapes and forms at full occupancy, each repeated: the same and the right bits.

    A copy that the matrix unit reads too early shows as a difference between two runs, or to the reference. Everything
    is compared where it lies.
    """
    end = time.perf_counter() + min(STRESS_S, 0.8 * setting.seconds)
    rng = random.Random(setting.seed)
    shapes = judged = repeats = 0
    while shapes == 0 or (not setting.tiny and time.perf_counter() < end):
        options, sequence, schedule = FORMS[shapes % len(FORMS)]
        problem = stress_problem(setting, rng, ExpertSpec(**options))
        with warp_specialized(schedule):
            first = run_problem(problem, sequence)
            for _ in range(2 if setting.tiny else REPEATS):
                assert same_bits(first, run_problem(problem, sequence)), f"bits: {title(problem)} {options} {schedule}"
                repeats += 1
        if shapes % JUDGED == 0:
            judge(first, problem)
            judged += 1
        shapes += 1
    return f"{shapes} shapes, {repeats} repeats, {judged} shapes against float64"


def stress_problem(setting: Setting, rng: random.Random, spec: ExpertSpec) -> Problem:
    """Random sizes, at which the GPU is full and float64 copies fit beside everything else; uneven choices."""
    dtype = rng.choice(setting.dtypes[1:])
    num_experts = 4 if setting.tiny else rng.choice((8, 16, 64, 128))
    top_k = rng.choice((1, 2)) if setting.tiny else rng.choice((1, 2, 4, 8))
    d = 32 if setting.tiny else 64 * rng.randint(2, 64)
    n = 16 if setting.tiny else 64 * rng.randint(1, 12)
    tokens = rng.randint(5, 9) if setting.tiny else rng.randint(64, 16384)
    hidden, choices, weights, gate_up, down, grad_out = experts_arguments(
        setting, tokens, d, n, num_experts, top_k, dtype
    )
    if spec.is_transposed:
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    dispatched = moe_triton.dispatch(choices, num_experts, backend="triton")
    parameters = ExpertParameters(gate_up, down)
    call = ExpertCall(hidden=hidden, weights=weights, dispatched=dispatched, parameters=parameters, spec=spec)
    return Problem(call, grad_out)


def title(problem: Problem) -> str:
    call = problem.call
    return (
        f"T={call.hidden.shape[0]} d={call.hidden_size} n={call.intermediate_size} E={call.num_experts} "
        f"K={call.dispatched.top_k} {call.hidden.dtype}"
    )


def run_problem(problem: Problem, sequence: bool) -> list[Tensor]:
    """Output and gradients, by the triton backend."""
    return list(run(problem, sequence=sequence).values())


def judge(found: list[Tensor], problem: Problem) -> None:
    """Against the reference in float64, on the device."""
    leaves = {name: x.double().requires_grad_() for name, x in inputs_of(problem.call).items()}
    out = reference.moe_experts(replaced(problem.call, **leaves))
    wanted = [out.detach(), *torch.autograd.grad(out, list(leaves.values()), problem.grad_out.double())]
    for mine, expected in zip(found, wanted, strict=True):
        assert_close(mine, expected, tolerance=TOLERANCE[problem.call.hidden.dtype])


def experts_arguments(
    setting: Setting, tokens: int, d: int, n: int, num_experts: int, top_k: int, dtype: torch.dtype
) -> list[Tensor]:
    """Hidden states, choices, weights, the two projections and a gradient; the choices are uneven on purpose."""
    device = setting.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    popularity = torch.rand(num_experts, device=device)
    choices = (torch.rand(tokens, num_experts, device=device) * popularity).argsort(1)[:, -top_k:].int()
    return [
        normal(tokens, d),
        choices,
        torch.rand(tokens, top_k, device=device) + 0.1,
        normal(num_experts, 2 * n, d).mul_(d**-0.5),
        normal(num_experts, d, n).mul_(n**-0.5),
        normal(tokens, d),
    ]


def run_experts(arguments: list[Tensor], backend: str) -> list[Tensor]:
    hidden, choices, weights, gate_up, down, grad_out = arguments
    leaves = [x.detach().requires_grad_() for x in (hidden, weights, gate_up, down)]
    out = moe_triton.moe_mlp(leaves[0], choices, *leaves[1:], backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


# Nothing waits, nothing is compiled again -----------------------------------------------------------------------------


def no_host_sync(setting: Setting) -> str:
    """Forward and backward under torch.cuda.set_sync_debug_mode("error"): whatever waits for the device raises."""
    setting.need_gpu()
    layers = ({}, {"bias": True, "capacity_factor": 1.25, "drop_policy": "probability"}, {"recompute": True})
    for options in layers:
        layer = make_layer(setting, **options)
        x = make_input(setting, layer)
        grad_out, leaves = torch.randn_like(x), [x, *layer.parameters()]
        forward_backward(layer, x, grad_out, leaves)  # compiles and loads the kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            forward_backward(layer, x, grad_out, leaves)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    problem = sequence_problem(setting)
    run_problem(problem, True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_problem(problem, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return f"{len(layers)} layers, and experts in tensors of their own"


def sequence_problem(setting: Setting) -> Problem:
    d, n, tokens = (16, 16, 6) if setting.tiny else (512, 256, 1000)
    dtype = torch.float32 if setting.tiny else torch.bfloat16
    return make_problem(random_choices(tokens, 2, 8), 8, d=d, n=n, dtype=dtype, device=str(setting.device))


def address_tables(setting: Setting) -> str:
    """Experts in tensors of their own: the bits of one stacked tensor; on another stream; first seen in a capture."""
    problem = sequence_problem(setting)
    stacked = run_problem(problem, False)
    assert same_bits(stacked, run_problem(problem, True)), "stacked and in tensors of their own differ"
    if setting.device.type != "cuda":
        return "on one stream"
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = run_problem(problem, True)
    torch.cuda.current_stream().wait_stream(stream)
    assert same_bits(stacked, other), "on a second stream"
    fresh = replace(problem, call=replaced(problem.call, gate_up=problem.call.parameters.gate_up.clone()))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a table of addresses that no call before it has made
        captured = run_problem(fresh, True)
    for _ in range(3):
        graph.replay()
        assert same_bits(stacked, captured), "replayed"
    return "on two streams, and captured"


def cuda_graph(setting: Setting) -> str:
    """Forward and backward captured in one graph and replayed on new inputs: the bits of an eager run."""
    setting.need_gpu()
    layer = make_layer(setting)
    x = make_input(setting, layer)
    grad_out, leaves = torch.randn_like(x), [x, *layer.parameters()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward_backward(layer, x, grad_out, leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_backward(layer, x, grad_out, leaves)
    for number in range(5):
        with torch.no_grad():
            x.copy_(torch.randn_like(x) * (number + 1))  # other tokens choose other experts
        graph.replay()
        assert same_bits(captured, forward_backward(layer, x, grad_out, leaves)), f"replay {number}"
    return "5 replays"


def compiled(setting: Setting) -> str:
    """torch.compile(fullgraph=True): the layer traced whole, bit for bit; the experts through inductor."""
    layer = make_layer(setting)
    x = make_input(setting, layer)
    grad_out, leaves = torch.randn_like(x), [x, *layer.parameters()]
    traced = torch.compile(layer, fullgraph=True, backend="aot_eager")
    eager = forward_backward(layer, x, grad_out, leaves)
    assert same_bits(eager, forward_backward(traced, x, grad_out, leaves)), "traced and eager differ"
    if setting.tiny:
        return "traced"
    arguments = experts_arguments(setting, 512, 256, 128, 8, 2, torch.bfloat16)
    hidden, choices, weights, gate_up, down, _ = arguments

    def block(hidden: Tensor) -> Tensor:
        return moe_triton.moe_mlp(hidden, choices, weights, gate_up, down, backend="triton").float().square()

    expected = block(hidden)
    assert_close(torch.compile(block, fullgraph=True)(hidden), expected, tolerance=1e-6)
    return "traced, and through inductor"


def no_recompilation(setting: Setting) -> str:
    """After one warm-up per bucket of rows per expert, 50 other numbers of tokens specialise no kernel."""
    setting.need_gpu()
    layer = make_layer(setting)
    with compilations() as first:
        for tokens in (16, 200, 400, 2048):  # 2, 25, 50 and 256 rows per expert
            train_step(setting, layer, tokens)
    assert first, "the hook saw no compilation at all: this check could not fail"
    rng = random.Random(torch.initial_seed())
    others = [1, 2, 3, 17, 127, 128, 129, 1000, 4096, 4097, *rng.sample(range(4, 4096), 40)]
    with compilations() as again:
        for tokens in others:
            train_step(setting, layer, tokens)
    assert not again, f"{len(again)} more: {', '.join(sorted(set(again)))}"
    return f"{len(others)} numbers of tokens, {len(first)} kernels compiled before"


def train_step(setting: Setting, layer: MoE, tokens: int) -> None:
    x = make_input(setting, layer, tokens)
    out = layer(x)
    (out.output.float().square().sum() + out.aux_loss).backward()


# Beyond int32 ---------------------------------------------------------------------------------------------------------


def beyond_int32(setting: Setting) -> str:
    """Hidden states, rows and weights of more than 2^31 elements: the last tokens and the last expert are right."""
    return f"{many_tokens(setting)}; {many_weights(setting)}"


def many_tokens(setting: Setting) -> str:
    """X, its gradient and the rows have T * d > 2^31 elements. A token's output depends on no other token."""
    d, n, num_experts = (16, 16, 3) if setting.tiny else (4096, 64, 16)
    tokens = 40 if setting.tiny else 2**31 // d + 1000
    dtype = setting.dtypes[-1]
    arguments = experts_arguments(setting, tokens, d, n, num_experts, 1, dtype)
    with poisoned() if setting.tiny else contextlib.nullcontext():  # filling takes as long as computing
        out, grad_hidden, grad_weights, _, grad_down = run_experts(arguments, "triton")
    last = slice(tokens - 20, tokens)
    rows = [x[last] for x in (arguments[0], arguments[1], arguments[2])]
    wanted = reference_experts(*rows, *arguments[3:5], arguments[5][last])
    for found, expected in zip((out[last], grad_hidden[last], grad_weights[last]), wanted, strict=False):
        assert_close(found, expected, tolerance=TOLERANCE[dtype])
    expert = int(arguments[1][-1, 0])
    check_down_gradient(arguments, expert, grad_down[expert])
    return f"{tokens * d / 2**31:.3f} x 2^31 elements of X"


def check_down_gradient(arguments: list[Tensor], expert: int, found: Tensor) -> None:
    """dW2 of one expert, from its rows in float64: they lie all over a tensor that int32 cannot index."""
    hidden, choices, weights, gate_up, _, grad_out = arguments
    chosen = (choices[:, 0] == expert).nonzero()[:, 0]
    expected = torch.zeros(found.shape, dtype=torch.float64, device=found.device)
    for part in chosen.split(8192):
        h = hidden[part].double() @ gate_up[expert].double().T
        a = reference.activate(h, "swiglu") * weights[part].double()
        expected += grad_out[part].double().T @ a
    assert_close(found, expected, tolerance=TOLERANCE[found.dtype])


def many_weights(setting: Setting) -> str:
    """E * 2n * d > 2^31 elements of weights, and as many of their gradients."""
    d, n, num_experts = (16, 16, 3) if setting.tiny else (4096, 4096, 65)
    arguments = experts_arguments(setting, 24 if setting.tiny else 512, d, n, num_experts, 2, setting.dtypes[-1])
    last = num_experts - 1
    arguments[1][:, 0] = torch.arange(arguments[1].shape[0], device=setting.device) % 2 * last  # the first or the last
    arguments[1][:, 1] = 1
    out, _, _, grad_gate_up, grad_down = run_experts(arguments, "triton")
    used = torch.tensor([0, 1, last], device=setting.device)
    hidden, choices, weights, gate_up, down, grad_out = arguments
    few = torch.where(choices == last, 2, choices)
    expected = reference_experts(hidden, few, weights, gate_up[used], down[used], grad_out)
    found = (out, grad_gate_up[used], grad_down[used])
    for mine, wanted in zip(found, (expected[0], *expected[3:]), strict=True):
        assert_close(mine, wanted, tolerance=TOLERANCE[mine.dtype])
    if not setting.tiny:
        assert not grad_gate_up[2:last].any(), "an expert without rows has a gradient"
    return f"{num_experts * 2 * n * d / 2**31:.3f} x 2^31 elements of W1"


def reference_experts(
    hidden: Tensor, choices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, grad_out: Tensor
):
    """Output and gradients of hidden states, weights and both projections, in float64."""
    leaves = [x.double().requires_grad_() for x in (hidden, weights, gate_up, down)]
    dispatched = reference.dispatch(choices, gate_up.shape[0])
    out = reference.moe_experts(
        ExpertCall(
            hidden=leaves[0], weights=leaves[1], dispatched=dispatched, parameters=ExpertParameters(*leaves[2:]),
            spec=ExpertSpec(),
        )
    )  # fmt: skip
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.double())]


# Other programs -------------------------------------------------------------------------------------------------------


def nccl(setting: Setting) -> str:
    """A world of one rank on NCCL, with every mode's exchange: the layer gives what the plain layer does.

    A thread watches what is queued, and the groups can be aborted.
    """
    setting.need_gpu()
    import torch.distributed as dist

    from moe_triton.distributed import ExpertParallel
    from moe_triton.distributed.exchange.expert_parallel import MODES
    from moe_triton.distributed.exchange.failure_board import failure_board
    from moe_triton.torch_internals import abort_groups

    # a store in memory: no port, no file
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        plain = make_layer(setting, capacity_factor=2.0)
        x = make_input(setting, plain)
        grad_out = torch.randn_like(x)
        wanted = forward_backward(plain, x, grad_out, [x, *plain.parameters()])
        for mode in MODES:
            spread = ExpertParallel(mode=mode, chunks=2, always_exchange=True)
            parallel = make_layer(setting, capacity_factor=2.0, expert_parallel=spread)
            parallel.load_state_dict(plain.state_dict())
            found = forward_backward(parallel, x, grad_out, [x, *parallel.parameters()])
            for mine, expected in zip(found, wanted, strict=True):
                assert_close(mine, expected, tolerance=TOLERANCE[torch.bfloat16])
        board = failure_board()
        board.look()
        assert board.watcher is not None
        assert board.watcher.is_alive()
        assert not board.ended
        abort_groups()
        assert not dist.is_initialized()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return f"one rank, {len(MODES)} modes"
