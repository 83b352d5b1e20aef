"""One call of the experts with products in fp8 as the kernels take it: `problem.Problem` with codes for operands."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_triton.backends.torch.activations import activate
from moe_triton.backends.triton.problem import ALL, Problem
from moe_triton.records import ExpertCall, Wanted
from moe_triton_kernels.d_hidden import Into
from moe_triton_kernels.fp8 import CODES, GROUP, CodedRows, ColumnCodes, RowCodes, WeightCodes, makes_codes
from moe_triton_kernels.fp8_d_weight import fp8_d_weight, tile_offsets
from moe_triton_kernels.heuristics import hidden_beside_adapter
from moe_triton_kernels.launch import Config, target_of
from moe_triton_kernels.operands import PerExpert
from moe_triton_kernels.quantize import quantize_both, quantize_columns, quantize_rows, quantize_weight
from moe_triton_kernels.tiles import TileTables


class Activated(NamedTuple):
    """The activation's codes, and the pre-activation, of which the adapter of down needs the activation itself."""

    codes: RowCodes
    h: Tensor


class Fp8Problem(Problem):
    """The products read codes, which are made here; adapters, and all that is returned, are as without."""

    @property
    def operand_dtype(self) -> torch.dtype:
        return CODES

    @cached_property
    def _gate_up_codes(self) -> WeightCodes:
        return quantize_weight(self.gate_up, size_k=self.size_d, size_columns=self.call.width)

    @cached_property
    def _down_codes(self) -> WeightCodes:
        return quantize_weight(self.down, size_k=self.size_n, size_columns=self.size_d)

    def config(self, op: str, weight: PerExpert | None = None) -> Config:
        found = super().config(op, weight)
        is_beside = op == "d_hidden" and weight is not None and weight.adapter is not None
        return hidden_beside_adapter(found) if is_beside else found

    def _makes_codes(self, *, by_rows: bool, sums: bool = False) -> bool:
        """Whether `d_hidden` does; adapters read numbers, and beside them, or an adapter's steps, codes would spill."""
        if self.gate_up_lora is not None or self.down_lora is not None:
            return False
        gated = self.call.width != self.size_n
        pairs = gated and not self.spec.is_concatenated
        architecture = target_of(self.hidden.device).architecture
        return makes_codes(architecture, by_rows=by_rows, pairs=pairs, sums=sums, gated=gated)

    @cached_property
    def _tiles(self) -> TileTables:
        return self.tiles()

    @cached_property
    def _tile_offsets(self) -> Tensor:
        return tile_offsets(self._tiles.offsets)

    def gate_up_operand(self, *, back: bool = False) -> PerExpert:
        return self._gate_up_codes.backward if back else self._gate_up_codes.forward

    def down_operand(self, *, back: bool = False) -> PerExpert:
        return self._down_codes.backward if back else self._down_codes.forward

    def rows_operand(self, x: Tensor | CodedRows) -> RowCodes:
        if not isinstance(x, CodedRows):
            return quantize_rows(x)
        return self.rows_operand(self.numbers(x)) if x.rows is None else x.rows

    def both_operands(self, x: Tensor, tiles: TileTables, *, sums: bool) -> tuple[RowCodes, ColumnCodes]:
        """Of tokens [T, size]: for a product with a projection, and gathered for a gradient of one.

        sums: of the gathered rows times their weights, too.
        """
        source, position = self.dispatched.source, self.dispatched.position
        weights = self.weights if sums else None
        return quantize_both(x, tiles, source=source, position=position, router_weights=weights)

    def gathered_operand(self, x: Tensor) -> ColumnCodes:
        return quantize_columns(x, self._tiles, source=self.dispatched.source, top_k=self.top_k)

    def numbers(self, rows: Tensor | CodedRows) -> Tensor:
        if not isinstance(rows, CodedRows):
            return rows
        return self.hidden.new_empty(0) if rows.numbers is None else rows.numbers

    def up(self, tiles: TileTables, *, keep_a: bool, keep_h: bool) -> tuple[Activated, Tensor]:
        codes, h = super().up(tiles, keep_a=keep_a, keep_h=keep_h or (keep_a and self.down_lora is not None))
        return Activated(codes, h), h if keep_h else h.new_empty(0)

    def down_rows(self, a: Activated, tiles: TileTables) -> Tensor:
        return self._down_rows(a.codes, a.h if self.down_lora is None else activate(a.h, self.spec), tiles)

    def d_hidden(
        self, grad_out: Tensor, h: Tensor, tiles: TileTables, u: Tensor | None = None, wanted: Wanted = ALL
    ) -> tuple[Any, Any, Tensor]:
        """Codes are made where the numbers are, and numbers are only written for what reads them."""
        if self.call.is_part:
            return self._d_hidden(self.rows_operand(grad_out), h, tiles, u)
        wanted = wanted.of(self.call.parameters)
        if wanted.down:
            rows, gathered = self.both_operands(grad_out, tiles, sums=wanted.down_bias)
        else:
            rows, gathered = self.rows_operand(grad_out), None
        into = Into(self._weighted_a_forms(tiles, wanted, gathered), self._grad_h_forms(tiles, wanted))
        return self._d_hidden(rows, h, tiles, u, into)

    def _weighted_a_forms(self, tiles: TileTables, wanted: Wanted, gathered: ColumnCodes | None) -> CodedRows:
        columns = self._columns(tiles, self.size_n) if wanted.down else None
        is_read = self.down_lora is not None or (wanted.down and columns is None)
        return CodedRows(numbers=self._numbers(self.size_n, is_read), columns=columns, gathered=gathered)

    def _grad_h_forms(self, tiles: TileTables, wanted: Wanted) -> CodedRows:
        width, rows = self.call.width, None
        # a group that holds columns of gate and of up is in two tiles
        in_a_tile = width == self.size_n or not self.spec.is_concatenated or self.size_n % GROUP.value == 0
        if wanted.hidden and in_a_tile and self._makes_codes(by_rows=True, sums=wanted.gate_up and wanted.gate_up_bias):
            rows = RowCodes.empty(self.num_rows, width, self.hidden.dtype, self.hidden.device)
        columns = self._columns(tiles, width, sums=wanted.gate_up_bias) if wanted.gate_up else None
        lacks = (wanted.hidden and rows is None) or (wanted.gate_up and columns is None)
        is_read = lacks or (wanted.gate_up_bias and columns is None) or self.gate_up_lora is not None
        return CodedRows(numbers=self._numbers(width, is_read), rows=rows, columns=columns)

    def _columns(self, tiles: TileTables, size: int, *, sums: bool = False) -> ColumnCodes | None:
        if not self._makes_codes(by_rows=False):
            return None
        most = tiles.select(GROUP.value)[1]
        return ColumnCodes.empty(size, most, self.hidden.dtype, self.hidden.device, sums=sums)

    def _numbers(self, size: int, is_read: bool) -> Tensor | None:
        return self.hidden.new_empty(self.num_rows, size) if is_read else None

    def _d_weight(self, tokens: Tensor, rows: Tensor | CodedRows, *, tokens_first: bool) -> Tensor:
        coded = rows if isinstance(rows, CodedRows) else CodedRows(numbers=rows)
        left, right = coded.gathered, coded.columns
        left = self.gathered_operand(tokens) if left is None else left
        right = quantize_columns(self.numbers(coded), self._tiles) if right is None else right
        left, right = (left, right) if tokens_first else (right, left)
        return fp8_d_weight(left, right, self._tiles, config=self.config_of_d_weight())

    def d_gate_up_bias(self, grad_h: Tensor | CodedRows) -> Tensor:
        columns = grad_h.columns if isinstance(grad_h, CodedRows) else None
        return super().d_gate_up_bias(grad_h) if columns is None else self._sum_of_tiles(columns)

    def d_down_bias(self, grad_out: Tensor, weighted_a: Tensor | CodedRows) -> Tensor:
        columns = weighted_a.gathered if isinstance(weighted_a, CodedRows) else None
        return super().d_down_bias(grad_out, weighted_a) if columns is None else self._sum_of_tiles(columns)

    def _sum_of_tiles(self, columns: ColumnCodes) -> Tensor:
        """[E, size] from the sums of tiles."""
        assert columns.sums is not None
        return self._d_bias(columns.sums, self._tile_offsets)


def problem_of(call: ExpertCall) -> Problem:
    """The call with its products as its spec asks."""
    return Fp8Problem(call) if call.spec.fp8 else Problem(call)
