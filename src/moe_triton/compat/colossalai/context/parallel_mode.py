"""The kinds of process groups, by Colossal-AI's names."""

from __future__ import annotations

from enum import Enum


class ParallelMode(Enum):
    """What a group of ranks shares; also the name of a stream of random numbers (`context.random`)."""

    GLOBAL = "global"
    DATA = "data"  # the same dense parameters, tokens of their own
    TENSOR = "tensor"  # slices of the same dense parameters, the same tokens
    PARALLEL_1D = "1d"  # the same as TENSOR
    MOE_MODEL = "moe_model"  # one set of experts between them (expert parallel)
    MOE_DATA = "moe_data"  # the same experts (expert data parallel)
    TOKENS = "tokens"  # a stream only: the same on ranks with the same tokens
