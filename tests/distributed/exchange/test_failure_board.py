"""Whether a process has ended, as far as another one can see, and what is kept of a default group that is gone."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from moe_triton.distributed import ExpertParallel
from moe_triton.distributed.exchange import failure_board
from moe_triton.distributed.exchange.channel import MOST_AGREED, Channel
from moe_triton.distributed.exchange.failure_board import Identity, state_of
from moe_triton.distributed.groups import default_timeout, device_type
from tests.helpers.faults import HIDDEN, Model, fresh_groups, outcomes, step


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


def identity_of(pid: int) -> Identity:
    return failure_board._pid_space(), pid, failure_board._start_time(pid)


def test_states_of_a_process(child):
    who = identity_of(child.pid)
    assert state_of(who) == ""
    child.send_signal(signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)
    assert state_of(who) == "stopped"
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert state_of(who) == "dead", "it has ended, though nobody has waited for it"
    child.wait()
    assert state_of(who) == "dead"


def test_another_process_with_the_same_number_is_not_the_one(child):
    space, pid, started = identity_of(child.pid)
    assert state_of((space, pid, started - 1)) == "dead"


def test_a_process_that_cannot_be_looked_at_is_not_dead(child, monkeypatch):
    who = identity_of(child.pid)
    monkeypatch.setattr(failure_board, "_stat", lambda pid: [])  # hidden, or no file descriptor is left
    assert state_of(who) == ""
    child.kill()
    child.wait()
    assert state_of(who) == "dead"


IDENTITY = """
from moe_triton.distributed.exchange.failure_board import identity, state_of
print(*identity(), state_of(identity()))
"""


def in_a_namespace(*options: str) -> list[str]:
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", *options, sys.executable, "-c", IDENTITY]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if "unshare" in done.stderr:
        pytest.skip(f"this machine does not make namespaces: {done.stderr.strip()}")
    return done.stdout.split()


@pytest.mark.parametrize("options", [["--mount-proc"], []], ids=["its own /proc", "the host's /proc"])
def test_a_process_of_another_pid_namespace_is_not_dead(options):
    found = in_a_namespace(*options)
    assert len(found) == 3, "a process does not find itself dead, whatever /proc it has"
    space, pid, started = map(int, found)
    assert space != failure_board._pid_space(), "the host has the same name and the same boot"
    assert state_of((space, pid, started)) == ""


def test_a_machine_without_namespaces_looks_for_nobody(monkeypatch):
    def none(path: str) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "readlink", none)
    unknown = failure_board._pid_space.__wrapped__()
    assert unknown != failure_board._pid_space.__wrapped__(), "no two processes have the same"


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


def lengths(most: int) -> list[int]:
    """Fingerprints kept after each of many calls with a length of its own, under tensor parallelism."""
    groups = fresh_groups(tp=2, ep=2)
    model = Model(ExpertParallel(groups))
    known = failure_board.failure_board().agreed[groups.tp.name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moe_triton.distributed.exchange.channel.MOST_AGREED", most)
        sizes = []
        for tokens in range(1, 12):
            model(torch.randn(tokens, HIDDEN))
            sizes.append(len(known))
        return sizes


def test_compared_lengths_do_not_grow_without_bound(two_ranks):
    sizes = two_ranks.run(lengths, MOST_AGREED)[0]
    assert sizes[0] == 3, "each of two layers, and the number of tokens"
    assert sizes == list(range(3, 14)), "a new length is compared once for all layers"
    assert max(two_ranks.run(lengths, 8)[0]) == 8


def collected(values: int) -> list[object]:
    groups = fresh_groups(ep=2)
    channel = Channel(group=groups.ep, layer="test")
    return channel.gather_objects(
        {"rank": dist.get_rank(), "data": list(range(values * dist.get_rank()))}, "collection"
    )


def test_objects_of_different_sizes(two_ranks):
    wanted = [{"rank": 0, "data": []}, {"rank": 1, "data": list(range(1000))}]
    assert two_ranks.run(collected, 1000) == [wanted] * 2
