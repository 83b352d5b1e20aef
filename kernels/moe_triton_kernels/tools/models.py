"""The MoE layers of published models: the one table, for benchmarks, cost model and shipped configurations."""

from __future__ import annotations

from typing import NamedTuple


class Layer(NamedTuple):
    """d, n, E and K of one MoE layer."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int


MODELS = {  # by their config.json at huggingface.co
    "DeepSeek-V3": Layer(7168, 2048, 256, 8),
    "Qwen3-30B-A3B": Layer(2048, 768, 128, 8),
    "Qwen3-235B-A22B": Layer(4096, 1536, 128, 8),
    "Mixtral-8x7B": Layer(4096, 14336, 8, 2),
    "gpt-oss-20b": Layer(2880, 2880, 32, 4),
    "gpt-oss-120b": Layer(2880, 2880, 128, 4),
    "OLMoE": Layer(2048, 1024, 64, 8),
}
SONIC = {  # the twelve shapes of the SonicMoE paper (arXiv 2512.14080): model size -> T and the layers
    "1.4B": (40960, (Layer(768, 256, 128, 8), Layer(768, 512, 64, 4), Layer(768, 1024, 32, 2))),
    "7B": (24576, (Layer(1536, 256, 128, 8), Layer(1536, 512, 64, 4), Layer(1536, 1024, 32, 2))),
    "30B": (32768, (Layer(4096, 256, 256, 16), Layer(4096, 512, 128, 8), Layer(4096, 1024, 64, 4))),
    "120B": (32768, (Layer(4096, 512, 256, 16), Layer(4096, 1024, 128, 8), Layer(4096, 2048, 64, 4))),
}
# From coarse to fine experts, with constant active parameters (ScatterMoE, arXiv 2403.08245).
GRANULARITY = tuple(Layer(4096, 8192 // k, 8 * k, k) for k in (1, 2, 4, 8, 16))
LAYERS = (*(layer for _, layers in SONIC.values() for layer in layers), *MODELS.values(), *GRANULARITY)
