"""The engine of `moe-triton bench`, `profile` and `tune`.

bench: cases (what is measured) -> providers (who), ways (eager, compiled, replayed) and limits (against what) ->
correctness, memory, timing -> runner (one shape in one mode, one result) -> results, session (kept cell by cell) ->
report, chart, page, comparing. The layer taken apart: stages -> stage_report; under the profiler: profiling,
memory_chart. Configurations: kernel_search (one kernel) -> tune_worker (its own process) -> tuning (the search).
"""
