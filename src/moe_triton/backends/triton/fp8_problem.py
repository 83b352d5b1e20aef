"""One call of the experts with products in fp8 as the kernels take it: `problem.Problem` with codes for operands."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from moe_triton.backends.torch.activations import activate
from moe_triton.backends.triton.problem import Problem
from moe_triton.records import ExpertCall
from moe_triton_kernels.fp8 import CODES, RowCodes, WeightCodes
from moe_triton_kernels.fp8_d_weight import fp8_d_weight
from moe_triton_kernels.operands import PerExpert
from moe_triton_kernels.quantize import quantize_columns, quantize_rows, quantize_weight
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

    @cached_property
    def _tiles(self) -> TileTables:
        return self.tiles()

    def gate_up_operand(self, *, back: bool = False) -> PerExpert:
        return self._gate_up_codes.backward if back else self._gate_up_codes.forward

    def down_operand(self, *, back: bool = False) -> PerExpert:
        return self._down_codes.backward if back else self._down_codes.forward

    def rows_operand(self, x: Tensor) -> RowCodes:
        return quantize_rows(x)

    def up(self, tiles: TileTables, *, keep_a: bool, keep_h: bool) -> tuple[Activated, Tensor]:
        codes, h = super().up(tiles, keep_a=keep_a, keep_h=keep_h or (keep_a and self.down_lora is not None))
        return Activated(codes, h), h if keep_h else h.new_empty(0)

    def down_rows(self, a: Activated, tiles: TileTables) -> Tensor:
        return self._down_rows(a.codes, a.h if self.down_lora is None else activate(a.h, self.spec), tiles)

    def _d_weight(self, tokens: Tensor, rows: Tensor, *, tokens_first: bool) -> Tensor:
        tiles, source = self._tiles, self.dispatched.source
        left, right = quantize_columns(tokens, tiles, source=source, top_k=self.top_k), quantize_columns(rows, tiles)
        left, right = (left, right) if tokens_first else (right, left)
        return fp8_d_weight(left, right, tiles, config=self.config_of_d_weight())


def problem_of(call: ExpertCall) -> Problem:
    """The call with its products as its spec asks."""
    return Fp8Problem(call) if call.spec.fp8 else Problem(call)
