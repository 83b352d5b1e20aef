"""The error of a training run that its user can fix."""

from __future__ import annotations


class TrainingError(ValueError):
    """A run that cannot start or continue: a bad setting, unusable data, a damaged file, a full disk. One line."""
