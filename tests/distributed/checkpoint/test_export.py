"""One set of safetensors files of a spread model: the tensors of the model that is not spread, bit for bit."""

from __future__ import annotations

import json
import os
import pickle
import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.testing._internal.distributed.fake_pg import FakeStore

from moe_triton import MoE
from moe_triton.distributed import CheckpointError, ExpertParallel, export_safetensors, make_groups
from moe_triton.distributed.checkpoint import export as export_module
from moe_triton.distributed.checkpoint.team import Team
from moe_triton.distributed.exchange import channel
from tests.helpers.checkpoint_models import Net, Spread


def export(spread: Spread, path: Path, limit: int) -> None:
    """Notes the largest message, and exports twice: the second export replaces the first."""
    net = make(spread)
    experts = net.moe.experts
    largest = max(p[0].numel() * p.element_size() for p in experts.parameters())
    sent, send = [], dist.send
    dist.send = lambda tensor, *args, **kwargs: (sent.append(tensor.nbytes), send(tensor, *args, **kwargs))
    try:
        for _ in range(2):
            export_safetensors(path, net, max_file_bytes=limit)
    finally:
        dist.send = send
    assert max(sent, default=0) <= largest
    assert bool(sent) == (dist.get_rank() in spread.senders)


def make(spread: Spread) -> Net:
    """With dtypes that are no numbers for gloo."""
    net = Net(spread)
    net.moe.experts.down_proj.data = net.moe.experts.down_proj.data.to(torch.float8_e4m3fn)
    net.moe.experts.gate_up_proj.data = net.moe.experts.gate_up_proj.data.bfloat16()
    net.register_buffer("mask", torch.tensor([True, False, True]))
    net.register_buffer("nothing", torch.zeros(0, 3))
    return net


def assert_exported(files: list[Path]) -> None:
    whole = make(Spread()).state_dict()
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == {name for name in whole if not name.startswith("tied")}
    for name, tensor in found.items():
        assert tensor.dtype == whole[name].dtype, name
        assert torch.equal(tensor.double(), whole[name].double()), name


@pytest.mark.parametrize(
    ("sizes", "senders"),
    [
        ({"ep": 4}, [1, 2, 3]),
        ({"ep": 2}, [1]),
        ({"ep": 2, "etp": 2}, [1, 2, 3]),
        ({"ep": 1, "etp": 4}, [1, 2, 3]),
        ({"ep": 2, "order": "data-before-expert"}, [2]),
    ],
    ids=str,
)
def test_every_layout(four_ranks, tmp_path, sizes, senders):
    four_ranks.run(export, Spread(sizes, senders=senders), tmp_path / "model.safetensors", 10**9)
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert_exported([tmp_path / "model.safetensors"])


def test_several_files_with_an_index(four_ranks, tmp_path):
    four_ranks.run(export, Spread({"ep": 4}, senders=[1, 2, 3]), tmp_path / "model.safetensors", 2000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert {file.name for file in tmp_path.iterdir()} == {*files, "model.safetensors.index.json"}
    assert_exported([tmp_path / file for file in files])
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    whole = make(Spread()).state_dict()
    assert index["metadata"]["total_size"] == sum(whole[name].nbytes for name in index["weight_map"])


def sharded(path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    from moe_triton.distributed import make_groups

    net, groups = Net(Spread({"ep": 2}, experts=6)), make_groups(ep=2)
    net.scale = None
    fully_shard(net.moe.experts, mesh=groups.moe_mesh["edp"])
    fully_shard(net, mesh=groups.dp_mesh)
    export_safetensors(path, net)


def test_fsdp2(four_ranks, tmp_path):
    four_ranks.run(sharded, tmp_path / "a.safetensors")
    whole = Net(Spread(experts=6)).state_dict()
    for name, tensor in load_file(tmp_path / "a.safetensors").items():
        assert torch.equal(tensor, whole[name]), name


def full_disk(path: Path) -> None:
    net = Net(Spread({"ep": 2}))
    export_safetensors(path, net)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with torch.no_grad():
        net.first.weight += 1
    dist.barrier()
    if dist.get_rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        for limit in (10**9, 2000):
            with pytest.raises(CheckpointError, match=rf"rank 0: cannot write {path}: File too large; .* intact"):
                export_safetensors(path, net, max_file_bytes=limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    dist.barrier()
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_full_disk_keeps_the_file_before(two_ranks, tmp_path):
    two_ranks.run(full_disk, tmp_path / "model.safetensors")


def test_bad_arguments_are_named(tmp_path):
    layer = MoE(8, 4, 4)
    with pytest.raises(ValueError, match=r"path: got '.*x.bin', wanted a name that ends in .safetensors"):
        export_safetensors(tmp_path / "x.bin", layer)
    with pytest.raises(ValueError, match=r"max_file_bytes: got 0, wanted at least 1"):
        export_safetensors(tmp_path / "x.safetensors", layer, max_file_bytes=0)
    layer.register_buffer("odd", torch.zeros(1, dtype=torch.complex128))
    with pytest.raises(TypeError, match=r"model: 'odd' has dtype torch.complex128"):
        export_safetensors(tmp_path / "x.safetensors", layer)


@dataclass
class World:
    """One rank of a world of torch's fake backend.

    bytes_sent  to and from collectives, by this rank
    scattered   bytes of the largest part that the first rank gives another
    """

    size: int
    rank: int
    bytes_sent: int = 0
    scattered: int = 0

    def run(self, path: Path) -> None:
        """Export a model of one expert a rank; as on the first rank, which is given the other ranks' descriptions."""
        dist.init_process_group("fake", store=FakeStore(), rank=self.rank, world_size=self.size)
        try:
            layer = MoE(8, 4, self.size, expert_parallel=ExpertParallel(make_groups(ep=self.size)))
            Team.of(None, "before").run("who the processes are", lambda: None)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dist, "all_reduce", self.counted(dist.all_reduce))
                patch.setattr(channel, "all_gather_single", self.counted(channel.all_gather_single))
                patch.setattr(channel.Channel, "broadcast_object", self.broadcast_object)
                patch.setattr(dist, "gather_object", self.gather_object)
                patch.setattr(dist, "scatter_object_list", self.scatter_object_list)
                patch.setattr(dist, "send", lambda *args, **options: None)
                export_safetensors(path, layer)
        finally:
            dist.destroy_process_group()

    def counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
            self.bytes_sent += tensor.nbytes
            return original(tensor, *args, **options)

        return call

    def broadcast_object(self, value: Any, phase: str, source: int) -> Any:
        self.bytes_sent += len(pickle.dumps(value))
        return value

    def gather_object(self, mine: Any, found: list[Any] | None, **options: Any) -> None:
        self.bytes_sent += len(pickle.dumps(mine))
        for rank in range(self.size) if found is not None else ():
            found[rank] = {
                name: {(rank, *offset[1:]) if name.startswith("experts.") else offset: shape
                       for offset, shape in boxes.items()}
                for name, boxes in mine.items()
            }  # fmt: skip

    def scatter_object_list(self, found: list[Any], parts: list[Any] | None, **options: Any) -> None:
        self.scattered = max((len(pickle.dumps(part)) for part in parts[1:]), default=0) if parts else 0
        found[0] = parts[0] if parts else {}


def test_what_a_rank_says_of_its_tensors_does_not_grow_with_the_world(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "_receive", lambda like, owner, team: like)
    others, firsts = [World(size, 3) for size in (8, 64)], [World(size, 0) for size in (8, 64)]
    for world in (*others, *firsts):
        world.run(tmp_path / "model.safetensors")
    assert 0 < others[0].bytes_sent == others[1].bytes_sent < 1000
    assert 0 < firsts[0].scattered == firsts[1].scattered < 1000
    assert load_file(tmp_path / "model.safetensors")["experts.gate_up_proj"].shape[0] == 64
