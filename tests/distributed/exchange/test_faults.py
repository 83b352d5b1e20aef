"""A fault on one rank ends in an error that names it, on every other rank: never a hang, an abort or stale rows."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_triton import MoE
from moe_triton.distributed import (
    ConfigurationMismatch,
    ExpertParallel,
    ExpertParallelError,
    SymmetricMemory,
    make_groups,
    reduce_gradients,
    save_checkpoint,
)
from moe_triton.distributed.exchange import channel
from tests.helpers import faults
from tests.helpers.compare import relative_rms
from tests.helpers.faults import EXPERTS, HIDDEN, Model, Scenario, fresh_groups, outcomes, step
from tests.helpers.ranks import at_once, free_port

WORLD = 4

DEATHS = {
    "forward": Scenario("experts 0"),
    "backward": Scenario("row gradients 0"),
    "reduction of gradients": Scenario("issue dense gradients"),
    "between two steps": Scenario("exit"),
    "the one that serves the store": Scenario("experts 1", victim=0),
    "one of two expert-parallel groups": Scenario("experts 0", ep=2, victim=1),
    "one of two groups with a common loss": Scenario("row gradients 0", ep=2, victim=3, aux_loss_weight=0.1),
}


def test_a_rank_that_dies_is_named_by_all_others():
    for name, found in at_once({name: partial(outcomes, WORLD, faults.live, DEATHS[name]) for name in DEATHS}).items():
        victim = DEATHS[name].victim
        dead = found.pop(victim)
        assert dead.code in (-signal.SIGKILL, 3), name
        for outcome in found:
            assert outcome.code == 0, name
            assert re.match(r"ExpertParallelError: rank \d, (MoE layer \d|gradients), [^:]+: ", outcome.error), name
            assert f"rank {victim} has died" in outcome.error, name


def one_is_busy(rank: int) -> None:
    model = Model(ExpertParallel(fresh_groups(4, ep=3)))
    step(model)
    if rank == 1:
        time.sleep(faults.DEADLINE)
    step(model)


def in_other_places(rank: int, folder: str) -> None:
    """Rank 1 believes that the training is over."""
    model = Model(ExpertParallel(fresh_groups(4, ep=3)))
    step(model)
    if rank == 1:
        save_checkpoint(folder, model)
    step(model)


def test_a_rank_that_does_not_answer_is_named_by_all_others(tmp_path):
    """It is stopped, also where it serves the store; busy elsewhere; or in another function of the package.

    Where rank 0 serves the store, it may end before rank 2 has asked it.
    """
    stopped = {v: Scenario("experts 0", victim=v, signal=signal.SIGSTOP, seconds=6) for v in (2, 0)}
    found = at_once(
        {
            **{v: partial(outcomes, WORLD, faults.live, stopped[v], without=v) for v in stopped},
            "busy": partial(outcomes, 3, one_is_busy, without=1),
            "saving": partial(outcomes, 3, in_other_places, str(tmp_path)),
        }
    )
    for victim in stopped:
        for rank, outcome in enumerate(found[victim]):
            if rank != victim:
                assert outcome.code == 0
                assert f"rank {victim} does not answer (its process is stopped)" in outcome.error
    for rank in (0, 2):
        wanted = rf"ExpertParallelError: rank {rank}, MoE layer 0, [^:]+: rank 1 does not answer \("
        assert re.match(wanted, found["busy"][rank].error), found["busy"][rank].error
    forward, saving = r"MoE layer 0, comparison of configurations \(forward\)", r"save_checkpoint to [^,]+, [a-z ]+"
    errors = [outcome.error for outcome in found["saving"]]
    for rank, other in ((0, 2), (2, 0)):
        places = f"rank 1 waits in {saving}, rank {other} waits in {forward}"
        assert re.match(f"ExpertParallelError: rank {rank}, {forward}: {places}", errors[rank]), errors[rank]
    places = f"ranks 0, 2 wait in {forward}"
    assert re.match(f"ExpertParallelError: rank 1, {saving}: {places}", errors[1]), errors[1]


def over_the_default_group(rank: int) -> None:
    """Only rank 1 raises."""
    layer = MoE(HIDDEN, 8, EXPERTS, expert_parallel=ExpertParallel())
    layer(torch.randn(4, HIDDEN))
    layer(torch.randn(4, HIDDEN + (rank == 1)))


def test_an_exception_is_reported_over_the_default_group():
    found = outcomes(2, over_the_default_group)
    assert found[1].error.startswith("ValueError: hidden_states: got shape [4, 9]")
    assert "rank 1 failed with ValueError: hidden_states: got shape [4, 9]" in found[0].error


def test_torchrun_names_the_rank_that_was_killed():
    worker = Path(faults.__file__).with_name("torchrun_worker.py")
    arguments = ["--nproc_per_node", str(WORLD), "--master_port", str(free_port()), str(worker)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=faults.DEADLINE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 1
    for rank in {0, 1, 2, 3} - {2}:
        assert re.search(rf"rank {rank}(,|: terminated:) .*rank 2 has died", done.stderr), done.stderr


def raises_everywhere(parallel: ExpertParallel, wrong: dict, name: str) -> None:
    """Rank 1's layer differs from the others' in `wrong`."""
    torch.manual_seed(0)
    mine = wrong if dist.get_rank() == 1 else {}
    arguments = {"hidden_size": HIDDEN, "intermediate_size": 8, "num_experts": EXPERTS, "capacity_factor": 1.0, **mine}
    layer = MoE(**arguments, expert_parallel=parallel)
    dtype = arguments.get("dtype", torch.float32)
    x = torch.randn(4 + dist.get_rank(), arguments["hidden_size"], dtype=dtype)
    with pytest.raises(ConfigurationMismatch, match=rf"^rank {dist.get_rank()}, MoE layer \d+, .*[ ;]{name}: "):
        layer(x)


WRONG_LAYERS = {
    "hidden_size": {"hidden_size": 16},
    "dtype": {"dtype": torch.float64},
    "top_k": {"top_k": 3},
    "num_experts": {"num_experts": 16},
    "activation": {"activation": "geglu"},
    "width": {"intermediate_size": 4},
    "backend": {"backend": "triton"},
}
WRONG_EXCHANGES = {
    "mode": {"mode": "bounded"},
    "chunks": {"chunks": 2},
    "deduplicate": {"deduplicate": False},
    "max_tokens_per_rank": {"mode": "bounded", "max_tokens_per_rank": 8},
    "max_rows_per_pair": {"mode": "bounded", "max_rows_per_pair": 3},
    "ranks_per_node": {"ranks_per_node": 2},
    "exchange": {"exchange": SymmetricMemory()},
    "dispatch_dtype": {"dispatch_dtype": torch.float8_e4m3fn},
}


def different_layers(mode: str) -> None:
    groups = fresh_groups(ep=WORLD)
    parallel = ExpertParallel(groups, mode=mode)
    for name, wrong in WRONG_LAYERS.items():
        raises_everywhere(parallel, wrong, name)
    if mode == "capacity":
        raises_everywhere(parallel, {"capacity_factor": 3.0}, "capacity")
    step(Model(ExpertParallel(groups)))  # all raised together: the group is as good as before


def different_exchanges() -> None:
    groups = fresh_groups(ep=WORLD)
    for name, wrong in WRONG_EXCHANGES.items():
        parallels = ExpertParallel(groups), ExpertParallel(groups, **wrong)  # nodes need groups, which all ranks make
        raises_everywhere(parallels[dist.get_rank() == 1], {}, name)
    step(Model(ExpertParallel(groups)))


def different_groups(name: str) -> None:
    """Some ranks spread their experts in another way, over groups that have the same ranks."""
    slices = {"ep": 2, "etp": 2}  # ep groups (0, 2) and (1, 3), etp groups (0, 1) and (2, 3)
    other = {"ep": {"ep": 1, "etp": 2}, "etp": {"ep": 2, "order": "data-before-expert"}}[name]
    groups, others = make_groups(**slices), make_groups(**other)
    assert groups.etp == others.etp if name == "ep" else groups.ep == others.ep
    is_other = dist.get_rank() in ((1, 3) if name == "ep" else (2, 3))
    raises_everywhere(ExpertParallel(others if is_other else groups), {}, name)


def different_tokens() -> None:
    raises_everywhere(ExpertParallel(make_groups(tp=2, ep=4)), {}, "tokens of the tp ranks")


def changed_later(name: str) -> None:
    rank, x = dist.get_rank(), torch.randn(5, HIDDEN)
    parallel = ExpertParallel(fresh_groups(ep=WORLD), mode="dropless")
    model = Model(parallel, capacity_factor=1.0)
    step(model)
    expected = pytest.raises(
        ConfigurationMismatch, match=rf"^rank {rank}, {model.layers[0].experts.layer_name}, .*{name}: "
    )
    if name == "direction":  # one rank goes on to its next step, where the others go back
        loss = model(x)
        with pytest.raises(ConfigurationMismatch, match="'forward'"):
            model(x) if rank == 1 else loss.backward()
        return
    if rank == 1 and name in ("mode", "chunks"):
        setattr(parallel, name, {"mode": "capacity", "chunks": 3}[name])
    if rank == 1 and name == "top_k":
        router = model.layers[0].router
        router.spec = replace(router.spec, top_k=3)
    with expected, torch.autocast("cpu", enabled=rank == 1 and name == "dtype"):
        model(x)


def another_order(mode: str, experts: int) -> None:
    """Rank 1 runs its two layers the other way round; with as many experts, all messages have the same sizes."""
    parallel = ExpertParallel(fresh_groups(ep=WORLD), mode=mode, max_tokens_per_rank=4)
    layers = [MoE(HIDDEN, 8, e, expert_parallel=parallel, capacity_factor=1.0) for e in (EXPERTS, experts)]
    first, other = (0, 1) if dist.get_rank() != 1 else (1, 0)
    mine, theirs = (layers[i].experts.layer_name for i in (first, other))
    with pytest.raises(ConfigurationMismatch, match=rf"layer: '{mine}' here, '{theirs}' on rank"):
        layers[first](torch.randn(4, HIDDEN))


def bad_input(where: str, aux_loss_weight: float, ep: int) -> None:
    """Rank 1 alone raises, in its first or its second step; the others hear of it long before the time-out."""
    rank = dist.get_rank()
    model = Model(ExpertParallel(fresh_groups(ep=ep, seconds=100)), aux_loss_weight=aux_loss_weight)
    if where != "first step":
        step(model)
    if rank == 1:
        with pytest.raises(ValueError, match="hidden_states: got shape"):
            model.layers[0](torch.randn(4, HIDDEN + 1))
        return
    match = r": rank 1 failed with ValueError: hidden_states: got shape \[4, 9\], wanted"
    with pytest.raises(ExpertParallelError, match=match):
        step(model)


def broken_backward() -> None:
    """An exception in the middle of rank 1's backward."""
    rank = dist.get_rank()

    def listen(event: str) -> None:
        if event == "row gradients 0" and rank == 1:
            raise MemoryError("no memory left")

    model = Model(ExpertParallel(fresh_groups(ep=WORLD, seconds=100), listener=listen))
    with pytest.raises(MemoryError if rank == 1 else ExpertParallelError, match="no memory left"):
        step(model)


def wrong_counts(change: int) -> None:
    """Rank 1 announces another number of rows than it has."""
    original = channel.Channel.all_to_all

    def all_to_all(self, out, rows, received, sent, phase):
        if phase == "exchange of counts":
            rows[:, 1] += change
        return original(self, out, rows, received, sent, phase)

    model = Model(ExpertParallel(fresh_groups(ep=WORLD, seconds=100), deduplicate=False))
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(channel.Channel, "all_to_all", all_to_all)
        with pytest.raises(ExpertParallelError, match=r"rank 1 announced -?\d+ rows"):
            step(model)


def copy_that_fails() -> None:
    """As an event of a device does that has failed."""

    def arrived():
        raise RuntimeError("an illegal memory access")

    model = Model(ExpertParallel(fresh_groups(ep=WORLD)))
    step(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel, "copy_to_host", lambda tensor: (arrived, list))
        with pytest.raises(ExpertParallelError, match=r"MoE layer \d+, exchange of counts: .*illegal memory access"):
            step(model)


def different_gradients() -> None:
    model = Model(ExpertParallel(fresh_groups(ep=WORLD)))
    if dist.get_rank() == 1:
        model.first.bias.requires_grad_(False)
    with pytest.raises(ConfigurationMismatch, match=r"gradients, comparison of dense gradients: .*tensors: "):
        step(model)


def too_many_rows() -> None:
    parallel = ExpertParallel(fresh_groups(ep=WORLD), mode="bounded", max_tokens_per_rank=40, max_rows_per_pair=3)
    layer = MoE(HIDDEN, 8, EXPERTS, top_k=1, expert_parallel=parallel)
    layer(torch.randn(3, HIDDEN))
    with pytest.raises(ExpertParallelError, match=r"rank 2 had more rows for another rank than max_rows_per_pair=3"):
        layer(torch.randn(40 if dist.get_rank() == 2 else 3, HIDDEN))
    layer(torch.randn(3, HIDDEN))


def uneven_batches() -> None:
    """Only the sum of a rank's losses, divided by the tokens of all, gives the gradient of the global mean."""
    rank, sizes = dist.get_rank(), [7, 1, 0, 4]
    torch.manual_seed(5)
    x = torch.randn(sum(sizes), HIDDEN)
    here = x[sum(sizes[:rank]) :][: sizes[rank]]
    whole = MoE(HIDDEN, 8, EXPERTS)
    whole(x).output.square().mean().backward()
    parallel = ExpertParallel(fresh_groups(ep=WORLD))
    layer = MoE(HIDDEN, 8, EXPERTS, expert_parallel=parallel)
    mine = layer.experts.local_experts
    with torch.no_grad():
        layer.router.weight.copy_(whole.router.weight)
        for name, parameter in layer.experts.named_parameters():
            parameter.copy_(getattr(whole.experts, name)[mine.start : mine.stop])

    def errors(rule: str) -> list[float]:
        layer.zero_grad()
        squares = layer(here).output.square()
        loss = squares.sum() / x.numel() if rule == "sum" else squares.mean() if here.numel() else squares.sum()
        loss.backward()
        parallel.loss_reduction = rule
        reduce_gradients(layer, rule=rule)
        pairs = [(layer.router.weight.grad, whole.router.weight.grad)]
        for name, parameter in layer.experts.named_parameters():
            pairs.append((parameter.grad, getattr(whole.experts, name).grad[mine.start : mine.stop]))
        return [relative_rms(*pair) for pair in pairs]

    assert max(errors("sum")) < 2e-5
    assert min(errors("mean")) > 0.1


@pytest.mark.parametrize("mode", ["dropless", "capacity"])
def test_layers_that_differ_between_ranks(four_ranks, mode):
    four_ranks.run(different_layers, mode)


def test_exchanges_that_differ_between_ranks(four_ranks):
    four_ranks.run(different_exchanges)


@pytest.mark.parametrize("name", ["ep", "etp"])
def test_groups_that_differ_between_ranks(four_ranks, name):
    four_ranks.run(different_groups, name)


def test_tokens_that_differ_between_tensor_parallel_ranks(four_ranks):
    four_ranks.run(different_tokens)


@pytest.mark.parametrize("name", ["mode", "chunks", "top_k", "dtype", "direction"])
def test_a_rank_that_changes_in_a_later_step(four_ranks, name):
    four_ranks.run(changed_later, name)


@pytest.mark.parametrize("experts", [EXPERTS, 2 * EXPERTS])
@pytest.mark.parametrize("mode", ["dropless", "capacity", "bounded", "allgather"])
def test_a_rank_that_runs_another_layer(four_ranks, mode, experts):
    four_ranks.run(another_order, mode, experts)


@pytest.mark.parametrize(
    ("where", "aux_loss_weight", "ep"), [("first step", 0.0, 4), ("second step", 0.0, 4), ("second step", 0.1, 2)]
)
def test_an_exception_on_one_rank_is_reported_to_the_others(four_ranks, where, aux_loss_weight, ep):
    four_ranks.run(bad_input, where, aux_loss_weight, ep)


def test_an_exception_in_one_backward_is_reported_to_the_others(four_ranks):
    four_ranks.run(broken_backward)


@pytest.mark.parametrize("change", [-1, 1])
def test_counts_that_do_not_fit(four_ranks, change):
    four_ranks.run(wrong_counts, change)


def test_a_copy_to_the_host_that_fails(four_ranks):
    four_ranks.run(copy_that_fails)


def test_parameters_that_differ_between_ranks(four_ranks):
    four_ranks.run(different_gradients)


def test_too_many_rows_raise_on_every_rank(four_ranks):
    four_ranks.run(too_many_rows)


def test_uneven_batches_need_the_sum_over_all_tokens(four_ranks):
    four_ranks.run(uneven_batches)
