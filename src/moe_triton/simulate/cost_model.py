"""What a step of a mixture of experts costs on 1 to 4,096 GPUs: a model in closed formulas, not a measurement.

Times in seconds, sizes in bytes, rates per second and per GPU, bandwidths in one direction. Names in the formulas:
T tokens per GPU, d hidden size, n expert intermediate size, E experts, K choices per token, P = ep ranks that share the
experts, m GPUs per node, N = P/m nodes, lambda = the load of the busiest rank over the mean.

A step is one batch of T tokens per GPU through the whole model: attention, dense and shared feed-forward layers,
embedding products, the MoE layers with their exchanges and, in training, backward and the reduction of gradients.
Everything but the routed experts is replicated on every GPU. Not in it: the optimizer's update, recomputed activations,
norms and other elementwise passes, the routing kernels, pipeline or tensor parallelism, data loading.

How well it predicts: `moe_triton.simulate.published`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from moe_triton.checks import check_choice, check_int, check_number
from moe_triton.simulate.presets import Device, Model, Network

MODES = ("forward", "train")
EXCHANGES = ("direct", "nccl", "deduplicated", "hierarchical")
ITEM_BYTES = {"float8": 1, "float16": 2, "bfloat16": 2, "float32": 4}
MAX_GPUS = 4096
ACTIVATION_BYTES = 2  # hidden rows, combined rows and gradients are bf16 or fp16 whatever the products' dtype
SCALE_BLOCK = 128  # values that share one fp32 scale in a float8 row (DeepEP, DeepSeek-V3: arXiv 2412.19437, 3.3.2)
TILE = 128  # rows of a grouped GEMM's largest tile
# The host reads the sizes once per layer and forward: wake-up, about 16 small index kernels of 8 us, and the launch of
# the rows. Estimated at 150 to 250 us from the operations of a forward pass on a CPU; not measured on a GPU.
HOST_SYNC_S = 200e-6
CHUNK_OVERHEAD_S = 10e-6  # assumed: launches per chunk


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every GPU does in a step.

    tokens          T, in sequences of `sequence` tokens
    dtype           of the products: bfloat16, float16 or float8
    dispatch_dtype  of the rows sent to the experts in the forward pass; all other rows are 2 bytes a value
    skew            lambda >= 1; a rank cannot hold more than everything, so that at most P of it counts
    chunks          D: pieces in which exchange and experts overlap
    exchange        nccl: a row per (token, rank), peer after peer, as `ExpertParallel` sends by default;
                    direct: a row per assignment, all sent at once, with no sizes read before (DeepEP's low-latency
                    kernels, `SymmetricMemory`);
                    deduplicated: a row per (token, node) over the network, then one per (token, rank) within the node;
                    hierarchical: a row per assignment, regrouped within the node, then sent node to node (Tutel)
    """

    model: Model
    tokens: int = 4096
    sequence: int = 4096
    dtype: str = "bfloat16"
    dispatch_dtype: str = "bfloat16"
    skew: float = 1.0
    chunks: int = 1
    mode: str = "train"
    exchange: str = "nccl"

    def __post_init__(self) -> None:
        check_int("tokens", self.tokens, low=1)
        check_int("sequence", self.sequence, low=1)
        check_choice("dtype", self.dtype, ("bfloat16", "float16", "float8"))
        check_choice("dispatch_dtype", self.dispatch_dtype, tuple(ITEM_BYTES))
        check_number("skew", self.skew, low=1)
        check_int("chunks", self.chunks, low=1)
        check_choice("mode", self.mode, MODES)
        check_choice("exchange", self.exchange, EXCHANGES)


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """One MoE layer on the busiest rank, in one direction; the parts as if nothing overlapped."""

    counts_s: float
    dispatch_s: float
    experts_s: float
    combine_s: float
    total_s: float

    @property
    def exchange_s(self) -> float:
        return self.counts_s + self.dispatch_s + self.combine_s

    @property
    def exposed_s(self) -> float:
        """The part of the exchange, with its overheads, that nothing hides."""
        return self.total_s - self.experts_s

    @property
    def hidden_s(self) -> float:
        return max(0.0, self.exchange_s - self.exposed_s)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One step. The times of a layer are forward, or forward and backward together in training.

    exchange_share  of the step during which a GPU does nothing but exchange rows
    overlap         share of the exchange that the experts hide
    memory_bytes    parameters and, in training, gradients and Adam's states (sharded over the replicas); no activations
    """

    gpus: int
    ep: int
    edp: int
    rows_per_expert: float
    counts_s: float
    dispatch_s: float
    experts_s: float
    combine_s: float
    layer_s: float
    all_experts_s: float
    all_exposed_exchange_s: float
    dense_s: float
    reductions_s: float
    exposed_reductions_s: float
    step_s: float
    exchange_share: float
    overlap: float
    tokens_per_s_per_gpu: float
    memory_bytes: float
    fits: bool


def miss(total: float, part: float, draws: int) -> float:
    """C(total - part, draws) / C(total, draws): the chance that distinct draws all miss a part. Real sizes are fine."""
    chance = 1.0
    for i in range(draws):
        chance *= max(0.0, total - part - i) / (total - i)
    return chance


def distinct_groups(model: Model, groups: float) -> float:
    """Into how many of `groups` equal groups of experts (ranks or nodes) a token's K experts fall, on average.

    Uniform routing: groups * (1 - C(E - E/groups, K) / C(E, K)). Under group-limited routing the K experts are drawn
    from router_top_groups random router groups; exact where one count of groups divides the other.
    """
    limit, of = model.router_top_groups, model.router_groups
    pool = model.experts * limit / of
    mine = max(1, round(of / groups))  # router groups that one group of experts has a part in
    part = model.experts / max(groups, of)
    untouched = 0.0
    for chosen in range(max(0, limit - of + mine), min(mine, limit) + 1):
        chance = math.comb(mine, chosen) * math.comb(of - mine, limit - chosen) / math.comb(of, limit)
        untouched += chance * miss(pool, chosen * part, model.top_k)
    return groups * (1 - untouched)


def row_bytes(hidden: int, dtype: str) -> int:
    """Of one hidden row on the wire, with its scales where it is float8."""
    scales = 4 * -(-hidden // SCALE_BLOCK) if dtype == "float8" else 0
    return hidden * ITEM_BYTES[dtype] + scales


def exchange_bytes(exchange: str, model: Model, tokens: float, row: int, ep: int, node: int) -> tuple[float, float]:
    """What a rank sends within its node and to other nodes under uniform routing, in bytes. `node`: GPUs per node."""
    local = min(node, ep)
    if exchange == "deduplicated":
        nodes = max(1.0, ep / node)
        within = distinct_groups(model, ep) * (local - 1) / local  # forwarded by the GPU of the same place in the node
        beyond = distinct_groups(model, nodes) * (nodes - 1) / nodes
    else:
        copies = distinct_groups(model, ep) if exchange == "nccl" else model.top_k
        within, beyond = copies * (local - 1) / ep, copies * (ep - local) / ep
    return tokens * row * within, tokens * row * beyond


def exchange_time(
    exchange: str, model: Model, tokens: float, row: int, ep: int, network: Network, device: Device, skew: float = 1.0
) -> float:
    """Seconds of one all-to-all of `tokens` tokens per rank over ep ranks; 0 on one rank.

    direct, deduplicated: a0 + a1*log2(N) + lambda * max(within / node_rate, beyond / nic_rate).
    nccl: the same with a0 + a_p*(P - 1) for the latency.
    hierarchical (Tutel's 2-D all-to-all, arXiv 2206.03382): with b = T*K rows,
    4b/memory + (m-1)*a_p + b/node_rate + (N-1)*a_p + b*(N-1)/N/nic_rate, the terms in b times lambda.
    """
    if ep == 1:
        return 0.0
    local, nodes = min(network.gpus_per_node, ep), max(1.0, ep / network.gpus_per_node)
    if exchange == "hierarchical":
        sent = skew * tokens * model.top_k * row
        latency = network.latency_s + (local - 1 + nodes - 1) * network.peer_latency_s
        moved = 4 * sent / device.memory_bandwidth  # two regroupings, each read and written
        return latency + moved + sent / network.node_rate + sent * (nodes - 1) / nodes / network.nic_rate
    within, beyond = exchange_bytes(exchange, model, tokens, row, ep, network.gpus_per_node)
    latency = network.latency_s
    if exchange == "nccl":
        latency += network.peer_latency_s * (ep - 1)
    else:
        latency += network.latency_per_double_s * math.log2(nodes)
    return latency + skew * max(within / network.node_rate, beyond / network.nic_rate)


def counts_time(exchange: str, model: Model, chunks: int, ep: int, network: Network) -> float:
    """The exchange of int32 counts [P, chunks, E/P] and the host's reading them; 0 on one rank and where none are."""
    if ep == 1 or exchange == "direct":
        return 0.0
    rate = network.nic_rate if ep > network.gpus_per_node else network.node_rate
    return network.latency_s + 4 * chunks * model.experts / rate + HOST_SYNC_S


def padded_rows(rows: float) -> float:
    """Rows that a grouped GEMM computes for an expert with Poisson(rows) rows: whole tiles, half a tile too many."""
    tile = min(TILE, max(16, 2 ** math.ceil(math.log2(max(rows, 1.0)))))
    used = 1 - math.exp(-rows)  # chance that the expert has any
    return max(tile * used, rows + (tile - 1) / 2 * used)


def experts_time(
    model: Model,
    rows: float,
    received: float,
    experts: float,
    dtype: str,
    device: Device,
    *,
    train: bool = True,
    chunks: int = 1,
) -> tuple[float, float]:
    """Seconds of one rank's experts in one layer, forward and backward (0 unless `train`).

    rows: assignments of this rank; received: its token rows; experts: how many it holds. FLOPs / sustained rate + bytes
    / memory bandwidth, with FLOPs 6*rows*n*d forward and 12*rows*n*d backward on padded rows, and the bytes of fused
    gather -> up -> activation -> down -> combine and of dH, dW2, dX, dW1 and the sum of dX. They are added, not
    overlapped: that is what fits the kernels of SonicMoE (arXiv 2512.14080) over twelve shapes (`published`). Every
    chunk pads its rows and reads the weights; the weight gradients are written once.
    """
    d, n, item = model.hidden, model.intermediate, ITEM_BYTES[dtype]
    mean = rows / experts / chunks
    flops = 6 * experts * chunks * padded_rows(mean) * n * d
    hidden, inner, routed = received * d, rows * n, rows * d
    weights = 3 * item * experts * chunks * (1 - math.exp(-mean)) * n * d  # only of experts that have rows
    moved = (item + 2) * hidden + 4 * inner + 4 * routed + weights
    if train:
        moved += 4 * inner  # the pre-activation is kept
    forward = flops / device.flops(dtype) + moved / device.memory_bandwidth
    if not train:
        return forward, 0.0
    gradients = 3 * ACTIVATION_BYTES * experts * n * d  # an expert without rows gets zeros
    moved = 8 * hidden + 20 * inner + 4 * routed + weights + gradients
    return forward, 2 * flops / device.flops(dtype) + moved / device.memory_bandwidth


def dense_time(model: Model, tokens: int, sequence: int, dtype: str, device: Device) -> float:
    """Seconds of one forward pass through everything but the routed experts; backward takes twice as long.

    2 FLOPs per token and parameter (the input embedding is a look-up) plus causal attention, width * sequence FLOPs per
    token and layer, and one reading of the parameters.
    """
    parameters = model.dense_parameters - model.vocabulary * model.hidden
    layers = model.layers if model.full_attention_layers is None else model.full_attention_layers
    flops = tokens * (2 * parameters + layers * model.attention_width * sequence)
    return flops / device.flops(dtype) + parameters * ITEM_BYTES[dtype] / device.memory_bandwidth


def pipelined(dispatch: float, experts: float, combine: float, chunks: int, overhead: float) -> float:
    """(A+G+C)/D + (D-1)/D * max(A+C, G) + D*overhead: D chunks, dispatch and combine on one link, experts beside them.

    The first chunk fills the pipeline; then the slower of link and experts sets the pace (as in Tutel and FasterMoE).
    """
    exchange = dispatch + combine
    return (exchange + experts) / chunks + (chunks - 1) / chunks * max(exchange, experts) + chunks * overhead


def layer_times(work: Workload, device: Device, network: Network, ep: int) -> list[LayerTime]:
    """The MoE layer forward and, in training, backward (whose exchanges carry 2-byte rows and reuse the counts)."""
    model, train = work.model, work.mode == "train"
    skew, chunks = min(work.skew, ep), work.chunks if ep > 1 else 1
    rows, received = skew * work.tokens * model.top_k, skew * work.tokens * distinct_groups(model, ep)
    local = model.experts / ep
    compute = experts_time(model, rows, received, local, work.dtype, device, train=train, chunks=chunks)

    def send(dtype: str) -> float:
        row = row_bytes(model.hidden, dtype)  # every chunk pays the latency
        return chunks * exchange_time(work.exchange, model, work.tokens / chunks, row, ep, network, device, skew)

    def layer(counts: float, dispatch: float, experts: float, combine: float) -> LayerTime:
        total = counts + pipelined(dispatch, experts, combine, chunks, CHUNK_OVERHEAD_S if ep > 1 else 0.0)
        return LayerTime(counts_s=counts, dispatch_s=dispatch, experts_s=experts, combine_s=combine, total_s=total)

    plain = send("bfloat16")
    found = [
        layer(counts_time(work.exchange, model, chunks, ep, network), send(work.dispatch_dtype), compute[0], plain)
    ]
    return [*found, layer(0.0, plain, compute[1], plain)] if train else found


def all_reduce_time(size: float, ranks: int, per_node: int, network: Network) -> float:
    """Seconds to sum `size` bytes over ranks, `per_node` of them in each node; 0 on one rank.

    Reduce-scatter within the node, a ring over the nodes on each GPU's share of the bytes, all-gather within the node.
    """
    if ranks == 1:
        return 0.0
    local = min(per_node, ranks)
    nodes = ranks / local
    within = 2 * size * (local - 1) / local / network.node_rate
    beyond = 2 * (size / local) * (nodes - 1) / nodes / network.nic_rate
    return network.latency_s + within + beyond


def reductions_time(model: Model, gpus: int, ep: int, network: Network) -> float:
    """Seconds to sum the gradients: the dense ones over all GPUs, each rank's experts over their edp replicas.

    ep consecutive GPUs share the experts, so that max(1, m/ep) replicas of an expert lie in a node.
    """
    node = network.gpus_per_node
    dense = all_reduce_time(ACTIVATION_BYTES * model.dense_parameters, gpus, node, network)
    share = ACTIVATION_BYTES * model.expert_parameters / ep
    return dense + all_reduce_time(share, gpus // ep, max(1, node // ep), network)


def memory(model: Model, gpus: int, ep: int, *, train: bool) -> float:
    """Bytes per GPU: 2 per parameter; in training 2 more for its gradient, 12 for Adam's fp32 states and master copy
    that the replicas of a parameter share (ZeRO-1, arXiv 1910.02054)."""
    dense, experts = model.dense_parameters, model.expert_parameters / ep
    if not train:
        return 2 * (dense + experts)
    return 4 * (dense + experts) + 12 * (dense / gpus + experts / (gpus // ep))


def expert_parallel_size(gpus: int, experts: int, wanted: int | None = None) -> int:
    """ep for a number of GPUs: `wanted`, or fewer where there are fewer GPUs; by default the most that divides both."""
    if wanted is None:
        return math.gcd(gpus, experts)
    check_int("ep", wanted, low=1)
    if experts % wanted:
        raise ValueError(f"ep: got {wanted}, wanted a divisor of the {experts} experts")
    if gpus % wanted and wanted % gpus:
        raise ValueError(f"ep: got {wanted}, wanted a divisor or a multiple of {gpus} GPUs")
    return min(gpus, wanted)


def predict(work: Workload, device: Device, network: Network, gpus: int, ep: int | None = None) -> Prediction:
    """One step on `gpus` GPUs (1 to 4,096), each with work.tokens tokens. ep: see `expert_parallel_size`.

    Gradients are reduced while backward computes, as far as its own exchange leaves the links free.
    """
    check_int("gpus", gpus, low=1, high=MAX_GPUS)
    model, train = work.model, work.mode == "train"
    ep = expert_parallel_size(gpus, model.experts, ep)
    layers = layer_times(work, device, network, ep)

    def total(value: Callable[[LayerTime], float]) -> float:
        return sum(value(layer) for layer in layers)

    once = dense_time(model, work.tokens, work.sequence, work.dtype, device)
    dense = 3 * once if train else once
    experts, exposed = (model.moe_layers * total(value) for value in (lambda t: t.experts_s, lambda t: t.exposed_s))
    reductions = reductions_time(model, gpus, ep, network) if train else 0.0
    free = 2 * once + model.moe_layers * (layers[-1].experts_s - layers[-1].hidden_s)
    exposed_reductions = max(0.0, reductions - free)
    step = dense + experts + exposed + exposed_reductions
    exchange = total(lambda t: t.exchange_s)
    used = memory(model, gpus, ep, train=train)
    return Prediction(
        gpus=gpus, ep=ep, edp=gpus // ep,
        rows_per_expert=min(work.skew, ep) * work.tokens * model.top_k * ep / model.experts,
        counts_s=total(lambda t: t.counts_s), dispatch_s=total(lambda t: t.dispatch_s),
        experts_s=total(lambda t: t.experts_s), combine_s=total(lambda t: t.combine_s),
        layer_s=total(lambda t: t.total_s), all_experts_s=experts, all_exposed_exchange_s=exposed, dense_s=dense,
        reductions_s=reductions, exposed_reductions_s=exposed_reductions, step_s=step, exchange_share=exposed / step,
        overlap=total(lambda t: t.hidden_s) / exchange if exchange else 0.0, tokens_per_s_per_gpu=work.tokens / step,
        memory_bytes=used, fits=used <= device.memory_bytes,
    )  # fmt: skip
