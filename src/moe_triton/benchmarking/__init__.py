"""The engine of `moe-triton bench`: our layer, its peers and the limits of the machine, timed in one interleaved run.

cases (what is measured) -> providers (who) and limits (against what) -> correctness, memory, timing -> runner (one
shape, one result) -> report, chart.
"""
