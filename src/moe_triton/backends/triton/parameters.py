"""The experts' parameters and the activation as the kernels take them."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from moe_triton.quantization import QuantizedWeight
from moe_triton.records import ExpertSpec, ExpertWeight, Lora, Projection
from moe_triton_kernels.activations import Activation
from moe_triton_kernels.lora import Adapter
from moe_triton_kernels.operands import Layout, PerExpert, per_expert, stacked
from moe_triton_kernels.quantized import quantized_per_expert

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def matrices(projection: Projection, layout: Layout | None = None, *, transposed: bool = False) -> PerExpert:
    """The projection's matrices for the kernels as they are given, [out, in] or [in, out], or with these swapped.

    layout: how these lie, of a single tensor, where it is known.
    """
    if layout is not None:
        return stacked(projection, layout)
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


def vectors(bias: ExpertWeight, layout: Layout | None) -> PerExpert:
    """The biases for the kernels; layout: how these lie, of a single tensor, where it is known."""
    return per_expert(bias) if layout is None else stacked(bias, layout)


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


def check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"hidden: the triton backend takes float32, float16 or bfloat16, got {dtype}")
