"""Whole tensors into spread models: every rank gets its own experts, not the first ones (DeepSpeed's issue 6589)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moe_triton import MoE
from moe_triton.distributed import CheckpointError, export_safetensors, load_experts_from
from tests.helpers.checkpoint_models import Net, Spread


def load(sizes: dict[str, Any] | None, source: Any, experts: int) -> None:
    whole, net, untouched = (
        Net(Spread(**how, experts=experts), seed=seed) for how, seed in (({}, 0), ({"sizes": sizes}, 5), ({}, 5))
    )
    source = whole.state_dict() if source is None else source
    names = load_experts_from(source, net)
    assert sorted(names) == sorted(name for name in whole.state_dict() if name.startswith("moe.experts."))
    mine = net.moe.experts.local_experts
    for name, parameter in net.named_parameters():
        if name in names:
            part = whole.get_parameter(name)[mine.start : mine.stop]
            short = name.rpartition(".")[2]
            expected = torch.stack([net.moe.experts.local_slice(short, expert) for expert in part])
        else:
            expected = untouched.get_parameter(name)
        assert torch.equal(parameter, expected), name
    load_experts_from(source, net, only_experts=False)
    for name, value in net.state_dict().items():
        if name not in names:
            assert torch.equal(value, whole.state_dict()[name]), name


@pytest.mark.parametrize(("sizes", "experts"), [({"ep": 4}, 7), ({"ep": 2, "etp": 2}, 8), ({"ep": 2}, 8)], ids=str)
def test_every_rank_reads_its_own_experts(four_ranks, tmp_path, sizes, experts):
    path = tmp_path / "model.safetensors"
    export_safetensors(path, Net(Spread(experts=experts)))
    four_ranks.run(load, sizes, path, experts)
    export_safetensors(path, Net(Spread(experts=experts)), max_file_bytes=2000)
    path.unlink()
    four_ranks.run(load, sizes, tmp_path, experts)
    four_ranks.run(load, sizes, None, experts)


def test_one_process(tmp_path):
    load(None, None, 8)


def test_what_does_not_fit_is_named(tmp_path: Path):
    layer = MoE(8, 4, 4)
    whole = {name: value.detach().clone() for name, value in layer.state_dict().items()}
    good, other = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    torn, index = tmp_path / "torn.safetensors", tmp_path / "gone.safetensors.index.json"
    save_file(whole, good)
    save_file({**whole, "experts.down_proj": torch.zeros(3, 8, 4)}, other)
    torn.write_bytes(good.read_bytes()[:-1])
    index.write_text(json.dumps({"weight_map": dict.fromkeys(whole, "gone")}))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    first = "experts.gate_up_proj"
    for source, model, kind, message in [
        (other, layer, ValueError, r"source: 'experts.down_proj' has shape \[3, 8, 4\], wanted \[4, 8, 4\]"),
        (good, MoE(8, 4, 4, bias=True), CheckpointError, rf"source: {good} has no '{first}_bias'"),
        ({}, layer, CheckpointError, rf"source: has no '{first}'"),
        ({first: 3}, layer, TypeError, rf"source: got int at '{first}', wanted a Tensor"),
        (tmp_path / "none.safetensors", layer, CheckpointError, r"cannot read .*none.safetensors"),
        (torn, layer, CheckpointError, rf"cannot read {torn}"),
        (index, layer, CheckpointError, rf"cannot read '{first}' in .*gone"),
        (3, layer, TypeError, r"source: got int, wanted a mapping of tensors or a path"),
        (whole, torch.nn.Linear(2, 2), ValueError, r"model: got one without experts"),
    ]:
        with pytest.raises(kind, match=message):
            load_experts_from(source, model)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
