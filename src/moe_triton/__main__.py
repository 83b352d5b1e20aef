"""`python -m moe_triton` is the same as `moe-triton`."""

from moe_triton.cli import main

main()
