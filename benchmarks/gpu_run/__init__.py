"""One run on a GPU that is lent for a few minutes: `schedule` (what runs when), `processes`, `worker`, `record`.

`steps` lists what there is to do; gpu_checks proves and gpu_benches measures.
"""
