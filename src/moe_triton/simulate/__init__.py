"""The cost model of expert parallelism behind `moe-triton simulate`."""
