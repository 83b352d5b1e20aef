"""The Gluon kernels behind `up`, `down` and `d_hidden`: when they run, what they compute, what they compile to.

On a Hopper GPU they run on it; elsewhere the emulator runs their source.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from moe_triton import reference
from moe_triton.backends.triton import problem as calls
from moe_triton.records import ExpertSpec
from moe_triton_kernels import configs
from moe_triton_kernels.activations import GATED_CASES, UNGATED_CASES, Activation
from moe_triton_kernels.d_hidden import d_hidden
from moe_triton_kernels.down import down
from moe_triton_kernels.gluon import d_hidden as gluon_d_hidden
from moe_triton_kernels.gluon import down as gluon_down
from moe_triton_kernels.gluon import launch, schedules
from moe_triton_kernels.gluon import up as gluon_up
from moe_triton_kernels.gluon.schedules import DERIVATIVES, SCHEDULES, places_of, why_unsupported
from moe_triton_kernels.launch import Config, Target, shared_limit
from moe_triton_kernels.operands import per_expert
from moe_triton_kernels.tiles import tile_tables
from moe_triton_kernels.tools import offline
from moe_triton_kernels.tools.offline import compile_apart
from moe_triton_kernels.up import up
from tests.helpers.compare import assert_close
from tests.helpers.gluon_emulator import Emulator
from tests.helpers.gluon_memory import Descriptor, Pointer, view_of
from tests.helpers.problems import check, make_problem, random_choices, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]  # NumPy has no bfloat16
PLAIN = Config(block_m=64, block_n=64, block_k=64, num_warps=4, num_stages=1)
ALONE = [name for name, schedule in SCHEDULES.items() if schedule.ctas == 1]  # not in clusters
ALL = GATED_CASES + UNGATED_CASES
OFFSETS = (0, 150, 150, 201)
NUM_ROWS, TOP_K = 210, 2  # nine rows belong to nobody


class EmulatedKernel:
    """Stands for a kernel: `kernel[grid](...)` runs its source in the emulator."""

    def __init__(self, kernel: Any, module: str) -> None:
        self.kernel, self.module = kernel, module
        self.signature = inspect.signature(kernel.fn)
        self.calls: list[tuple[tuple[int], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*arguments: Any, num_warps: int, num_ctas: int, **constants: Any) -> None:
            bound = self.signature.bind(*arguments, **constants)
            self.calls.append((grid, bound.arguments))
            assert (num_warps, num_ctas) == (4, constants["TILE"].CTAS.value)
            emulated = {name: self.emulated(value) for name, value in bound.arguments.items()}
            Emulator(len(self.calls)).launch(self.module, self.kernel.fn.__name__, grid[0], **emulated)

        return launch

    @classmethod
    def emulated(cls, value: Any) -> Any:
        if isinstance(value, tuple):
            return type(value)(*map(cls.emulated, value))
        if isinstance(value, triton.language.constexpr):
            return value.value
        if isinstance(value, launch.TensorDescriptor):
            return Descriptor(view_of(value.base, value.shape, value.strides), value.block_shape)
        return Pointer(value.reshape(-1).numpy()) if isinstance(value, Tensor) else value


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> dict[str, EmulatedKernel]:
    """Hopper: tensors on the CPU count as on one of two multiprocessors, and what is launched is emulated."""
    if DEVICE == "cuda":
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("not a Hopper GPU")
        return {}
    for module in (schedules, launch):
        monkeypatch.setattr(module, "target_of", lambda device: Target(architecture="sm_90", num_sms=2))
    monkeypatch.setattr(schedules, "cluster_error", lambda: None)
    kernels = {
        "down": EmulatedKernel(gluon_down.down_kernel, "down"),
        "up": EmulatedKernel(gluon_up.up_kernel, "up"),
        "d_hidden": EmulatedKernel(gluon_d_hidden.d_hidden_kernel, "d_hidden"),
    }
    monkeypatch.setattr(gluon_d_hidden, "d_hidden_kernel", kernels["d_hidden"])
    monkeypatch.setattr(gluon_down, "down_kernel", kernels["down"])
    monkeypatch.setattr(gluon_up, "up_kernel", kernels["up"])
    return kernels


class Setting:
    """A dispatch of 210 slots to three experts, of which the second gets none; d = 128."""

    def __init__(self, dtype: torch.dtype = torch.float16) -> None:
        self.dtype = dtype
        self.offsets = torch.tensor(OFFSETS, dtype=torch.int32, device=DEVICE)
        self.slots = torch.randperm(NUM_ROWS, device=DEVICE)[: OFFSETS[-1]]
        nobody = self.slots.new_full((NUM_ROWS - OFFSETS[-1],), -1)
        self.source = torch.cat([self.slots, nobody]).int()
        self.tiles = tile_tables(self.offsets, NUM_ROWS)
        self.x = self.random(NUM_ROWS // TOP_K, 128)
        self.router_weights = torch.rand(NUM_ROWS // TOP_K, TOP_K, device=DEVICE) + 0.1

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(self.dtype)

    def weight(self, size_k: int, size_columns: int, transposed: bool = False) -> Tensor:
        """[E, k, columns], as the kernel reads them: k is contiguous (in a view), or, `transposed`, the columns are."""
        weight = self.random(3, size_columns, size_k) / size_k**0.5
        return weight.transpose(1, 2).contiguous() if transposed else weight.transpose(1, 2)

    def experts(self) -> list[tuple[int, slice]]:
        return [(e, slice(OFFSETS[e], OFFSETS[e + 1])) for e in range(3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", ALONE)
@pytest.mark.parametrize("transposed", [False, True])
def test_down(hopper: dict[str, EmulatedKernel], schedule: str, transposed: bool, dtype: torch.dtype) -> None:
    setting = Setting(dtype)
    a, weight, bias = setting.random(NUM_ROWS, 64), setting.weight(64, 272, transposed), setting.random(3, 272)
    a[OFFSETS[-1] :] = float("nan")
    out = down(
        a,
        setting.tiles,
        per_expert(weight),
        size_columns=272,
        config=replace(PLAIN, gluon=schedule, group=3),
        bias=per_expert(bias),
        router_weights=setting.router_weights,
        source=setting.source,
    )
    if hopper:
        ((grid, arguments),) = hopper["down"].calls
        assert grid == (2,)
        assert arguments["TILE"].GROUP.value == 3
        assert arguments["K_CONTIGUOUS"] == (not transposed)
    for e, span in setting.experts():
        scale = setting.router_weights.reshape(-1)[setting.slots[span]].double()
        assert_close(out[span], (a[span].double() @ weight[e].double() + bias[e].double()) * scale[:, None])
    assert out[OFFSETS[-1] :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", ALONE)
def test_the_gradient_of_rows(hopper: dict[str, EmulatedKernel], schedule: str, dtype: torch.dtype) -> None:
    """d_rows: neither bias nor router weights, and the columns are contiguous."""
    setting = Setting(dtype)
    a, weight = setting.random(NUM_ROWS, 128), setting.weight(128, 48, transposed=True)
    config = replace(PLAIN, gluon=schedule)
    out = down(a, setting.tiles, per_expert(weight), size_columns=48, config=config)
    for e, span in setting.experts():
        assert_close(out[span], a[span].double() @ weight[e].double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", ALONE)
@pytest.mark.parametrize(("activation", "transposed"), [("swiglu", False), ("gpt_oss", True), ("relu2", False)])
def test_up(
    hopper: dict[str, EmulatedKernel], schedule: str, activation: str, transposed: bool, dtype: torch.dtype
) -> None:
    setting, size_n = Setting(dtype), 80
    width = size_n if activation == "relu2" else 2 * size_n
    weight, bias = setting.weight(128, width, transposed), setting.random(3, width)
    gate = next(case for case in ALL if case.name == activation)
    sizes = {"size_n": size_n, "top_k": TOP_K, "activation": gate, "is_concatenated": True}

    def run(**keep: bool) -> tuple[Tensor, Tensor]:
        return up(
            setting.x,
            setting.source,
            setting.tiles,
            per_expert(weight.transpose(1, 2)).transposed(),
            per_expert(bias),
            config=replace(PLAIN, gluon=schedule),
            **sizes,
            **keep,
        )

    a, h = run(keep_activation=True, keep_preactivation=True)
    for e, span in setting.experts():
        rows = setting.x[setting.slots[span] // TOP_K]
        assert_close(h[span], rows.double() @ weight[e].double() + bias[e].double())
        assert_close(a[span], reference.activate(h[span].double(), activation, True))
    assert a[OFFSETS[-1] :].isnan().all()
    assert h[OFFSETS[-1] :].isnan().all()
    kept = slice(0, OFFSETS[-1])
    alone, nothing = run(keep_activation=True, keep_preactivation=False)
    none, h_alone = run(keep_activation=False, keep_preactivation=True)
    assert nothing.shape == none.shape == (0,)
    assert torch.equal(alone[kept], a[kept])
    assert torch.equal(h_alone[kept], h[kept])
    if hopper:
        assert len(hopper["up"].calls) == 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("schedule", ALONE)
@pytest.mark.parametrize(("activation", "transposed"), [("swiglu", True), ("geglu_tanh", False), ("silu", True)])
def test_d_hidden(
    hopper: dict[str, EmulatedKernel], schedule: str, activation: str, transposed: bool, dtype: torch.dtype
) -> None:
    setting, size_n = Setting(dtype), 80
    weight = setting.weight(128, size_n, transposed)
    h = setting.random(NUM_ROWS, size_n if activation == "silu" else 2 * size_n)
    h[OFFSETS[-1] :] = float("nan")
    weighted_a, grad_h, shares = d_hidden(
        setting.x,
        setting.source,
        setting.tiles,
        per_expert(weight),
        h,
        setting.router_weights,
        size_n=size_n,
        activation=Activation(activation),
        is_concatenated=True,
        config=replace(PLAIN, gluon=schedule),
    )
    assert shares.shape == (1, NUM_ROWS)  # a tile holds all columns
    for e, span in setting.experts():
        slots = setting.slots[span]
        grad_a = setting.x[slots // TOP_K].double() @ weight[e].double()
        scale = setting.router_weights.reshape(-1)[slots].double()[:, None]
        leaf = h[span].double().requires_grad_()
        a = reference.activate(leaf, activation, True)
        assert_close(grad_h[span], torch.autograd.grad(a, leaf, grad_a * scale, retain_graph=True)[0])
        assert_close(weighted_a[span], a.detach() * scale)
        assert_close(shares[0, span], (grad_a * a.detach().to(dtype).double()).sum(1), tolerance=1e-3)
    for output in (weighted_a, grad_h):
        assert output[OFFSETS[-1] :].isnan().all()
    if hopper:
        assert len(hopper["d_hidden"].calls) == 1


def test_experts_forward_and_backward(hopper: dict[str, EmulatedKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Up, down, d_hidden and d_rows warp-specialized, the rest plain."""

    def choose(op: str, **sizes: Any) -> Config:
        return replace(configs.choose_config(op, **sizes), gluon="ping_pong")

    monkeypatch.setattr(calls, "choose_config", choose)
    monkeypatch.setattr(calls, "_PREPARED", {})
    problem = make_problem(random_choices(9, 2, 4), 4, d=64, n=64, dtype=torch.float16)
    check(run(problem), problem, tolerance=2e-3)
    if hopper:
        assert [len(hopper[name].calls) for name in ("up", "down", "d_hidden")] == [1, 2, 1]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_gate_in_pairs_and_a_contraction_that_ends_within_a_block(
    hopper: dict[str, EmulatedKernel], schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(op: str, **sizes: Any) -> Config:
        return replace(configs.choose_config(op, **sizes), gluon=schedule)

    monkeypatch.setattr(calls, "choose_config", choose)
    monkeypatch.setattr(calls, "_PREPARED", {})
    spec = ExpertSpec(is_concatenated=False, is_transposed=SCHEDULES[schedule].ping_pong)
    problem = make_problem(random_choices(9, 2, 4), 4, spec=spec, d=80, n=48, dtype=torch.float16)
    check(run(problem), problem, tolerance=2e-3)
    if hopper:
        assert [len(hopper[name].calls) for name in ("up", "down", "d_hidden")] == [1, 2, 1]
        calls_made = [call for kernel in hopper.values() for call in kernel.calls]
        assert [call[0] for call in calls_made] == [(2 // SCHEDULES[schedule].ctas,)] * 4  # two multiprocessors
        assert [call[1]["TILE"].EVEN_K.value for call in calls_made] == [False] * 4


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_tensor_per_expert(
    hopper: dict[str, EmulatedKernel], schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as of one stack, from matrices and biases of their own."""

    def choose(op: str, **sizes: Any) -> Config:
        return replace(configs.choose_config(op, **sizes), gluon=schedule)

    monkeypatch.setattr(calls, "choose_config", choose)
    monkeypatch.setattr(calls, "_PREPARED", {})
    spec = ExpertSpec(is_concatenated=schedule == "cooperative")
    problem = make_problem(random_choices(9, 2, 4), 4, spec=spec, d=80, n=48, dtype=torch.float16)
    stacked, found = run(problem), run(problem, sequence=True)
    check(found, problem, tolerance=2e-3)
    assert all(torch.equal(found[name], stacked[name]) for name in stacked)
    if hopper:
        for name, number in (("up", 1), ("down", 2), ("d_hidden", 1)):
            places = [call[1]["places"] for call in hopper[name].calls]
            assert [p if p is None else p.STEP.value for p in places] == [None] * number + [512] * number


@pytest.mark.parametrize(("gap", "step"), [(256, 512), (24, 16)])
def test_matrices_in_any_order_with_anything_between(
    hopper: dict[str, EmulatedKernel], gap: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting()
    a, weight, bias = setting.random(NUM_ROWS, 64), setting.weight(64, 272), setting.random(3, 272)
    memory = torch.full((3, 272 * 64 + gap), float("nan"), dtype=setting.dtype, device=DEVICE)
    lowest_last = [memory[2 - e, gap:].view(272, 64).copy_(weight[e].T) for e in range(3)]
    table = per_expert(lowest_last).transposed()
    config = replace(PLAIN, gluon="cooperative")
    sizes: dict[str, Any] = {"size_columns": 272, "config": config, "bias": per_expert(list(bias))}
    out = down(a, setting.tiles, table, **sizes)
    for e, span in setting.experts():
        assert_close(out[span], a[span].double() @ weight[e].double() + bias[e].double())
    if hopper:
        ((_, arguments),) = hopper["down"].calls
        assert arguments["places"].STEP.value == step
        assert arguments["places"].first == lowest_last[2].data_ptr()
    monkeypatch.setattr(schedules, "REACH", places_of(table.addresses).steps - 1)
    reason = why_unsupported("cooperative", a, table, None, size_columns=272)
    assert reason == "the experts' matrices lie further apart than a descriptor reaches"


def test_what_is_not_supported_runs_on_the_plain_kernels() -> None:
    """The experts' matrices have others between them: the result is the one without a schedule."""
    setting = Setting()
    weight = per_expert(setting.weight(128, 144, transposed=True).repeat_interleave(2, 0)[::2])
    sizes = {"size_n": 72, "top_k": TOP_K, "activation": Activation("swiglu"), "is_concatenated": True}
    kept = slice(0, OFFSETS[-1])
    found = []
    for config in (PLAIN, replace(PLAIN, gluon="cooperative")):
        a, h = up(
            setting.x,
            setting.source,
            setting.tiles,
            weight,
            None,
            config=config,
            keep_activation=True,
            keep_preactivation=True,
            **sizes,
        )
        rows = down(h, setting.tiles, weight.transposed(), size_columns=128, config=config)
        found.append(torch.cat([a[kept], h[kept], rows[kept]], dim=1))
    assert torch.equal(*found)
    reason = why_unsupported("cooperative", setting.x, weight, None, size_columns=72, projections=2)
    if DEVICE == "cpu":
        assert reason == "architecture interpreter, wanted one of sm_90"


def test_the_reasons(hopper: dict[str, EmulatedKernel]) -> None:
    rows, weight = torch.randn(8, 128, device=DEVICE).bfloat16(), torch.randn(3, 160, 128, device=DEVICE).bfloat16()
    stacked, table = per_expert(weight).transposed(), per_expert(list(weight)).transposed()

    def reason(rows: Tensor = rows, weight: Any = stacked, bias: Any = None, **changed: Any) -> str | None:
        arguments = {"schedule": "ping_pong", "size_columns": 160, **changed}
        return why_unsupported(arguments.pop("schedule"), rows, weight, bias, **arguments)

    assert reason() is None
    assert reason(projections=2, size_columns=80) is None
    assert reason(weight=per_expert(weight.transpose(1, 2).contiguous())) is None
    assert reason(bias=per_expert(torch.randn(3, 160, device=DEVICE))) is None
    assert reason(schedule=None) == "no schedule is chosen"
    assert "torch.float32 rows and torch.bfloat16 weights, wanted both in one of" in reason(rows=rows.float())
    assert "torch.float16 rows and torch.bfloat16 weights" in reason(rows=rows.half())
    assert "torch.float16 rows and torch.bfloat16 weights" in reason(rows=rows.half(), weight=table)
    assert reason(weight=table) is None
    not_one = "the experts' matrices are neither one contiguous tensor nor one each"
    assert reason(weight=per_expert(list(weight[:, :, ::2])).transposed()) == not_one
    assert reason(weight=per_expert(weight[:, :, ::2]).transposed()) == not_one
    assert reason(weight=per_expert(torch.randn(6, 160, 128, device=DEVICE).bfloat16()[::2]).transposed()) == not_one
    assert reason(bias=per_expert(list(torch.randn(3, 160, device=DEVICE)))) is None
    assert (
        reason(bias=per_expert(torch.randn(3, 320, device=DEVICE)[:, ::2])) == "the experts' biases are not contiguous"
    )
    assert reason(derivative=Activation("swiglu")) is None
    limited = reason(derivative=Activation("swiglu", limit=10.0))
    assert limited == "the derivative of swiglu_limit10, wanted that of one of swiglu, geglu_tanh, silu, gelu_tanh"
    assert reason(rows=rows[:0]) == "no rows"
    odd = per_expert(torch.randn(3, 160, 88, device=DEVICE).bfloat16()).transposed()
    assert reason(rows=rows[:, :88].contiguous(), weight=odd) == "a contraction of 88, wanted a multiple of 16"
    narrow = per_expert(torch.randn(3, 12, 128, device=DEVICE).bfloat16()).transposed()
    assert reason(weight=narrow, size_columns=12) == "12 columns, wanted a multiple of 16"
    shifted = torch.randn(8 * 128 + 1, device=DEVICE).bfloat16()[1:].view(8, 128)
    not_aligned = "rows or weights do not begin at a multiple of 16 bytes"
    assert reason(rows=shifted) == not_aligned
    askew = torch.randn(2 * 160 * 128 + 1, device=DEVICE).bfloat16()[1:].view(2, 160, 128)
    assert reason(weight=per_expert(list(askew)).transposed()) == not_aligned
    with pytest.raises(ValueError, match="gluon: got 'solo', wanted None or one of cooperative, ping_pong"):
        reason(schedule="solo")


def test_a_gluon_that_cannot_be_imported_is_a_reason(
    hopper: dict[str, EmulatedKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "moe_triton_kernels.gluon.names", None)
    schedules.import_error.cache_clear()
    rows, weight = torch.randn(8, 64, device=DEVICE).half(), per_expert(torch.randn(2, 64, 16, device=DEVICE).half())
    try:
        assert why_unsupported("cooperative", rows, weight, None, size_columns=16).startswith("ModuleNotFoundError: ")
    finally:
        schedules.import_error.cache_clear()


def test_no_shipped_configuration_names_a_schedule() -> None:
    """They have never run on a GPU. An entry of the table gets one when a GPU has measured it faster."""
    assert all(config.gluon is None for config in configs.shipped_table().values())
    large = {"d": 4096, "n": 2048, "dtype": torch.bfloat16, "num_rows": 65536, "num_experts": 8}
    assert all(configs.choose_config(op, architecture="sm_90", **large).gluon is None for op in configs.OPS)


def test_what_the_kernels_compile_to() -> None:
    cases = {case.name: case for case in offline.collect_cases("sm_90", ["gluon"])}
    reports = compile_apart("sm_90", ["gluon"])
    assert [report.kernel for report in reports] == list(cases)
    for report in reports:
        case = cases[report.kernel]
        gathered, ping_pong = report.kernel.startswith(("up", "d_hidden")), case.constants["PING_PONG"]
        assert offline.broken_gates(case, report) == []
        assert report.spills == 0
        assert report.shared_bytes <= shared_limit("sm_90")
        assert report.setmaxnreg > 0
        # two main loops of BLOCK_K / 16 instructions for each 64 rows; a step's 128 rows of A in 8 copies a thread
        assert (report.multicast > 0) == (case.num_ctas > 1)
        assert report.wgmma == (16 if ping_pong else 8)
        assert report.cp_async == (8 if gathered else 0)
        assert report.tma >= (1 if report.kernel.startswith("d_hidden") else 2)  # gathered rows need none
        assert report.proxy_fence == (3 if gathered else 1)  # after the barriers are made, and in each gathered loop


def test_every_kernel_has_its_cases() -> None:
    cases = offline.collect_cases("sm_90", ["gluon"], every=True)
    assert {case.constants.get("ACTIVATION", GATED_CASES[0]) for case in cases} == set(ALL)
    for op in schedules.OPS:
        types = [f"{op}_bf16_", f"{op}_fp16_"]
        mine = [case for case in cases if case.name.startswith(tuple(types))]
        assert all(any(case.name.startswith(stored) for case in mine) for stored in types)
        assert {case.constants["PING_PONG"] for case in mine} == {False, True}
        assert {case.constants["K_CONTIGUOUS"] for case in mine} == {False, True}
        assert {case.constants["PING_PONG"] for case in mine if "places.STEP" in case.constants} == {False, True}
        if op in ("down", "d_rows"):
            continue
        known = DERIVATIVES if op.startswith("d_hidden") else ALL
        activations = [activation for activation in known if activation.is_gated == op.endswith("gated")]
        for is_concatenated in (True, False) if op.endswith("gated") else (True,):
            found = {
                (case.constants["ACTIVATION"], "fp16" in case.name)
                for case in mine
                if case.constants["CONCATENATED"] == is_concatenated
            }
            assert found == {(activation, wide) for activation in activations for wide in (True, False)}
        tails = {(case.constants["PING_PONG"], case.constants["K_CONTIGUOUS"]) for case in mine if "tail" in case.name}
        assert len(tails) == 4
    assert offline.collect_cases("sm_100", ["gluon"], every=True) == []
