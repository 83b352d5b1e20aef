"""Run in every rank, or in one process: a small model that trains, saves and goes on where another one stopped."""

from __future__ import annotations

import os
import resource
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from moe_triton import MoE
from moe_triton.distributed import (
    CheckpointError,
    ExpertParallel,
    ExpertParallelError,
    load_checkpoint,
    make_groups,
    save_checkpoint,
)
from moe_triton.distributed.groups import ALONE, Group
from moe_triton.layers import Router
from tests.helpers.compare import assert_close

HIDDEN, INTERMEDIATE, TOP_K, TOKENS = 8, 12, 2, 12


@dataclass
class Spread:
    """sizes: of the groups of all ranks; ranks: instead, spread over these alone; neither: one process."""

    sizes: dict[str, Any] | None = None
    ranks: tuple[int, ...] = ()
    experts: int = 8
    optimizer: str = "AdamW"
    layer: dict[str, Any] = field(default_factory=dict)
    lora: bool = False  # adapters over frozen projections
    senders: list[int] = field(default_factory=list)  # who sends pieces to the first rank in an export

    def make_group(self) -> Group:
        """Of `ranks`; every rank has to call it, and one that is not among them must not use what it gets."""
        if self.ranks not in _groups:
            _groups[self.ranks] = dist.new_group(list(self.ranks))
        rank = dist.get_rank()
        if rank not in self.ranks:
            return Group(ranks=self.ranks, rank=-1)
        return Group(ranks=self.ranks, rank=self.ranks.index(rank), reference=ref(_groups[self.ranks]))


_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}


class Net(nn.Module):
    """Dense layers around an MoE; parameters and buffers of every kind."""

    def __init__(self, spread: Spread, seed: int = 0) -> None:
        super().__init__()
        self.dp = self.edp = ALONE
        parallel = None
        self.group = None
        if spread.ranks:
            self.dp = spread.make_group()
            self.group = self.dp.handle
            mesh = DeviceMesh.from_group(self.group, "cpu", mesh=torch.tensor(spread.ranks), mesh_dim_names=("ep",))
            parallel = ExpertParallel(mesh, loss_reduction="sum")
        elif spread.sizes is not None:
            groups = make_groups(**spread.sizes)
            self.dp, self.edp, parallel = groups.dp, groups.edp, ExpertParallel(groups, loss_reduction="sum")
        torch.manual_seed(seed)
        double = {"dtype": torch.float64}
        router = Router(HIDDEN, spread.experts, TOP_K, choice_bias=True, **double)
        arguments = {"bias": True, "aux_loss_weight": 0.1, **spread.layer}
        self.first = nn.Linear(HIDDEN, HIDDEN, **double)
        self.moe = MoE(
            HIDDEN, INTERMEDIATE, spread.experts, TOP_K, router=router, expert_parallel=parallel, **double, **arguments
        )
        if spread.lora:
            self.moe.experts.add_lora(3, 6.0)
        self.last = nn.Linear(HIDDEN, 1, **double)
        self.tied = self.last  # a second name of the same parameters
        self.scale = nn.Parameter(torch.tensor(1.5, **double))
        self.register_buffer("steps", torch.tensor(0))
        with torch.no_grad():
            self.moe.router.choice_bias.copy_(torch.randn(spread.experts))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = self.moe(self.first(x))
        return self.last(out.output * self.scale).squeeze(-1), out.aux_loss

    def train_step(self, optimizer: torch.optim.Optimizer) -> float:
        """The loss over the global batch of the model's own step; each rank takes its share of the tokens."""
        generator = torch.Generator().manual_seed(int(self.steps))
        x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64, generator=generator)
        here = slice(self.dp.rank * TOKENS // self.dp.size, (self.dp.rank + 1) * TOKENS // self.dp.size)
        y, aux_loss = self(x[here])
        loss = (y - x[here].sum(1)).square().sum() / TOKENS + aux_loss
        optimizer.zero_grad()
        loss.backward()
        total = loss.detach().clone()
        experts = {id(parameter) for parameter in self.moe.experts.parameters()}
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        for tensor, group in [(total, self.dp)] + [
            (parameter.grad, self.edp if id(parameter) in experts else self.dp) for parameter in trained
        ]:
            if group.size > 1:
                dist.all_reduce(tensor, group=group.handle)
        optimizer.step()
        self.steps += 1
        return total.item()


def make_optimizer(net: nn.Module, name: str) -> torch.optim.Optimizer:
    """Two groups with settings of their own. The large eps keeps rounding in a tiny gradient from growing."""
    groups = [
        {"params": [p for name, p in net.named_parameters() if "experts" in name], "lr": 0.02, "weight_decay": 0.1},
        {"params": [p for name, p in net.named_parameters() if "experts" not in name]},
    ]
    if name == "SGD":
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    return getattr(torch.optim, name)(groups, lr=0.05, eps=0.01)


def make(spread: Spread, seed: int = 0) -> tuple[Net, torch.optim.Optimizer]:
    net = Net(spread, seed)
    return net, make_optimizer(net, spread.optimizer)


def uninterrupted(spread: Spread, steps: int) -> tuple[Net, torch.optim.Optimizer, list[float]]:
    """The same training in one process, without expert parallelism, as it should be after `steps` steps."""
    alone = Spread(experts=spread.experts, optimizer=spread.optimizer, layer=spread.layer, lora=spread.lora)
    if (str(alone), steps) not in _made:
        net, optimizer = make(alone)
        _made[str(alone), steps] = net, optimizer, [net.train_step(optimizer) for _ in range(steps)]
    return _made[str(alone), steps]


_made: dict[tuple[str, int], tuple[Net, torch.optim.Optimizer, list[float]]] = {}


def assert_same_state(spread: Spread, net: Net, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Parameters, buffers and the optimizer's state equal the uninterrupted run's; of the experts, the local part."""
    whole, whole_optimizer, _ = uninterrupted(spread, steps)
    experts = net.moe.experts

    def local(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not name.startswith("moe.experts."):
            return tensor
        part = tensor[list(experts.local_experts)]
        return torch.stack([experts.local_slice(name.rpartition(".")[2], expert) for expert in part])

    assert int(net.steps) == steps
    for (name, mine), (_, theirs) in zip(net.state_dict().items(), whole.state_dict().items(), strict=True):
        if mine.is_floating_point():
            assert_close(mine, local(name, theirs).to(mine.dtype), tolerance=1e-12)
    for name, parameter in net.named_parameters():
        state, expected = optimizer.state[parameter], whole_optimizer.state[whole.get_parameter(name)]
        assert state.keys() == expected.keys()
        assert bool(state) == parameter.requires_grad, name
        for entry, value in state.items():
            wanted = expected[entry]
            assert_close(value, local(name, wanted) if wanted.dim() else wanted, tolerance=1e-12)


def train_and_save(spread: Spread, folder: Path, steps: int = 2) -> None:
    net, optimizer = make(spread)
    for _ in range(steps):
        net.train_step(optimizer)
    save_checkpoint(folder, net, optimizer, extra={"spread": str(spread)}, group=net.group)


def resume(spread: Spread, folder: Path, steps: int, then_save: Path | None = None) -> None:
    """Load what was saved after `steps` steps into a differently drawn model, and go on for one step."""
    if spread.ranks and spread.make_group().rank < 0:
        return
    net, optimizer = make(spread, seed=5)
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    extra = load_checkpoint(folder, net, optimizer, group=net.group)
    assert extra.keys() == {"spread"}
    assert_same_state(spread, net, optimizer, steps)
    loss = net.train_step(optimizer)
    expected = uninterrupted(spread, steps + 1)[2][-1]
    assert abs(loss - expected) <= 1e-12 * abs(expected)
    assert_same_state(spread, net, optimizer, steps + 1)
    if then_save is not None:
        save_checkpoint(then_save, net, optimizer, extra=extra, group=net.group)


def fully_sharded(folder: Path) -> dict[str, torch.Tensor]:
    """Experts sharded by FSDP2 over edp, the rest over dp; saved after a step. Returns the whole tensors, gathered."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    net = Net(Spread({"ep": 2}, experts=6))  # three experts over two shards: uneven
    net.scale = None  # FSDP2 shards no scalars
    groups = make_groups(ep=2)
    fully_shard(net.moe.experts, mesh=groups.moe_mesh["edp"])
    fully_shard(net, mesh=groups.dp_mesh)
    optimizer = torch.optim.AdamW(net.parameters())
    generator = torch.Generator().manual_seed(dist.get_rank())
    for parameter in net.parameters():
        assert isinstance(parameter, DTensor)
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.to_local().normal_(generator=generator)
    optimizer.step()
    save_checkpoint(folder, net, optimizer)

    found = {}
    state = {name: optimizer.state[parameter]["exp_avg"] for name, parameter in net.named_parameters()}
    for kind, tensors in (("model", dict(net.named_parameters())), ("exp_avg", state)):
        for name, tensor in tensors.items():
            here = tensor.full_tensor().detach()
            if "experts" in name:
                parts: list[Any] = [None] * groups.ep.size
                dist.all_gather_object(parts, here, group=groups.ep.handle)
                here = torch.cat(parts)
            found[f"{kind}.{name}"] = here

    other = Net(Spread({"ep": 2}, experts=6), seed=3)
    other.scale = None
    fully_shard(other.moe.experts, mesh=groups.moe_mesh["edp"])
    fully_shard(other, mesh=groups.dp_mesh)
    again = torch.optim.AdamW(other.parameters())
    load_checkpoint(folder, other, again)
    for (name, mine), theirs in zip(other.named_parameters(), net.parameters(), strict=True):
        assert torch.equal(mine.to_local(), theirs.to_local()), name
        assert torch.equal(again.state[mine]["exp_avg"].to_local(), optimizer.state[theirs]["exp_avg"].to_local())
    return found


def data_parallel(folder: Path) -> None:
    """Saved from inside DistributedDataParallel, loaded outside it."""
    net, optimizer = make(Spread())
    save_checkpoint(folder, nn.parallel.DistributedDataParallel(net), optimizer)
    other, other_optimizer = make(Spread(), seed=5)
    load_checkpoint(folder, other, other_optimizer)
    for mine, theirs in zip(other.parameters(), net.parameters(), strict=True):
        assert torch.equal(mine, theirs)


# What goes wrong ------------------------------------------------------------------------------------------------------


def full_disk(folder: Path) -> None:
    """On one rank a file cannot grow beyond 100 bytes, as on a full disk: an error on both, and nothing is lost."""
    net, optimizer = make(Spread({"ep": 2}))
    net.train_step(optimizer)
    save_checkpoint(folder, net, optimizer, extra={"spread": ""})
    before = sorted(folder.rglob("*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    net.train_step(optimizer)
    dist.barrier()
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(CheckpointError, match=r"save_checkpoint to .*/kept, writing: rank 1: .*File too large"):
            save_checkpoint(folder, net, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    dist.barrier()
    assert sorted(folder.rglob("*")) == before
    resume(Spread({"ep": 2}), folder, 1)


def refused(folder: Path) -> None:
    """A folder that cannot be made; ranks that disagree: the same error everywhere."""
    net, optimizer = make(Spread({"ep": 2}))
    net.train_step(optimizer)
    (folder / "file").touch()
    with pytest.raises(CheckpointError, match=r"/file/below, making a folder: rank 0: .*Not a directory.*/file/below"):
        save_checkpoint(folder / "file" / "below", net, optimizer)
    with pytest.raises(CheckpointError, match=r"holds no checkpoint: there is no .*/none/checkpoint.json"):
        load_checkpoint(folder / "none", net)
    with pytest.raises(CheckpointError, match=r"optimizer: got one on some ranks only"):
        save_checkpoint(folder / "a", net, optimizer if dist.get_rank() == 0 else None)
    with pytest.raises(TypeError, match=r"rank 1: extra\['x'\]: got object"):
        save_checkpoint(folder / "a", net, optimizer, extra={"x": object()} if dist.get_rank() == 1 else None)
    optimizer.state[net.first.weight]["step"] += dist.get_rank()
    with pytest.raises(CheckpointError, match=r"optimizer state of first.weight: .* on rank 1, but .*"):
        save_checkpoint(folder / "a", net, optimizer)
    assert not (folder / "a").exists()


def die_while_saving(rank: int, store: str, folder: Path) -> None:
    """A process of its own: saves twice; the second time rank 1 is killed when half of its file is written."""
    from datetime import timedelta

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    net, optimizer = make(Spread({"ep": 2}))
    for _ in range(2):
        net.train_step(optimizer)
    save_checkpoint(folder, net, optimizer, extra={"spread": ""})
    net.train_step(optimizer)
    if rank == 1:
        import safetensors.torch

        save = safetensors.torch.save

        def half(*args: Any, **kwargs: Any) -> Any:
            data = save(*args, **kwargs)
            next(folder.glob("tensors-000002/shard-*")).write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        safetensors.torch.save = half
    with pytest.raises(ExpertParallelError, match=r"rank 0, save_checkpoint to .*, writing: rank 1"):
        save_checkpoint(folder, net, optimizer)
    os._exit(42)  # the group is broken: nothing to tidy up
