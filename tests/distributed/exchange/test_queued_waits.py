"""Failures where waits for collectives only queue work, as under NCCL: every rank gets a named error, in every mode."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
import torch.distributed as dist

from moe_triton.distributed import ConfigurationMismatch, ExpertParallel, reduce_gradients
from moe_triton.distributed.exchange.failure_board import failure_board
from tests.helpers import faults
from tests.helpers.faults import HIDDEN, Model, step
from tests.helpers.queued import start_anew, waits_only_queue
from tests.helpers.ranks import Ranks, at_once, started
from tests.helpers.schedule_faults import (
    CASES,
    MODES,
    STAYS,
    VICTIM,
    WORLD,
    Raised,
    differs,
    fails,
    rows,
)

PAGE = Path(__file__).parents[3] / "docs" / "distributed.md"


@pytest.fixture(scope="module")
def three_ranks() -> Iterator[Ranks]:
    with started(WORLD) as ranks:
        yield ranks


CAUSES = {
    "is killed": "rank 1 has died",
    "raises": "rank 1 failed with MemoryError: no memory left",
    "sleeps": "rank 1 has done nothing since MoE layer 1, output gradients of chunk 0",
    "is stopped": r"rank 1 does not answer \(its process is stopped\)",
}


def test_a_rank_that_fails_is_named_by_all_others():
    cases = [*itertools.product(MODES, ("is killed", "raises"))]
    cases += [("dropless", "sleeps"), ("bounded", "is stopped")]  # until the time-out, whatever the mode
    found = at_once({case: partial(fails, *case, 5 if case[1] in STAYS else 60) for case in cases})
    for (mode, fault), ranks in found.items():
        for rank, raised in enumerate(ranks):
            if rank != VICTIM:
                wanted = rf"rank {rank}, (MoE layer \d|gradients), [^:]+: {CAUSES[fault]}.* \(step 2; "
                assert raised.error == "ExpertParallelError"
                assert re.match(wanted, raised.message), (mode, fault, raised.message)
        if fault == "raises":
            assert (ranks[VICTIM].error, ranks[VICTIM].message) == ("MemoryError", "no memory left")


def test_a_rank_that_does_something_else_is_named():
    """By what differs, or by where the others wait. As many ranks as it takes wait at the same time."""
    names = rf"on rank {VICTIM}\b|rank {VICTIM} (waits in|has done nothing since) layer"
    elsewhere = r"on rank [02]\b|ranks? [02](, 2)? (waits?|has done nothing since|have done nothing since)"
    free: SimpleQueue[Ranks] = SimpleQueue()

    def run(mode: str, fault: str) -> list[Raised]:
        ranks = free.get()
        try:
            return ranks.run(differs, mode, fault, 8)
        finally:
            free.put(ranks)

    with ExitStack() as stack:
        for _ in range(2):
            free.put(stack.enter_context(started(WORLD)))
        cases = [*itertools.product(MODES, ("other top_k", "other chunks", "evaluates"))]
        cases += [("dropless", "skips layer 0"), ("bounded", "skips layer 1"), ("dropless", "no backward")]
        found = at_once({case: partial(run, *case) for case in cases})
    for (mode, fault), ranks in found.items():
        for rank, raised in enumerate(ranks):
            assert re.match(rf"rank {rank}, (layer \d|gradients), [^:]+: ", raised.message), (fault, raised.message)
            assert re.search(elsewhere if rank == VICTIM else names, raised.message), (fault, raised.message)
            if mode == "dropless" and fault.startswith("other"):
                assert raised.error == "ConfigurationMismatch"
                assert f"differ in {fault.removeprefix('other ')}: " in raised.message


def test_the_page_has_these_faults():
    table = re.search(r"<!-- table: schedule faults \(.*?\) -->\n(.*?)<!-- end", PAGE.read_text(), re.DOTALL)
    assert table
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()[2:]]
    nothing = [Raised(error="", message="", seconds=0.0)]
    wanted = [line.split(" | ")[:2] for line in rows(dict.fromkeys(CASES, nothing), 0)[2:]]
    assert [[f"| {fault}", mode] for fault, mode, *_ in cells] == wanted
    for fault, mode, errors, seconds, timeout in cells:
        assert set(errors.replace("`", "").split(" or ")) <= {"ExpertParallelError", "ConfigurationMismatch"}, fault
        assert 0 <= float(seconds) < float(timeout), (fault, mode)


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
