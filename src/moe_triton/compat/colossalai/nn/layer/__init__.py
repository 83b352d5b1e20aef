"""Layers: the mixture of experts, tensor-parallel linear ones, and dropout by stream."""

from moe_triton.compat.colossalai.nn.layer.dropout import WrappedDropout, WrappedDropPath
from moe_triton.compat.colossalai.nn.layer.moe import *  # noqa: F403
from moe_triton.compat.colossalai.nn.layer.moe import __all__ as _moe
from moe_triton.compat.colossalai.nn.layer.parallel_1d import Linear1D_Col, Linear1D_Row

__all__ = ["Linear1D_Col", "Linear1D_Row", "WrappedDropPath", "WrappedDropout", *_moe]
