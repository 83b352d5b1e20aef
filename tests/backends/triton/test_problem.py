"""What calls that lie alike share: it is made once, keeps no tensor, and holds only while nothing else has changed."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from moe_triton import reference
from moe_triton.backends.triton import problem as triton_problem
from moe_triton.backends.triton.experts import experts_forward
from moe_triton.backends.triton.problem import prepared_for
from moe_triton.records import ExpertCall, ExpertSpec
from moe_triton_kernels import configs, launch
from tests.helpers.compare import TOLERANCE, assert_close
from tests.helpers.problems import Problem, check, make_problem, random_choices, run


@pytest.fixture(autouse=True)
def nothing_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_problem, "_PREPARED", {})


def make(tokens: int = 5, **options: object) -> Problem:
    return make_problem(random_choices(tokens, 2, 4), 4, d=24, n=16, **options)


def test_calls_that_lie_alike_share_what_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    original = triton_problem.Up
    monkeypatch.setattr(triton_problem, "Up", lambda *args, **sizes: made.append(sizes) or original(*args, **sizes))
    first, second = make(), make()
    check(run(first), first, tolerance=TOLERANCE[torch.float32])
    expected = reference.moe_experts(second.call)
    with torch.no_grad():
        assert_close(experts_forward(second.call, False)[0], expected)
    assert len(made) == 1
    assert prepared_for(first.call) is prepared_for(second.call)
    for other in (make(6), make(dtype=torch.bfloat16), make(bias=False), make(spec=ExpertSpec(activation="geglu"))):
        assert prepared_for(other.call) is prepared_for(other.call) is not prepared_for(first.call)


def test_it_keeps_no_tensor() -> None:
    problem = make(2)
    run(problem)
    call = problem.call
    given = (call.hidden, call.weights, call.dispatched.source, *call.parameters[:4], problem.grad_out)
    alive = [weakref.ref(tensor) for tensor in given]
    assert triton_problem._PREPARED
    del problem, call, given
    gc.collect()
    assert [reference() for reference in alive] == [None] * len(alive)


def test_weights_at_another_alignment_or_stride() -> None:
    """Addresses are not compared, so that a call looks at them; strides are."""
    problem = make()
    with torch.no_grad():
        expected = experts_forward(problem.call, False)[0]
        for offset, stride in ((1, 24), (0, 28)):
            down = problem.call.parameters.down
            size = (*down.shape[:2], stride)
            moved = torch.empty(offset + size[0] * size[1] * size[2])[offset:].view(size)[..., : down.shape[2]]
            moved.copy_(down)
            call = replace(problem.call, parameters=problem.call.parameters._replace(down=moved))
            assert (prepared_for(call) is prepared_for(problem.call)) == (moved.stride() == down.stride())
            assert torch.equal(experts_forward(call, False)[0], expected)


def config_of(call: ExpertCall) -> launch.Config:
    problem = triton_problem.Problem(call)
    problem.down_rows(problem.up(problem.tiles(), keep_a=True, keep_h=False)[0], problem.tiles())
    config: launch.Config = problem.kernels["down"].config
    return config


def test_another_table_another_device_and_another_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = make().call
    before = config_of(call)
    wanted = replace(before, block_n=32)
    key = {"op": "down", "d": 24, "n": 16, "dtype": "float32", "architecture": launch.target_of(call.hidden.device)[0]}
    table = tmp_path / "configs.json"
    table.write_text(json.dumps([{**key, "bucket": 16, "config": asdict(wanted)}]))
    monkeypatch.setenv("MOE_TRITON_TABLE", str(table))
    configs.user_table.cache_clear()
    try:
        assert config_of(call) == wanted != before
    finally:
        monkeypatch.undo()
        configs.user_table.cache_clear()
    assert config_of(call) == before
    kept = prepared_for(call)
    monkeypatch.setattr(launch, "compiler_fences", lambda: "another")
    fenced = prepared_for(call)
    target = launch.Target(architecture="sm_90", num_sms=132)
    monkeypatch.setattr(triton_problem, "target_of", lambda device: target)
    assert len({kept, fenced, prepared_for(call)}) == 3
    monkeypatch.undo()


def test_what_is_no_single_plain_tensor_is_prepared_anew() -> None:
    call = make().call
    lists = replace(call, parameters=call.parameters._replace(down=list(call.parameters.down)))
    assert lists.kind is None
    assert prepared_for(lists) is not prepared_for(lists)


def test_the_most_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_problem, "MOST_KINDS", 2)
    for tokens in (1, 2, 3):
        prepared_for(make(tokens).call)
    assert len(triton_problem._PREPARED) == 1
