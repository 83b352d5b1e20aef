"""What the load monitor says of the exchange: rows by rank, imbalance and time, without waiting for the device."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from moe_triton import MoE
from moe_triton.distributed import DeepEP, ExpertParallel, SymmetricMemory
from moe_triton.distributed.exchange import meter as meters
from moe_triton.distributed.exchange.meter import ExchangeMeter
from moe_triton.metrics import JsonlSink, LoadMonitor, load_scalars, load_statistics
from moe_triton.metrics.statistics import exchange_statistics
from tests.helpers.exchanges import imitated_deep_ep, imitated_symmetric_memory
from tests.helpers.faults import fresh_groups

CPU = torch.device("cpu")
TOKENS = (6, 1, 0, 5)


def step(layer: MoE, again: bool = False) -> torch.Tensor:
    """The choices of this rank's tokens [T, K]."""
    x = torch.randn(TOKENS[dist.get_rank()], 8).requires_grad_()
    out = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
    out.output.sum().backward()
    return layer.router(x).experts


def check_rows(exchange: dict, rows_per_choice: bool = False) -> None:
    groups = fresh_groups(ep=4)
    torch.manual_seed(dist.get_rank())
    layer = MoE(8, 4, 8, top_k=3, shared_intermediate_size=4, expert_parallel=ExpertParallel(groups, **exchange))
    with torch.no_grad():  # the same routers
        dist.broadcast(layer.router.weight, 0)
    with LoadMonitor(layer) as monitor, LoadMonitor(layer) as other:
        owner = [step(layer) // 2, step(layer, again=True) // 2]
        sent = torch.zeros(4, dtype=torch.int64)
        for choices in owner:
            for rank in range(4):
                there = choices == rank
                sent[rank] += there.sum() if rows_per_choice else there.any(1).sum()
        dist.all_reduce(sent)
        layer.eval()
        with torch.no_grad():
            layer(torch.zeros(1, 8))
        found = monitor.read(mode="train", group=groups.ep.handle)["experts"].exchange
        assert found is not None
        assert list(found.rows) == sent.tolist()
        assert found.imbalance == pytest.approx(4 * max(found.rows) / sum(found.rows))
        assert len(found.seconds) == 4
        assert all(seconds > 0 for seconds in found.seconds)
        alone = other.read(mode="train")["experts"].exchange
        assert alone is not None
        assert alone.rows == (found.rows[dist.get_rank()],)
        assert alone.imbalance is None
        evaluated = monitor.read(mode="eval", group=groups.ep.handle)["experts"].exchange
        assert evaluated is not None
        assert sum(evaluated.rows) == (12 if rows_per_choice else sum(row > 0 for row in evaluated.rows) * 4)
        assert monitor.read() == {}
        copied = pickle.loads(pickle.dumps(other.meters))
        assert copied.keys() == other.meters.keys()
    assert layer.experts.lent_meters == ()
    layer(torch.zeros(1, 8))
    assert not monitor.meters


EXCHANGES = {
    "dropless": {"chunks": 2},
    "a row per choice": {"deduplicate": False},
    "bounded": {"mode": "bounded", "max_tokens_per_rank": 6},
    "allgather": {"mode": "allgather"},
}


@pytest.mark.parametrize("name", EXCHANGES)
def test_rows_of_every_rank(four_ranks, name):
    four_ranks.run(check_rows, EXCHANGES[name], name == "a row per choice")


def over_others() -> None:
    with imitated_deep_ep():
        check_rows({"exchange": DeepEP(), "max_tokens_per_rank": 6})
    with imitated_symmetric_memory():
        check_rows({"exchange": SymmetricMemory(), "max_tokens_per_rank": 6}, rows_per_choice=True)


def test_rows_of_other_exchanges(four_ranks):
    four_ranks.run(over_others)


def test_a_call_that_fails_gives_the_meters_back(two_ranks):
    two_ranks.run(failing)


def failing() -> None:
    layer = MoE(8, 4, 8, expert_parallel=ExpertParallel(fresh_groups(ep=2)))
    monitor = LoadMonitor(layer)
    with pytest.raises(TypeError):
        layer.experts(torch.zeros(1, 8, dtype=torch.float64), *layer_arguments(layer))
    assert layer.experts.lent_meters == ()
    assert copy.deepcopy(monitor.meters).keys() == monitor.meters.keys()


def layer_arguments(layer: MoE) -> tuple:
    from moe_triton import dispatch

    return torch.ones(1, 1), dispatch(torch.zeros(1, 1, dtype=torch.int32), layer.num_experts)


def test_one_process_has_no_exchange():
    layer = MoE(8, 4, 4)
    with LoadMonitor(layer) as monitor:
        layer(torch.randn(3, 8))
        assert monitor.read()["experts"].exchange is None


def test_time_excludes_what_the_experts_compute(monkeypatch):
    now = iter([0.0, 2.0, 5.0, 10.0])
    monkeypatch.setattr(meters.time, "perf_counter", lambda: next(now))
    meter = ExchangeMeter()
    with meter.measuring(CPU), meter.excluding(CPU):
        pass
    assert meter.read() == (0, 7.0)


class Event:
    """A CUDA event of a stream whose clock the test moves; querying never waits."""

    clock, done = 0.0, -1.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        self.at, Event.clock = Event.clock, Event.clock + 1.0

    def query(self) -> bool:
        return self.at <= Event.done

    def synchronize(self) -> None:
        Event.done = max(Event.done, self.at)

    def elapsed_time(self, other: Event) -> float:
        assert other.query(), "read before it has happened"
        return (other.at - self.at) * 1e3


def test_events_are_read_late_and_not_kept(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    meter, device = ExchangeMeter(), torch.device("cuda")
    for _ in range(3):
        with meter.measuring(device), meter.excluding(device):
            pass
    assert (len(meter.pending), meter.seconds) == (6, 0.0), "nothing has ended, and nothing has waited"
    Event.done = 7.0
    with meter.measuring(device):
        pass
    assert len(meter.pending) == 3
    assert meter.read() == (0, 3 * (3.0 - 1.0) + 1.0)
    assert not meter.pending


def test_statistics_in_words_and_in_sinks(tmp_path):
    exchange = exchange_statistics([6, 2], [0.25, 0.5])
    assert exchange == ((6, 2), (0.25, 0.5), 1.5)
    assert exchange_statistics([0, 0], [0.0, 0.0]).imbalance == 1.0
    reading = {"experts": load_statistics(torch.tensor([3, 5]))._replace(exchange=exchange)}
    assert str(reading["experts"]).endswith("exchange 500 ms, busiest rank 1.50 of the mean rows")
    scalars = load_scalars(reading)
    found = {name: scalars[f"moe/experts/{name}"] for name in ("received_rows", "exchange_s", "rank_imbalance")}
    assert found == {"received_rows": 6, "exchange_s": 0.5, "rank_imbalance": 1.5}
    JsonlSink(tmp_path / "load.jsonl")(reading, 1)
    written = json.loads((tmp_path / "load.jsonl").read_text())["layers"]["experts"]["exchange"]
    assert written == {"rows": [6, 2], "seconds": [0.25, 0.5], "imbalance": 1.5}
