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

    decode            0        bits/8 fEnd + sfEnd           codes and scales of W1 -> numbers
    decode_down       0        bits/8 End + sEnd             codes and scales of W2 -> numbers

Where projections are quantised, `PACKED_BITS` take the place of the 8s bits of each of their elements in up, down,
d_hidden and d_rows.

In fp8 (`FP8_FLOORS`), codes have one byte, and four more for each group of 128 (rows) or 16384 (weights).

An adapter's part of up, down, d_hidden and d_rows, r in d or n of their work, is left out.
Row indices and router weights (a few bytes per row) are left out where whole rows move, and make up the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_triton_kernels.tools.gpus import GPUS, Gpu

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
INDEX = 4  # bytes of an int32 index, of a router weight and of a logit: the router computes in fp32
# bits of a number with its share of the scales: those of int8 are fp32 for 128 numbers, those of int4 for 32
PACKED_BITS = {"mxfp4": 4.25, "nvfp4": 4.5, "fp8": 8 + 32 / 128**2, "int8": 8.25, "int4": 5.0}
TILE_SIZES = (16, 32, 64, 128)  # rows per tile of the tables


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One MoE layer and its tokens.

    ValueError on sizes below 1, K above E, another dtype than bf16, fp16, fp32, and an unknown format.
    """

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    dtype: str = "bf16"
    gated: bool = True
    rank: int = 16  # of adapters
    format: str | None = None  # of quantised projections

    def __post_init__(self) -> None:
        for name in ("tokens", "hidden", "intermediate", "experts", "top_k", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted at least 1")
        if self.top_k > self.experts:
            raise ValueError(f"top_k: got {self.top_k}, wanted at most {self.experts}, the experts")
        if self.dtype not in ITEMSIZE:
            raise ValueError(f"dtype: got {self.dtype!r}, wanted one of {', '.join(ITEMSIZE)}")
        if self.format is not None and self.format not in PACKED_BITS:
            raise ValueError(f"format: got {self.format!r}, wanted one of {', '.join(PACKED_BITS)}")

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

    def packed(self, numbers: int) -> int:
        """Bytes of so many numbers of the experts' projections."""
        return self.itemsize * numbers if self.format is None else int(PACKED_BITS[self.format] * numbers / 8)

    @property
    def x(self) -> int:
        """Elements of X [T, d]."""
        return self.tokens * self.hidden

    @property
    def y(self) -> int:
        """Elements of the rows [S, d]."""
        return self.rows * self.hidden

    @property
    def a(self) -> int:
        """Elements of the activation A [S, n]."""
        return self.rows * self.intermediate

    @property
    def logits(self) -> int:
        """Elements of the logits [T, E]."""
        return self.tokens * self.experts

    @property
    def router(self) -> int:
        """Elements of the router's weight [E, d]."""
        return self.experts * self.hidden

    @property
    def w2(self) -> int:
        """Elements of W2 [E, d, n]."""
        return self.experts * self.intermediate * self.hidden


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a GPU can do: FLOP/s of dense 8-bit, 16-bit and fp32 products, bytes/s of main memory, and who says so.

    flops_8 is flops_16 where there are no such products.
    """

    name: str
    flops_8: float
    flops_16: float
    flops_32: float
    bandwidth: float
    source: str

    def flops(self, dtype: str) -> float:
        return {"fp8": self.flops_8, "fp32": self.flops_32}.get(dtype, self.flops_16)


def _device(name: str, gpu: Gpu) -> Device:
    flops, bandwidth = gpu.measured or (gpu.fp16_flops, gpu.bandwidth)
    measured = "measured: 8192^3 bf16 product, device copy; fp32, fp8: "
    source = f"{measured if gpu.measured else ''}data-sheet peak, {gpu.product}"
    return Device(
        name=name,
        flops_8=gpu.fp8_flops or flops,
        flops_16=flops,
        flops_32=gpu.fp32_flops,
        bandwidth=bandwidth,
        source=source,
    )


DEVICES = {name: _device(name, gpu) for name, gpu in GPUS.items()}


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one launch has to compute (FLOPs of matrix products) and to move (bytes)."""

    flops: int
    bytes: int

    def floor_s(self, device: Device, dtype: str) -> float:
        """Seconds: max(FLOPs / P, bytes / bandwidth)."""
        return max(self.flops / device.flops(dtype), self.bytes / device.bandwidth)


def _product(shape: Shape, factor: int, elements: int, projection: int = 0) -> Work:
    """A grouped product of all rows with `factor` * n * d weights each: it moves so many elements, and of weights."""
    flops = 2 * factor * shape.rows * shape.intermediate * shape.hidden
    return Work(flops=flops, bytes=shape.itemsize * elements + shape.packed(projection))


def _values(count: int) -> Work:
    """Indices, router weights and logits: int32 and fp32, whatever the model's dtype is."""
    return Work(flops=0, bytes=INDEX * count)


def _narrow(shape: Shape, rows: int, width: int) -> Work:
    """Between rows of this width, rows of the rank, and a factor of every expert."""
    elements = rows * width + (shape.experts * width + shape.rows) * shape.rank
    return Work(flops=2 * shape.rows * width * shape.rank, bytes=shape.itemsize * elements)


def _gate(shape: Shape, parts: int, narrow: int, wide: int) -> Work:
    """So many products of tokens, experts and d, with this many elements of 16 and of 32 bits."""
    return Work(flops=2 * parts * shape.logits * shape.hidden, bytes=2 * narrow + 4 * wide)


def _tiles(shape: Shape, sizes: Sequence[int] = TILE_SIZES) -> int:
    """Entries of the tables of these tile sizes, where the rows spread evenly over the experts."""
    used = min(shape.rows, shape.experts)
    return sum(used * -(-shape.rows // (used * size)) for size in sizes)


FLOORS: dict[str, Callable[[Shape], Work]] = {
    # X, 16-bit weight -> fp32 logits
    "gate_forward": lambda s: _gate(s, 1, s.x + s.router, s.logits),
    # fp32 gradient of the logits -> two 16-bit parts
    "gate_split": lambda s: _gate(s, 0, 2 * s.logits, s.logits),
    # two parts of the gradient, the weight for each, the gradient to add to -> gradient of X
    "gate_d_hidden": lambda s: _gate(s, 2, 2 * s.logits + 2 * s.router + 2 * s.x, 0),
    # two parts of the gradient, X -> a gradient of the weight of each
    "gate_d_weight": lambda s: _gate(s, 2, 2 * s.logits + s.x, 2 * s.router),
    # logits [T, E] -> experts and weights [T, K], counts and score sums [E], z sum
    "topk": lambda s: _values(s.tokens * s.experts + 2 * s.rows + 2 * s.experts + 1),
    # at least one partial sum of each is read, and the total written
    "topk_sums": lambda s: _values(2 * (2 * s.experts + 1)),
    # logits, experts, gradients of weights and sums -> gradient of the logits
    "topk_backward": lambda s: _values(2 * s.tokens * s.experts + 2 * s.rows + s.experts + 1),
    # the whole permutation: experts [T, K] -> source and position [S], counts [E], offsets [E+1]
    "permutation": lambda s: _values(3 * s.rows + 2 * s.experts + 1),
    "permutation_count": lambda s: _values(s.rows + s.experts),
    "permutation_scan": lambda s: _values(2 * s.experts),
    "permutation_keep": lambda s: _values(2 * s.rows + s.experts),
    "permutation_place": lambda s: _values(3 * s.rows + 2 * s.experts + 1),
    # offsets -> (expert, first row) of every tile, for four tile sizes
    "tile_tables": lambda s: _values(s.experts + 1 + len(TILE_SIZES) + 2 * _tiles(s)),
    # the whole permutation and the tile tables, without reading the offsets again
    "small_dispatch": lambda s: _values(3 * s.rows + 2 * s.experts + 1 + len(TILE_SIZES) + 2 * _tiles(s)),
    # logits -> what topk and small_dispatch write, the counts once
    "small_route": lambda s: _values(
        s.tokens * s.experts + 4 * s.rows + 3 * s.experts + 2 + len(TILE_SIZES) + 2 * _tiles(s)
    ),
    # a whole table: one address of 8 bytes for every expert
    "address_table": lambda s: _values(2 * s.experts),
    # offsets -> the pieces of every expert's rows: one each (expert, first row, end), where they spread evenly
    "row_pieces": lambda s: _values(4 * s.experts + 1),
    # how many experts are split is read: none, where rows spread evenly, and there is nothing to add
    "sum_pieces": lambda s: _values(1),
    "up": lambda s: _product(s, s.factor, s.x + s.factor * s.a + s.a, s.factor * s.w2),
    "down": lambda s: _product(s, 1, s.a + s.y, s.w2),
    "combine": lambda s: _product(s, 0, s.y + s.x),
    "d_hidden": lambda s: _product(s, 1, s.x + 2 * s.factor * s.a + s.a, s.w2),
    "d_router_weights": lambda s: _values(3 * s.rows),  # one share and one index per row -> one gradient per row
    "d_weight_down": lambda s: _product(s, 1, s.x + s.a + s.w2),
    "d_weight_up": lambda s: _product(s, s.factor, s.x + s.factor * (s.a + s.w2)),
    "d_rows": lambda s: _product(s, s.factor, s.factor * s.a + s.y, s.factor * s.w2),
    # codes and scales of W1, of W2 -> its numbers
    "decode": lambda s: _product(s, 0, s.factor * s.w2, s.factor * s.w2),
    "decode_down": lambda s: _product(s, 0, s.w2, s.w2),
    # X or dO, factor -> t or u; X or dO, u or t -> the factor's gradient
    "narrow_gathered": lambda s: _narrow(s, s.tokens, s.hidden),
    "d_adapter_gathered": lambda s: _narrow(s, s.tokens, s.hidden),
    # A, factor -> t; w*A, u -> the factor's gradient
    "narrow_ordered": lambda s: _narrow(s, s.rows, s.intermediate),
    "d_adapter_ordered": lambda s: _narrow(s, s.rows, s.intermediate),
    # db1: dH -> [E, fn]
    "d_bias_rows": lambda s: _product(s, 0, (s.rows + s.experts) * s.factor * s.intermediate),
    # db2: dO [T, d], each row's index and router weight -> [E, d]
    "d_bias_gathered": lambda s: Work(
        flops=0, bytes=s.itemsize * (s.tokens + s.experts) * s.hidden + 2 * INDEX * s.rows
    ),
}


def _codes(elements: int, group: int = 128) -> int:
    """Bytes of codes and of their fp32 scales."""
    return elements + 4 * -(-elements // group)


def _fp8_product(shape: Shape, factor: int, codes: int, elements: int) -> Work:
    """A product of rows of so many codes by `factor` * n * d weights of each expert; 16-bit elements move too."""
    weights = _codes(factor * shape.w2, 128**2)
    return Work(flops=_product(shape, factor, 0).flops, bytes=_codes(codes) + weights + shape.itemsize * elements)


def _fp8_gradient(shape: Shape, factor: int) -> Work:
    """Of rows [S, d] and rows [S, factor * n], both codes."""
    codes = _codes(shape.y) + _codes(factor * shape.a)
    return Work(flops=_product(shape, factor, 0).flops, bytes=codes + shape.itemsize * factor * shape.w2)


def _sum_of_tiles(shape: Shape, columns: int) -> Work:
    """Sums of tiles of 128 rows -> [E, columns]."""
    return Work(flops=0, bytes=(4 * _tiles(shape, (128,)) + shape.itemsize * shape.experts) * columns)


def _quantize_weight(shape: Shape, factor: int) -> Work:
    numbers = factor * shape.w2
    return Work(flops=0, bytes=(shape.itemsize + 1) * numbers + _codes(numbers, 128**2))


FP8_FLOORS: dict[str, Callable[[Shape], Work]] = {
    # codes of X and W1 -> H, codes of A
    "fp8_up": lambda s: _fp8_product(s, s.factor, s.x + s.a, s.factor * s.a),
    "fp8_down": lambda s: _fp8_product(s, 1, s.a, s.y),
    # codes of dO and W2, H -> codes of dH both ways, and of w*A along its rows
    "fp8_d_hidden": lambda s: Work(
        flops=_product(s, 1, 0).flops,
        bytes=_fp8_product(s, 1, s.x, s.factor * s.a).bytes + 2 * _codes(s.factor * s.a) + _codes(s.a),
    ),
    "fp8_d_rows": lambda s: _fp8_product(s, s.factor, s.factor * s.a, s.y),
    "fp8_d_weight_down": lambda s: _fp8_gradient(s, 1),
    "fp8_d_weight_up": lambda s: _fp8_gradient(s, s.factor),
    # where d_hidden makes codes, and sums with them; elsewhere dH is read, as without codes
    "fp8_d_bias_rows": lambda s: _sum_of_tiles(s, s.factor * s.intermediate),
    "fp8_d_bias_gathered": lambda s: _sum_of_tiles(s, s.hidden),
    # codes of dH and W1, of which 32 share a byte -> dX rows
    "mxfp8_rows": lambda s: Work(
        flops=_product(s, s.factor, 0).flops,
        bytes=s.factor * (s.a + s.w2) + -(-s.factor * (s.a + s.w2) // 32) + s.itemsize * s.y,
    ),
    "quantize_mx": lambda s: Work(flops=0, bytes=(s.itemsize + 1) * s.x + -(-s.x // 32)),
    # X -> codes; X -> codes of every expert's rows; W1, and W2 -> codes for both directions
    "quantize_rows": lambda s: Work(flops=0, bytes=s.itemsize * s.x + _codes(s.x)),
    "quantize_columns": lambda s: Work(flops=0, bytes=s.itemsize * s.x + _codes(s.y)),
    # dO -> codes, and codes of every expert's rows
    "quantize_both": lambda s: Work(flops=0, bytes=s.itemsize * s.x + _codes(s.x) + _codes(s.y)),
    "quantize_weight": lambda s: _quantize_weight(s, s.factor),
    "quantize_weight_down": lambda s: _quantize_weight(s, 1),
    "tile_offsets": lambda s: _values(2 * (s.experts + 1)),
}
EXPERTS_FORWARD = ("up", "down", "combine")
EXPERTS_BACKWARD = ("d_hidden", "d_router_weights", "d_weight_down", "d_weight_up", "d_rows", "combine")


def floor_s(kernels: tuple[str, ...], shape: Shape, device: Device) -> float:
    """Seconds that these kernels (of FLOORS) need one after another at least."""
    return sum(FLOORS[kernel](shape).floor_s(device, shape.dtype) for kernel in kernels)
