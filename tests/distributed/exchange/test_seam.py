"""`ExpertParallel(exchange=...)`: other exchanges, over imitations of what they call, equal one process."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_triton.distributed import DeepEP, ExpertParallel, ExpertParallelError, SymmetricMemory
from moe_triton.distributed.exchange.all_to_all import AllToAll
from moe_triton.layers.experts import FeedForward
from tests.helpers import parity
from tests.helpers.exchanges import ElasticBuffer, EventOverlap, imitated_deep_ep, imitated_symmetric_memory
from tests.helpers.faults import fresh_groups
from tests.helpers.parity import Case
from tests.helpers.ranks import products

ROOT = Path(__file__).parents[3]
UNEVEN, SOME_EMPTY = [9, 1, 4, 2], [5, 0, 7, 0]
LAYER = {"aux_loss_weight": 0.1, "bias": True, "shared_intermediate_size": 8}
EXACT = 1e-14
IMITATED = {"deep_ep": (DeepEP, imitated_deep_ep), "symmetric": (SymmetricMemory, imitated_symmetric_memory)}


def check(name: str, case: Case, **options) -> None:
    make, imitated = IMITATED[name]
    with imitated():
        exchange = {"exchange": make(**options), "max_tokens_per_rank": 9, **case.exchange}
        parity.check(replace(case, exchange=exchange, tolerance=EXACT))
        if name == "deep_ep":
            assert ElasticBuffer.made == [{"hidden": parity.HIDDEN, "num_topk": parity.TOP_K, "deterministic": True}]


@pytest.mark.parametrize(("name", "tokens"), products(name=tuple(IMITATED), tokens=(UNEVEN, SOME_EMPTY, [0] * 4)))
def test_equal_to_one_process(four_ranks, name, tokens):
    four_ranks.run(check, name, Case(tokens, layer=LAYER, lora=True))


@pytest.mark.parametrize("name", IMITATED)
@pytest.mark.parametrize("sizes", [{"ep": 2}, {"ep": 2, "etp": 2}, {"ep": 4, "tp": 2}], ids=str)
def test_other_groups(four_ranks, name, sizes):
    tokens = UNEVEN if "tp" not in sizes else [9, 4]
    four_ranks.run(check, name, Case(tokens, sizes=sizes, layer=LAYER))


def by_kernels() -> None:
    layer = {"backend": "triton", "top_k": 2, "bias": True}
    exchange = {"exchange": SymmetricMemory(), "max_tokens_per_rank": 6}
    with imitated_symmetric_memory():
        parity.check(Case([6, 3], {"ep": 2}, exchange, layer, dtype=torch.float32, experts=4))


def test_rows_in_expert_order_by_kernels(two_ranks):
    two_ranks.run(by_kernels)


def in_a_group_of_one(name: str) -> None:
    check(name, Case([5] * 4, sizes={"ep": 1}, exchange={"always_exchange": True}))


@pytest.mark.parametrize("name", IMITATED)
def test_a_group_of_one_that_exchanges(four_ranks, name):
    four_ranks.run(in_a_group_of_one, name)


def test_experts_that_do_not_divide(four_ranks):
    four_ranks.run(check, "symmetric", Case(UNEVEN, experts=7, layer=LAYER))


def recomputed(name: str) -> None:
    make, imitated = IMITATED[name]
    groups, gradients = fresh_groups(ep=4), []
    with imitated():
        for is_checkpointed in (False, True):
            parallel = ExpertParallel(groups, exchange=make(), max_tokens_per_rank=4)
            layers = [parity.make_layer(Case([4] * 4), parallel) for _ in range(2)]
            x = torch.arange(4 * parity.HIDDEN, dtype=torch.float64).sin().view(4, -1).requires_grad_()
            y = x
            for layer in layers:
                y = checkpoint(layer, y, use_reentrant=False)[0] if is_checkpointed else layer(y)[0]
            y.square().sum().backward()
            gradients.append([x.grad, *(p.grad for layer in layers for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", IMITATED)
def test_two_layers_recomputed(four_ranks, name):
    four_ranks.run(recomputed, name)


def order_of_events() -> list[str]:
    events: list[str] = []

    def noted(function, event):
        return lambda *args, **kwargs: (events.append(event), function(*args, **kwargs))[1]

    with imitated_deep_ep(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ElasticBuffer, "dispatch", noted(ElasticBuffer.dispatch, "dispatch"))
        patch.setattr(EventOverlap, "current_stream_wait", noted(EventOverlap.current_stream_wait, "wait"))
        patch.setattr(FeedForward, "forward", noted(FeedForward.forward, "shared expert"))
        parallel = ExpertParallel(fresh_groups(ep=4), exchange=DeepEP(), max_tokens_per_rank=4)
        layer = parity.make_layer(Case([4] * 4, layer={"shared_intermediate_size": 8}), parallel)
        layer(torch.randn(4, parity.HIDDEN, dtype=torch.float64))
    return events


def test_the_shared_expert_runs_while_deep_ep_sends(four_ranks):
    for events in four_ranks.run(order_of_events):
        assert events == ["dispatch", "shared expert", "wait", "wait"]


def too_many_rows(max_rows: int) -> None:
    parallel = ExpertParallel(
        fresh_groups(ep=4), exchange=SymmetricMemory(max_rows=max_rows), max_tokens_per_rank=6, loss_reduction="sum"
    )
    layer = parity.make_layer(Case([6] * 4, one_expert=True), parallel, top_k=1)
    x = torch.randn(6, parity.HIDDEN, dtype=torch.float64)
    with imitated_symmetric_memory():
        if max_rows >= 24:
            assert layer(x).output.shape == x.shape
            return
        with pytest.raises(ExpertParallelError, match=f"rank 0 had more than max_rows={max_rows} rows to receive"):
            layer(x)


@pytest.mark.parametrize("max_rows", [23, 24])
def test_rows_without_room_raise_on_every_rank(four_ranks, max_rows):
    four_ranks.run(too_many_rows, max_rows)


def bounded(max_rows: int) -> None:
    """Where all rows fit, the limit changes nothing."""
    check("symmetric", Case([6] * 4, layer=LAYER), max_rows=max_rows)


def test_rows_that_have_room(four_ranks):
    four_ranks.run(bounded, 60)


def written_by_a_user(code: str) -> None:
    groups = fresh_groups(ep=4)
    buffer = ElasticBuffer(groups.ep.handle, num_max_tokens_per_rank=9, hidden=parity.HIDDEN, num_topk=parity.TOP_K)
    names = {"buffer": buffer, "ExpertParallel": ExpertParallel, "groups": groups}
    exec(code, names)
    parity.check(Case(UNEVEN, exchange={"exchange": names["parallel"].make_exchange}, layer=LAYER, tolerance=EXACT))


def test_the_stage_of_the_page(four_ranks):
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class BufferStage" in block]
    assert len(code[code.index("class") : code.index("\nparallel")].strip().splitlines()) <= 20
    four_ranks.run(written_by_a_user, code)


class OwnAgain:
    """The package's own exchange, given from outside; the address in its repr differs between ranks."""

    def __call__(self, inner, spec):
        return AllToAll(mode="dropless")(inner, spec)


def given_from_outside() -> None:
    parity.check(Case(SOME_EMPTY, exchange={"exchange": OwnAgain()}, layer=LAYER, tolerance=EXACT))


def test_the_packages_own_exchange_has_the_same_protocol(four_ranks):
    four_ranks.run(given_from_outside)


def test_bad_arguments():
    with pytest.raises(ImportError, match="exchange: got DeepEP without the package deep_ep, wanted it installed"):
        DeepEP()
    with pytest.raises(ValueError, match="max_rows: got 0, wanted at least 1"):
        SymmetricMemory(max_rows=0)
    for wrong in ({"mode": "bounded"}, {"chunks": 2}, {"deduplicate": False}, {"ranks_per_node": 2}):
        ((name, value),) = wrong.items()
        with pytest.raises(
            ValueError, match=rf"{name}: got {value!r} with exchange=SymmetricMemory\(max_rows=None\), "
        ):
            ExpertParallel(exchange=SymmetricMemory(), **wrong)
    with pytest.raises(ValueError, match=r"dispatch_dtype: got torch.float16, wanted torch.float8_e4m3fn or None"):
        ExpertParallel(dispatch_dtype=torch.float16)


def bad_calls() -> None:
    groups, x = fresh_groups(ep=4), torch.zeros(2, parity.HIDDEN, dtype=torch.float64)

    def call(exchange, experts: int = parity.EXPERTS, **arguments):
        return parity.make_layer(
            Case([2] * 4, experts=experts), ExpertParallel(groups, exchange=exchange, **arguments)
        )(x)

    with pytest.raises(RuntimeError, match="exchange: got SymmetricMemory, which needs a CUDA GPU"):
        call(SymmetricMemory(), max_tokens_per_rank=2)
    with pytest.raises(ValueError, match="max_tokens_per_rank: got None with SymmetricMemory, wanted the most"):
        call(SymmetricMemory())
    with pytest.raises(ValueError, match="max_tokens_per_rank: got 1 for a call with 2"):
        call(SymmetricMemory(), max_tokens_per_rank=1)
    with imitated_deep_ep():
        with pytest.raises(ValueError, match="max_tokens_per_rank: got None with DeepEP, wanted the most"):
            call(DeepEP())
        with pytest.raises(ValueError, match="num_experts: got 7 on 4 ranks with DeepEP, wanted a multiple"):
            call(DeepEP(), experts=7, max_tokens_per_rank=2)


def test_calls_that_cannot_be(four_ranks):
    four_ranks.run(bad_calls)
