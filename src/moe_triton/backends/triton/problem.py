"""One call of the experts as the kernels take it. Records and their shapes: `moe_triton.records`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_triton.backends.triton.parameters import Factors, activation_of, matrices, vectors
from moe_triton.kinds import MOST_KINDS
from moe_triton.records import (
    ExpertCall,
    TiledDispatch,
    Wanted,
    matrix_shape,
)
from moe_triton_kernels import launch
from moe_triton_kernels.combine import combine
from moe_triton_kernels.configs import choose_config, shipped_table, user_table
from moe_triton_kernels.d_hidden import DHidden, Into
from moe_triton_kernels.d_router_weights import d_router_weights
from moe_triton_kernels.d_weight import d_bias, d_weight
from moe_triton_kernels.down import Down
from moe_triton_kernels.fp8 import RowCodes
from moe_triton_kernels.heuristics import BUCKETS, adapter_tile, decodes_in_loop
from moe_triton_kernels.launch import Config, target_of
from moe_triton_kernels.narrow import narrow
from moe_triton_kernels.operands import PerExpert, per_expert
from moe_triton_kernels.quantized import decode
from moe_triton_kernels.tiles import TileTables, tile_tables
from moe_triton_kernels.up import Up

ALL = Wanted()


class Prepared:
    """What all calls of one kind have in common. It keeps no tensor.

    layouts  of the projections, as `Problem` has them, and of the biases; None for one that is not a single tensor
    kernels  operation -> its kernel's launch, prepared when the first call gets there; or its configuration alone
    """

    def __init__(self, call: ExpertCall) -> None:
        spec, parameters = call.spec, call.parameters
        self.activation = activation_of(spec, call.hidden.dtype)
        self.top_k, self.num_rows, self.num_experts = call.dispatched.top_k, call.num_rows, call.num_experts
        self.size_n, self.size_d = matrix_shape(parameters.down)[:: 1 if spec.is_transposed else -1]
        swaps = (not spec.is_transposed, not spec.is_transposed, False, False)
        self.layouts = [
            per_expert(given, transposed=swap).layout if isinstance(given, Tensor) else None
            for given, swap in zip(parameters, swaps, strict=False)
        ]
        self.is_adapted = call.gate_up_lora is not None or call.down_lora is not None
        self.kernels: dict[str, Any] = {}


def prepared_for(call: ExpertCall) -> Prepared:
    """What was prepared for calls of this kind, on this device, with these tables and this compiler."""
    kind = call.kind
    if kind is None:
        return Prepared(call)
    key = (kind, target_of(call.hidden.device), launch.compiler_fences(), user_table(), shipped_table())
    found = _PREPARED.get(key)
    if found is None:
        if len(_PREPARED) >= MOST_KINDS:
            _PREPARED.clear()
        found = _PREPARED[key] = Prepared(call)
    return found


_PREPARED: dict[tuple[Any, ...], Prepared] = {}


class Problem:
    """One call as the kernels take it: contiguous tensors, the sizes, and the configuration of each kernel.

    gate_up and down are as the forward product reads them: [d, n or 2n] and [n, d].
    """

    def __init__(self, call: ExpertCall) -> None:
        prepared, spec, parameters = prepared_for(call), call.spec, call.parameters
        self.call, self.spec, self.dispatched, self.kernels = call, spec, call.dispatched, prepared.kernels
        self.hidden, self.weights = call.hidden.contiguous(), call.weights.contiguous()
        self.activation, self.size_n, self.size_d = prepared.activation, prepared.size_n, prepared.size_d
        self.top_k, self.num_rows, self.num_experts = prepared.top_k, prepared.num_rows, prepared.num_experts
        swap, (gate_up, down, gate_up_bias, down_bias) = not spec.is_transposed, prepared.layouts
        self.gate_up = matrices(parameters.gate_up, gate_up, transposed=swap)
        self.down = matrices(parameters.down, down, transposed=swap)
        up_vectors, down_vectors = parameters.gate_up_bias, parameters.down_bias
        self.gate_up_bias = None if up_vectors is None else vectors(up_vectors, gate_up_bias)
        self.down_bias = None if down_vectors is None else vectors(down_vectors, down_bias)
        self.gate_up_lora: Factors | None = None
        self.down_lora: Factors | None = None
        if prepared.is_adapted:
            gate_up_lora, down_lora = call.gate_up_lora, call.down_lora
            self.gate_up_lora = None if gate_up_lora is None else Factors(gate_up_lora)
            self.down_lora = None if down_lora is None else Factors(down_lora)

    def tiles(self) -> TileTables:
        if isinstance(self.dispatched, TiledDispatch) and self.dispatched.tiles is not None:
            return self.dispatched.tiles
        return tile_tables(self.dispatched.offsets, self.num_rows)

    @property
    def operand_dtype(self) -> torch.dtype:
        """The dtype of what the products multiply."""
        return self.hidden.dtype

    def gate_up_operand(self, *, back: bool = False) -> PerExpert:
        """The projection as the product reads it, or with `back` as the one for the gradient of its input does."""
        return self.gate_up.transposed() if back else self.gate_up

    def down_operand(self, *, back: bool = False) -> PerExpert:
        return self.down.transposed() if back else self.down

    def rows_operand(self, x: Any) -> Tensor | RowCodes:
        """Rows, contiguous, as a product with a projection reads them."""
        return x

    def config(self, op: str, weight: PerExpert | None = None) -> Config:
        """How the kernel of this op is launched; weight: what it multiplies by."""
        name = f"{op}_gated" if self.activation.is_gated and op in ("up", "d_hidden") else op
        return choose_config(
            name,
            d=self.size_d,
            n=self.size_n,
            dtype=self.operand_dtype,
            num_rows=self.rows_of_config(op),
            num_experts=self.num_experts,
            architecture=target_of(self.hidden.device).architecture,
            format=None if weight is None or weight.decoding is None else weight.decoding.format,
        )

    def rows_of_config(self, op: str) -> int:
        return rows_of_config(self.call) if op in ("up", "down") else self.num_rows

    def read(self, projection: PerExpert, op: str) -> PerExpert:
        """The projection as the kernel of this op reads it; a quantised one as codes, or decoded for this one use."""
        if projection.decoding is None:
            return projection
        half = self.size_n if op == "up" and self.spec.is_gated and self.spec.is_concatenated else None
        rows_per_expert = self.rows_of_config(op) / max(self.num_experts, 1)
        decoding, itemsize = projection.decoding, self.hidden.element_size()
        if decodes_in_loop(decoding.format, rows_per_expert, itemsize, block=decoding.block[1], half=half):
            return projection
        return decode(projection, self.hidden.dtype)

    def up(self, tiles: TileTables, *, keep_a: bool, keep_h: bool) -> tuple[Any, Tensor]:
        """The activation [S, n] for `down_rows`, and the pre-activation [S, 2n or n]; empty [0] where not kept."""
        weight, lora, x = self.gate_up_operand(), self.gate_up_lora, self.rows_operand(self.hidden)
        if weight.decoding is not None:
            weight = self.read(weight, "up")
        up = self.kernels.get("up")
        if up is None:
            up = self.kernels["up"] = Up(
                x,
                tiles,
                weight,
                size_n=self.size_n,
                top_k=self.top_k,
                activation=self.activation,
                is_concatenated=self.spec.is_concatenated,
                config=self.config("up", weight),
            )
        return up(
            x,
            self.dispatched.source,
            tiles,
            weight if lora is None else lora.forward(weight, self.t_gate_up(tiles)),
            self.gate_up_bias,
            keep_activation=keep_a,
            keep_preactivation=keep_h,
        )

    def down_rows(self, a: Any, tiles: TileTables) -> Tensor:
        """Every row's output times its router weight [S, d]."""
        return self._down_rows(a, a, tiles)

    def _down_rows(self, a: Tensor | RowCodes, of_adapter: Tensor, tiles: TileTables) -> Tensor:
        """The same of the activation as the product and as the adapter reads it."""
        weight, lora = self.down_operand(), self.down_lora
        if weight.decoding is not None:
            weight = self.read(weight, "down")
        down = self.kernels.get("down") or self._rows_times("down", a, tiles, weight)
        return down(
            a,
            tiles,
            weight if lora is None else lora.forward(weight, self.t_down(of_adapter, tiles)),
            bias=self.down_bias,
            router_weights=self.weights,
            source=self.dispatched.source,
        )

    def d_hidden(
        self, grad_out: Tensor, h: Tensor, tiles: TileTables, u: Tensor | None = None, wanted: Wanted = ALL
    ) -> tuple[Any, Any, Tensor]:
        """Weighted activation [S, n], pre-activation's gradient, and shares of the router weights' gradient.

        The first two are for the gradients that are wanted; `numbers` gives them as tensors.
        """
        return self._d_hidden(self.rows_operand(grad_out), h, tiles, u)

    def _d_hidden(
        self, grad_out: Tensor | RowCodes, h: Tensor, tiles: TileTables, u: Tensor | None, into: Into | None = None
    ) -> tuple[Any, Any, Tensor]:
        weight = self._backward(self.down_operand(back=True), self.down_lora, u, "d_hidden")
        d_hidden = self.kernels.get("d_hidden")
        if d_hidden is None:
            d_hidden = self.kernels["d_hidden"] = DHidden(
                grad_out,
                tiles,
                weight,
                size_n=self.size_n,
                top_k=self.top_k,
                activation=self.activation,
                is_concatenated=self.spec.is_concatenated,
                config=self.config("d_hidden", weight),
            )
        return d_hidden(grad_out, self.dispatched.source, tiles, weight, h, self.weights, into)

    def numbers(self, rows: Any) -> Tensor:
        """What `d_hidden` gave as [S, ...], for biases and adapters; an empty [0] where none reads them."""
        return rows

    def _backward(self, projection: PerExpert, lora: Factors | None, u: Tensor | None, op: str) -> PerExpert:
        weight = projection if projection.decoding is None else self.read(projection, op)
        return weight if lora is None or u is None else lora.backward(weight, u)

    def d_router_weights(self, shares: Tensor, grad_out: Tensor, tiles: TileTables) -> Tensor:
        return d_router_weights(shares, grad_out, self.dispatched.source, tiles, self.down_bias, self.weights)

    def d_rows(self, grad_h: Any, tiles: TileTables, u: Tensor | None = None) -> Tensor:
        """Every row's gradient of its token [S, d]."""
        weight = self._backward(self.gate_up_operand(back=True), self.gate_up_lora, u, "d_rows")
        rows = self.rows_operand(grad_h)
        return self._rows_times("d_rows", rows, tiles, weight)(rows, tiles, weight)

    def _rows_times(self, op: str, rows: Tensor | RowCodes, tiles: TileTables, weight: PerExpert) -> Down:
        """The kernel of one of the two products of rows in expert order, which give [S, d]."""
        found = self.kernels.get(op)
        if found is None:
            config = self.config(op, weight)
            found = self.kernels[op] = Down(rows, tiles, weight, size_columns=self.size_d, config=config)
        return found

    def combine(self, rows: Tensor) -> Tensor:
        return combine(rows, self.dispatched.position, self.hidden.dtype)

    def d_gate_up(self, grad_h: Any) -> Tensor:
        """[E, 2n, d], or [E, d, 2n] where transposed."""
        return self._d_weight(self.hidden, grad_h, tokens_first=self.spec.is_transposed)

    def d_down(self, grad_out: Tensor, weighted_a: Any) -> Tensor:
        """[E, d, n], or [E, n, d] where transposed."""
        return self._d_weight(grad_out, weighted_a, tokens_first=not self.spec.is_transposed)

    def _d_weight(self, tokens: Tensor, rows: Any, *, tokens_first: bool) -> Tensor:
        """tokens^T rows, contracted over each expert's rows, or its transpose where not `tokens_first`.

        `tokens` [T, ...] is gathered by row -> token; `rows` [S, ...] lies in expert order.
        """
        left, right = (tokens, rows) if tokens_first else (rows, tokens)
        return self._contract(left, right, self.config_of_d_weight(), gather_left=tokens_first)

    def config_of_d_weight(self) -> Config:
        found = self.kernels.get("d_weight")
        if found is None:
            found = self.kernels["d_weight"] = self.config("d_weight")
        return found

    def _contract(self, left: Tensor, right: Tensor, config: Config, **gathering: bool) -> Tensor:
        """left^T right over each expert's rows, [E, ...]."""
        source, offsets = self.dispatched.source, self.dispatched.offsets
        return d_weight(left, right, source, offsets, top_k=self.top_k, config=config, **gathering)

    def t_gate_up(self, tiles: TileTables) -> Tensor:
        """scaling * X A^T [S, width], width being the padded rank."""
        assert self.gate_up_lora is not None
        return self._narrow(self.hidden, self.gate_up_lora, self.gate_up_lora.a.transposed(), tiles, gathered=True)

    def t_down(self, a: Tensor, tiles: TileTables) -> Tensor:
        assert self.down_lora is not None
        return self._narrow(a, self.down_lora, self.down_lora.a.transposed(), tiles)

    def u_gate_up(self, grad_h: Tensor, tiles: TileTables) -> Tensor | None:
        """scaling * dH B [S, width]; None without an adapter."""
        lora = self.gate_up_lora
        return None if lora is None else self._narrow(grad_h, lora, lora.b, tiles)

    def u_down(self, grad_out: Tensor, tiles: TileTables) -> Tensor | None:
        lora = self.down_lora
        return None if lora is None else self._narrow(grad_out, lora, lora.b, tiles, gathered=True)

    def _narrow(
        self, x: Tensor, lora: Factors, weight: PerExpert, tiles: TileTables, *, gathered: bool = False
    ) -> Tensor:
        source = self.dispatched.source if gathered else None
        return narrow(
            x,
            tiles,
            weight,
            rank=lora.rank,
            scaling=lora.scaling,
            num_rows=self.num_rows,
            source=source,
            top_k=self.top_k,
        )

    def d_gate_up_lora(
        self, grad_h: Tensor, u: Tensor | None, tiles: TileTables, wanted: Wanted
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of a [E, r, d] and of b [E, 2n, r]; None where not wanted."""
        grad_a = grad_b = None
        if (lora := self.gate_up_lora) is not None:
            if wanted.gate_up_lora_a:
                u = self.u_gate_up(grad_h, tiles) if u is None else u
                assert u is not None
                grad_a = self._d_factor(u, self.hidden)[:, : lora.rank]
            if wanted.gate_up_lora_b:
                grad_b = self._d_factor(grad_h, self.t_gate_up(tiles), gathers=False)[:, :, : lora.rank]
        return grad_a, grad_b

    def d_down_lora(
        self, grad_out: Tensor, weighted_a: Tensor, u: Tensor | None, tiles: TileTables, wanted: Wanted
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of a [E, r, n] and of b [E, d, r]; None where not wanted."""
        grad_a = grad_b = None
        if (lora := self.down_lora) is not None:
            if wanted.down_lora_a:
                u = self.u_down(grad_out, tiles) if u is None else u
                assert u is not None
                grad_a = self._d_factor(u, weighted_a, gathers=False)[:, : lora.rank]
            if wanted.down_lora_b:
                grad_b = self._d_factor(grad_out, self.t_down(weighted_a, tiles), gather_left=True)[:, :, : lora.rank]
        return grad_a, grad_b

    def _d_factor(self, left: Tensor, right: Tensor, *, gather_left: bool = False, gathers: bool = True) -> Tensor:
        architecture = target_of(left.device).architecture
        config = adapter_tile(left.shape[1], right.shape[1], left.element_size(), architecture)
        return self._contract(left, right, config, gather_left=gather_left, gathers=gathers)

    def d_gate_up_bias(self, grad_h: Any) -> Tensor:
        return self._d_bias(self.numbers(grad_h), self.dispatched.offsets)

    def d_down_bias(self, grad_out: Tensor, weighted_a: Any) -> Tensor:
        """weighted_a: what `d_hidden` gave, which may hold sums of grad_out's rows."""
        return self._d_bias(grad_out, self.dispatched.offsets, self.weights)

    def _d_bias(self, values: Tensor, offsets: Tensor, router_weights: Tensor | None = None) -> Tensor:
        """The sum of each expert's rows, [E, ...] in hidden's dtype."""
        if values.shape[1] == 0:  # d or n is 0: there is nothing to launch a grid for
            return self.hidden.new_zeros(self.num_experts, 0)
        return d_bias(
            values,
            self.dispatched.source,
            offsets,
            top_k=self.top_k,
            router_weights=router_weights,
            dtype=self.hidden.dtype,
        )


def rows_of_config(call: ExpertCall) -> int:
    """The rows that the configurations of up and down are for: one number where bits must not depend on the rows."""
    return BUCKETS[-1] * call.num_experts + 1 if call.spec.batch_invariant else call.num_rows
