"""The cost model: its formulas, its presets against published totals, and its predictions against published times."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from moe_triton.simulate import presets, published
from moe_triton.simulate.cost_model import (
    EXCHANGES,
    Workload,
    all_reduce_time,
    distinct_groups,
    exchange_bytes,
    exchange_time,
    expert_parallel_size,
    experts_time,
    layer_times,
    padded_rows,
    pipelined,
    predict,
    reductions_time,
    row_bytes,
)
from moe_triton.simulate.presets import DEVICES, MODELS, NETWORKS

V3, H100, NVLINK4 = MODELS["deepseek-v3"], DEVICES["h100"], NETWORKS["nvlink4-ib400"]
# billions of parameters, total and active, as the models' authors publish them
PUBLISHED_SIZES = {
    "deepseek-v3": (671, 37),
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-235b-a22b": (235, 22),
    "mixtral-8x7b": (46.7, 12.9),
    "gpt-oss-20b": (20.9, 3.6),
    "gpt-oss-120b": (116.8, 5.1),
    "olmoe": (6.9, 1.3),
}
# what was seen, rounded up: the largest error where nothing was fitted
ERROR_BOUNDS = {
    "DeepEP normal dispatch": 0.09,
    "DeepEP normal combine": 0.105,
    "DeepEP with 24 SMs": 0.075,
    "DeepEP low-latency dispatch": 0.025,
    "DeepEP low-latency combine": 0.095,
    "NCCL all-to-all, 8 x B300": 0.28,
    "SonicMoE backward, H100": 0.045,
    "LigerCute forward, H200": 0.27,
    "LigerCute backward, H200": 0.97,
    "Megatron step, GB200": 1.29,
    "Megatron step, GB300": 0.88,
}


def small_model(**sizes):
    return replace(V3, router_groups=1, router_top_groups=1, **sizes)


@pytest.mark.parametrize("name", MODELS)
def test_presets_have_the_published_sizes(name):
    model, (total, active) = MODELS[name], PUBLISHED_SIZES[name]
    assert (model.dense_parameters + model.expert_parameters) / 1e9 == pytest.approx(total, rel=0.005)
    # gpt-oss counts the active parameters without the input embedding
    left_out = model.vocabulary * model.hidden if name.startswith("gpt-oss") else 0
    assert (model.active_parameters - left_out) / 1e9 == pytest.approx(active, rel=0.02)


def test_every_device_has_a_network():
    assert {device.network for device in DEVICES.values()} <= set(NETWORKS)
    for table in (DEVICES, NETWORKS, MODELS):
        assert all(name == entry.name and entry.source for name, entry in table.items())


def test_constants_are_the_fits():
    node, nic = published.fit_bandwidths()
    network = published.fit_latency(NETWORKS["h800-ib400"])
    start_us, _ = published.fit_nccl()
    assert node == pytest.approx(presets.NODE_EFFICIENCY, abs=0.005)
    assert nic == pytest.approx(presets.NIC_EFFICIENCY, abs=0.005)
    assert network.latency_s == pytest.approx(presets.LATENCY_S, abs=0.5e-6)
    assert network.latency_per_double_s == presets.LATENCY_PER_DOUBLE_S
    assert (start_us * 1e-6 - presets.LATENCY_S) / 7 == pytest.approx(presets.PEER_LATENCY_S, abs=0.05e-6)
    assert published.fit_gemm() == presets.GEMM_EFFICIENCY


def test_predictions_against_published_points():
    points = published.validate()
    for point in points:
        print(f"{point.what:30} {point.case:36} {point.published:7g} {point.predicted:7.4g} {point.error:+.1%}")
    assert sum(not point.fitted for point in points) == 56
    assert {point.what for point in points if not point.fitted} == set(ERROR_BOUNDS)
    seen = {what: max(abs(p.error) for p in points if p.what == what and not p.fitted) for what in ERROR_BOUNDS}
    for what, bound in ERROR_BOUNDS.items():
        assert bound / 1.5 < seen[what] <= bound, f"{what}: {seen[what]:.1%}"
    assert max(abs(p.error) for p in points if p.fitted) < 0.065


@pytest.mark.parametrize("nic_bandwidth", [25e9, 100e9])
def test_validation_fails_where_the_network_is_wrong(nic_bandwidth):
    network = published.fit_latency(replace(NETWORKS["h800-ib400"], nic_bandwidth=nic_bandwidth))
    errors = [
        abs(published.low_latency_us(what, ep, network) / published.LOW_LATENCY_US[what][ep] - 1)
        for what in ("dispatch", "combine")
        for ep in (32, 128, 256)
    ]
    assert max(errors) > 2 * max(ERROR_BOUNDS[f"DeepEP low-latency {what}"] for what in ("dispatch", "combine"))


@pytest.mark.parametrize(
    ("groups", "router_groups", "top_groups"), [(2, 1, 1), (4, 1, 1), (8, 1, 1), (2, 4, 2), (4, 4, 2), (8, 4, 3)]
)
def test_distinct_groups_against_enumeration(groups, router_groups, top_groups):
    experts, top_k = 8, 2
    model = replace(V3, experts=experts, top_k=top_k, router_groups=router_groups, router_top_groups=top_groups)
    counts = []
    for chosen in itertools.combinations(range(router_groups), top_groups):
        pool = [e for e in range(experts) if e * router_groups // experts in chosen]
        counts += [len({e * groups // experts for e in picks}) for picks in itertools.combinations(pool, top_k)]
    assert distinct_groups(model, groups) == pytest.approx(sum(counts) / len(counts), rel=1e-12)


def test_bytes_of_an_exchange():
    model = small_model(experts=64, top_k=4)
    row = row_bytes(model.hidden, "bfloat16")
    assert row == 2 * 7168
    assert row_bytes(7168, "float8") == 7168 + 4 * 56
    within, beyond = exchange_bytes("direct", model, 10, row, 16, 8)
    assert within == pytest.approx(10 * 4 * row * 7 / 16)
    assert beyond == pytest.approx(10 * 4 * row * 8 / 16)
    # a row per rank is never more than one per assignment; one per node crosses the network less often still
    sent = {kind: exchange_bytes(kind, model, 10, row, 32, 8) for kind in EXCHANGES}
    assert sent["deduplicated"][1] < sent["nccl"][1] < sent["direct"][1]
    # all experts of a token on one other rank or on this one
    assert exchange_bytes("nccl", small_model(experts=8, top_k=8), 1, 100, 2, 8) == pytest.approx((100.0, 0.0))
    for kind in EXCHANGES:
        assert exchange_bytes(kind, model, 10, row, 8, 8)[1] == 0


def test_exchange_times_by_hand():
    network = replace(
        NVLINK4,
        node_bandwidth=100e9,
        nic_bandwidth=10e9,
        node_efficiency=1.0,
        nic_efficiency=0.5,
        latency_s=1e-6,
        latency_per_double_s=2e-6,
        peer_latency_s=3e-6,
    )
    model = small_model(experts=64, top_k=4)
    sent = 1000 * 4 * 2000  # b: bytes per rank
    time = {kind: exchange_time(kind, model, 1000, 2000, 32, network, H100, 1.5) for kind in EXCHANGES}
    assert time["direct"] == pytest.approx(1e-6 + 2 * 2e-6 + 1.5 * sent * 24 / 32 / 5e9)
    copies = 32 * (1 - math.comb(62, 4) / math.comb(64, 4))
    assert time["nccl"] == pytest.approx(1e-6 + 31 * 3e-6 + 1.5 * 1000 * 2000 * copies * 24 / 32 / 5e9)
    nodes = 4 * (1 - math.comb(48, 4) / math.comb(64, 4))
    assert time["deduplicated"] == pytest.approx(1e-6 + 2 * 2e-6 + 1.5 * 1000 * 2000 * nodes * 3 / 4 / 5e9)
    wire = 4 * sent / 3.35e12 + sent / 100e9 + sent * 3 / 4 / 5e9
    assert time["hierarchical"] == pytest.approx(1e-6 + 7 * 3e-6 + 3 * 3e-6 + 1.5 * wire)
    assert all(exchange_time(kind, model, 1000, 2000, 1, network, H100) == 0 for kind in EXCHANGES)


def test_pipeline():
    assert pipelined(2.0, 3.0, 1.0, 1, 0.5) == 6.5
    assert pipelined(2.0, 3.0, 1.0, 2, 0.0) == pytest.approx(6 / 2 + 3 / 2)  # exchange and experts take turns evenly
    assert pipelined(2.0, 9.0, 1.0, 4, 0.0) == pytest.approx(12 / 4 + 9 * 3 / 4)
    deep = pipelined(2.0, 9.0, 1.0, 10**6, 0.0)
    assert deep == pytest.approx(9.0, rel=1e-4)  # the experts alone remain


def test_rows_are_padded_to_tiles():
    assert padded_rows(4096) == pytest.approx(4096 + 63.5)
    assert padded_rows(20) == pytest.approx(20 + 15.5)
    assert padded_rows(0.01) == pytest.approx(0.16, rel=0.01)
    assert all(padded_rows(rows) >= rows for rows in (0.5, 1, 7, 16, 100, 128, 129, 5000))


def test_experts_are_bound_by_products_or_by_memory():
    # no fewer seconds than the products alone; nearly nothing but reading the weights where there is one row each
    many = experts_time(V3, 10**6, 10**6, 8, "bfloat16", H100)
    products = [6e6 * 2048 * 7168 / (0.74 * 989.4e12) * factor for factor in (1, 2)]
    assert products[0] < many[0] < 1.2 * products[0]
    assert products[1] < many[1] < 1.2 * products[1]
    few, none = experts_time(V3, 256, 256, 256, "bfloat16", H100, train=False)
    weights = 256 * (1 - math.exp(-1)) * 6 * 2048 * 7168 / 3.35e12
    assert weights < few < 1.3 * weights
    assert none == 0.0
    assert experts_time(V3, 10**6, 10**6, 8, "float8", H100)[0] < 0.6 * many[0]


def test_all_reduce():
    network = replace(NVLINK4, node_efficiency=1.0, nic_efficiency=1.0, latency_s=0.0)
    assert all_reduce_time(8e9, 1, 8, network) == 0
    assert all_reduce_time(8e9, 8, 8, network) == pytest.approx(2 * 8e9 * 7 / 8 / 450e9)
    two_nodes = 2 * 8e9 * 7 / 8 / 450e9 + 2 * 1e9 / 2 / 50e9
    assert all_reduce_time(8e9, 16, 8, network) == pytest.approx(two_nodes)
    assert all_reduce_time(8e9, 4, 1, network) == pytest.approx(2 * 8e9 * 3 / 4 / 50e9)
    # experts: their share over edp replicas only; ep = 2 leaves four replicas in a node
    model = small_model(layers=1, moe_layers=1)
    dense = all_reduce_time(2 * model.dense_parameters, 16, 8, network)
    experts = all_reduce_time(model.expert_parameters, 8, 4, network)
    assert reductions_time(model, 16, 2, network) == pytest.approx(dense + experts)
    assert reductions_time(model, 16, 16, network) == pytest.approx(dense)


def test_a_step_is_the_sum_of_its_parts():
    work = Workload(model=V3, chunks=4, dispatch_dtype="float8", skew=1.3)
    one = predict(work, H100, NVLINK4, 512, 64)
    assert (one.ep, one.edp) == (64, 8)
    assert one.rows_per_expert == pytest.approx(1.3 * 4096 * 8 * 64 / 256)
    parts = one.dense_s + one.all_experts_s + one.all_exposed_exchange_s + one.exposed_reductions_s
    assert one.step_s == pytest.approx(parts)
    assert one.layer_s * 58 == pytest.approx(one.all_experts_s + one.all_exposed_exchange_s)
    assert one.exchange_share == pytest.approx(one.all_exposed_exchange_s / one.step_s)
    assert one.tokens_per_s_per_gpu == pytest.approx(4096 / one.step_s)
    assert 0 < one.overlap < 1
    assert not one.fits


def test_one_gpu_exchanges_nothing():
    for mode in ("forward", "train"):
        one = predict(Workload(model=V3, mode=mode, chunks=8, skew=3.0), H100, NVLINK4, 1)
        assert (one.ep, one.edp, one.dispatch_s, one.combine_s, one.counts_s, one.reductions_s) == (1, 1, 0, 0, 0, 0)
        assert one.step_s == pytest.approx(one.dense_s + one.all_experts_s)
        assert one.rows_per_expert == 128  # the whole load: no rank can be busier than the only one


def test_what_helps_helps():
    def step(gpus=64, network=NVLINK4, device=H100, **changes):
        return predict(replace(Workload(model=V3), **changes), device, network, gpus).step_s

    assert step(dispatch_dtype="float8") < step()
    assert step(chunks=2) < step()
    assert step(skew=1.5) > step()
    assert step(exchange="direct") > step() > step(exchange="deduplicated")
    assert step(network=NETWORKS["nvl72-ib400"]) < step() < step(network=NETWORKS["pcie4-100g"])
    assert step(device=DEVICES["h200"]) < step()
    assert step(mode="forward") < step() / 2
    # few rows: the exchange's latency and a chunk's overhead cost more than the overlap saves
    assert step(tokens=32, chunks=8, mode="forward") > step(tokens=32, mode="forward")
    # reductions show when a step is too short to hide them
    assert predict(Workload(model=V3, tokens=64), H100, NVLINK4, 512).exposed_reductions_s > 0


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_range(name):
    work = Workload(model=MODELS[name])
    for power in range(13):
        one = predict(work, H100, NVLINK4, 2**power)
        assert one.ep * one.edp == one.gpus == 2**power
        assert MODELS[name].experts % one.ep == 0
        assert 0 < one.step_s < 60
        assert 0 <= one.exchange_share < 1
        assert all(layer.exposed_s > -1e-12 for layer in layer_times(work, H100, NVLINK4, one.ep))


def test_expert_parallel_size():
    assert expert_parallel_size(4096, 256) == 256
    assert expert_parallel_size(24, 256) == 8
    assert expert_parallel_size(8, 256, 64) == 8
    assert expert_parallel_size(128, 256, 64) == 64
    with pytest.raises(ValueError, match="ep: got 48, wanted a divisor of the 256 experts"):
        expert_parallel_size(96, 256, 48)
    with pytest.raises(ValueError, match="ep: got 64, wanted a divisor or a multiple of 96 GPUs"):
        expert_parallel_size(96, 256, 64)
    with pytest.raises(ValueError, match="ep: got 0"):
        expert_parallel_size(8, 256, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens: got 0"),
        ({"skew": 0.9}, "skew: got 0.9"),
        ({"chunks": 0}, "chunks: got 0"),
        ({"mode": "backward"}, "mode: got 'backward'"),
        ({"dtype": "float32"}, "dtype: got 'float32'"),
        ({"dispatch_dtype": "int8"}, "dispatch_dtype: got 'int8'"),
        ({"exchange": "fastest"}, "exchange: got 'fastest'"),
        ({"sequence": 0}, "sequence: got 0"),
    ],
)
def test_bad_workloads(changes, message):
    with pytest.raises(ValueError, match=message):
        Workload(model=V3, **changes)


def test_bad_machines():
    with pytest.raises(ValueError, match="gpus: got 4097, wanted 1 to 4096"):
        predict(Workload(model=V3), H100, NVLINK4, 4097)
    with pytest.raises(ValueError, match="dtype: got 'float8', wanted one of bfloat16, float16 on a100"):
        predict(Workload(model=V3, dtype="float8"), DEVICES["a100"], NVLINK4, 8)
