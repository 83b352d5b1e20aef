"""The grouped GEMM kernels by themselves: block shapes, tile order, addresses, what is left alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_triton import reference
from moe_triton_kernels import d_weight as d_weight_module
from moe_triton_kernels import descriptors
from moe_triton_kernels.activations import Activation
from moe_triton_kernels.d_hidden import d_hidden
from moe_triton_kernels.d_router_weights import d_router_weights
from moe_triton_kernels.d_weight import d_bias, d_weight
from moe_triton_kernels.descriptors import at, describe_weight, rows_descriptor
from moe_triton_kernels.down import down
from moe_triton_kernels.grouped_gemm import tile_order
from moe_triton_kernels.launch import Config, Target
from moe_triton_kernels.operands import (
    PerExpert,
    per_expert,
    unit_of,
)
from moe_triton_kernels.tiles import tile_tables
from moe_triton_kernels.up import up
from tests.helpers.compare import TOLERANCE, assert_close
from tests.helpers.pairs import every_pair

device = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = Config(block_m=16, block_n=16, block_k=16, num_warps=4, num_stages=1)
CONFIGS = [
    SMALL,
    replace(SMALL, block_n=64, parts=4, group=1),
    replace(SMALL, block_m=32, block_n=32, block_k=32, parts=2, group=3),
    replace(SMALL, descriptors=True),
    replace(SMALL, block_n=32, block_k=32, parts=2, descriptors=True),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FORMS = [("swiglu", True), ("swiglu", False), ("silu", True)]  # (activation, is_concatenated): each has its epilogue
ROWS = 40  # S: 37 kept rows of T = 20 tokens with K = 2 choices, three experts of which the second has none
OFFSETS = (0, 21, 21, 37)


class Setting:
    """A dispatch made by hand, and random operands in float64 and as the kernels get them."""

    def __init__(self, d: int = 40, n: int = 24, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.offsets = torch.tensor(OFFSETS, dtype=torch.int32, device=device)
        slots = torch.randperm(ROWS)[: OFFSETS[-1]].int()
        self.source = torch.cat([slots, torch.full((ROWS - OFFSETS[-1],), -1, dtype=torch.int32)]).to(device)
        self.tiles = tile_tables(self.offsets, ROWS)
        self.x = self.random(ROWS // 2, d)
        self.weights = torch.rand(ROWS // 2, 2, device=device) + 0.1
        self.gate_up = self.random(3, d, 2 * n) / d**0.5
        self.down = self.random(3, n, d) / n**0.5
        self.slots = slots.long().to(device)
        for weight in (self.gate_up, self.down):
            weight[1] = float("nan")  # nobody's: must not come in where a tile reaches past the first expert's end

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(self.dtype)

    def in_order(self, width: int) -> Tensor:
        """Rows [ROWS, width] in expert order, of which nobody may read those past the end."""
        rows = self.random(ROWS, width)
        rows[OFFSETS[-1] :] = float("nan")
        return rows

    def experts(self) -> list[tuple[int, slice, Tensor]]:
        """(expert, its rows, the tokens of its rows) for the experts that have rows."""
        spans = [slice(OFFSETS[e], OFFSETS[e + 1]) for e in range(3)]
        return [(e, span, self.slots[span] // 2) for e, span in enumerate(spans) if span.start < span.stop]

    def up(
        self, config: Config, activation: str = "swiglu", is_concatenated: bool = True, by_k: bool = False, **keep: bool
    ) -> tuple[Tensor, Tensor]:
        return up(
            self.x,
            self.source,
            self.tiles,
            stored(self.gate_up, by_k),
            None,
            size_n=self.gate_up.shape[2] // (2 if activation == "swiglu" else 1),
            top_k=2,
            activation=Activation(activation),
            is_concatenated=is_concatenated,
            config=config,
            **{"keep_activation": True, "keep_preactivation": True, **keep},
        )


def stored(weight: Tensor, by_k: bool) -> PerExpert:
    """A weight [E, k, columns] with the columns, or with k, contiguous in memory."""
    return per_expert(weight.mT.contiguous()).transposed() if by_k else per_expert(weight)


def assert_untouched(*tensors: Tensor) -> None:
    """Rows that no expert has were not written: fresh memory is poisoned with NaN (by conftest, on a CPU)."""
    if device == "cpu":
        assert all(tensor[OFFSETS[-1] :].isnan().all() for tensor in tensors)


@every_pair(config=CONFIGS, form=FORMS, dtype=DTYPES, d=[32, 40], by_k=[False, True])  # 32: of every block_k a multiple
def test_up(form: tuple[str, bool], config: Config, d: int, by_k: bool, dtype: torch.dtype) -> None:
    setting = Setting(d=d, dtype=dtype)
    a, h = setting.up(config, *form, by_k)
    for e, rows, tokens in setting.experts():
        expected = setting.x[tokens].double() @ setting.gate_up[e].double()
        assert_close(h[rows], expected)
        assert_close(a[rows], reference.activate(expected, *form))
    assert_untouched(a, h)


def test_up_keeps_what_it_is_asked_for() -> None:
    setting = Setting()
    a, h = setting.up(SMALL)
    alone, nothing = setting.up(SMALL, keep_preactivation=False)
    none, h_alone = setting.up(SMALL, keep_activation=False)
    kept = slice(0, OFFSETS[-1])
    assert nothing.shape == none.shape == (0,)
    assert torch.equal(a[kept], alone[kept])
    assert torch.equal(h[kept], h_alone[kept])


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_activation_is_that_of_the_rounded_preactivation(dtype: torch.dtype) -> None:
    a, h = Setting(dtype=dtype).up(SMALL)
    expected = reference.activate(h[: OFFSETS[-1]].double(), "swiglu").to(dtype)
    assert (a[: OFFSETS[-1]] == expected).double().mean() > 0.99  # fp32 maths may differ from fp64 by a last bit
    assert_close(a[: OFFSETS[-1]], expected.double(), tolerance=1e-4)


@every_pair(config=CONFIGS, dtype=DTYPES, by_k=[False, True])
def test_down(config: Config, by_k: bool, dtype: torch.dtype) -> None:
    setting = Setting(dtype=dtype)
    a, bias = setting.in_order(24), setting.random(3, 40)
    weight = stored(setting.down, by_k)
    plain = down(a, setting.tiles, weight, size_columns=40, config=config)
    scaled = down(
        a,
        setting.tiles,
        weight,
        size_columns=40,
        config=config,
        bias=per_expert(bias),
        router_weights=setting.weights,
        source=setting.source,
    )
    assert_untouched(plain, scaled)
    for e, rows, _ in setting.experts():
        expected = a[rows].double() @ setting.down[e].double()
        assert_close(plain[rows], expected)
        weights = setting.weights.reshape(-1)[setting.slots[rows], None].double()
        assert_close(scaled[rows], (expected + bias[e].double()) * weights)


@every_pair(config=CONFIGS, form=FORMS, dtype=DTYPES, by_k=[False, True])
def test_d_hidden_and_the_router_weights_gradient(
    form: tuple[str, bool], config: Config, by_k: bool, dtype: torch.dtype
) -> None:
    setting = Setting(dtype=dtype)
    h, bias = setting.in_order(48 if form[0] == "swiglu" else 24), setting.random(3, 40)
    weighted_a, grad_h, shares = d_hidden(
        setting.x,
        setting.source,
        setting.tiles,
        stored(setting.down.mT, not by_k),
        h,
        setting.weights,
        size_n=24,
        activation=Activation(form[0]),
        is_concatenated=form[1],
        config=config,
    )
    assert_untouched(weighted_a, grad_h)
    plan = (setting.source, setting.tiles)
    with_bias = d_router_weights(shares, setting.x, *plan, per_expert(bias), setting.weights)
    without = d_router_weights(shares, setting.x, *plan, None, setting.weights.half())
    assert shares.shape == (triton.cdiv(24, config.block_n), ROWS)
    assert without.dtype == torch.float16
    expected = torch.zeros(ROWS, dtype=torch.float64, device=device)
    expected_bias = expected.clone()
    for e, rows, tokens in setting.experts():
        wide = h[rows].double().requires_grad_()
        a = reference.activate(wide, *form)
        weights = setting.weights.reshape(-1)[setting.slots[rows], None].double()
        grad_out = setting.x[tokens].double()
        (grad,) = torch.autograd.grad(((a @ setting.down[e].double()) * weights * grad_out).sum(), wide)
        assert_close(grad_h[rows], grad)
        assert_close(weighted_a[rows], a * weights)
        expected[setting.slots[rows]] = ((a @ setting.down[e].double()) * grad_out).sum(1)
        expected_bias[setting.slots[rows]] = (grad_out * bias[e].double()).sum(1)
    assert_close(with_bias.reshape(-1), expected + expected_bias, tolerance=TOLERANCE[dtype])  # of rounded activations
    assert_close(without.reshape(-1), expected, tolerance=max(TOLERANCE[dtype], TOLERANCE[torch.float16]))
    assert (expected == 0).sum() == ROWS - OFFSETS[-1]  # slots without a row


@every_pair(
    config=CONFIGS,
    dtype=DTYPES,
    gather_left=[False, True],
    sizes=[(24, 40), (32, 64)],  # blocks fit in the second
)
def test_d_weight(config: Config, gather_left: bool, sizes: tuple[int, int], dtype: torch.dtype) -> None:
    setting = Setting(d=sizes[1], dtype=dtype)
    rows_in_order = setting.in_order(sizes[0])
    operands = (setting.x, rows_in_order) if gather_left else (rows_in_order, setting.x)
    grad = d_weight(*operands, setting.source, setting.offsets, top_k=2, gather_left=gather_left, config=config)
    expected = torch.zeros(3, *sizes, dtype=torch.float64, device=device)
    for e, rows, tokens in setting.experts():
        expected[e] = rows_in_order[rows].double().T @ setting.x[tokens].double()
    assert_close(grad, expected.mT if gather_left else expected)
    assert (grad[1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_d_bias(dtype: torch.dtype) -> None:
    setting = Setting(dtype=dtype)
    rows_in_order = setting.in_order(136)
    plain = d_bias(rows_in_order, setting.source, setting.offsets, top_k=2)
    gathered = d_bias(setting.x, setting.source, setting.offsets, top_k=2, router_weights=setting.weights)
    expected = torch.zeros(3, 136, dtype=torch.float64, device=device)
    expected_gathered = torch.zeros(3, 40, dtype=torch.float64, device=device)
    for e, rows, tokens in setting.experts():
        expected[e] = rows_in_order[rows].double().sum(0)
        weights = setting.weights.reshape(-1)[setting.slots[rows], None].double()
        expected_gathered[e] = (setting.x[tokens].double() * weights).sum(0)
    assert_close(plain, expected)
    assert_close(gathered, expected_gathered)


@triton.jit
def order_kernel(out, num_rows, num_columns, GROUP: tl.constexpr):
    tile = tl.program_id(0)
    row, column = tile_order(tile, num_rows, num_columns, GROUP)
    tl.store(out + 2 * tile, row)
    tl.store(out + 2 * tile + 1, column)


@settings(max_examples=15, deadline=None)
@given(num_rows=st.integers(1, 9), num_columns=st.integers(1, 5), group=st.sampled_from([1, 2, 8]))
def test_tile_order_visits_every_tile_once_and_column_blocks_are_shared(
    num_rows: int, num_columns: int, group: int
) -> None:
    out = torch.empty(num_rows * num_columns, 2, dtype=torch.int32, device=device)
    order_kernel[(num_rows * num_columns,)](out, num_rows, num_columns, GROUP=group)
    visited = [tuple(pair) for pair in out.tolist()]
    assert sorted(visited) == [(row, column) for row in range(num_rows) for column in range(num_columns)]
    first_group = visited[: min(group, num_rows)]
    assert first_group == [(row, 0) for row in range(len(first_group))]


def test_addresses_are_kept_and_strides_are_made_equal() -> None:
    matrices = [torch.randn(4, 8, device=device) for _ in range(3)]
    parameter = per_expert(matrices)
    assert parameter.data.tolist() == [matrix.data_ptr() for matrix in matrices]
    assert (parameter.is_table, parameter.layout.alignment, parameter.strides) == (True, 16, (8, 1))
    assert parameter.transposed().strides == (1, 8)
    assert per_expert(matrices).data is parameter.data  # no copy to the device in the next step
    odd = torch.randn(33, device=device)[1:].view(4, 8)
    assert per_expert([*matrices, odd]).layout.alignment == 4
    mixed = per_expert([matrices[0], torch.randn(8, 4, device=device).T])
    assert mixed.strides == (8, 1)
    assert mixed.held[0] is matrices[0]
    assert mixed.data.tolist() == [tensor.data_ptr() for tensor in mixed.held]


def test_a_descriptor_where_the_layout_allows_it() -> None:
    config = replace(SMALL, block_n=32, descriptors=True)

    def form(parameter: Tensor | list[Tensor], by_k: bool, halves: int = 1) -> str | None:
        weight = per_expert(parameter).transposed() if by_k else per_expert(parameter)
        size_k, columns = parameter[0].shape[::-1] if by_k else parameter[0].shape
        sizes = {"size_k": size_k, "size_columns": columns // halves, "halves": halves, "block_n": 32}
        descriptor = at(weight.data, describe_weight(weight, config, **sizes))
        if descriptor is None:
            return None
        assert isinstance(descriptor, TensorDescriptor)
        if by_k:
            assert (descriptor.shape, descriptor.block_shape) == (
                [3, halves, columns // halves, size_k],
                [1, halves, 32, 16],
            )
        return "k" if weight.weight().K_CONTIGUOUS.value else "columns"

    matrices = torch.randn(3, 8, 12, device=device)
    assert (form(matrices, True), form(matrices, False), form(matrices, True, 2)) == ("k", "columns", "k")
    assert form(matrices[:, :, :8], True) == "k"  # gaps between rows, and between experts, are no matter
    assert form(matrices, False, 2) is None  # halves that are no blocks of whole rows
    assert form(list(matrices), True) is None
    assert form(matrices[:1].expand(3, 8, 12), True) is None
    spread = torch.randn(3, 9, 12, device=device)[:, :8]  # from one expert to the next, not a whole number of matrices
    assert form(spread, True) is None
    assert form(spread, False) is None
    assert form(matrices[:, :, 1:9], True) is None  # not at a multiple of 16 bytes
    assert form(torch.randn(3, 8, 10, device=device), True) is None  # nor are its rows
    assert form(matrices[:, :, ::2], True) is None
    plain = per_expert(matrices)
    assert describe_weight(plain, SMALL, size_k=8, size_columns=12, halves=1, block_n=32) is None
    found = plain.weight()
    assert found.data is matrices
    assert (found.stride_e, found.stride_k, found.stride_n) == (96, 12, 1)
    constants = (found.ALIGNMENT, found.UNIT, found.K_CONTIGUOUS, found.QUANTIZED)
    assert [constant.value for constant in constants] == [4, 4, False, False]


def test_rows_by_descriptor_where_the_layout_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SMALL, descriptors=True)
    rows = torch.randn(5, 24, device=device)
    made = rows_descriptor(rows, config, block=(16, 16), size_k=24)
    assert made is not None
    assert (made.shape, made.strides, made.block_shape) == ([5, 24], [24, 1], [16, 16])
    assert rows_descriptor(rows, SMALL, block=(16, 16)) is None
    assert rows_descriptor(rows[:0], config, block=(16, 16)) is None
    assert rows_descriptor(torch.randn(5, 22, device=device), config, block=(16, 16)) is None
    assert rows_descriptor(torch.randn(121, device=device)[1:].view(5, 24), config, block=(16, 16)) is None
    monkeypatch.setattr(descriptors, "target_of", lambda _: Target(architecture="sm_103", num_sms=1))
    assert rows_descriptor(rows, config, block=(16, 16), size_k=24) is None  # the last block of k is not full
    assert rows_descriptor(rows, replace(config, block_k=8), block=(16, 8), size_k=24) is not None
    weight = per_expert(torch.randn(3, 24, 16, device=device))
    sizes = {"size_k": 24, "size_columns": 16, "halves": 1, "block_n": 16}
    assert describe_weight(weight, config, **sizes) is None
    assert describe_weight(weight, replace(config, block_k=8), **sizes) is not None
    monkeypatch.setattr(d_weight_module, "target_of", descriptors.target_of)
    assert d_weight_module.ordered_descriptor(rows, config, 16) is None  # its rest would be a second product


def test_sizes_in_units_of_16_bytes() -> None:
    """Triton finds out by itself that 16 divides an argument, but not that 8 does."""
    assert [unit_of(2, 72, 40), unit_of(2, 64, 40), unit_of(2, 64, 48), unit_of(2, 72, 36)] == [8, 8, 1, 1]
    assert [unit_of(4, 36, 40), unit_of(4, 34), unit_of(4, 16, 0)] == [4, 1, 1]


@pytest.mark.skipif(device == "cuda", reason="takes address space, not memory, which only works on a CPU")
def test_offsets_beyond_32_bits() -> None:
    """More than 2^31 elements before the token's row, and before the expert's matrix."""
    tokens, d, n, stride = 2**27 + 8, 16, 16, 2**31 + 64
    x = torch.from_numpy(np.empty((tokens, d), dtype=np.float16))
    x[-5:] = torch.randn(5, d)
    gate_up = torch.from_numpy(np.empty(stride + d * n, dtype=np.float16)).as_strided((2, d, n), (stride, n, 1))
    gate_up[1] = torch.randn(d, n) / d**0.5
    source = torch.arange(tokens - 5, tokens, dtype=torch.int32)
    offsets = torch.tensor([0, 0, 5], dtype=torch.int32)
    sizes = {"size_n": n, "top_k": 1, "activation": Activation("silu"), "is_concatenated": True, "config": SMALL}
    tiles = tile_tables(offsets, 5)
    a, h = up(x, source, tiles, per_expert(gate_up), None, keep_activation=True, keep_preactivation=True, **sizes)
    expected = x[-5:].double() @ gate_up[1].double()
    assert_close(h, expected)
    assert_close(a, reference.activate(expected, "silu"))
