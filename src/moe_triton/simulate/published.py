"""The cost model beside published measurements: what it is fitted on, and how far its predictions are from the rest.

DeepEP's V1 numbers were measured on H800s with a 400 Gb/s NIC each (its docs/legacy.md), the V2 ones on Hopper and
Blackwell nodes (its README.md at dd758ca of 2026-07-14, read 2026-11-29), here taken to be H100s and B200s: 7168 hidden
values, 8 of 256 experts. SonicMoE's are H100 TFLOP/s read off the plots of arXiv 2512.14080, within 5 TFLOP/s.

LigerCute's are the figures over the bars of liger_cute_kernels/assets/hopper_gpu_scaling.png in linkedin/Liger-Kernel
(at ead96b6 of 2026-08-21, read 2026-11-29): one layer over 2, 4 and 8 H200s, bf16, 8192 tokens per rank, its exchange
inside the kernels. Megatron's are whole training steps of NVIDIA-NeMo/Megatron-Bridge, docs/performance-summary.md,
container 25.11 (at 00b7660, read 2026-11-29): tokens per second and GPU on 8 to 256 GPUs, with up to 8 pipeline stages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from moe_triton.simulate.cost_model import (
    Workload,
    distinct_groups,
    exchange_bytes,
    exchange_time,
    experts_time,
    layer_times,
    predict,
    row_bytes,
)
from moe_triton.simulate.presets import DEVICES, MODELS, NETWORKS, Device, Model, Network
from moe_triton_kernels.tools.models import SONIC, Layer

DEEPEP = replace(MODELS["deepseek-v3"], router_groups=1, router_top_groups=1)  # its tests route uniformly
LOW_LATENCY_TOKENS = 128
LOW_LATENCY_US = {  # EP -> microseconds
    "dispatch": {8: 77, 16: 118, 32: 155, 64: 173, 128: 192, 256: 194},
    "combine": {8: 114, 16: 195, 32: 273, 64: 314, 128: 369, 256: 360},
}
NORMAL_TOKENS = 4096
# (network, EP, GB/s of dispatch): the bottleneck's logical bandwidth, which counts a rank's rows for itself
NORMAL_GBS = (
    ("h800-ib400", 8, 153),
    ("h800-ib400", 16, 43),
    ("h800-ib400", 32, 58),
    ("h800-ib400", 64, 51),
    ("nvlink4-ib400", 16, 90),
    ("nvlink4-ib400", 32, 61),
    ("nvlink5-ib400", 16, 90),
    ("nvlink5-ib400", 8, 726),
)
# the same of V2's combine; and of both with fewer SMs (24 in place of 64), of which the model knows nothing
COMBINE_GBS = (
    ("nvlink4-ib400", 16, 81),
    ("nvlink4-ib400", 32, 61),
    ("nvlink5-ib400", 16, 91),
    ("nvlink5-ib400", 8, 740),
)
FEWER_SMS_GBS = {"dispatch": 643, "combine": 675}  # on nvlink5-ib400, EP8
# preset -> EP -> forward and backward TFLOP/s
LIGER_CUTE_TFLOPS = {
    "qwen3-30b-a3b": {2: (307, 215), 4: (274, 207), 8: (238, 211)},
    "mixtral-8x7b": {2: (534, 384), 4: (548, 398), 8: (533, 400)},
}
LIGER_CUTE_TOKENS = 8192
GRACE_FLOPS = {"bfloat16": 2500e12, "float16": 2500e12, "float8": 5000e12}  # a GPU of GB200 and GB300, by data sheet
# (system, preset, GPUs, EP, dtype, sequences per micro-batch of 4096 tokens, tokens per second and GPU)
MEGATRON = (
    ("GB200", "deepseek-v3", 256, 64, "bfloat16", 1, 3139),
    ("GB200", "deepseek-v3", 256, 32, "float8", 1, 4018),
    ("GB200", "qwen3-235b-a22b", 256, 32, "bfloat16", 1, 4916),
    ("GB200", "qwen3-30b-a3b", 8, 8, "float8", 4, 23766),
    ("GB300", "deepseek-v3", 256, 32, "bfloat16", 1, 3848),
    ("GB300", "deepseek-v3", 256, 32, "float8", 1, 4357),
    ("GB300", "qwen3-235b-a22b", 256, 16, "bfloat16", 2, 6131),
    ("GB300", "qwen3-30b-a3b", 8, 8, "float8", 4, 28934),
)
NCCL_US = {2: 50.7, 4: 51.1, 8: 83.0, 16: 101.8, 32: 99.7, 64: 154.5}  # MB per rank -> microseconds on 8 x B300, coarse
# forward and backward TFLOP/s of the shapes of SONIC, in their order
SONIC_TFLOPS = (
    *((335, 363), (397, 401), (404, 433)),
    *((363, 404), (431, 438), (463, 465)),
    *((425, 457), (500, 508), (549, 551)),
    *((515, 523), (555, 564), (591, 583)),
)
SONIC_SHAPES = tuple((tokens, layer) for tokens, layers in SONIC.values() for layer in layers)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One published number beside the model's. `fitted`: the model was fitted on it, so that it proves nothing."""

    what: str
    case: str
    unit: str
    published: float
    predicted: float
    fitted: bool

    @property
    def error(self) -> float:
        """Relative: predicted / published - 1."""
        return self.predicted / self.published - 1


def groups_of(nodes: float) -> Model:
    """DeepEP's normal test chooses 4 groups where there are more nodes than that, one group a node."""
    return replace(DEEPEP, router_groups=int(nodes), router_top_groups=4) if nodes > 4 else DEEPEP


def normal_gbs(network: Network, ep: int) -> float:
    """Logical GB/s at the bottleneck of a deduplicated exchange as DeepEP counts them, own rows included.

    Without latencies the format of the rows does not matter: dispatch in float8 and combine in bfloat16 are alike.
    """
    nodes = max(1.0, ep / network.gpus_per_node)
    model = groups_of(nodes)
    row = row_bytes(model.hidden, "float8")
    within, beyond = exchange_bytes("deduplicated", model, NORMAL_TOKENS, row, ep, network.gpus_per_node)
    seconds = max(within / network.node_rate, beyond / network.nic_rate)
    logical = NORMAL_TOKENS * row * distinct_groups(model, ep if nodes == 1 else nodes)
    return logical / seconds / 1e9


def fit_bandwidths() -> tuple[float, float]:
    """(node, NIC) efficiency from two points: EP8 crosses NVLink with 7/8 of its rows, EP64 the NICs with 7/8."""
    found = {(name, ep): rate * 1e9 for name, ep, rate in NORMAL_GBS}
    base = NETWORKS["h800-ib400"]
    node = found["h800-ib400", 8] * 7 / 8 / base.node_bandwidth
    nic = found["h800-ib400", 64] * 7 / 8 / base.nic_bandwidth
    return node, nic


def low_latency_us(what: str, ep: int, network: Network) -> float:
    row = row_bytes(DEEPEP.hidden, "float8" if what == "dispatch" else "bfloat16")
    device = DEVICES["h100"]  # direct exchanges touch only the network
    return 1e6 * exchange_time("direct", DEEPEP, LOW_LATENCY_TOKENS, row, ep, network, device)


def fit_latency(network: Network) -> Network:
    """a0 and a1 >= 0 of `network` by least squares on dispatch and combine at EP16 (2 nodes) and EP64 (8 nodes)."""
    bare = replace(network, latency_s=0.0, latency_per_double_s=0.0)
    left = {
        ep: [(LOW_LATENCY_US[what][ep] - low_latency_us(what, ep, bare)) / 1e6 for what in LOW_LATENCY_US]
        for ep in (16, 64)
    }
    small, large = (sum(rest) / len(rest) for rest in left.values())
    slope = max(0.0, (large - small) / 2)  # from log2(2) to log2(8)
    start = (small + large) / 2 - 2 * slope
    return replace(network, latency_s=start, latency_per_double_s=slope)


def nccl_us(megabytes: float, start_us: float, rate: float) -> float:
    """Microseconds of an all-to-all of 8 ranks on one node, 7/8 of whose bytes leave the rank."""
    return start_us + megabytes * 1e12 * 7 / 8 / rate


def fit_nccl() -> tuple[float, float]:
    """(microseconds at size 0, bytes per second) from the smallest and the largest size."""
    small, large = min(NCCL_US), max(NCCL_US)
    rate = (large - small) * 1e12 * 7 / 8 / (NCCL_US[large] - NCCL_US[small])
    return NCCL_US[small] - small * 1e12 * 7 / 8 / rate, rate


def sonic_tflops(tokens: int, layer: Layer, device: Device) -> tuple[float, float]:
    """Forward and backward TFLOP/s of a layer's experts on one GPU."""
    model = replace(DEEPEP, **layer._asdict())
    forward, backward = experts_time(model, tokens * layer.top_k, tokens, layer.experts, "bfloat16", device)
    flops = 6 * tokens * layer.top_k * layer.intermediate * layer.hidden / 1e12
    return flops / forward, 2 * flops / backward


def fit_gemm() -> float:
    """The GEMM efficiency, in hundredths, with the least worst error on the forward speeds."""

    def worst(hundredths: int) -> float:
        device = replace(DEVICES["h100"], gemm_efficiency=hundredths / 100)
        pairs = zip(SONIC_SHAPES, SONIC_TFLOPS, strict=True)
        return max(abs(sonic_tflops(*shape, device)[0] / forward - 1) for shape, (forward, _) in pairs)

    return min(range(50, 100), key=worst) / 100


def liger_cute_tflops(preset: str, ep: int) -> tuple[float, float]:
    """Forward and backward TFLOP/s of one layer whose exchange is cut up finely and overlaps the experts."""
    work = Workload(model=MODELS[preset], tokens=LIGER_CUTE_TOKENS, exchange="direct", chunks=8)
    forward, backward = (time.total_s for time in layer_times(work, DEVICES["h200"], NETWORKS["nvlink4-ib400"], ep))
    model = MODELS[preset]
    flops = 6 * LIGER_CUTE_TOKENS * model.top_k * model.intermediate * model.hidden / 1e12
    return flops / forward, 2 * flops / backward


def megatron_speed(preset: str, gpus: int, ep: int, dtype: str, sequences: int) -> float:
    """Tokens per second and GPU of a step of many micro-batches: the sums of the gradients, once a step, are left out.

    Neither are pipelines, recomputation and the optimizer in the model. MXFP8 is taken for float8.
    """
    device = replace(DEVICES["b200"], peak_flops=GRACE_FLOPS)
    work = Workload(model=MODELS[preset], tokens=4096 * sequences, sequence=4096, dtype=dtype, exchange="direct")
    step = predict(work, device, NETWORKS["nvl72-ib400"], gpus, ep)
    return work.tokens / (step.step_s - step.exposed_reductions_s)


def validate() -> list[Point]:
    """Fits the model anew and predicts every published point, the fitted ones included."""
    points = []

    def add(what: str, case: str, unit: str, published: float, predicted: float, fitted: bool) -> None:
        points.append(Point(what=what, case=case, unit=unit, published=published, predicted=predicted, fitted=fitted))

    node, nic = fit_bandwidths()
    for name, ep, speed in NORMAL_GBS:
        network = replace(NETWORKS[name], node_efficiency=node, nic_efficiency=nic)
        fitted = name == "h800-ib400" and ep in (8, 64)
        add("DeepEP normal dispatch", f"EP{ep} {name}", "GB/s", speed, normal_gbs(network, ep), fitted)
    for name, ep, speed in COMBINE_GBS:
        network = replace(NETWORKS[name], node_efficiency=node, nic_efficiency=nic)
        add("DeepEP normal combine", f"EP{ep} {name}", "GB/s", speed, normal_gbs(network, ep), False)
    for way, speed in FEWER_SMS_GBS.items():
        network = replace(NETWORKS["nvlink5-ib400"], node_efficiency=node, nic_efficiency=nic)
        add("DeepEP with 24 SMs", f"{way} EP8 {network.name}", "GB/s", speed, normal_gbs(network, 8), False)
    network = fit_latency(replace(NETWORKS["h800-ib400"], node_efficiency=node, nic_efficiency=nic))
    for what, row in LOW_LATENCY_US.items():
        for ep, time in row.items():
            predicted = low_latency_us(what, ep, network)
            add(f"DeepEP low-latency {what}", f"EP{ep}", "us", time, predicted, ep in (16, 64))
    start, rate = fit_nccl()
    for size, latency in NCCL_US.items():
        fitted = size in (min(NCCL_US), max(NCCL_US))
        add("NCCL all-to-all, 8 x B300", f"{size} MB", "us", latency, nccl_us(size, start, rate), fitted)
    device = replace(DEVICES["h100"], gemm_efficiency=fit_gemm())
    for index, way in enumerate(("forward", "backward")):
        for (tokens, layer), speeds in zip(SONIC_SHAPES, SONIC_TFLOPS, strict=True):
            case = f"T{tokens} d{layer.hidden} n{layer.intermediate} E{layer.experts} K{layer.top_k}"
            predicted = sonic_tflops(tokens, layer, device)[index]
            add(f"SonicMoE {way}, H100", case, "TFLOP/s", speeds[index], predicted, index == 0)
    for preset, speeds_of in LIGER_CUTE_TFLOPS.items():
        for ep, speeds in speeds_of.items():
            for way, speed, predicted in zip(
                ("forward", "backward"), speeds, liger_cute_tflops(preset, ep), strict=True
            ):
                add(f"LigerCute {way}, H200", f"EP{ep} {preset}", "TFLOP/s", speed, predicted, False)
    for system, preset, gpus, ep, dtype, sequences, speed in MEGATRON:
        predicted = megatron_speed(preset, gpus, ep, dtype, sequences)
        add(f"Megatron step, {system}", f"{preset} {dtype} EP{ep} x{gpus}", "tokens/s", speed, predicted, False)
    return points
