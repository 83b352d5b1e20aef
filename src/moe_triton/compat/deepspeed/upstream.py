"""The installed DeepSpeed, or stand-ins for it.

DeepSpeed's engine finds MoE layers by isinstance and process groups in `deepspeed.utils.groups`; so where deepspeed is
installed our layer derives from its class, and our groups live in its dictionaries. Nothing else of it is used.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

try:
    MoE: Any = importlib.import_module("deepspeed.moe.layer").MoE
    groups: Any = importlib.import_module("deepspeed.utils.groups")
except ImportError:
    MoE, groups = nn.Module, None
