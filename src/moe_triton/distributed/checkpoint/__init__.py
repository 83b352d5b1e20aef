"""Checkpoints of models whose experts are spread over ranks, in a format that does not depend on the ranks."""
