"""Autograd and torch.compile for the operations that have a gradient."""
