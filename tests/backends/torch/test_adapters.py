"""Adapters' products on a CPU, by torch and by compiled loops: float64's numbers, and bits that no thread changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_triton import Lora, moe_mlp
from moe_triton.backends.torch import adapters, fused, threads
from moe_triton.backends.torch.adapters import Adapter, LoopedAdapter, affine, affine_back
from moe_triton.backends.torch.blocks import Block, Layout
from moe_triton.backends.torch.cpu import CpuPolicy, invariant_policy
from moe_triton.backends.torch.fused import multiplies_pairs
from moe_triton.backends.torch.looped import multiply
from moe_triton.backends.torch.processor import this_processor
from tests.helpers.compare import TOLERANCE, assert_close, relative_rms

POLICY = CpuPolicy(shapes_recur=False, shared_block_rows=1000)
SIZES = (33, 0, 5, 70)  # rows of the experts: more than a piece, none, fewer than a tile, an odd number of pieces
SIZE_IN, SIZE_OUT = 70, 146  # neither is a multiple of a vector
SCALING = 0.5
E = len(SIZES)
EXPERT = torch.arange(E).repeat_interleave(torch.tensor(SIZES))  # of every row


@pytest.fixture(params=["torch", "loops"])
def kind(request: pytest.FixtureRequest) -> type[Adapter]:
    if request.param == "loops":
        pytest.importorskip("numba")
    return LoopedAdapter if request.param == "loops" else Adapter


def layout_of(sizes: tuple[int, ...] = SIZES, policy: CpuPolicy = POLICY) -> Layout:
    return Layout(torch.tensor([0, *sizes]).cumsum(0).int(), policy, 0)


def draw(rank: int, dtype: torch.dtype) -> tuple[Lora, dict[str, Tensor]]:
    """An adapter whose b lies as PEFT's, and rows of all that its products read or add to."""
    a = torch.randn(E, rank, SIZE_IN).to(dtype)
    b = torch.randn(SIZE_OUT, rank, E).to(dtype).permute(2, 0, 1)
    widths = {"x": SIZE_IN, "dx": SIZE_IN, "y": SIZE_OUT, "dy": SIZE_OUT}
    return Lora(a, b, SCALING), {name: torch.randn(sum(SIZES), width).to(dtype) for name, width in widths.items()}


def results(adapter: Adapter, rows: dict[str, Tensor], block: Block, *, keeps_u: bool = True) -> dict[str, Tensor]:
    """All that an adapter computes; gradients start as NaN but for experts that have no rows."""
    y, dx = rows["y"].clone(), rows["dx"].clone()
    adapter.add(block, rows["x"], y)
    u = adapter.add_back(block, rows["dy"], dx)
    grad_a, grad_b = torch.full_like(adapter.a, torch.nan), torch.full_like(adapter.b, torch.nan)
    for grad in (grad_a, grad_b):
        grad[1] = 0
    adapter.gradients(block, rows["x"], rows["dy"], u if keeps_u else None, grad_a, grad_b)
    return {"y": y, "dx": dx, "a": grad_a, "b": grad_b}


def expected(lora: Lora, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    a, b = lora.a.double(), lora.b.double()
    wide = {name: values.double() for name, values in rows.items()}
    expert = EXPERT
    t = lora.scaling * torch.einsum("mi,mri->mr", wide["x"], a[expert])
    u = lora.scaling * torch.einsum("mo,mor->mr", wide["dy"], b[expert])
    each = torch.nn.functional.one_hot(expert, E).double()
    return {
        "y": wide["y"] + torch.einsum("mr,mor->mo", t, b[expert]),
        "dx": wide["dx"] + torch.einsum("mr,mri->mi", u, a[expert]),
        "a": torch.einsum("me,mr,mi->eri", each, u, wide["x"]),
        "b": torch.einsum("me,mr,mo->eor", each, t, wide["dy"]),
    }


def assert_right(found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype) -> None:
    limit = 2e-6 if dtype == torch.float32 else TOLERANCE[dtype]
    for name, value in wanted.items():
        assert_close(found[name], value, tolerance=limit)
        with pytest.raises(AssertionError):
            assert_close(found[name].roll(1, 0), value, tolerance=limit)


@pytest.mark.parametrize("rank", [8, 16, 64, 34])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_of_float64(dtype: torch.dtype, rank: int, kind: type[Adapter]) -> None:
    lora, rows = draw(rank, dtype)
    layout = layout_of()
    (block,) = layout.blocks
    assert_right(results(kind(layout, lora), rows, block, keeps_u=rank != 8), expected(lora, rows), dtype)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("is_looped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beside_a_product(dtype: torch.dtype, is_looped: bool, has_bias: bool) -> None:
    """In the loops of the product, and after it: both directions, and u for the gradients that follow."""
    pytest.importorskip("numba")
    if is_looped and dtype == torch.bfloat16 and not multiplies_pairs(this_processor()):
        dtype = torch.float32  # as the policy does
    lora, rows = draw(34, dtype)
    weight = torch.randn(E, SIZE_OUT, SIZE_IN).to(dtype)
    biases = torch.randn(E, SIZE_OUT).to(dtype) if has_bias else None
    wide = {name: values.double() for name, values in rows.items()}
    zeros = {"y": torch.zeros_like(rows["y"]), "dx": torch.zeros_like(rows["dx"])}
    of_adapter = expected(lora, rows | zeros)
    of_weight = torch.einsum("mi,moi->mo", wide["x"], weight.double()[EXPERT])
    y = of_adapter["y"] + of_weight + (0 if biases is None else biases.double()[EXPERT])
    dx = of_adapter["dx"] + torch.einsum("mo,moi->mi", wide["dy"], weight.double()[EXPERT])

    layout = layout_of()
    layout.is_looped = is_looped
    adapter, (block,) = LoopedAdapter(layout, lora), layout.blocks
    into = torch.full_like(rows["y"], torch.nan)
    found = affine(layout, block, rows["x"], lambda e: weight[e], biases, adapter, into)
    assert found.data_ptr() == into.data_ptr() or not is_looped
    if is_looped and biases is None:
        after = multiply(block, rows["x"], lambda e: weight[e])
        adapter.add(block, rows["x"], after)
        few = EXPERT == 2  # of these rows the product is rounded before something is added, too
        assert torch.equal(into[few], after[few])
        once, twice = (relative_rms(found[~few], y[~few]) for found in (into, after))  # of others a sum is rounded once
        assert once < twice if dtype == torch.bfloat16 else once < 3e-7
    # in bf16 the loops read matrices in rows only
    back = weight.mT if dtype == torch.float32 else weight.mT.contiguous()
    found_dx, u = affine_back(layout, block, rows["dy"], lambda e: back[e], adapter)
    grad_a, grad_b = (torch.zeros_like(factor) for factor in (adapter.a, adapter.b))
    adapter.gradients(block, rows["x"], rows["dy"], u, grad_a, grad_b)
    wanted = {"into": y, "dx": dx, "a": of_adapter["a"], "b": of_adapter["b"]}
    assert_right({"into": into, "dx": found_dx, "a": grad_a, "b": grad_b}, wanted, dtype)


def test_pairs_without_the_instruction() -> None:
    """One tile: compiling whole loops for other processors than this one takes seconds."""
    numba = pytest.importorskip("numba")
    from moe_triton.backends.torch.vectors import LANES, tile

    run = tile(vectors=1, adds=False, is_bf16=True, has_instruction=False)

    @numba.njit
    def product(left: int, row: int, right: int, size_k: int, out: int, out_row: int, rows: int, columns: int) -> None:
        run(left, row, 4, right, 4 * LANES, size_k, out, out_row, rows, columns)

    left, right = torch.randn(5, 14).bfloat16(), torch.randn(14, LANES).bfloat16()
    pairs, out = right.unflatten(0, (7, 2)).mT.contiguous(), torch.full((6, 16), torch.nan).bfloat16()
    product(left.data_ptr(), 28, pairs.data_ptr(), 7, out.data_ptr(), 32, 5, 11)
    assert_close(out[:5, :11], left.double() @ right[:, :11].double(), tolerance=TOLERANCE[torch.bfloat16])
    assert out[5].isnan().all()
    assert out[:, 11:].isnan().all()


def test_the_bits_depend_on_neither_threads_nor_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    lora, rows = draw(16, torch.float32)
    layout = layout_of()
    (block,) = layout.blocks
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            adapter = LoopedAdapter(layout, lora)
            found.append(results(adapter, rows, block))
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(threads, "openmp_parallel", lambda: None)
    found.append(results(adapter, rows, block))  # on the calling thread
    for other in found[1:]:
        assert all(torch.equal(other[name], found[0][name]) for name in other)
    alone = rows["y"][40:41].clone()
    adapter.add(Block(slice(0, 1), slice(0, 1), [(3, slice(0, 1))]), rows["x"][40:41], alone)
    assert torch.equal(alone, found[0]["y"][40:41])


@pytest.mark.parametrize(
    ("dtype", "rank", "rows_each", "policy", "loops", "processor", "runs"),
    [
        (torch.float32, 5, 16, POLICY, "1", ("avx512",), True),
        (torch.bfloat16, 16, 16, POLICY, "1", ("avx512",), True),
        (torch.bfloat16, 5, 16, POLICY, "1", ("avx512",), False),  # no whole words
        (torch.float64, 16, 16, POLICY, "1", ("avx512",), False),
        (torch.float32, 16, 15, POLICY, "1", ("avx512",), False),  # few rows
        (torch.float32, 16, 16, invariant_policy(), "1", ("avx512",), False),
        (torch.float32, 16, 16, POLICY, "0", ("avx512",), False),
        (torch.float32, 16, 16, POLICY, "1", ("avx2",), False),
    ],
)
def test_when_loops_run(
    dtype: torch.dtype,
    rank: int,
    rows_each: int,
    policy: CpuPolicy,
    loops: str,
    processor: tuple[str, ...],
    runs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("numba")
    found = this_processor()._replace(instruction_sets=processor)
    monkeypatch.setattr(adapters, "this_processor", lambda: found)
    monkeypatch.setenv(fused.VARIABLE, loops)
    layout = layout_of((0, 2 * rows_each), policy)
    lora = Lora(torch.empty(2, rank, 8, dtype=dtype), torch.empty(2, 8, rank, dtype=dtype))
    assert adapters.runs_loops(layout, lora) == runs


def test_loops_need_threads_that_they_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "openmp_parallel", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not threads.knows_torchs_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert threads.knows_torchs_threads()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_with_several_adapters(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and all gradients of the whole operation, by loops, beside those by torch."""
    pytest.importorskip("numba")
    tokens, d, n = 40, 32, 24
    x, weights = torch.randn(tokens, d).to(dtype), torch.rand(tokens, 2).to(dtype)
    ids = torch.randint(1, E, (tokens, 2))  # expert 0 has no rows
    up, down = torch.randn(E, 2 * n, d).to(dtype) / d**0.5, torch.randn(E, d, n).to(dtype) / n**0.5
    factors = [
        torch.randn(E, *shape).to(dtype)
        for rank in (8, 16)
        for shape in ((rank, d), (2 * n, rank), (rank, n), (d, rank))
    ]
    grad, found, ran = torch.randn(tokens, d).to(dtype), [], []
    for runs in (False, True):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, weights, *factors)]
        by_up, by_down = ([Lora(*leaves[i : i + 2], SCALING) for i in at] for at in ((2, 6), (4, 8)))
        monkeypatch.setattr(adapters, "runs_loops", lambda *_, runs=runs: ran.append(runs) or runs)
        out = moe_mlp(leaves[0], ids, leaves[1], up, down, gate_up_lora=by_up, down_lora=by_down)
        found.append([out, *torch.autograd.grad(out, leaves, grad)])
    assert set(ran) == {False, True}
    for by_loops, by_torch in zip(found[1], found[0], strict=True):
        assert_close(by_loops, by_torch.double(), tolerance=2e-6 if dtype == torch.float32 else 2 * TOLERANCE[dtype])
        assert by_torch.abs().sum() > 0
