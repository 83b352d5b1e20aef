"""The one error of a training run that its user can mend."""

from __future__ import annotations


class TrainingError(ValueError):
    """A run that cannot start or go on: a bad setting, unusable data, a damaged file, a full disk. One clear line."""
