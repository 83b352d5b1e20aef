"""GPUs, networks and models for the cost model, in public numbers, and the records that describe them.

Times in seconds, sizes in bytes, rates per second and per GPU, bandwidths in one direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_triton_kernels.tools import models
from moe_triton_kernels.tools.gpus import GPUS, Gpu

# Shares of the nominal rates and latencies, fitted to published measurements; tests/simulate/test_cost_model.py fits
# them again. Only the hardware named with each was measured; for every other preset the value is an assumption.
GEMM_EFFICIENCY = 0.74  # H100: SonicMoE's forward kernels (arXiv 2512.14080), twelve shapes
NODE_EFFICIENCY = 0.67  # H800: DeepEP normal dispatch, EP8, 153 GB/s of which 7/8 cross NVLink (200 GB/s)
NIC_EFFICIENCY = 0.89  # H800 + 400 Gb/s InfiniBand: DeepEP normal dispatch, EP64, 51 GB/s of which 7/8 cross (50 GB/s)
LATENCY_S = 28e-6  # the same cluster: DeepEP low-latency dispatch and combine, EP16 and EP64
LATENCY_PER_DOUBLE_S = 0.0  # the same fit: it finds no growth with the nodes
PEER_LATENCY_S = 2.8e-6  # NCCL on 8 x B300: 47 microseconds at size 0, less the latency above, over 7 peers


@dataclass(frozen=True, kw_only=True)
class Device:
    """One GPU. FLOP/s are dense; `gemm_efficiency` is the share of them that large products reach;
    `network` the preset that such GPUs usually have."""

    name: str
    peak_flops: dict[str, float]
    memory_bandwidth: float
    memory_bytes: float
    gemm_efficiency: float = GEMM_EFFICIENCY
    network: str
    source: str

    def flops(self, dtype: str) -> float:
        """Sustained FLOP/s; ValueError when the device has no such products."""
        if dtype not in self.peak_flops:
            raise ValueError(f"dtype: got {dtype!r}, wanted one of {', '.join(self.peak_flops)} on {self.name}")
        return self.peak_flops[dtype] * self.gemm_efficiency


@dataclass(frozen=True, kw_only=True)
class Network:
    """The links of one GPU: within a node (NVLink, Infinity Fabric, PCIe) and to other nodes (its share of the NICs).

    *_efficiency           shares of the nominal bandwidths that exchanges reach
    latency_s              a0: of an exchange, whatever its size
    latency_per_double_s   a1: added for every doubling of the nodes
    peer_latency_s         a_p: added for every peer where the messages go out one after the other
    """

    name: str
    gpus_per_node: int
    node_bandwidth: float
    nic_bandwidth: float
    node_efficiency: float = NODE_EFFICIENCY
    nic_efficiency: float = NIC_EFFICIENCY
    latency_s: float = LATENCY_S
    latency_per_double_s: float = LATENCY_PER_DOUBLE_S
    peer_latency_s: float = PEER_LATENCY_S
    source: str

    @property
    def node_rate(self) -> float:
        return self.node_bandwidth * self.node_efficiency

    @property
    def nic_rate(self) -> float:
        return self.nic_bandwidth * self.nic_efficiency


@dataclass(frozen=True, kw_only=True)
class Model:
    """The sizes of a language model whose experts are gated.

    attention_parameters   of one layer's projections
    attention_width        heads * (query-key + value head size), of one layer
    full_attention_layers  layers whose attention spans the sequence; None: all (windows are left out of the FLOPs)
    dense_intermediate     of the feed-forward layers that are no mixture
    router_groups          of group-limited routing: a token's experts lie in router_top_groups of them
    """

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    layers: int
    moe_layers: int
    vocabulary: int
    attention_parameters: int
    attention_width: int
    full_attention_layers: int | None = None
    dense_intermediate: int = 0
    shared_intermediate: int = 0
    router_groups: int = 1
    router_top_groups: int = 1
    source: str

    @property
    def expert_parameters(self) -> int:
        """Of all routed experts in all layers."""
        return self.moe_layers * self.experts * 3 * self.intermediate * self.hidden

    @property
    def dense_parameters(self) -> int:
        """Of everything else, both embeddings included; without norms and biases."""
        feed_forward = (
            3
            * self.hidden
            * ((self.layers - self.moe_layers) * self.dense_intermediate + self.moe_layers * self.shared_intermediate)
        )
        router = self.moe_layers * self.hidden * self.experts
        return self.layers * self.attention_parameters + feed_forward + router + 2 * self.vocabulary * self.hidden

    @property
    def active_parameters(self) -> int:
        """That one token meets, both embeddings included."""
        return self.dense_parameters + self.expert_parameters * self.top_k // self.experts


def grouped_query(hidden: int, heads: int, key_heads: int, head: int) -> int:
    """Parameters of the projections of one grouped-query attention layer: query, key, value, output."""
    return hidden * head * (2 * heads + 2 * key_heads)


def latent(hidden: int, heads: int, query_rank: int, key_rank: int, plain: int, rotary: int, value: int) -> int:
    """Parameters of one multi-head latent attention layer (DeepSeek-V2, arXiv 2405.04434, 2.1)."""
    query = hidden * query_rank + query_rank * heads * (plain + rotary)
    key_value = hidden * (key_rank + rotary) + key_rank * heads * (plain + value)
    return query + key_value + heads * value * hidden


NETWORKS = {
    name: Network(name=name, gpus_per_node=gpus, node_bandwidth=node, nic_bandwidth=nic, source=source)
    for name, gpus, node, nic, source in (
        ("nvlink3-ib200", 8, 300e9, 25e9, "DGX A100: NVLink 3 (600 GB/s both ways), a 200 Gb/s NIC per GPU"),
        ("h800-ib400", 8, 200e9, 50e9,
         "H800: NVLink at 400 GB/s both ways, a 400 Gb/s NIC per GPU (DeepSeek-V3, arXiv 2412.19437)"),
        ("nvlink4-ib400", 8, 450e9, 50e9, "DGX H100 and H200: NVLink 4 (900 GB/s both ways), a 400 Gb/s NIC per GPU"),
        ("nvlink5-ib400", 8, 900e9, 50e9, "DGX B200: NVLink 5 (1.8 TB/s both ways), a 400 Gb/s NIC per GPU"),
        ("nvlink5-ib800", 8, 900e9, 100e9, "DGX B300: NVLink 5 (1.8 TB/s both ways), an 800 Gb/s NIC per GPU"),
        ("nvl72-ib400", 72, 900e9, 50e9,
         "GB200 NVL72: 72 GPUs on NVLink 5 (1.8 TB/s both ways), a 400 Gb/s NIC per GPU"),
        ("xgmi-ib400", 8, 448e9, 50e9,
         "MI300X platform: seven Infinity Fabric links (896 GB/s both ways), a 400 Gb/s NIC per GPU"),
        ("pcie4-100g", 8, 31.5e9, 12.5e9 / 8, "eight GPUs on PCIe 4.0 x16, one 100 Gb/s NIC for all of them"),
    )
}  # fmt: skip
USUAL_NETWORKS = {
    "a100": "nvlink3-ib200",
    "h100": "nvlink4-ib400",
    "h200": "nvlink4-ib400",
    "b200": "nvlink5-ib400",
    "mi300x": "xgmi-ib400",
}


def _device(name: str, gpu: Gpu) -> Device:
    flops = {"bfloat16": gpu.fp16_flops, "float16": gpu.fp16_flops}
    if gpu.fp8_flops is not None:
        flops["float8"] = gpu.fp8_flops
    return Device(
        name=name, peak_flops=flops, memory_bandwidth=gpu.bandwidth, memory_bytes=gpu.memory,
        network=USUAL_NETWORKS[name], source=f"{gpu.product} data sheet",
    )  # fmt: skip


DEVICES = {name: _device(name, GPUS[name]) for name in USUAL_NETWORKS}


def _model(name: str, *, layers: int, attention_parameters: int, **sizes: Any) -> Model:
    """A model whose layers are all mixtures, unless `sizes` says otherwise."""
    return Model(
        name=name.lower(), **models.MODELS[name]._asdict(), layers=layers, attention_parameters=attention_parameters,
        **{"moe_layers": layers, **sizes},
    )  # fmt: skip


MODELS = {
    model.name: model
    for model in (
        _model(
            "DeepSeek-V3", layers=61, moe_layers=58, vocabulary=129280,
            attention_parameters=latent(7168, 128, 1536, 512, 128, 64, 128), attention_width=128 * (192 + 128),
            dense_intermediate=18432, shared_intermediate=2048, router_groups=8, router_top_groups=4,
            source="deepseek-ai/DeepSeek-V3 config.json (without multi-token prediction)",
        ),
        _model(
            "Qwen3-30B-A3B", layers=48, vocabulary=151936, attention_parameters=grouped_query(2048, 32, 4, 128),
            attention_width=32 * 256, source="Qwen/Qwen3-30B-A3B config.json",
        ),
        _model(
            "Qwen3-235B-A22B", layers=94, vocabulary=151936, attention_parameters=grouped_query(4096, 64, 4, 128),
            attention_width=64 * 256, source="Qwen/Qwen3-235B-A22B config.json",
        ),
        _model(
            "Mixtral-8x7B", layers=32, vocabulary=32000, attention_parameters=grouped_query(4096, 32, 8, 128),
            attention_width=32 * 256, source="mistralai/Mixtral-8x7B-v0.1 config.json",
        ),
        _model(
            "gpt-oss-20b", layers=24, vocabulary=201088, attention_parameters=grouped_query(2880, 64, 8, 64),
            attention_width=64 * 128, full_attention_layers=12, source="openai/gpt-oss-20b config.json",
        ),
        _model(
            "gpt-oss-120b", layers=36, vocabulary=201088, attention_parameters=grouped_query(2880, 64, 8, 64),
            attention_width=64 * 128, full_attention_layers=18, source="openai/gpt-oss-120b config.json",
        ),
        _model(
            "OLMoE", layers=16, vocabulary=50304, attention_parameters=grouped_query(2048, 16, 16, 128),
            attention_width=16 * 256, source="allenai/OLMoE-1B-7B-0924 config.json",
        ),
    )
}  # fmt: skip
