"""How evenly the router spreads the tokens: statistics that a training loop can log, without a host sync until read.

`LoadMonitor` watches every routed layer of a model by forward hooks; `load_statistics` is the arithmetic, for counts
that are at hand already (`MoEOutput.expert_counts`). Sinks write a reading; `plot_load` and `plot_load_map` draw it.
"""

from moe_triton.metrics.monitor import LoadMonitor
from moe_triton.metrics.plots import plot_load, plot_load_map
from moe_triton.metrics.sinks import JsonlSink, TensorBoardSink, WandbSink, load_scalars
from moe_triton.metrics.statistics import ExchangeStatistics, LoadStatistics, load_statistics

__all__ = [
    "ExchangeStatistics",
    "JsonlSink",
    "LoadMonitor",
    "LoadStatistics",
    "TensorBoardSink",
    "WandbSink",
    "load_scalars",
    "load_statistics",
    "plot_load",
    "plot_load_map",
]
