"""Floors against numbers worked out by hand, and against the totals of the literature."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_triton import QuantizedWeight
from moe_triton_kernels.tiles import BLOCK_SIZES
from moe_triton_kernels.tools import floors
from moe_triton_kernels.tools.floors import DEVICES, EXPERTS_BACKWARD, EXPERTS_FORWARD, FLOORS, FP8_FLOORS, Shape, Work

# T = 6, d = 8, n = 4, E = 5, K = 2: S = 12, X 48, rows 96, A 48, W2 160 elements
SMALL = Shape(tokens=6, hidden=8, intermediate=4, experts=5, top_k=2)
BY_HAND = {  # kernel: (FLOPs, bytes) in bf16, gated
    "up": (2 * 12 * 4 * 8 * 2, 2 * (48 + 320 + 96 + 48)),
    "down": (768, 2 * (48 + 160 + 96)),
    "combine": (0, 2 * (96 + 48)),
    "decode": (0, 2 * 2 * 320),
    "decode_down": (0, 2 * 2 * 160),
    "d_hidden": (768, 2 * (48 + 160 + 96 + 96 + 48)),
    "d_weight_down": (768, 2 * (48 + 48 + 160)),
    "d_weight_up": (1536, 2 * (48 + 96 + 320)),
    "d_rows": (1536, 2 * (96 + 320 + 96)),
    **dict.fromkeys(("narrow_gathered", "d_adapter_gathered"), (2 * 12 * 8 * 16, 2 * (48 + 5 * 8 * 16 + 12 * 16))),
    **dict.fromkeys(("narrow_ordered", "d_adapter_ordered"), (2 * 12 * 4 * 16, 2 * (48 + 5 * 4 * 16 + 12 * 16))),
    "d_bias_rows": (0, 2 * (12 * 8 + 5 * 8)),
    "d_bias_gathered": (0, 2 * (48 + 40) + 12 * 8),
    "d_router_weights": (0, 12 * 12),
    "gate_forward": (2 * 6 * 5 * 8, 2 * (48 + 40) + 4 * 30),
    "gate_split": (0, 4 * 30 + 2 * 60),
    "gate_d_hidden": (2 * 480, 2 * (60 + 80 + 48 + 48)),
    "gate_d_weight": (2 * 480, 2 * (60 + 48) + 4 * 80),
    "topk": (0, 4 * (30 + 24 + 10 + 1)),
    "topk_sums": (0, 4 * 2 * 11),
    "topk_backward": (0, 4 * (60 + 24 + 6)),
    "permutation": (0, 4 * (36 + 11)),
    "permutation_count": (0, 4 * (12 + 5)),
    "permutation_scan": (0, 40),
    "permutation_keep": (0, 4 * (24 + 5)),
    "permutation_place": (0, 4 * (36 + 11)),
    "tile_tables": (0, 4 * (6 + 4 + 2 * 4 * 5)),  # 12 rows over 5 experts: one tile each, whatever its size
    "small_dispatch": (0, 4 * (36 + 11 + 4 + 2 * 4 * 5)),
    "small_route": (0, 4 * (30 + 48 + 15 + 2 + 4 + 2 * 4 * 5)),
    "address_table": (0, 8 * 5),
    "row_pieces": (0, 4 * (6 + 3 * 5)),  # offsets; expert, first row and end of each
    "sum_pieces": (0, 4),
}


# the same shape in fp8: X and A 48 codes and 4 * 1 bytes of scales, rows and dH 96 codes, W2 160, W1 320
FP8_BY_HAND = {
    "fp8_up": (1536, 96 + 4 + 320 + 4 + 2 * 96),  # of X and A together the scales of one group
    "fp8_down": (768, 48 + 4 + 160 + 4 + 2 * 96),
    "fp8_d_hidden": (768, 48 + 4 + 160 + 4 + 2 * 96 + 2 * (96 + 4) + 48 + 4),
    "fp8_d_rows": (1536, 96 + 4 + 320 + 4 + 2 * 96),
    "fp8_d_weight_down": (768, 96 + 4 + 48 + 4 + 2 * 160),
    "fp8_d_weight_up": (1536, 96 + 4 + 96 + 4 + 2 * 320),
    **dict.fromkeys(("fp8_d_bias_rows", "fp8_d_bias_gathered"), (0, 4 * 5 * 8 + 2 * 5 * 8)),  # a tile for each expert
    "mxfp8_rows": (1536, 416 + 13 + 2 * 96),
    "quantize_mx": (0, 2 * 48 + 48 + 2),
    "quantize_rows": (0, 2 * 48 + 48 + 4),
    "quantize_columns": (0, 2 * 48 + 96 + 4),
    "quantize_both": (0, 2 * 48 + 48 + 4 + 96 + 4),
    "quantize_weight": (0, 3 * 320 + 320 + 4),
    "quantize_weight_down": (0, 3 * 160 + 160 + 4),
    "tile_offsets": (0, 4 * 12),
}


@pytest.mark.parametrize("kernel", [*FLOORS, *FP8_FLOORS])
def test_by_hand(kernel: str) -> None:
    flops, bytes_ = (BY_HAND | FP8_BY_HAND)[kernel]
    assert (FLOORS | FP8_FLOORS)[kernel](SMALL) == Work(flops=flops, bytes=bytes_)


def test_products_of_codes_have_twice_the_flops() -> None:
    assert DEVICES["h100"].flops("fp8") == pytest.approx(2 * DEVICES["h100"].flops("bf16"), rel=1e-3)
    assert DEVICES["a100"].flops("fp8") == DEVICES["a100"].flops("bf16")  # which has no such products


def test_the_published_sums() -> None:
    """6TKnd FLOPs forward and 12TKnd backward; the bytes of one kernel at a time, in the terms of T, d, n, E, K."""
    t, d, n, e, k = 32768, 2048, 768, 128, 8
    shape = Shape(tokens=t, hidden=d, intermediate=n, experts=e, top_k=k)
    work = {name: FLOORS[name](shape) for name in FLOORS}
    assert sum(work[name].flops for name in EXPERTS_FORWARD) == 6 * t * k * n * d
    assert sum(work[name].flops for name in EXPERTS_BACKWARD) == 12 * t * k * n * d
    assert work["up"].bytes == 2 * t * d + 4 * e * n * d + 4 * t * k * n + 2 * t * k * n
    assert work["down"].bytes == 2 * t * k * n + 2 * e * n * d + 2 * t * k * d
    assert work["combine"].bytes == 2 * t * k * d + 2 * t * d
    assert work["d_hidden"].bytes == 2 * t * d + 2 * e * n * d + 8 * t * k * n + 2 * t * k * n
    assert work["d_weight_down"].bytes == 2 * t * d + 2 * t * k * n + 2 * e * n * d
    assert work["d_rows"].bytes == 4 * t * k * n + 4 * e * n * d + 2 * t * k * d
    assert work["d_weight_up"].bytes == 2 * t * d + 4 * t * k * n + 4 * e * n * d


def test_ungated_and_wider_dtypes() -> None:
    ungated, wide = replace(SMALL, gated=False), replace(SMALL, dtype="fp32")
    assert FLOORS["up"](ungated) == Work(flops=768, bytes=2 * (48 + 160 + 48 + 48))
    assert FLOORS["d_hidden"](ungated).bytes == 2 * (48 + 160 + 48 + 48 + 48)
    for kernel in (*EXPERTS_FORWARD, "d_hidden", "d_weight_up", "d_rows"):
        assert FLOORS[kernel](wide).bytes == 2 * FLOORS[kernel](SMALL).bytes
        assert FLOORS[kernel](wide).flops == FLOORS[kernel](SMALL).flops
    for kernel in ("topk", "topk_backward", "permutation", "tile_tables", "d_router_weights"):
        assert FLOORS[kernel](wide) == FLOORS[kernel](SMALL)  # fp32 and int32, whatever the model is


@pytest.mark.parametrize(("format", "bits"), [("mxfp4", 4 + 8 / 32), ("nvfp4", 4 + 8 / 16), ("fp8", 8 + 32 / 128**2)])
def test_quantised_projections(format: str, bits: float) -> None:
    """Their codes and scales take the place of two bytes an element, and nothing else changes."""
    shape = Shape(tokens=4, hidden=2048, intermediate=1024, experts=16, top_k=2)
    packed = replace(shape, format=format)
    numbers = 16 * 2048 * 1024
    for kernel, factor in (("up", 2), ("down", 1), ("d_hidden", 1), ("d_rows", 2)):
        plain, found = FLOORS[kernel](shape), FLOORS[kernel](packed)
        assert found.flops == plain.flops
        assert plain.bytes - found.bytes == factor * numbers * (16 - bits) / 8
    assert FLOORS["decode"](packed).bytes == 2 * numbers * (16 + bits) / 8
    assert FLOORS["d_weight_up"](packed) == FLOORS["d_weight_up"](shape)


def test_the_bits_of_integers_are_those_that_quantize_makes() -> None:
    for format, bits in floors.PACKED_BITS.items():
        weight = QuantizedWeight.quantize(torch.randn(1, 128, 128), format)
        assert weight.nbytes * 8 == pytest.approx(bits * 128 * 128 + 32 * (format == "nvfp4"))


def test_the_tile_tables_of_many_rows() -> None:
    shape = Shape(tokens=600, hidden=8, intermediate=4, experts=4, top_k=1)  # 150 rows: 10, 5, 3 and 2 tiles
    assert FLOORS["tile_tables"](shape).bytes == 4 * (5 + 4 + 2 * 4 * 20)
    assert floors.TILE_SIZES == BLOCK_SIZES


def test_the_floor_is_the_slower_of_the_two() -> None:
    h200 = DEVICES["h200"]
    assert Work(flops=790 * 10**12, bytes=0).floor_s(h200, "bf16") == pytest.approx(1.0)
    assert Work(flops=67 * 10**12, bytes=0).floor_s(h200, "fp32") == pytest.approx(1.0)
    assert Work(flops=790 * 10**12, bytes=86 * 10**11).floor_s(h200, "bf16") == pytest.approx(2.0)
    shape = Shape(tokens=32768, hidden=4096, intermediate=2048, experts=64, top_k=4)
    # 6 * 32768 * 4 * 2048 * 4096 FLOPs in the two products, 1.342 GB in combine
    assert floors.floor_s(EXPERTS_FORWARD, shape, h200) == pytest.approx(8.3506e-3 + 0.3121e-3, rel=1e-4)


def test_every_device_says_where_its_numbers_are_from() -> None:
    for name, device in DEVICES.items():
        assert device.name == name
        assert device.source.startswith("measured" if name == "h200" else "data-sheet peak")
        assert device.flops("bf16") == device.flops("fp16") > device.flops("fp32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 0}, "tokens: got 0, wanted at least 1"),
        ({"top_k": 6}, "top_k: got 6, wanted at most 5"),
        ({"dtype": "fp8"}, "dtype: got 'fp8', wanted one of bf16, fp16, fp32"),
        ({"format": "int3"}, "format: got 'int3', wanted one of mxfp4, nvfp4, fp8, int8, int4"),
    ],
)
def test_bad_shapes(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)
