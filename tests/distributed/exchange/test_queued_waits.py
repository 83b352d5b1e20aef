"""Failures where waits for collectives only queue work, as under NCCL: every rank gets a named error, in every mode."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from moe_triton.distributed import ConfigurationMismatch, ExpertParallel, ExpertParallelError, reduce_gradients
from moe_triton.distributed.exchange.failure_board import failure_board
from tests.helpers import faults
from tests.helpers.faults import HIDDEN, Model, outcomes, step
from tests.helpers.queued import start_anew, waits_only_queue
from tests.helpers.ranks import Ranks, products, started

WORLD, VICTIM = 3, 1
MODES = {"dropless": {}, "bounded": {"mode": "bounded", "max_tokens_per_rank": 6}}


@pytest.fixture(scope="module")
def three_ranks() -> Iterator[Ranks]:
    with started(WORLD) as ranks:
        yield ranks


def live(rank: int, mode: str, fault: str, seconds: float) -> None:
    """A step in good health, then the victim's fault in the middle of the second."""
    armed = False

    def listen(event: str) -> None:
        if not armed or rank != VICTIM or event != "row gradients 0":
            return
        if fault == "raises":
            raise MemoryError("no memory left")
        if fault == "sleeps":
            time.sleep(faults.DEADLINE)
        os.kill(os.getpid(), {"is killed": signal.SIGKILL, "is stopped": signal.SIGSTOP}[fault])

    with waits_only_queue(seconds, ep=WORLD) as groups:
        model = Model(ExpertParallel(groups, listener=listen, **MODES[mode]))
        step(model)
        armed = True
        while True:
            step(model)


FAULTS = {
    "is killed": "rank 1 has died",
    "raises": "rank 1 failed with MemoryError: no memory left",
    "sleeps": "rank 1 has done nothing since MoE layer 1, output gradients of chunk 0",
    "is stopped": r"rank 1 does not answer \(its process is stopped\)",
}


@pytest.mark.parametrize(
    ("mode", "fault"),
    [
        *products(mode=tuple(MODES), fault=("is killed", "raises")),
        ("dropless", "sleeps"),  # until the time-out, whatever the mode
        ("bounded", "is stopped"),
    ],
)
def test_a_rank_that_fails_is_named_by_all_others(mode, fault):
    seconds = 60 if fault in ("is killed", "raises") else 5
    stays = fault in ("sleeps", "is stopped")
    found = outcomes(WORLD, live, mode, fault, seconds, without=VICTIM if stays else None)
    for rank, outcome in enumerate(found):
        if rank != VICTIM:
            assert outcome.code == 0
            wanted = rf"ExpertParallelError: rank {rank}, (MoE layer \d|gradients), [^:]+: {FAULTS[fault]}.* \(step 2; "
            assert re.match(wanted, outcome.error), outcome.error
    if fault == "raises":
        assert found[VICTIM].error.startswith("MemoryError: no memory left")


def go_on(model: Model, parallel: ExpertParallel, fault: str) -> None:
    """Three more steps, of which the victim does the first in its own way."""
    is_other = dist.get_rank() == VICTIM
    x = torch.randn(6, HIDDEN)
    if is_other and "skips layer" in fault:
        del model.layers[int(fault[-1])]
    if is_other and fault == "other top_k":
        for layer in model.layers:
            layer.router.spec = replace(layer.router.spec, top_k=3)
    if is_other and fault == "other chunks":
        parallel.chunks = 3
    if is_other and fault == "evaluates":
        with torch.no_grad():
            model(x)
    if fault == "no backward":
        loss = model(x)
        if not is_other:
            loss.backward()
    for _ in range(3):
        step(model)


def one_goes_its_own_way(mode: str, fault: str) -> str:
    """Every rank raises within the time-out. Returns its message."""
    with waits_only_queue(3, ep=WORLD) as groups:
        parallel = ExpertParallel(groups, **MODES[mode])
        model = Model(parallel, top_k=2)
        step(model)
        names = [layer.experts.layer_name for layer in model.layers]
        with pytest.raises(ExpertParallelError) as raised:
            go_on(model, parallel, fault)
        start_anew()
    message = str(raised.value)
    for i, name in enumerate(names):
        message = re.sub(rf"{name}\b", f"layer {i}", message)
    return message


@pytest.mark.parametrize(
    ("mode", "fault"),
    [
        *products(mode=tuple(MODES), fault=("other top_k", "other chunks", "evaluates")),
        ("dropless", "skips layer 0"),
        ("bounded", "skips layer 1"),
        ("dropless", "no backward"),
    ],
)
def test_a_rank_that_does_something_else_is_named(three_ranks, mode, fault):
    """By what differs, or by where the others wait."""
    names = rf"on rank {VICTIM}\b|rank {VICTIM} (waits in|has done nothing since) layer"
    elsewhere = r"on rank [02]\b|ranks? [02](, 2)? (waits?|has done nothing since|have done nothing since)"
    for rank, message in enumerate(three_ranks.run(one_goes_its_own_way, mode, fault)):
        assert re.match(rf"rank {rank}, (layer \d|gradients), [^:]+: ", message), message
        assert re.search(elsewhere if rank == VICTIM else names, message), message
        if mode == "dropless" and fault.startswith("other"):
            assert f"differ in {fault.removeprefix('other ')}: " in message


def compared_always() -> str:
    """The victim's layer has another K, in a mode in which nothing else compares that at once."""
    with waits_only_queue(60, ep=WORLD) as groups, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_TRITON_COMPARE_ALWAYS", "1")
        model = Model(ExpertParallel(groups, **MODES["bounded"]), top_k=2)
        step(model)
        if dist.get_rank() == VICTIM:
            model.layers[0].router.spec = replace(model.layers[0].router.spec, top_k=3)
        with pytest.raises(ConfigurationMismatch) as raised:
            step(model)
        start_anew()
    return str(raised.value)


def test_every_call_is_compared_where_that_is_asked_for(three_ranks):
    messages = three_ranks.run(compared_always)
    assert [f"comparison of configurations (forward): the ranks of the group differ in top_k: {k} here" in message
            for k, message in zip((2, 3, 2), messages, strict=True)] == [True] * 3, messages  # fmt: skip


def good_health(mode: str) -> tuple[int, list[float]]:
    """Steps without a fault: every step is compared with the one before, and the numbers are gloo's."""
    losses = []
    for queued in (False, True):
        with waits_only_queue(60, ep=WORLD) if queued else _plain(60) as groups:
            model = Model(ExpertParallel(groups, chunks=2, **MODES[mode]))
            for _ in range(3):
                torch.manual_seed(dist.get_rank())
                loss = model(torch.randn(6, HIDDEN))
                loss.backward()
                reduce_gradients(model)
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter -= 0.1 * parameter.grad
                model.zero_grad()
                losses.append(loss.item())
            compared = len(failure_board().comparisons)
    assert losses[:3] == losses[3:], losses
    start_anew()
    return compared, losses


class _plain:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self):
        return faults.fresh_groups(self.seconds, ep=WORLD)

    def __exit__(self, *error: object) -> None:
        pass


@pytest.mark.parametrize("mode", MODES)
def test_steps_in_good_health(three_ranks, mode):
    for compared, _ in three_ranks.run(good_health, mode):
        assert compared == 1, "the calls of the last step are under way, of the one group that has all ranks"
