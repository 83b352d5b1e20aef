"""What is kept of a default group that is gone, its time-out and device, and Python values that ranks exchange."""

from __future__ import annotations

import gc
import weakref
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from moe_triton.distributed import ExpertParallel
from moe_triton.distributed.exchange import failure_board
from moe_triton.distributed.exchange.channel import Channel
from moe_triton.distributed.exchange.failure_board import FailureBoard, QueuedWait
from moe_triton.distributed.groups import Group, default_timeout, device_type
from tests.helpers.faults import Model, fresh_groups, outcomes, step


def two_boards() -> tuple[FailureBoard, FailureBoard]:
    store = dist.HashStore()
    return FailureBoard(store=store, rank=0), FailureBoard(store=store, rank=1)


HERE, PAIR = "MoE layer 0, rows of chunk 0", Group(ranks=(0, 1), rank=0)


def test_any_report_ends_what_a_rank_does():
    mine, other = two_boards()
    assert not mine.cannot_complete(PAIR, HERE)
    other.report("MoE layer 3", "rank 1 failed with ValueError: no")
    assert mine.cannot_complete(PAIR, HERE)
    assert mine.explain(PAIR, HERE) == "rank 1 failed with ValueError: no"
    assert mine.cannot_complete(Group(ranks=(0, 2), rank=0), HERE), "whichever group it happened in"


def test_ranks_that_have_failed_equally_often_go_on_together():
    mine, other = two_boards()
    for _ in range(2):
        other.report(HERE, "a cause")
        other.mark_handled()
        assert mine.cannot_complete(PAIR, HERE)
        mine.report(HERE, "a cause")
        mine.mark_handled()
        for board in (mine, other):
            assert not board.cannot_complete(PAIR, HERE)


def test_a_difference_that_was_found_here_is_found_by_this_rank_too():
    mine, other = two_boards()
    other.report(HERE, differs=True)
    assert not mine.cannot_complete(PAIR, HERE), "the collective in which it was found completes"
    assert mine.cannot_complete(PAIR, "MoE layer 0, results of chunk 0")


@pytest.mark.parametrize("meets_it", [True, False])
def test_a_rank_that_meets_a_failure_itself_is_not_ended_by_the_thread_that_watches(monkeypatch, meets_it):
    mine, other = two_boards()
    over = SimpleNamespace(record=lambda: None, query=lambda: True)
    place = ("MoE layer 0", "rows of chunk 0")
    mine.queued["ep"] = QueuedWait(group=PAIR, place=place, event=over, since=0.0, limit_s=1.0)
    other.report(HERE, "a cause")
    other.mark_handled()

    def find_cause(group: Group) -> str:
        if meets_it:
            mine.mark_handled()
        return "a cause"

    monkeypatch.setattr(failure_board, "abort_groups", lambda: None)
    monkeypatch.setattr(failure_board, "_aborted", [])  # this process goes on
    monkeypatch.setattr(failure_board, "FAILURE_GRACE_S", 0.1)
    monkeypatch.setattr(mine, "find_cause", find_cause)
    mine.look()
    assert mine.ended == ("" if meets_it else "a cause")
    assert not other.cannot_complete(PAIR, HERE), "they have failed together"


def test_every_default_group_has_a_board_of_its_own():
    boards, kept = [], []
    for _ in range(2):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        kept.append(dist.group.WORLD)  # another one is the default although this one is still there
        boards.append(failure_board.failure_board())
        assert failure_board.failure_board() is boards[-1]
        dist.destroy_process_group()
        with pytest.raises(RuntimeError, match="no default process group"):
            failure_board.failure_board()
    assert boards[0] is not boards[1]


def restarts(rank: int, stores: list[str]) -> None:
    """A job that starts anew in its processes: nothing of the old default group is kept."""
    for store in stores:
        model = Model(ExpertParallel(fresh_groups(ep=2)))
        step(model)
        assert model.layers[1].experts.layer_name == "MoE layer 1"
        gone = [weakref.ref(dist.group.WORLD), weakref.ref(model.layers[0].experts.expert_parallel.ep.handle)]
        del model
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()
        assert [ref() for ref in gone] == [None, None]
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
        )
    dist.barrier()  # no rank ends while another one still connects


def test_groups_end_with_their_default_group(tmp_path):
    stores = [str(tmp_path / name) for name in ("first", "second")]
    assert [outcome.error for outcome in outcomes(2, restarts, stores)] == ["", ""]


@pytest.mark.parametrize("backend", [None, "gloo", "cpu:gloo"], ids=str)
def test_the_time_out_of_the_default_group(backend):
    seconds = timedelta(seconds=77)
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=seconds)
    try:
        assert device_type() == "cpu"
        assert default_timeout() == seconds
    finally:
        dist.destroy_process_group()


# as torch has it for init_process_group() with no backend or "nccl", "cpu:gloo,cuda:nccl", "gloo" and "cpu:gloo"
CONFIGURATIONS = {"cuda:nccl": "cuda", "cpu:gloo,cuda:nccl": "cuda", "cpu:gloo,cuda:gloo": "cpu", "cpu:gloo": "cpu"}


@pytest.mark.parametrize(("configuration", "wanted"), CONFIGURATIONS.items())
def test_the_device_of_the_default_group(monkeypatch, configuration, wanted):
    monkeypatch.setattr(dist, "get_backend", lambda: "undefined")
    monkeypatch.setattr(dist, "get_backend_config", lambda: configuration)
    assert device_type() == wanted


def collected(values: int) -> list[object]:
    groups = fresh_groups(ep=2)
    channel = Channel(group=groups.ep, layer="test")
    return channel.gather_objects(
        {"rank": dist.get_rank(), "data": list(range(values * dist.get_rank()))}, "collection"
    )


def test_objects_of_different_sizes(two_ranks):
    wanted = [{"rank": 0, "data": []}, {"rank": 1, "data": list(range(1000))}]
    assert two_ranks.run(collected, 1000) == [wanted] * 2
