"""One call of the experts as the kernels take it. Records and their shapes: `moe_triton.records`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from moe_triton.quantization import QuantizedWeight
from moe_triton.records import (
    ExpertCall,
    ExpertSpec,
    Lora,
    Projection,
    TiledDispatch,
    Wanted,
    matrix_shape,
)
from moe_triton_kernels.activations import Activation
from moe_triton_kernels.combine import combine
from moe_triton_kernels.configs import choose_config
from moe_triton_kernels.d_hidden import d_hidden, d_router_weights
from moe_triton_kernels.d_weight import d_bias, d_weight
from moe_triton_kernels.down import down
from moe_triton_kernels.fp8 import RowCodes
from moe_triton_kernels.heuristics import BUCKETS, adapter_tile, decodes_in_loop
from moe_triton_kernels.launch import Config, target_of
from moe_triton_kernels.lora import Adapter
from moe_triton_kernels.narrow import narrow
from moe_triton_kernels.operands import PerExpert, per_expert
from moe_triton_kernels.quantized import decode, quantized_per_expert
from moe_triton_kernels.tiles import TileTables, tile_tables
from moe_triton_kernels.up import up

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Problem:
    """One call as the kernels take it: contiguous tensors, the sizes, and the configuration of each kernel.

    gate_up and down are as the forward product reads them: [d, n or 2n] and [n, d].
    """

    def __init__(self, call: ExpertCall) -> None:
        spec, parameters = call.spec, call.parameters
        self.call, self.spec, self.dispatched = call, spec, call.dispatched
        self.hidden, self.weights = call.hidden.contiguous(), call.weights.contiguous()
        self.activation = activation_of(spec, call.hidden.dtype)
        self.top_k, self.num_rows, self.num_experts = call.dispatched.top_k, call.num_rows, call.num_experts
        self.size_n, self.size_d = matrix_shape(parameters.down)[:: 1 if spec.is_transposed else -1]
        self.gate_up = matrices(parameters.gate_up, transposed=not spec.is_transposed)
        self.down = matrices(parameters.down, transposed=not spec.is_transposed)
        self.gate_up_bias = None if parameters.gate_up_bias is None else per_expert(parameters.gate_up_bias)
        self.down_bias = None if parameters.down_bias is None else per_expert(parameters.down_bias)
        self.gate_up_lora = None if call.gate_up_lora is None else Factors(call.gate_up_lora)
        self.down_lora = None if call.down_lora is None else Factors(call.down_lora)

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

    def rows_operand(self, x: Tensor) -> Tensor | RowCodes:
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
        weight, lora = self.read(self.gate_up_operand(), "up"), self.gate_up_lora
        return up(
            self.rows_operand(self.hidden),
            self.dispatched.source,
            tiles,
            weight if lora is None else lora.forward(weight, self.t_gate_up(tiles)),
            self.gate_up_bias,
            size_n=self.size_n,
            top_k=self.top_k,
            activation=self.activation,
            is_concatenated=self.spec.is_concatenated,
            keep_activation=keep_a,
            keep_preactivation=keep_h,
            config=self.config("up", weight),
        )

    def down_rows(self, a: Any, tiles: TileTables) -> Tensor:
        """Every row's output times its router weight [S, d]."""
        return self._down_rows(a, a, tiles)

    def _down_rows(self, a: Tensor | RowCodes, of_adapter: Tensor, tiles: TileTables) -> Tensor:
        """The same of the activation as the product and as the adapter reads it."""
        weight, lora = self.read(self.down_operand(), "down"), self.down_lora
        return down(
            a,
            tiles,
            weight if lora is None else lora.forward(weight, self.t_down(of_adapter, tiles)),
            size_columns=self.size_d,
            config=self.config("down", weight),
            bias=self.down_bias,
            router_weights=self.weights,
            source=self.dispatched.source,
        )

    def d_hidden(
        self, grad_out: Tensor, h: Tensor, tiles: TileTables, u: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted activation [S, n], pre-activation's gradient, and shares of the router weights' gradient."""
        weight = self._backward(self.down_operand(back=True), self.down_lora, u, "d_hidden")
        return d_hidden(
            self.rows_operand(grad_out),
            self.dispatched.source,
            tiles,
            weight,
            h,
            self.weights,
            size_n=self.size_n,
            activation=self.activation,
            is_concatenated=self.spec.is_concatenated,
            config=self.config("d_hidden", weight),
        )

    def _backward(self, projection: PerExpert, lora: Factors | None, u: Tensor | None, op: str) -> PerExpert:
        weight = self.read(projection, op)
        return weight if lora is None or u is None else lora.backward(weight, u)

    def d_router_weights(self, shares: Tensor, grad_out: Tensor, tiles: TileTables) -> Tensor:
        return d_router_weights(shares, grad_out, self.dispatched.source, tiles, self.down_bias, self.weights)

    def d_rows(self, grad_h: Tensor, tiles: TileTables, u: Tensor | None = None) -> Tensor:
        """Every row's gradient of its token [S, d]."""
        weight = self._backward(self.gate_up_operand(back=True), self.gate_up_lora, u, "d_rows")
        return down(
            self.rows_operand(grad_h),
            tiles,
            weight,
            size_columns=self.size_d,
            config=self.config("d_rows", weight),
        )

    def combine(self, rows: Tensor) -> Tensor:
        return combine(rows, self.dispatched.position, self.hidden.dtype)

    def d_gate_up(self, grad_h: Tensor) -> Tensor:
        """[E, 2n, d], or [E, d, 2n] where transposed."""
        return self._d_weight(self.hidden, grad_h, tokens_first=self.spec.is_transposed)

    def d_down(self, grad_out: Tensor, weighted_a: Tensor) -> Tensor:
        """[E, d, n], or [E, n, d] where transposed."""
        return self._d_weight(grad_out, weighted_a, tokens_first=not self.spec.is_transposed)

    def _d_weight(self, tokens: Tensor, rows: Tensor, *, tokens_first: bool) -> Tensor:
        """tokens^T rows, contracted over each expert's rows, or its transpose where not `tokens_first`.

        `tokens` [T, ...] is gathered by row -> token; `rows` [S, ...] lies in expert order.
        """
        left, right = (tokens, rows) if tokens_first else (rows, tokens)
        return self._contract(left, right, self.config("d_weight"), gather_left=tokens_first)

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

    def d_gate_up_bias(self, grad_h: Tensor) -> Tensor:
        return self._d_bias(grad_h)

    def d_down_bias(self, grad_out: Tensor) -> Tensor:
        return self._d_bias(grad_out, self.weights)

    def _d_bias(self, values: Tensor, router_weights: Tensor | None = None) -> Tensor:
        """The sum of each expert's rows, [E, ...]."""
        if values.shape[1] == 0:  # d or n is 0: there is nothing to launch a grid for
            return values.new_zeros(self.num_experts, 0)
        source, offsets = self.dispatched.source, self.dispatched.offsets
        return d_bias(values, source, offsets, top_k=self.top_k, router_weights=router_weights)


def matrices(projection: Projection, *, transposed: bool = False) -> PerExpert:
    """The projection's matrices for the kernels as they are given, [out, in] or [in, out], or with these swapped."""
    if not isinstance(projection, QuantizedWeight):
        return per_expert(projection, transposed=transposed)
    found = quantized_per_expert(
        projection.format,
        projection.codes,
        projection.scales,
        projection.zeros,
        projection.global_scale,
        block=(projection.kind.rows, projection.group),
    )
    return found.transposed() if projection.is_transposed is not transposed else found


@lru_cache
def activation_of(spec: ExpertSpec, dtype: torch.dtype) -> Activation:
    """The spec's activation, its limit rounded to `dtype` as torch compares it with a tensor of this dtype.

    Raises TypeError on a dtype that kernels do not compute with.
    """
    check_dtype(dtype)
    limit = None if spec.limit is None else torch.tensor(spec.limit, dtype=dtype, device="cpu").item()
    return Activation(spec.activation, limit, spec.alpha)


class Factors:
    """An adapter as the kernels take it: a as [r, in] and b as [out, r] per expert."""

    def __init__(self, lora: Lora) -> None:
        # PEFT's b has neither dimension contiguous: a kernel would load a whole sector for each element
        a, b = (x if 1 in x.stride()[1:] else x.contiguous() for x in (lora.a, lora.b))
        self.a, self.b, self.rank, self.scaling = per_expert(a), per_expert(b), a.shape[1], lora.scaling

    def forward(self, weight: PerExpert, t: Tensor) -> PerExpert:
        """The projection with what is added to its product, given t = scaling * x A^T."""
        return weight._replace(adapter=Adapter(t=t, factor=self.b.transposed(), rank=self.rank))

    def backward(self, weight: PerExpert, u: Tensor) -> PerExpert:
        """The same for the gradient of the product's input, given u = scaling * dy B."""
        return weight._replace(adapter=Adapter(t=u, factor=self.a, rank=self.rank))


def rows_of_config(call: ExpertCall) -> int:
    """The rows that the configurations of up and down are for: one number where bits must not depend on the rows."""
    return BUCKETS[-1] * call.num_experts + 1 if call.spec.batch_invariant else call.num_rows


def check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"hidden: the triton backend takes float32, float16 or bfloat16, got {dtype}")
