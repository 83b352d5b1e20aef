"""What tests share: comparisons, problems, processes, models."""
