"""The least that each kernel has to compute and to move, and the time below which no implementation can get.

Floor of a kernel = max(FLOPs / P, bytes / bandwidth). FLOPs are those of the matrix products, 2 per multiply-add;
everything else counts as free. Bytes are the compulsory traffic with main memory: every tensor that a kernel reads or
writes, once, however often caches are missed. So a row that is gathered K times counts once (the roofline model of
Williams, Waterman and Patterson, CACM 2009).

With T tokens, d hidden size, n intermediate size, E experts, K choices, S = T*K rows, s bytes per element, and f = 2
for a gated activation, 1 for an ungated one:

    kernel            FLOPs    bytes
    up                2fSnd    sTd + sfEnd + sfSn + sSn      X, W1 -> H, A
    down              2Snd     sSn + sEnd + sSd              A, W2 -> rows
    combine           0        sSd + sTd                     rows -> out; in backward dX rows -> dX
    d_hidden          2Snd     sTd + sEnd + 2sfSn + sSn      dO, W2, H -> dH, w*A
    d_weight_down     2Snd     sTd + sSn + sEnd              dO, w*A -> dW2
    d_weight_up       2fSnd    sTd + sfSn + sfEnd            X, dH -> dW1
    d_rows            2fSnd    sfSn + sfEnd + sSd            dH, W1 -> dX rows
    narrow_gathered   2Sdr     sTd + sEdr + sSr              X or dO, factor of rank r -> t or u
    narrow_ordered    2Snr     sSn + sEnr + sSr              A, factor -> t (f times the rows where they are dH)
    d_adapter_...     as narrow: its operands and its result are the same three

An adapter's part of up, down, d_hidden and d_rows, r in d or n of their work, is left out.
Row indices and router weights (a few bytes per row) are left out where whole rows move, and make up the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
INDEX = 4  # bytes of an int32 index, of a router weight and of a logit: the router computes in fp32
TILE_SIZES = (16, 32, 64, 128)  # rows per tile of the tables


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One MoE layer and its tokens; ValueError on sizes below 1, K above E, or another dtype than bf16, fp16, fp32."""

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    dtype: str = "bf16"
    gated: bool = True
    rank: int = 16  # of adapters

    def __post_init__(self) -> None:
        for name in ("tokens", "hidden", "intermediate", "experts", "top_k", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted at least 1")
        if self.top_k > self.experts:
            raise ValueError(f"top_k: got {self.top_k}, wanted at most {self.experts}, the experts")
        if self.dtype not in ITEMSIZE:
            raise ValueError(f"dtype: got {self.dtype!r}, wanted one of {', '.join(ITEMSIZE)}")

    @property
    def rows(self) -> int:
        """S: one row per token and choice."""
        return self.tokens * self.top_k

    @property
    def factor(self) -> int:
        """Columns of the up projection per column of its activation."""
        return 2 if self.gated else 1

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a GPU can do: FLOP/s of dense 16-bit and of fp32 products, bytes/s of main memory, and who says so."""

    name: str
    flops_16: float
    flops_32: float
    bandwidth: float
    source: str

    def flops(self, dtype: str) -> float:
        return self.flops_32 if dtype == "fp32" else self.flops_16


# fp32 means full precision: no tf32
DEVICES = {
    "h200": Device(
        name="h200",
        flops_16=790e12,
        flops_32=67e12,
        bandwidth=4.3e12,
        source="measured: 8192^3 bf16 product, device copy; fp32: data-sheet peak",
    ),
    "h100": Device(
        name="h100", flops_16=989e12, flops_32=67e12, bandwidth=3.35e12, source="data-sheet peak, H100 SXM 80 GB"
    ),
    "a100": Device(
        name="a100", flops_16=312e12, flops_32=19.5e12, bandwidth=2.039e12, source="data-sheet peak, A100 SXM 80 GB"
    ),
    "b200": Device(name="b200", flops_16=2250e12, flops_32=75e12, bandwidth=8e12, source="data-sheet peak, B200 SXM"),
    "mi300x": Device(
        name="mi300x", flops_16=1307e12, flops_32=163e12, bandwidth=5.3e12, source="data-sheet peak, MI300X"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one launch has to compute (FLOPs of matrix products) and to move (bytes)."""

    flops: int
    bytes: int

    def floor_s(self, device: Device, dtype: str) -> float:
        """Seconds: max(FLOPs / P, bytes / bandwidth)."""
        return max(self.flops / device.flops(dtype), self.bytes / device.bandwidth)


def _product(shape: Shape, factor: int, elements: int) -> Work:
    """A grouped product of all rows with `factor` * n * d weights each, that moves this many elements."""
    flops = 2 * factor * shape.rows * shape.intermediate * shape.hidden
    return Work(flops=flops, bytes=shape.itemsize * elements)


def _sizes(shape: Shape) -> tuple[int, int, int, int, int]:
    """Elements of X [T, d], of the rows [S, d], of A [S, n], of W2 [E, d, n], and f."""
    d, n = shape.hidden, shape.intermediate
    return shape.tokens * d, shape.rows * d, shape.rows * n, shape.experts * n * d, shape.factor


def up(shape: Shape) -> Work:
    x, _, a, w, f = _sizes(shape)
    return _product(shape, f, x + f * w + f * a + a)


def down(shape: Shape) -> Work:
    _, rows, a, w, _ = _sizes(shape)
    return _product(shape, 1, a + w + rows)


def combine(shape: Shape) -> Work:
    x, rows, *_ = _sizes(shape)
    return Work(flops=0, bytes=shape.itemsize * (rows + x))


def d_hidden(shape: Shape) -> Work:
    x, _, a, w, f = _sizes(shape)
    return _product(shape, 1, x + w + 2 * f * a + a)


def d_weight_down(shape: Shape) -> Work:
    x, _, a, w, _ = _sizes(shape)
    return _product(shape, 1, x + a + w)


def d_weight_up(shape: Shape) -> Work:
    x, _, a, w, f = _sizes(shape)
    return _product(shape, f, x + f * a + f * w)


def d_rows(shape: Shape) -> Work:
    _, rows, a, w, f = _sizes(shape)
    return _product(shape, f, f * a + f * w + rows)


def narrow_gathered(shape: Shape) -> Work:
    return _narrow(shape, shape.tokens, shape.hidden)


def narrow_ordered(shape: Shape) -> Work:
    return _narrow(shape, shape.rows, shape.intermediate)


def _narrow(shape: Shape, rows: int, width: int) -> Work:
    """Between rows of this width, rows of the rank, and a factor of every expert."""
    elements = rows * width + (shape.experts * width + shape.rows) * shape.rank
    return Work(flops=2 * shape.rows * width * shape.rank, bytes=shape.itemsize * elements)


def d_bias_rows(shape: Shape) -> Work:
    """db1: dH -> [E, fn]."""
    columns = shape.factor * shape.intermediate
    return Work(flops=0, bytes=shape.itemsize * (shape.rows + shape.experts) * columns)


def d_bias_gathered(shape: Shape) -> Work:
    """db2: dO [T, d], each row's index and router weight -> [E, d]."""
    elements = (shape.tokens + shape.experts) * shape.hidden
    return Work(flops=0, bytes=shape.itemsize * elements + 2 * INDEX * shape.rows)


def d_router_weights(shape: Shape) -> Work:
    """One share and one index per row -> one gradient per row."""
    return Work(flops=0, bytes=3 * INDEX * shape.rows)


def topk(shape: Shape) -> Work:
    """Logits [T, E] -> experts and weights [T, K], counts and score sums [E], z sum."""
    logits = shape.tokens * shape.experts
    return Work(flops=0, bytes=INDEX * (logits + 2 * shape.rows + 2 * shape.experts + 1))


def topk_sums(shape: Shape) -> Work:
    """Counts, score sums and z sum: at least one partial sum of each is read, and the total written."""
    return Work(flops=0, bytes=INDEX * 2 * (2 * shape.experts + 1))


def topk_backward(shape: Shape) -> Work:
    """Logits, experts, gradients of weights and sums -> gradient of the logits."""
    logits = shape.tokens * shape.experts
    return Work(flops=0, bytes=INDEX * (2 * logits + 2 * shape.rows + shape.experts + 1))


def permutation(shape: Shape) -> Work:
    """The whole permutation: experts [T, K] -> source and position [S], counts [E], offsets [E+1]."""
    return Work(flops=0, bytes=INDEX * (3 * shape.rows + 2 * shape.experts + 1))


def permutation_count(shape: Shape) -> Work:
    return Work(flops=0, bytes=INDEX * (shape.rows + shape.experts))


def permutation_scan(shape: Shape) -> Work:
    return Work(flops=0, bytes=INDEX * 2 * shape.experts)


def permutation_keep(shape: Shape) -> Work:
    return Work(flops=0, bytes=INDEX * (2 * shape.rows + shape.experts))


def permutation_place(shape: Shape) -> Work:
    return Work(flops=0, bytes=INDEX * (3 * shape.rows + 2 * shape.experts + 1))


def tile_tables(shape: Shape) -> Work:
    """Offsets -> (expert, first row) of every tile, for four tile sizes; the rows spread evenly over the experts."""
    used = min(shape.rows, shape.experts)
    tiles = sum(used * -(-shape.rows // (used * size)) for size in TILE_SIZES)
    return Work(flops=0, bytes=INDEX * (shape.experts + 1 + len(TILE_SIZES) + 2 * tiles))


def row_pieces(shape: Shape) -> Work:
    """Offsets -> the pieces of every expert's rows: one each (expert, first row, end), where they spread evenly."""
    return Work(flops=0, bytes=INDEX * (4 * shape.experts + 1))


def sum_pieces(shape: Shape) -> Work:
    """How many experts are split is read; where rows spread evenly none is, and there is nothing to add."""
    return Work(flops=0, bytes=INDEX)


FLOORS: dict[str, Callable[[Shape], Work]] = {
    "topk": topk,
    "topk_sums": topk_sums,
    "topk_backward": topk_backward,
    "permutation": permutation,
    "permutation_count": permutation_count,
    "permutation_scan": permutation_scan,
    "permutation_keep": permutation_keep,
    "permutation_place": permutation_place,
    "tile_tables": tile_tables,
    "row_pieces": row_pieces,
    "sum_pieces": sum_pieces,
    "up": up,
    "down": down,
    "combine": combine,
    "d_hidden": d_hidden,
    "d_router_weights": d_router_weights,
    "d_weight_down": d_weight_down,
    "d_weight_up": d_weight_up,
    "d_rows": d_rows,
    "narrow_gathered": narrow_gathered,
    "narrow_ordered": narrow_ordered,
    "d_adapter_gathered": narrow_gathered,
    "d_adapter_ordered": narrow_ordered,
    "d_bias_rows": d_bias_rows,
    "d_bias_gathered": d_bias_gathered,
}
EXPERTS_FORWARD = ("up", "down", "combine")
EXPERTS_BACKWARD = ("d_hidden", "d_router_weights", "d_weight_down", "d_weight_up", "d_rows", "combine")


def floor_s(kernels: tuple[str, ...], shape: Shape, device: Device) -> float:
    """Seconds that these kernels (of FLOORS) need one after another at least."""
    return sum(FLOORS[kernel](shape).floor_s(device, shape.dtype) for kernel in kernels)
