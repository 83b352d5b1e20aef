"""A layer that lives longer than its process groups keeps none of their threads, which could abort the process."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_triton import MoE
from moe_triton.distributed import ExpertParallel, make_groups
from moe_triton.distributed.groups import default_group
from tests.helpers.ranks import fork_context, free_port


def threads_of_gloo() -> int:
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)


def outlive(pipe: Connection, environment: dict[str, str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with default_group(torch.device("cpu")):
            groups = make_groups(ep=1)
            layer = MoE(8, 4, 2, 1, expert_parallel=ExpertParallel(groups, always_exchange=True))
            layer(torch.randn(3, 8, requires_grad=True)).output.sum().backward()
            before = threads_of_gloo()
        with pytest.raises(RuntimeError, match="got no default process group, wanted one until"):
            layer(torch.randn(3, 8))
        with pytest.raises(RuntimeError, match=r"^handle: got a group that destroy_process_group\(\) has ended"):
            groups.ep.handle  # noqa: B018
        pipe.send((before, dist.is_initialized(), threads_of_gloo()))


def test_a_layer_that_lives_longer():
    context = fork_context()
    here, there = context.Pipe()
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0", "WORLD_SIZE": "1"}
    process = context.Process(target=outlive, args=(there, environment))
    process.start()
    there.close()
    before, initialized, after = here.recv()
    process.join(60)
    assert before > 0
    assert (initialized, after, process.exitcode) == (False, 0, 0)
