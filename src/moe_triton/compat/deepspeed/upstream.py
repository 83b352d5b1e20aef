"""The installed DeepSpeed, or stand-ins for it.

DeepSpeed's engine finds MoE layers by isinstance and process groups in `deepspeed.utils.groups`; so where deepspeed is
installed our layer derives from its class, and our groups live in its dictionaries. Nothing else of it is used.
"""

from __future__ import annotations

from typing import Any

from torch import nn

MoE: Any  # base class of our layer
groups: Any  # deepspeed.utils.groups, or None

try:
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups
except ImportError:
    MoE, groups = nn.Module, None
