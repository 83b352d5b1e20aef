"""Quantised projections on a CPU: decoded inside a product, or in parts that stay in cache until their product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from moe_triton.backends.torch.cpu import CpuPolicy
from moe_triton.backends.torch.stored import StoredCodes, in_planes, serial_parts, stored_codes
from moe_triton.quantization import QuantizedWeight
from moe_triton.records import ExpertWeight

PART_BYTES = 1 << 20  # of decoded numbers; about the size of an L2 cache
# of an expert, that compiled loops multiply as they decode, by pairs and else; with more, a library's product is faster
FEW_PAIRED_ROWS, FEW_ROWS = 16, 4


class Decoded:
    """Expert -> its projection [out, in] from `weight` [E, out, in], a part of the outputs at a time."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype) -> None:
        self.weight, self.dtype = weight, dtype
        _, self.size_out, self.size_in = weight.shape

    @property
    def mT(self) -> Decoded:
        """The transpose."""
        return Decoded(self.weight.mT, self.dtype)

    @cached_property
    def stored(self) -> StoredCodes | None:
        """What compiled loops read; None where torch decodes."""
        return stored_codes(self.weight, self.dtype)

    def parts(self) -> Iterator[slice]:
        """Ranges of the outputs whose numbers have at most PART_BYTES, 128 outputs at least."""
        most = PART_BYTES // (self.dtype.itemsize * max(self.size_in, 1))
        step = max(most // 128 * 128, 128)  # a multiple of every block size
        for start in range(0, self.size_out, step):
            yield slice(start, min(start + step, self.size_out))

    def products(
        self,
        policy: CpuPolicy,
        parts: Sequence[tuple[int, slice]],
        x_mI: Tensor,
        biases: ExpertWeight | None,
        out: Tensor | None,
    ) -> Tensor:
        """Compute x @ projection(e).T + bias[e] for the rows of every part, (e, rows), [m, O]."""
        y_mO = x_mI.new_empty(x_mI.shape[0], self.size_out) if out is None else out
        most, stored = 0, self.stored
        if stored is not None and not self.weight.is_transposed and not policy.fixed_rows:
            most = FEW_PAIRED_ROWS if stored.multiplies_pairs(x_mI) else FEW_ROWS
        few = [(e, part) for e, part in parts if part.stop - part.start <= most]
        if few:
            self._few_rows(few, x_mI, biases, y_mO)
        for e, part in parts:
            if part.stop - part.start > most:
                self.product(policy, x_mI[part], e, None if biases is None else biases[e], y_mO[part])
        return y_mO

    def _few_rows(
        self, parts: Sequence[tuple[int, slice]], x_mI: Tensor, biases: ExpertWeight | None, out: Tensor
    ) -> None:
        """`products` by the loops; rows are multiplied in fp32 with the numbers as they are before any rounding."""
        assert self.stored is not None
        sizes = [part.stop - part.start for _, part in parts]
        bounds = list(accumulate(sizes, initial=0))
        is_all = bounds[-1] == x_mI.shape[0]
        x_few = x_mI if is_all else torch.cat([x_mI[part] for _, part in parts])
        by_pairs = self.stored.multiplies_pairs(x_few)
        multiply = self.stored.few_rows_in_bf16 if by_pairs else self.stored.few_rows
        y_few = multiply(x_few, [e for e, _ in parts], bounds)
        for (e, part), start, size in zip(parts, bounds, sizes, strict=False):
            y = y_few[start : start + size]
            if biases is not None:
                y += biases[e]
            if not is_all:
                out[part] = y
        if is_all:
            for y, found in zip(serial_parts(y_few), serial_parts(out), strict=True):
                found.copy_(y)

    def product(
        self, policy: CpuPolicy, x_mI: Tensor, expert: int, bias_O: Tensor | None, out: Tensor | None
    ) -> Tensor:
        """Compute x @ projection(expert).T + bias, [m, out]."""
        y_mO = x_mI.new_empty(x_mI.shape[0], self.size_out) if out is None else out
        if self.stored is not None:
            self._product_by_planes(self.stored, policy, x_mI, expert, y_mO)
            return y_mO if bias_O is None else y_mO.add_(bias_O)
        for part in self.parts():
            matrix = self.weight.dequantize(self.dtype, expert=expert, rows=part)
            policy.product(x_mI, matrix, None if bias_O is None else bias_O[part], y_mO[:, part])
        return y_mO

    def _product_by_planes(
        self, stored: StoredCodes, policy: CpuPolicy, x_mI: Tensor, expert: int, out: Tensor
    ) -> None:
        """`product` without a bias, of parts that the loops decode."""
        parts = list(self.parts())
        most = parts[0].stop
        if self.weight.is_transposed:  # the columns of what is stored are the outputs
            matrix = torch.empty(self.size_in, most, dtype=self.dtype)
            for part in parts:
                found = stored.decode(expert, slice(0, self.size_in), part, matrix)
                y = policy.product(x_mI, found.T)
                out[:, part].unflatten(1, (-1, stored.planes)).copy_(y.unflatten(1, (stored.planes, -1)).mT)
            return
        x_mI = in_planes(x_mI, stored.planes).flatten(1)
        matrix = torch.empty(most, self.size_in, dtype=self.dtype)
        for part in parts:
            policy.product(x_mI, stored.decode(expert, part, slice(0, self.size_in), matrix), None, out[:, part])
