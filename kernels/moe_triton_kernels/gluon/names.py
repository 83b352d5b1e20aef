"""The names of Gluon that we use, as every supported version of Triton (3.6 to 3.9) has them.

Gluon is experimental: 3.9 renamed the copies to `async_load`, in two modules, and made `aggregate` public. Where
anything here is missing, importing this module fails, and `schedules.why_unsupported` gives the error as its reason.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

aggregate = gluon.aggregate if hasattr(gluon, "aggregate") else tl.core._aggregate
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
cp_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
cp_async_arrive = async_copy.mbarrier_arrive

__all__ = [
    "TensorDescriptor",
    "aggregate",
    "cp_async",
    "cp_async_arrive",
    "fence_async_shared",
    "gl",
    "gluon",
    "mbarrier",
    "tma_load",
    "warpgroup_mma",
    "warpgroup_mma_wait",
]
