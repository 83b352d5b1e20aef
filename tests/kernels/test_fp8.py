"""fp8: codes and scales, and the grouped products of codes, against the definition in float64.

Decoded numbers are multiplied in float64 here, in plain loops over groups, so nothing is shared with the kernels.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_triton import reference
from moe_triton_kernels import fp8, heuristics
from moe_triton_kernels.activations import Activation
from moe_triton_kernels.configs import choose_config
from moe_triton_kernels.d_hidden import Into, d_hidden
from moe_triton_kernels.d_router_weights import d_router_weights
from moe_triton_kernels.d_weight import d_bias
from moe_triton_kernels.down import down
from moe_triton_kernels.fp8 import CodedRows, ColumnCodes, RowCodes, WeightCodes, fp8_supported, makes_codes
from moe_triton_kernels.fp8_d_weight import fp8_d_weight, tile_offsets
from moe_triton_kernels.launch import Config
from moe_triton_kernels.mxfp8 import quantize_mx
from moe_triton_kernels.operands import per_expert
from moe_triton_kernels.quantize import quantize_both, quantize_columns, quantize_rows, quantize_weight
from moe_triton_kernels.tiles import tile_tables
from moe_triton_kernels.up import up
from tests.helpers.compare import TOLERANCE, assert_close

device = "cuda" if torch.cuda.is_available() else "cpu"
FP8 = torch.float8_e4m3fn
NAN, INF = float("nan"), float("inf")
ROWS = 200  # S: 181 kept rows of T = 100 tokens with K = 2 choices, three experts of which the second has none
OFFSETS = (0, 150, 150, 181)
TILES = 3
SIZES = [(128, 128), (200, 160), (136, 72)]  # (d, n): the second needs three scales a tile of gate and up
TURNS = [(*SIZES[0], True), (*SIZES[1], True), (*SIZES[2], False)]  # with and without descriptors
DTYPES = (torch.bfloat16, torch.float16)


def quantized(x: Tensor, *group: int) -> tuple[Tensor, Tensor]:
    """Codes, and the scale of each element, of a matrix in groups of rows by columns from the first element on."""
    codes, scales = torch.empty_like(x, dtype=FP8), torch.empty_like(x, dtype=torch.float32)
    for i in range(0, x.shape[0], group[0]):
        for j in range(0, x.shape[1], group[1]):
            at = (slice(i, i + group[0]), slice(j, j + group[1]))
            scale = x[at].float().abs().max() / 448
            scale = torch.where(scale < 2.0**-126, 1.0, scale)
            codes[at] = (x[at].float() / scale).clamp(-448, 448).to(FP8)
            scales[at] = scale
    return codes, scales


def decoded(x: Tensor, *group: int) -> Tensor:
    codes, scales = quantized(x, *group)
    return codes.double() * scales.double()


def same_codes(actual: Tensor, expected: Tensor) -> bool:
    """But for the sign of a zero."""
    return torch.equal(actual.float(), expected.float())


def config_of(op: str, **changes: object) -> Config:
    sizes = {"d": 256, "n": 256, "num_rows": 1, "num_experts": 1, "architecture": "interpreter"}
    return replace(choose_config(op, dtype=FP8, **sizes), **changes)


class Setting:
    """A dispatch made by hand, random operands, and their codes by the kernels."""

    def __init__(self, d: int, n: int, dtype: torch.dtype, activation: str = "swiglu") -> None:
        self.d, self.n, self.dtype = d, n, dtype
        self.activation = (
            Activation(activation, limit=7.0, alpha=1.702) if activation == "gpt_oss" else Activation(activation)
        )
        self.width = 2 * n if self.activation.is_gated else n
        slots = torch.randperm(ROWS)[: OFFSETS[-1]].int()
        self.source = torch.cat([slots, torch.full((ROWS - OFFSETS[-1],), -1, dtype=torch.int32)]).to(device)
        self.tokens = slots.long().to(device) // 2
        self.tiles = tile_tables(torch.tensor(OFFSETS, dtype=torch.int32, device=device), ROWS)
        self.x, self.grad_out = self.random(ROWS // 2, d), self.random(ROWS // 2, d)
        self.weights = torch.rand(ROWS // 2, 2, device=device) + 0.1
        self.row_weights = self.weights.view(-1)[slots.long().to(device)].double()[:, None]
        self.gate_up, self.down = self.random(3, self.width, d, scale=d**-0.5), self.random(3, d, n, scale=n**-0.5)
        for weight in (self.gate_up, self.down):
            weight[1] = NAN  # nobody's: must not come in where a tile reaches past the first expert's end

    def random(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, device=device)).to(self.dtype)

    def in_order(self, width: int) -> Tensor:
        """Rows [ROWS, width] in expert order, of which nobody may read those past the end."""
        rows = self.random(ROWS, width)
        rows[OFFSETS[-1] :] = NAN
        return rows

    def spans(self) -> list[tuple[int, slice]]:
        return [(e, slice(OFFSETS[e], OFFSETS[e + 1])) for e in (0, 2)]

    def per_row(self, rows: Tensor, weight: Tensor) -> Tensor:
        """rows [S, k] times the experts' [columns, k], both decoded: [S, columns] in float64."""
        out = torch.zeros(OFFSETS[-1], weight.shape[1], dtype=torch.float64, device=device)
        for e, span in self.spans():
            out[span] = rows[span] @ decoded(weight[e], 128, 128).T
        return out

    def summed(self, rows: Tensor) -> Tensor:
        """The sum of each expert's rows, [3, .] in float64; rows in expert order."""
        out = torch.zeros(3, rows.shape[1], dtype=torch.float64, device=device)
        for e, span in self.spans():
            out[e] = rows[span].double().sum(0)
        return out

    def codes_of(self, weight: Tensor) -> WeightCodes:
        """weight [E, columns, k]."""
        sizes = {"size_k": weight.shape[2], "size_columns": weight.shape[1]}
        return quantize_weight(per_expert(weight).transposed(), **sizes)


def test_row_codes_are_those_of_the_definition() -> None:
    for size in (128, 300):
        x = torch.randn(37, size, device=device) * torch.logspace(-30, 20, 37, device=device)[:, None]
        x[3], x[5, :128], x[7, 1] = 0, 1e-44, -500
        x[9, 0], x[11, 2], x[13, -1] = NAN, INF, -INF
        for dtype in (torch.float32, *DTYPES):
            found = quantize_rows(x.to(dtype))
            codes, scales = quantized(x.to(dtype).nan_to_num(), 1, 128)
            fine = x.to(dtype).isfinite().all(1)
            assert found.dtype == dtype
            assert same_codes(found.codes[fine, :size], codes[fine])
            assert torch.equal(found.scales[fine], scales[fine][:, ::128])
            assert found.codes.shape[1] % 128 == 0
            assert not found.codes[fine, size:].float().any()
            broken = (found.codes.double() * found.scales.double().repeat_interleave(128, 1))[~fine]
            assert broken.sum(1).isnan().all()
    assert quantize_rows(x[:0]).codes.shape == (0, 384)


@pytest.mark.parametrize("size_k", [128, 200])
def test_mx_codes(size_k: int) -> None:
    """Of matrices and of their transposes; torch's own E8M0 and e4m3 are the definition."""
    stored = torch.randn(2, size_k, 37, device=device) * torch.logspace(-20, 20, size_k, device=device)[:, None]
    stored[1, 0, :3] = torch.tensor([448.0, 449.0, 896.0]) * 2.0**40  # the largest of their groups
    stored[0, :32, 3], stored[0, 0, 4], stored[0, 0, 5], stored[1, :, 6] = 0, NAN, INF, 1e-44
    for x in (stored.mT, stored.mT.contiguous(), stored.mT[0].bfloat16()):
        found = quantize_mx(x)
        rows = F.pad(x.float().reshape(-1, size_k), (0, -size_k % 128))
        groups = rows.unflatten(1, (-1, 32))
        largest = groups.abs().amax(2)
        exponent = torch.where(largest > 0, (largest.double() / 448).log2().ceil(), -127).clamp(-127).int()
        powers = torch.where(largest.isfinite(), torch.ldexp(torch.ones_like(largest), exponent), NAN)
        codes = (groups / powers[..., None]).clamp(-448, 448).to(FP8)
        scales = found.scales.view(torch.float8_e8m0fnu).float().view_as(powers)
        assert torch.equal(scales.nan_to_num(-1), powers.nan_to_num(-1))
        assert found.codes.shape == (*x.shape[:-1], rows.shape[1])
        is_nan = codes.float().isnan()
        assert torch.equal(found.codes.float().view_as(is_nan).isnan(), is_nan)
        assert torch.equal(found.codes.float().view_as(is_nan).nan_to_num(), codes.float().nan_to_num())


@pytest.mark.parametrize("stacked", [True, False])
def test_weight_codes_serve_both_directions(stacked: bool) -> None:
    weight = torch.randn(3, 200, 328, device=device).bfloat16()  # [E, columns, k]
    weight[0, :128, :128] = 0
    given = weight if stacked else list(weight.mT.contiguous().unbind())
    parameter = per_expert(given).transposed() if stacked else per_expert(given)
    found = quantize_weight(parameter, size_k=328, size_columns=200)
    assert found.forward.data.shape == (3, 200, 384)
    assert found.backward.data.shape == (3, 328, 256)
    for e in range(3):
        codes, scales = quantized(weight[e], 128, 128)
        assert same_codes(found.forward.data[e, :, :328], codes)
        assert same_codes(found.backward.data[e, :, :200], codes.T.contiguous())
        assert torch.equal(found.forward.scales[e], scales[::128, ::128].T)
    assert torch.equal(found.backward.scales, found.forward.scales.mT)
    assert not found.forward.data[:, :, 328:].float().any()
    assert not found.backward.data[:, :, 200:].float().any()


def assert_columns(found: ColumnCodes, expected: ColumnCodes) -> None:
    """Of the tiles that there are."""
    assert same_codes(found.codes[:, : 128 * TILES], expected.codes[:, : 128 * TILES])
    assert torch.equal(found.scales[:TILES], expected.scales[:TILES])


def sums_per_expert(columns: ColumnCodes, s: Setting) -> Tensor:
    """In fp32, from the sums of tiles; those past the last tile are NaN, as all memory is that nobody writes."""
    assert columns.sums is not None
    assert columns.sums[TILES:].isnan().all()
    return d_bias(columns.sums, s.source, tile_offsets(s.tiles.offsets), top_k=2)


def test_codes_both_ways() -> None:
    """Of tokens with two rows, with one, and with none, whose codes stay as they are."""
    s = Setting(d=136, n=40, dtype=torch.bfloat16)
    position = torch.full((ROWS // 2, 2), -1, dtype=torch.int32, device=device)
    kept = s.source[: OFFSETS[-1]].long()
    position.view(-1)[kept] = torch.arange(OFFSETS[-1], dtype=torch.int32, device=device)
    rows, columns = quantize_both(s.x, s.tiles, source=s.source, position=position, router_weights=s.weights)
    assert_columns(columns, quantize_columns(s.x, s.tiles, source=s.source, top_k=2))
    weighted = s.x[s.tokens].double() * s.row_weights
    assert_close(sums_per_expert(columns, s), s.summed(weighted), tolerance=TOLERANCE[torch.float32])
    assert quantize_both(s.x, s.tiles, source=s.source, position=position)[1].sums is None
    expected = quantize_rows(s.x)
    assert same_codes(rows.codes[s.tokens], expected.codes[s.tokens])
    assert torch.equal(rows.scales[s.tokens], expected.scales[s.tokens])


@pytest.mark.parametrize("gathered", [True, False])
def test_column_codes_begin_anew_with_every_expert(gathered: bool) -> None:
    s = Setting(d=72, n=40, dtype=torch.bfloat16)
    rows = s.x[s.tokens] if gathered else s.in_order(72)
    found = quantize_columns(s.x, s.tiles, source=s.source, top_k=2) if gathered else quantize_columns(rows, s.tiles)
    tile = 0
    for _, span in s.spans():
        codes, scales = quantized(rows[span], 128, 1)
        for first in range(0, len(codes), 128):
            part = codes[first : first + 128]
            here = found.codes[:, 128 * tile : 128 * tile + 128]
            assert same_codes(here[:, : len(part)], part.T.contiguous())
            assert not here[:, len(part) :].float().any()
            assert torch.equal(found.scales[tile], scales[first])
            tile += 1
    assert tile == TILES
    assert tile_offsets(s.tiles.offsets).tolist() == [0, 2, 2, 3]


@pytest.mark.parametrize(
    ("d", "n", "activation", "is_concatenated", "descriptors"),
    [
        (*SIZES[0], "swiglu", True, True),
        (*SIZES[1], "swiglu", True, False),
        (*SIZES[2], "swiglu", True, True),
        (*SIZES[1], "gpt_oss", False, True),
        (*SIZES[2], "geglu", False, False),
        (*SIZES[1], "relu2", True, False),
    ],
)
def test_up(d: int, n: int, activation: str, is_concatenated: bool, descriptors: bool) -> None:
    dtype = DTYPES[descriptors]
    s = Setting(d, n, dtype, activation)
    bias = s.random(3, s.width)
    a, h = up(
        quantize_rows(s.x),
        s.source,
        s.tiles,
        s.codes_of(s.gate_up).forward,
        per_expert(bias),
        size_n=n,
        top_k=2,
        activation=s.activation,
        is_concatenated=is_concatenated,
        keep_activation=True,
        keep_preactivation=True,
        config=config_of("up_gated" if s.activation.is_gated else "up", descriptors=descriptors),
    )
    end = OFFSETS[-1]
    expected = s.per_row(decoded(s.x, 1, 128)[s.tokens], s.gate_up)
    for e, span in s.spans():
        expected[span] += bias[e].double()
    assert h.dtype == dtype
    assert_close(h[:end], expected, tolerance=TOLERANCE[dtype] / 4)
    value = reference.activate(h[:end].float(), activation, is_concatenated, s.activation.limit, s.activation.alpha)
    codes, scales = quantized(value, 1, 128)
    assert a.dtype == dtype
    assert_close(a.scales[:end], scales[:, ::128], tolerance=1e-6)
    differs = a.codes[:end, :n].float() != codes.float()  # where a rounding of the activation moves a tie
    assert differs.float().mean() < 1e-3
    assert not a.codes[:end, n:].float().any()
    assert h[end:].isnan().all()


@pytest.mark.parametrize(("d", "n", "descriptors"), TURNS)
def test_down_and_d_rows(d: int, n: int, descriptors: bool) -> None:
    dtype = DTYPES[descriptors]
    s = Setting(d, n, dtype)
    end = OFFSETS[-1]
    a, bias = s.in_order(n), s.random(3, d)
    rows = down(
        quantize_rows(a),
        s.tiles,
        s.codes_of(s.down).forward,
        size_columns=d,
        config=config_of("down", descriptors=descriptors, parts=2),
        bias=per_expert(bias),
        router_weights=s.weights,
        source=s.source,
    )
    expected = s.per_row(decoded(a[:end], 1, 128), s.down)
    for e, span in s.spans():
        expected[span] += bias[e].double()
    assert rows.dtype == dtype
    assert_close(rows[:end], expected * s.row_weights, tolerance=TOLERANCE[dtype] / 4)
    grad_h = s.in_order(s.width)
    grad_x = down(
        quantize_rows(grad_h),
        s.tiles,
        s.codes_of(s.gate_up).backward,
        size_columns=d,
        config=config_of("d_rows", descriptors=descriptors, block_n=64),
    )
    expected = torch.zeros(end, d, dtype=torch.float64, device=device)
    for e, span in s.spans():
        expected[span] = decoded(grad_h[span], 1, 128) @ decoded(s.gate_up[e], 128, 128)
    assert_close(grad_x[:end], expected, tolerance=TOLERANCE[dtype] / 4)
    assert rows[end:].isnan().all()
    assert grad_x[end:].isnan().all()


@pytest.mark.parametrize(
    ("d", "n", "activation", "is_concatenated"),
    [
        (*SIZES[0], "swiglu", True),
        (*SIZES[1], "swiglu", True),
        (*SIZES[1], "swiglu", False),
        (*SIZES[2], "relu2", True),
    ],
)
def test_d_hidden(d: int, n: int, activation: str, is_concatenated: bool) -> None:
    """And its results' codes, but for rows with a group of gate and of up, which lies in two tiles."""
    dtype = DTYPES[is_concatenated]
    s = Setting(d, n, dtype, activation)
    end, tiles = OFFSETS[-1], s.tiles.select(128)[1]
    h = s.in_order(s.width)
    rows = RowCodes.empty(ROWS, s.width, dtype, h.device) if n != 160 or not is_concatenated else None
    into = Into(
        CodedRows(numbers=h.new_empty(ROWS, n), columns=ColumnCodes.empty(n, tiles, dtype, h.device)),
        CodedRows(
            numbers=torch.empty_like(h),
            rows=rows,
            columns=ColumnCodes.empty(s.width, tiles, dtype, h.device, sums=True),
        ),
    )
    coded_a, coded_h, shares = d_hidden(
        quantize_rows(s.grad_out),
        s.source,
        s.tiles,
        s.codes_of(s.down).backward,
        h,
        s.weights,
        size_n=n,
        activation=s.activation,
        is_concatenated=is_concatenated,
        config=config_of("d_hidden", descriptors=is_concatenated, parts=4),
        into=into,
    )
    weighted_a, grad_h = coded_a.numbers, coded_h.numbers
    for found in into:
        assert_columns(found.columns, quantize_columns(found.numbers, s.tiles))
    if rows is not None:
        codes = quantize_rows(grad_h)
        assert same_codes(rows.codes[:end], codes.codes[:end])
        assert torch.equal(rows.scales[:end], codes.scales[:end])
    sums = sums_per_expert(coded_h.columns, s)
    assert_close(sums, s.summed(grad_h), tolerance=TOLERANCE[torch.float32])  # of dH as it is stored
    assert not sums[1].any()
    wide = h[:end].double().requires_grad_()
    value = reference.activate(wide, activation, is_concatenated)
    grad_a = torch.zeros(end, n, dtype=torch.float64, device=device)
    for e, span in s.spans():
        grad_a[span] = decoded(s.grad_out, 1, 128)[s.tokens[span]] @ decoded(s.down[e], 128, 128)
    (expected,) = torch.autograd.grad(value, wide, grad_a * s.row_weights)
    tolerance = TOLERANCE[dtype] / 4
    assert_close(grad_h[:end], expected, tolerance=tolerance)
    assert_close(weighted_a[:end], value.detach() * s.row_weights, tolerance=tolerance)
    grad_weights = d_router_weights(shares, s.grad_out, s.source, s.tiles, None, s.weights)
    terms = torch.zeros(ROWS, dtype=torch.float64, device=device)
    terms[s.source[:end].long()] = (grad_a * value.detach().to(dtype).double()).sum(1)
    assert_close(grad_weights.view(-1), terms, tolerance=tolerance)


@pytest.mark.parametrize(("d", "n", "descriptors"), TURNS)
def test_d_weight(d: int, n: int, descriptors: bool) -> None:
    dtype = DTYPES[descriptors]
    s = Setting(d, n, dtype)
    grad_h = s.in_order(s.width)
    config = config_of("d_weight", block_m=64, descriptors=descriptors)
    left = quantize_columns(grad_h, s.tiles)
    right = quantize_columns(s.x, s.tiles, source=s.source, top_k=2)
    found = fp8_d_weight(left, right, s.tiles, config=config)
    expected = torch.zeros_like(found, dtype=torch.float64)
    for e, span in s.spans():
        expected[e] = decoded(grad_h[span], 128, 1).T @ decoded(s.x[s.tokens[span]], 128, 1)
    assert found.dtype == dtype
    assert_close(found, expected, tolerance=TOLERANCE[dtype] / 4)
    split = fp8_d_weight(left, right, s.tiles, config=config, piece_rows=128)  # the first expert's tiles are two pieces
    assert_close(split, expected, tolerance=TOLERANCE[dtype] / 4)


def test_codes_go_with_codes() -> None:
    s = Setting(128, 128, torch.bfloat16)
    plain, codes = per_expert(s.down).transposed(), s.codes_of(s.down).forward
    a = s.in_order(128)
    with pytest.raises(ValueError, match="weight: got codes together with rows, wanted codes for codes"):
        down(a, s.tiles, codes, size_columns=128, config=config_of("down"))
    with pytest.raises(ValueError, match="weight: got rows together with codes, wanted codes for codes"):
        down(quantize_rows(a), s.tiles, plain, size_columns=128, config=config_of("down"))


def test_where_d_hidden_makes_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(architecture: str, **options: bool) -> list[bool]:
        return [makes_codes(architecture, by_rows=by_rows, **options) for by_rows in (False, True)]

    monkeypatch.setattr(fp8, "triton_version", lambda: (3, 7, 1))
    assert made("sm_90") == made("interpreter") == made("sm_90", sums=True) == [True, True]
    assert made("sm_100") == [True, False]
    assert made("sm_90", pairs=True) == made("sm_100", pairs=True) == [False, False]
    monkeypatch.setattr(fp8, "triton_version", lambda: (3, 6, 0))
    assert made("sm_90") == made("sm_100") == [False, False]
    monkeypatch.setattr(fp8, "triton_version", lambda: (3, 8, 0))
    assert made("sm_90") == [True, True]
    assert made("sm_90", sums=True) == made("sm_90", gated=False) == [True, False]
    assert made("sm_100") == [False, False]
    monkeypatch.setattr(fp8, "triton_version", lambda: (3, 9, 0))
    assert made("sm_90") == made("sm_90", sums=True) == made("sm_90", gated=False) == [True, False]
    assert made("sm_90", pairs=True) == made("sm_100") == [False, False]


def test_the_parts_of_d_hidden_follow_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, parts in (((3, 8, 0), 4), ((3, 9, 0), 8)):
        monkeypatch.setattr(heuristics, "triton_version", lambda version=version: version)
        assert heuristics.fp8_tile("d_hidden_gated", "sm_90", 128).parts == parts


def test_where_codes_are_multiplied() -> None:
    assert [name for name in ("sm_80", "sm_90", "sm_100", "gfx942", "interpreter") if fp8_supported(name)] == [
        "sm_90", "sm_100", "interpreter",
    ]  # fmt: skip
