"""Models with mixtures of experts."""
