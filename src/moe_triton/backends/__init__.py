"""The implementations. A backend is a package with one module per operation (`routing`, `dispatch`, `experts`).

All backends define the same functions over plain tensors, forward and backward, and know no autograd; the operations
above them validate, differentiate and, through `moe_triton.runtime`, choose.
"""
