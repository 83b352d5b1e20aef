"""Compiled loops over quantised projections: the numbers and bits of torch's own decoding, and when they run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moe_triton import QuantizedWeight
from moe_triton.backends.torch import decoded, fused, stored
from moe_triton.backends.torch.cpu import CpuPolicy, invariant_policy
from moe_triton.backends.torch.decoded import Decoded
from moe_triton.backends.torch.stored import in_planes, stored_codes
from tests.helpers.compare import relative_rms

numba = pytest.importorskip("numba")

E, OUT, IN = 3, 136, 256
KINDS: dict[str, dict[str, Any]] = {
    "mxfp4": {},
    "nvfp4": {},
    "fp8": {},
    "int8": {"group": 64},
    "int4": {"symmetric": False},
}
POLICY = CpuPolicy(shapes_recur=False)


def quantized(kind: str, scales: torch.dtype | None = None) -> QuantizedWeight:
    found = QuantizedWeight.quantize(torch.randn(E, OUT, IN), kind, **KINDS[kind])
    return found if scales is None else replace(found, scales=found.scales.to(scales))


def with_all_codes(weight: QuantizedWeight) -> QuantizedWeight:
    """Every byte is among the codes, and among the scales that are bytes: NaN too."""

    def every_byte(part: Tensor) -> Tensor:
        part.view(torch.uint8).view(-1)[:256] = torch.arange(256, dtype=torch.uint8)
        return part

    scales = every_byte(weight.scales) if weight.scales.element_size() == 1 else weight.scales
    return replace(weight, codes=every_byte(weight.codes), scales=scales)


def natural(planes: Tensor, count: int) -> Tensor:
    """Rows in planes -> in the order of columns."""
    return planes.unflatten(1, (count, -1)).mT.flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_decoding_has_the_bits_of_torch(kind: str, dtype: torch.dtype) -> None:
    weight = with_all_codes(quantized(kind))
    reader = stored_codes(weight, dtype)
    assert reader is not None
    for expert, rows, columns in ((0, slice(0, OUT), slice(0, IN)), (2, slice(128, OUT), slice(128, IN))):
        out = torch.empty(OUT, columns.stop - columns.start, dtype=dtype)
        found = natural(reader.decode(expert, rows, columns, out), reader.planes)
        expected = weight.dequantize(dtype, expert=expert, rows=rows, columns=columns)
        assert found.isnan().any() == (expert == 0 and kind in ("mxfp4", "nvfp4", "fp8"))
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
def test_few_rows(kind: str) -> None:
    weight, x = quantized(kind), torch.randn(8, IN)
    reader = stored_codes(weight, torch.float32)
    assert reader is not None
    found = reader.few_rows(x, [2, 0], [0, 7, 8])  # 4 + 2 + 1 rows, and 1
    dense = weight.dequantize(torch.float64)
    expected = torch.cat([x[:7].double() @ dense[2].T, x[7:].double() @ dense[0].T])
    assert relative_rms(found, expected) < 3e-7


@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float16])
def test_scales_of_16_bits(scales: torch.dtype) -> None:
    weight = quantized("int4", scales)
    reader = stored_codes(weight, torch.float32)
    assert reader is not None
    found = natural(reader.decode(1, slice(0, OUT), slice(0, IN), torch.empty(OUT, IN)), reader.planes)
    assert torch.equal(found, weight.dequantize(torch.float32, expert=1))


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_numbers_that_are_nan_or_large(kind: str) -> None:
    """A NaN makes its outputs NaN, and a number near the largest of fp32 stays one."""
    weight = quantized(kind)
    if kind == "mxfp4":
        weight.scales[0, 1, 0], weight.scales[0, 2, 0] = 255, 252
    else:
        weight.codes.view(torch.uint8)[0, 1, 5] = 0xFF
        weight.scales[0, 1] = 2.0**118
    x = torch.full((3, IN), 2.0**-20)
    reader = stored_codes(weight, torch.float32)
    assert reader is not None
    found, dense = reader.few_rows(x, [0], [0, 3]), weight.dequantize(torch.float64)[0]
    assert found.isnan().any(0).nonzero().tolist() == [[1]]
    expected = x.double() @ dense.T
    is_number = ~expected.isnan()
    assert expected[is_number].abs().max() > 2.0**100
    assert relative_rms(found[is_number], expected[is_number]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_products_of_few_and_of_many_rows(
    dtype: torch.dtype, is_transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert without rows, experts with few and one with many; a part of it in each product."""
    monkeypatch.setattr(decoded, "PART_BYTES", 1)
    weight = quantized("mxfp4")
    weight = weight.mT if is_transposed else weight
    parts = [(0, slice(0, 3)), (2, slice(3, 40))]
    x = torch.randn(40, weight.shape[2]).to(dtype)
    bias = torch.randn(E, weight.shape[1]).to(dtype)
    found = Decoded(weight, dtype).products(POLICY, parts, x, bias, None)
    dense = weight.dequantize(torch.float64)
    expected = torch.cat([x[rows].double() @ dense[e].T + bias[e].double() for e, rows in parts])
    assert found.dtype == dtype
    assert relative_rms(found, expected) < (1e-6 if dtype == torch.float32 else 4e-3)
    monkeypatch.setenv(fused.VARIABLE, "0")
    by_torch = Decoded(weight, dtype).products(POLICY, parts, x, bias, None)
    assert relative_rms(by_torch, found) < (1e-6 if dtype == torch.float32 else 4e-3)
    assert relative_rms(found[3:], expected[3:].roll(1, 0)) > 0.1  # the comparison can fail


def test_a_rows_bits_depend_on_it_alone_where_they_must_not() -> None:
    weight, x = quantized("mxfp4"), torch.randn(40, IN)
    whole = Decoded(weight, torch.float32).products(invariant_policy(), [(1, slice(0, 40))], x, None, None)
    x_padded = torch.cat([x[7:8], torch.zeros(31, IN)])
    alone = Decoded(weight, torch.float32).products(invariant_policy(), [(1, slice(0, 32))], x_padded, None, None)
    assert torch.equal(whole[7], alone[0])


def test_the_bits_depend_on_neither_threads_nor_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "WORTH_A_THREAD", 1)
    weight, x = quantized("mxfp4"), torch.randn(6, IN)
    reader = stored_codes(weight, torch.float32)
    assert reader is not None
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            decoded_part = reader.decode(1, slice(0, OUT), slice(0, IN), torch.empty(OUT, IN))
            found.append(torch.cat([reader.few_rows(x, [0, 2], [0, 5, 6]), decoded_part.T[:, :OUT]]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_projections_beyond_two_gigabytes_of_words() -> None:
    """Zeros that the system never writes to memory, but for the last expert's."""
    num_experts, rows, columns = 2050, 1024, 4096
    codes = torch.from_numpy(np.zeros((num_experts, rows, columns // 2), dtype=np.uint8))
    scales = torch.from_numpy(np.zeros((num_experts, rows, columns // 32), dtype=np.uint8))
    assert codes.numel() // 2 > 2**31
    scales[-1, -1] = 127
    codes[-1, -1] = 0x22
    reader = stored_codes(QuantizedWeight(format="mxfp4", codes=codes, scales=scales), torch.float32)
    assert reader is not None
    found = reader.few_rows(torch.ones(1, columns), [num_experts - 1], [0, 1])
    assert found[0, -1] == columns
    last = reader.decode(num_experts - 1, slice(rows - 1, rows), slice(0, columns), torch.empty(1, columns))
    assert torch.equal(last, torch.ones(1, columns))


def test_what_torch_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = quantized("fp8")
    assert stored_codes(weight, torch.float32) is not None
    assert stored_codes(weight, torch.float16) is None
    assert stored_codes(weight, torch.float64) is None
    assert "write no torch.float16" in fused.codes_in_words(torch.float16)
    assert "compiled loops" in fused.codes_in_words(torch.bfloat16)
    odd = QuantizedWeight.quantize(torch.randn(1, 4, 129), "fp8")
    assert stored_codes(odd, torch.float32) is None
    strided = replace(weight, codes=weight.codes.mT.contiguous().mT)
    assert stored_codes(strided, torch.float32) is None
    assert stored_codes(weight[:0], torch.float32) is None
    monkeypatch.setenv(fused.VARIABLE, "0")
    assert stored_codes(weight, torch.float32) is None
    assert fused.loops_in_words() == "none (MOE_TRITON_CPU_LOOPS=0)"
    assert fused.codes_in_words(torch.float32).endswith("in cache: MOE_TRITON_CPU_LOOPS=0")
    monkeypatch.setenv(fused.VARIABLE, "yes")
    with pytest.raises(ValueError, match="MOE_TRITON_CPU_LOOPS: got 'yes', wanted one of 0, 1"):
        stored_codes(weight, torch.float32)


def test_codes_at_an_odd_address() -> None:
    """As a file that is mapped to memory may have them."""
    weight = quantized("mxfp4")
    memory = torch.empty(weight.codes.numel() + 1, dtype=torch.uint8)
    codes = memory[1:].view(weight.codes.shape).copy_(weight.codes)
    reader = stored_codes(replace(weight, codes=codes), torch.float32)
    assert reader is not None
    found = natural(reader.decode(1, slice(0, OUT), slice(0, IN), torch.empty(OUT, IN)), reader.planes)
    assert torch.equal(found, weight.dequantize(torch.float32, expert=1))


def test_planes() -> None:
    x = torch.arange(12.0).view(2, 6)
    assert in_planes(x, 2)[0].tolist() == [[0, 2, 4], [1, 3, 5]]
    assert torch.equal(natural(in_planes(x, 3).flatten(1), 3), x)


def test_without_a_folder_that_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba then keeps nothing, and the loops run all the same."""
    from moe_triton.backends.torch import loops

    def refuse(function: Any, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return numba.njit(function, **options)

    monkeypatch.setattr(loops, "njit", refuse)
    assert loops.compiled(lambda x: x + 1)(1) == 2


def test_numba_that_cannot_be_imported() -> None:
    """Its ImportError, as for a numpy that it does not know, gives torch's path and a reason."""
    program = """
import sys
sys.modules["numba"] = None
import torch
from moe_triton import QuantizedWeight
from moe_triton.backends.torch.fused import loops_in_words
from moe_triton.backends.torch.stored import stored_codes
assert stored_codes(QuantizedWeight.quantize(torch.randn(1, 8, 32), "mxfp4"), torch.float32) is None
print(loops_in_words())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("none (numba cannot be imported")
    assert "pip install moe-triton[cpu]" in done.stdout


@pytest.mark.parametrize("name", ["rounded", "quickly_rounded"])
def test_rounding_to_bf16(name: str) -> None:
    """The nearest number, ties to even; quickly, subnormal numbers may become 0."""
    from moe_triton.backends.torch import loops

    rounded, small = getattr(loops, name), 2.0**-126

    @numba.njit
    def round_all(numbers: Any, out: Any) -> None:
        for i in range(len(numbers)):
            out[i] = rounded(numbers[i])

    bits = torch.randint(-(1 << 31), 1 << 31, (100_003,)).int()
    bits[:1000] = (bits[:1000] & ~0xFFFF) | 0x8000  # halfway between two
    numbers = torch.cat([bits.view(torch.float32), torch.tensor([0.0, -0.0, torch.inf, small, small / 3])])
    found = torch.empty(len(numbers), dtype=torch.bfloat16)
    round_all(numbers.numpy(), found.view(torch.uint16).numpy())
    expected = numbers.bfloat16()
    assert torch.equal(found.isnan(), expected.isnan())
    assert expected.isnan().any()
    is_zero = (name == "quickly_rounded") & (numbers.abs() < small) & (found == 0)
    assert torch.equal(
        found.nan_to_num(0)[~is_zero].view(torch.int16), expected.nan_to_num(0)[~is_zero].view(torch.int16)
    )
    assert is_zero.sum() < 0.01 * len(numbers)
