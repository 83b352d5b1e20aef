"""The exceptions of expert parallelism and of checkpoints."""

from __future__ import annotations


class ExpertParallelError(RuntimeError):
    """A collective of an MoE layer failed. The message names rank, layer and phase, and the ranks that are gone."""


class ConfigurationMismatch(ExpertParallelError):
    """The ranks of a group do not agree on what they are about to compute."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read, or does not fit the model. The message names the file."""
