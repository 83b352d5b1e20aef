"""DeepSpeed's MoE, over our experts: change one import.

    from deepspeed.moe.layer import MoE                    ->  from moe_triton.compat.deepspeed.layer import MoE
    from deepspeed.moe.utils import ...                    ->  from moe_triton.compat.deepspeed.utils import ...
    deepspeed.utils.groups.initialize(ep_size, mpu, ...)   ->  moe_triton.compat.deepspeed.groups.initialize(...)

`MoE` here has the argument order of DeepSpeed's documentation of January 2022, `layer.MoE` the one of today.
"""

from moe_triton.compat.deepspeed import groups, layer, utils
from moe_triton.compat.deepspeed.documented import MoE

__all__ = ["MoE", "groups", "layer", "utils"]
