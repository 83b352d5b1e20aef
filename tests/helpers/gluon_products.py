"""Products that the Gluon emulator runs: their operands, their float64 answers, and how they end in many orders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from moe_triton import reference
from moe_triton_kernels.activations import Activation
from moe_triton_kernels.gluon.launch import PlacesArgument
from moe_triton_kernels.gluon.schedules import RingTile
from moe_triton_kernels.operands import BiasArgument
from moe_triton_kernels.tiles import TilesArgument
from tests.helpers.compare import assert_close
from tests.helpers.gluon_emulator import Deadlock, Emulator
from tests.helpers.gluon_memory import Descriptor, Pointer, Race

BLOCK_M, BLOCK_K = 8, 4
# four experts: the second has no row; the third has three tiles of BLOCK_M rows, so that a cluster's last is half empty
OFFSETS = np.array([0, 5, 5, 23, 26], np.int32)
NUM_ROWS = 30  # rows 26 to 29 belong to nobody
TOP_K = 2
STAGES = 3
EXPERTS = len(OFFSETS) - 1


def tiles(block_m: int) -> TilesArgument:
    entries = [(e, row) for e in range(EXPERTS) for row in range(OFFSETS[e], OFFSETS[e + 1], block_m)]
    table = np.array(entries, np.int32).reshape(-1)
    number = np.array([len(entries)], np.int32)
    return TilesArgument(Pointer(table), Pointer(number), Pointer(OFFSETS))


def matrices(random: np.random.Generator, size_k: int, size_columns: int) -> np.ndarray:
    """The experts' matrices [E, k, columns]; that of the expert without rows is NaN, and goes nowhere."""
    found = random.standard_normal((EXPERTS, size_k, size_columns)).astype(np.float32)
    found[1] = np.nan
    return found


def descriptor(weight: np.ndarray, k_contiguous: bool, width: int) -> Descriptor:
    """Of the matrices [E, k, columns], or of their transposes."""
    if k_contiguous:
        return Descriptor(weight.transpose(0, 2, 1), [1, width, BLOCK_K])
    return Descriptor(weight, [1, BLOCK_K, width])


def table(random: np.random.Generator, weight: np.ndarray, k_contiguous: bool, width: int) -> dict[str, Any]:
    """The same as matrices of their own: in any order in memory, at multiples of 16 bytes, with NaN between them."""
    stored = weight.transpose(0, 2, 1) if k_contiguous else weight
    _, rows, line = stored.shape
    starts = random.permutation(EXPERTS) * (rows * line // 4 + 2) * 4
    memory = np.full(starts.max() + rows * line, np.nan, np.float32)
    for start, matrix in zip(starts, stored, strict=True):
        memory[start : start + matrix.size] = matrix.reshape(-1)
    steps = np.lib.stride_tricks.as_strided(memory, (starts.max() // 4 + 1, rows, line), (16, 4 * line, 4))
    block = [1, width, BLOCK_K] if k_contiguous else [1, BLOCK_K, width]
    return {
        "weight": Descriptor(steps, block),
        "places": PlacesArgument(Pointer(2**40 + 4 * starts), 2**40, 16),
    }


class Case:
    """A product that the emulator runs, and its float64 answer."""

    def __init__(
        self,
        *,
        ping_pong: bool,
        stages: int,
        steps: int,
        k_contiguous: bool = True,
        tail: int = 0,
        ctas: int = 1,
        is_table: bool = False,
        seed: int = 0,
    ) -> None:
        """tail: k that the last step lacks. ctas: of a cluster. is_table: matrices that are arrays of their own."""
        self.random = np.random.default_rng(seed)
        self.k_contiguous, self.size_k = k_contiguous, steps * BLOCK_K - tail
        self.ping_pong, self.stages, self.ctas, self.block_m = ping_pong, stages, ctas, ctas * BLOCK_M
        self.is_table = is_table

    def weight(self, weight: np.ndarray, width: int) -> dict[str, Any]:
        if self.is_table:
            return table(self.random, weight, self.k_contiguous, width)
        return {"weight": descriptor(weight, self.k_contiguous, width), "places": None}

    def constants(self, block_n: int, parts: int = 2) -> dict[str, Any]:
        is_even = self.size_k % BLOCK_K == 0
        tile = RingTile(self.ping_pong, self.block_m, block_n, BLOCK_K, self.stages, 2, parts, is_even, self.ctas)
        return {"tiles": tiles(self.block_m), "K_CONTIGUOUS": self.k_contiguous, "TILE": tile}

    def rows(self, emulator: Emulator, programs: int = 2) -> None:
        """down: 24 columns in tiles of 16, with bias and router weights."""
        columns, block_n = 24, 16
        a = self.random.standard_normal((NUM_ROWS, self.size_k)).astype(np.float32)
        a[OFFSETS[-1] :] = np.nan
        weight = matrices(self.random, self.size_k, columns)
        bias = self.random.standard_normal((EXPERTS, columns)).astype(np.float32)
        router_weights = self.random.random(NUM_ROWS).astype(np.float32) + 0.1
        source = self.random.permutation(NUM_ROWS).astype(np.int32)
        out = np.full(NUM_ROWS * columns, np.nan, np.float32)
        emulator.launch(
            "down",
            "down_kernel",
            programs,
            a=Descriptor(a, [self.block_m if self.ping_pong else self.block_m // 2, BLOCK_K]),
            **self.weight(weight, block_n),
            bias=BiasArgument(Pointer(bias.reshape(-1)), columns, 1, 4, 1),
            router_weights=Pointer(router_weights),
            source=Pointer(source),
            out=Pointer(out),
            size_k=self.size_k,
            size_columns=columns,
            **self.constants(block_n),
        )
        result = torch.from_numpy(out).reshape(NUM_ROWS, columns)
        for e in range(EXPERTS):
            span = slice(OFFSETS[e], OFFSETS[e + 1])
            product = a[span].astype(np.float64) @ weight[e].astype(np.float64) + bias[e]
            assert_close(result[span], torch.from_numpy(product * router_weights[source[span], None]))
        assert result[OFFSETS[-1] :].isnan().all()

    def up(
        self,
        emulator: Emulator,
        activation: str = "swiglu",
        programs: int = 2,
        keep_h: bool = True,
        concatenated: bool = True,
    ) -> None:
        """up: 24 columns (and 24 of gate) in tiles of 16, gathered from NUM_ROWS / TOP_K tokens."""
        gated, size_n, block_n = activation == "swiglu", 24, 32
        projections = 2 if gated else 1
        width = block_n // projections if concatenated else block_n
        x = self.random.standard_normal((NUM_ROWS // TOP_K, self.size_k)).astype(np.float32)
        weight = matrices(self.random, self.size_k, projections * size_n)
        bias = self.random.standard_normal((EXPERTS, projections * size_n)).astype(np.float32)
        source = self.random.permutation(NUM_ROWS).astype(np.int32)
        source[OFFSETS[-1] :] = -1
        a = np.full(NUM_ROWS * size_n, np.nan, np.float32)
        h = np.full(NUM_ROWS * projections * size_n if keep_h else 0, np.nan, np.float32)
        emulator.launch(
            "up",
            "up_kernel",
            programs,
            x=Pointer(x.reshape(-1)),
            source=Pointer(source),
            **self.weight(weight, width),
            bias=BiasArgument(Pointer(bias.reshape(-1)), projections * size_n, 1, 4, 1),
            a=Pointer(a),
            h=Pointer(h) if keep_h else None,
            size_d=self.size_k,
            size_n=size_n,
            TOP_K=TOP_K,
            ACTIVATION=Activation(activation),
            CONCATENATED=concatenated,
            **self.constants(block_n, 2 if concatenated else 1),  # a column block of A has 8 at least
        )
        a_rows = torch.from_numpy(a).reshape(NUM_ROWS, size_n)
        h_rows = torch.from_numpy(h).reshape(-1, projections * size_n)
        for e in range(EXPERTS):
            span = slice(OFFSETS[e], OFFSETS[e + 1])
            expected = x[source[span] // TOP_K].astype(np.float64) @ weight[e].astype(np.float64) + bias[e]
            value = reference.activate(torch.from_numpy(expected), activation, concatenated)
            assert_close(a_rows[span], value, tolerance=1e-4)
            if keep_h:
                assert_close(h_rows[span], torch.from_numpy(expected))
        assert a_rows[OFFSETS[-1] :].isnan().all()
        assert h_rows[OFFSETS[-1] :].isnan().all()

    def d_hidden(
        self, emulator: Emulator, activation: str = "swiglu", programs: int = 2, concatenated: bool = True
    ) -> None:
        """d_hidden: 24 columns in tiles of 16, gradients gathered from NUM_ROWS / TOP_K tokens."""
        size_n, block_n = 24, 16
        width = 2 * size_n if activation == "swiglu" else size_n
        grad_out = self.random.standard_normal((NUM_ROWS // TOP_K, self.size_k)).astype(np.float32)
        weight = matrices(self.random, self.size_k, size_n)
        h = self.random.standard_normal((NUM_ROWS, width)).astype(np.float32)
        router_weights = self.random.random(NUM_ROWS).astype(np.float32) + 0.1
        source = self.random.permutation(NUM_ROWS).astype(np.int32)
        h[OFFSETS[-1] :], source[OFFSETS[-1] :] = np.nan, -1
        columns = {"weighted_a": size_n, "grad_h": width, "shares": -(-size_n // block_n)}
        outputs = {name: np.full(number * NUM_ROWS, np.nan, np.float32) for name, number in columns.items()}
        emulator.launch(
            "d_hidden",
            "d_hidden_kernel",
            programs,
            grad_out=Pointer(grad_out.reshape(-1)),
            source=Pointer(source),
            **self.weight(weight, block_n),
            h=Pointer(h.reshape(-1)),
            router_weights=Pointer(router_weights),
            **{name: Pointer(output) for name, output in outputs.items()},
            size_d=self.size_k,
            size_n=size_n,
            num_slots=NUM_ROWS,
            TOP_K=TOP_K,
            ACTIVATION=Activation(activation),
            CONCATENATED=concatenated,
            **self.constants(block_n),
        )
        found = {name: torch.from_numpy(output) for name, output in outputs.items()}
        weighted_a, grad_h = found["weighted_a"].view(NUM_ROWS, size_n), found["grad_h"].view(NUM_ROWS, width)
        shares = found["shares"].view(-1, NUM_ROWS).sum(0)
        for e in range(EXPERTS):
            span = slice(OFFSETS[e], OFFSETS[e + 1])
            grad_a = torch.from_numpy(grad_out[source[span] // TOP_K].astype(np.float64) @ weight[e])
            scale = torch.from_numpy(router_weights[source[span]]).double()[:, None]
            leaf = torch.from_numpy(h[span]).double().requires_grad_()
            a = reference.activate(leaf, activation, concatenated)
            (expected,) = torch.autograd.grad(a, leaf, grad_a * scale)
            a = a.detach()
            assert_close(weighted_a[span], a * scale, tolerance=1e-4)
            assert_close(grad_h[span], expected, tolerance=1e-4)
            assert_close(shares[span], (grad_a * a).sum(1), tolerance=1e-4)
        for output in (weighted_a, grad_h, shares):
            assert output[OFFSETS[-1] :].isnan().all()


PACES = (0.2, 1, 0.2, 1), (0.02, 1, 1, 1)


def outcomes(
    changes: dict[str, str],
    *,
    gathered: bool,
    ping_pong: bool,
    steps: int = 5,
    ctas: int = 1,
    paces: Sequence[Sequence[float]] = PACES,
    meets: bool = True,
    orders: int = 12,
) -> set[str]:
    """How so many orders of events end, with these changes to the source."""
    found = set()
    for seed in range(orders):
        case = Case(ping_pong=ping_pong, stages=STAGES, steps=steps, ctas=ctas)
        emulator = Emulator(seed, paces[seed % len(paces)], changes, meets)
        try:
            (case.up if gathered else case.rows)(emulator)
        except (AssertionError, Race, Deadlock) as error:
            found.add({AssertionError: "wrong", Race: "race", Deadlock: "deadlock"}[type(error)])
        else:
            found.add("right")
    return found
