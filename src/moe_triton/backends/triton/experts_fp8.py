"""The experts with fp8 products on the triton backend: emulated, as the torch backend does.

Definition: `moe_triton.reference.fp8`.
"""

from moe_triton.backends.torch.experts_fp8 import (
    combine_rows,
    experts_backward,
    experts_backward_rows,
    experts_backward_weights,
    experts_forward,
    linear,
)

__all__ = [
    "combine_rows",
    "experts_backward",
    "experts_backward_rows",
    "experts_backward_weights",
    "experts_forward",
    "linear",
]
