"""`moe-triton train`: a small language model over bytes, with a mixture of experts or dense, from text to report."""

from moe_triton.training.config import TrainConfig
from moe_triton.training.errors import TrainingError
from moe_triton.training.job import run_job

__all__ = ["TrainConfig", "TrainingError", "run_job"]
