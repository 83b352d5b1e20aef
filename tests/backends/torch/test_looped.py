"""The loops that multiply experts' rows: float64's numbers whatever the sizes, and bits that depend on the row only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_triton.backends.torch import fused, looped
from moe_triton.backends.torch.blocks import Block
from moe_triton.backends.torch.processor import this_processor
from tests.helpers.compare import TOLERANCE, assert_close

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(not this_processor().has("avx512"), reason="the loops are for vectors of 512 bits")
HAS_PAIRS = pytest.mark.skipif(not this_processor().has("avx512_bf16"), reason="the processor multiplies no pairs")
BF16 = pytest.param(torch.bfloat16, marks=HAS_PAIRS)
COUNTS = (0, 1, 2, 3, 0, 4, 5, 8, 9, 17, 0, 70)  # rows of an expert: every number of rows that a tile has


@pytest.fixture(autouse=True)
def loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fused.VARIABLE, "1")


def block_of(counts: tuple[int, ...] = COUNTS) -> Block:
    parts, start = [], 0
    for e, count in enumerate(counts):
        if count:
            parts.append((e, slice(start, start + count)))
        start += count
    return Block(slice(0, start), slice(0, start), parts)


def guarded(num_rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """NaNs, and in the middle of them the place of a result, whose rows are apart."""
    memory = torch.full((num_rows + 2, columns + 3), torch.nan).to(dtype)
    return memory, memory[1 : num_rows + 1, :columns]


def drawn(size_in: int, size_out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    x, matrix = torch.randn(sum(COUNTS), size_in), torch.randn(len(COUNTS), size_out, size_in) / size_in**0.5
    return x.to(dtype), matrix.to(dtype), torch.randn(len(COUNTS), size_out).to(dtype)


def expected(x: Tensor, matrix: Tensor, block: Block, bias: Tensor | None = None) -> Tensor:
    return torch.cat(
        [x[part].double() @ matrix[e].double().T + (0 if bias is None else bias[e].double()) for e, part in block.parts]
    )


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("in_rows", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("size_in", "size_out"), [(2, 1), (16, 7), (38, 97), (64, 130), (130, 33)])
def test_products(size_in: int, size_out: int, dtype: torch.dtype, in_rows: bool, has_bias: bool) -> None:
    block, (x, matrix, bias) = block_of(), drawn(size_in, size_out, dtype)
    stored = matrix if in_rows else matrix.mT.contiguous().mT
    assert looped.reads(list(stored), dtype)
    memory, out = guarded(len(x), size_out, dtype)
    found = looped.multiply(block, x, lambda e: stored[e], bias if has_bias else None, out)
    assert found.data_ptr() == out.data_ptr()
    wanted = expected(x, matrix, block, bias if has_bias else None)
    assert_close(out, wanted, tolerance=TOLERANCE[dtype])
    assert int(memory.isnan().sum()) == memory.numel() - out.numel()  # nothing else is written
    with pytest.raises(AssertionError):
        assert_close(out, expected(x, matrix.roll(1, 0), block), tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("cache", [1 << 17, 1 << 10])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("size_out", "size_in"), [(1, 2), (7, 16), (97, 38), (130, 300), (33, 130)])
def test_gradients(
    size_out: int, size_in: int, dtype: torch.dtype, cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looped, "LEFT_BYTES", cache)
    monkeypatch.setattr(looped, "RIGHT_BYTES", 2 * cache)
    block = block_of()
    left, right = (torch.randn(sum(COUNTS), size).to(dtype) for size in (size_out, size_in))
    memory = torch.full((len(COUNTS), size_out, size_in + 3), torch.nan, dtype=dtype)
    looped.multiply_outer(block, left, right, memory[..., :size_in])
    wanted = {e: left[part].double().T @ right[part].double() for e, part in block.parts}
    for e, _ in block.parts:
        assert_close(memory[e, :, :size_in], wanted[e], tolerance=TOLERANCE[dtype])
    with pytest.raises(AssertionError):
        assert_close(memory[1, :, :size_in], wanted[2], tolerance=TOLERANCE[dtype])
    idle = [e for e, count in enumerate(COUNTS) if count == 0]
    assert memory[idle].isnan().all()
    assert memory[..., size_in:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("size_in", [32, 64, 80, 38])  # in whole vectors or not, in rows of whole cache lines or not
def test_gradients_written_past_the_caches(size_in: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    block, (left, right) = block_of(), (torch.randn(sum(COUNTS), size).to(dtype) for size in (33, size_in))
    found = []
    for streamed in (looped.STREAMED, 0):
        monkeypatch.setattr(looped, "STREAMED", streamed)
        for begin in (0, 1):
            memory = torch.full((len(COUNTS) * 33 * size_in + 160,), torch.nan, dtype=dtype)
            begin += -memory.data_ptr() % 64 // memory.element_size()
            grad = memory[begin : begin + len(COUNTS) * 33 * size_in].view(len(COUNTS), 33, size_in)
            looped.multiply_outer(block, left, right, grad)
            idle = [e for e, count in enumerate(COUNTS) if count == 0]
            assert grad[idle].isnan().all()
            looped.clear(grad, idle)
            assert not grad[idle].any()
            assert int(memory.isnan().sum()) == 160  # nothing else is written
            found.append(grad)
    assert all(torch.equal(grad, found[0]) for grad in found[1:])


def test_instructions_that_write_past_the_caches() -> None:
    from numba import cfunc, types

    from moe_triton.backends.torch import product_loops

    asm = cfunc(types.void(types.intp))(product_loops.outer_fp32)._library.get_asm_str()
    assert asm.count("vmovntps") == 24  # 8 rows of two vectors, and 4 rows
    assert asm.count("sfence") == 1


@pytest.mark.parametrize("count", [1, 2, 3, 8, 12])
def test_long_pieces_of_a_matrix_in_columns_change_no_bit(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block, columns = block_of((count, 0, count)), torch.randn(3, 640, 300).mT
    x = torch.randn(2 * count, 640)
    found = looped.multiply(block, x, columns.__getitem__)
    monkeypatch.setattr(looped, "FEW_ROWS", 0)
    assert torch.equal(found, looped.multiply(block, x, columns.__getitem__))
    assert_close(found, expected(x, columns, block), tolerance=TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_rows_bits_depend_on_it_alone(dtype: torch.dtype) -> None:
    x, matrix, _ = drawn(130, 97, dtype)
    block, columns = block_of(), matrix.mT.contiguous().mT
    for of in (matrix.__getitem__, columns.__getitem__):
        kept = looped.multiply(block, x, of, by_row=True)
        for rows in range(1, 9):
            alone = looped.multiply(block_of((0,) * 11 + (rows,)), x[-70 : rows - 70], of, by_row=True)
            assert torch.equal(alone, kept[-70 : rows - 70])


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    x, matrix, _ = drawn(130, 97, dtype)
    block, columns, threads = block_of(), matrix.mT.contiguous().mT, torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            grad = torch.zeros(len(COUNTS), 97, 130, dtype=dtype)
            by_rows = looped.multiply(block, x, matrix.__getitem__)
            looped.multiply_outer(block, by_rows, x, grad)
            found.append((by_rows, looped.multiply(block, x, columns.__getitem__), grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*pair) for other in found[1:] for pair in zip(found[0], other, strict=True))


def test_what_the_loops_do_not_read() -> None:
    dense = torch.empty(6, 8)
    assert looped.reads([dense, dense], torch.float32)
    assert looped.reads([dense.T], torch.float32)
    assert looped.reads([dense.bfloat16()], torch.bfloat16)
    assert not looped.reads([dense, torch.empty(6, 12)[:, :8]], torch.float32)
    assert not looped.reads([dense], torch.bfloat16)
    assert not looped.reads([dense[::2, ::2]], torch.float32)
    assert looped.reads([dense.bfloat16().T], torch.bfloat16)
    assert not looped.reads([dense.bfloat16()[:, :7]], torch.bfloat16)


def test_kinds_that_several_processes_have_compiled(tmp_path: Path) -> None:
    """Numba finds functions by their names: those of two kinds must not stand in for each other."""
    program = """
import os, sys, torch
from tests.backends.torch.test_looped import block_of, expected, drawn
from moe_triton.backends.torch import looped, loops  # numba, but nothing is compiled yet
for names in sys.argv[1:]:
    if os.fork() == 0:
        for name in names.split(","):
            torch.manual_seed(0)
            x, matrix, _ = drawn(38, 97, getattr(torch, name))
            wanted = expected(x, matrix, block_of())
            error = (looped.multiply(block_of(), x, matrix.__getitem__) - wanted).norm() / wanted.norm()
            assert error < 0.01, (name, float(error))
        sys.exit()
    _, status = os.wait()
    assert status == 0, names
"""
    kinds = ["float32", "bfloat16"] if this_processor().has("avx512_bf16") else ["float32"]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program, *kinds, ",".join(kinds)], check=True, env=environment)
    assert list(tmp_path.rglob("*.nbc"))
