"""Run in every rank: DeepSpeed's layer and ours inside DeepSpeed's own engine, from the same weights."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe import layer as upstream_layer
from deepspeed.moe import utils as upstream_utils
from deepspeed.utils import groups as upstream_groups
from deepspeed.utils import logger
from torch import Tensor, nn

from moe_triton.benchmarking.providers.deepspeed_moe import without_compiled_sums
from moe_triton.compat import deepspeed as compat
from moe_triton.compat.deepspeed import groups, utils
from moe_triton.compat.deepspeed import layer as our_layer
from moe_triton.distributed.groups import _made
from tests.helpers.compare import assert_close
from tests.helpers.deepspeed_modules import EXPERTS, D, run

LAYERS = {"upstream": upstream_layer.MoE, "ours": our_layer.MoE}


@dataclass
class Case:
    """What is trained. options: of the MoE layers; config: of the engine; tokens: by rank."""

    options: dict[str, Any]
    expert: str = "Gated"
    config: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    tokens: list[int] = field(default_factory=lambda: [24, 24])
    steps: int = 4
    by: str | None = None  # optimizer groups of our own making


class Model(nn.Module):
    """Two MoE layers between dense ones."""

    def __init__(self, layer: type[nn.Module], case: Case) -> None:
        super().__init__()
        expert = EXPERTS[case.expert]
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)
        self.moes = nn.ModuleList([layer(D, expert(), num_experts=4, **case.options) for _ in range(2)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, l_aux = self.first(x), 0.0
        for moe in self.moes:
            y, loss, _ = moe(x)
            x, l_aux = x + y, l_aux + loss
        return self.last(x), l_aux


def start_deepspeed() -> None:
    """Over the process group that there is; without the shared-memory reduction, which takes a minute to build."""
    logger.setLevel(logging.ERROR)
    vars(deepspeed.ops)["__compatible_ops__"] = {}  # nor is it asked which others could be built
    os.environ["LOCAL_RANK"] = str(dist.get_rank())
    without_compiled_sums()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def reset() -> None:
    """Every engine starts without groups, and leaves none: their threads are never idle."""
    groups.reset()
    upstream_groups._WORLD_GROUP = None
    _made.clear()
    dist.barrier()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def make_engine(kind: str, case: Case) -> Any:
    """An engine around a model that has the same weights whichever layer it is made of."""
    start_deepspeed()
    torch.manual_seed(3)
    model = Model(LAYERS[kind], case)
    generator = torch.Generator().manual_seed(17 + dist.get_rank())  # the engine makes equal what has to be
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    optimizer: dict[str, Any] = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    config = {"train_micro_batch_size_per_gpu": 1, "optimizer": optimizer, "steps_per_print": 1000, **case.config}
    if case.dtype == torch.bfloat16:
        config["bf16"] = {"enabled": True}
    parameters: Any = [p for p in model.parameters() if p.requires_grad]
    if case.by is not None:
        module = utils if kind == "ours" else upstream_utils
        parameters = module.configure_moe_param_groups(parameters, **({"by": case.by} if kind == "ours" else {}))
    return deepspeed.initialize(model=model, model_parameters=parameters, config=config)[0]


def train(engine: Any, case: Case, first_step: int = 0) -> list[float]:
    """The local losses of some steps on batches that depend on rank and step."""
    losses = []
    for step in range(first_step, first_step + case.steps):
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        x = torch.randn(case.tokens[dist.get_rank()], D, generator=generator).to(case.dtype)
        torch.manual_seed(step)
        output, l_aux = engine(x)
        loss = (output.float() - x.float().roll(1, -1)).square().mean() + 0.1 * l_aux
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def losses_of_both(case: Case) -> dict[str, list[float]]:
    found = {}
    for kind in LAYERS:
        reset()
        found[kind] = train(make_engine(kind, case), case)
    reset()
    return found


def losses_of_ours(case: Case) -> list[float]:
    reset()
    found = train(make_engine("ours", case), case)
    reset()
    return found


def checkpoints(case: Case, folder: str) -> dict[str, Any]:
    """Train, save, train on; load what was saved into new engines of both kinds, and train on from there."""
    found = {}
    for kind in LAYERS:
        reset()
        engine = make_engine(kind, case)
        train(engine, case)
        engine.save_checkpoint(str(Path(folder) / kind), tag="here")
        found[kind] = train(engine, case, case.steps)
    for kind in LAYERS:
        for source in LAYERS:
            reset()
            engine = make_engine(kind, case)
            with torch.no_grad():
                for parameter in engine.module.parameters():
                    parameter.zero_()
            engine.load_checkpoint(str(Path(folder) / source), tag="here")
            found[f"{kind} from {source}"] = train(engine, case, case.steps)
    reset()
    return found


def losses_by_ep_size(case: Case) -> dict[int, list[float]]:
    """Our layer in the engine, from one full state dict, with the experts on every rank and spread over all."""
    torch.manual_seed(5)
    whole = Model(our_layer.MoE, case)
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    found = {}
    for ep_size in (1, dist.get_world_size()):
        reset()
        engine = make_engine("ours", replace(case, options={**case.options, "ep_size": ep_size}))
        engine.module.load_state_dict(whole.state_dict())  # every rank takes its own experts
        if hasattr(engine.optimizer, "refresh_fp32_params"):
            engine.optimizer.refresh_fp32_params()
        found[ep_size] = train(engine, case)
    reset()
    return found


class Mpu:
    """A model parallel unit as Megatron's: runs of `size` ranks are tensor parallel."""

    def __init__(self, size: int) -> None:
        world, self.rank, self.size = dist.get_world_size(), dist.get_rank(), size
        for first in range(0, world, size):
            members = list(range(first, first + size))
            group = dist.new_group(members)
            if self.rank in members:
                self.tensor = group
        for lane in range(size):
            members = list(range(lane, world, size))
            group = dist.new_group(members)
            if self.rank in members:
                self.data = group

    def get_model_parallel_rank(self) -> int:
        return self.rank % self.size

    def get_model_parallel_world_size(self) -> int:
        return self.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tensor

    def get_data_parallel_rank(self) -> int:
        return self.rank // self.size

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size() // self.size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data


def layers_under_tensor_parallelism(case: Case) -> None:
    """Outputs, losses, counts and gradients of both layers, where pairs of ranks hold the same tokens."""
    start_deepspeed()
    reset()
    upstream_groups.mpu = mpu = Mpu(2)
    gather = deepspeed.comm.all_gather_into_tensor
    deepspeed.comm.all_gather_into_tensor = lambda out, x, group: gather(out, x.reshape(-1), group=group)  # for gloo
    results = []
    for layer_class in LAYERS.values():
        for names in (upstream_groups._EXPERT_PARALLEL_GROUP, upstream_groups._EXPERT_DATA_PARALLEL_GROUP):
            names.clear()
        torch.manual_seed(7)
        layer = layer_class(D, EXPERTS[case.expert](), num_experts=4, **case.options)
        layer.set_deepspeed_parallelism()
        generator = torch.Generator().manual_seed(17 + dist.get_rank(layer_group(case)))
        with torch.no_grad():
            for parameter in layer.deepspeed_moe.experts.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        torch.manual_seed(31 + mpu.get_data_parallel_rank())
        results.append(run(layer, torch.randn(24, D)))
        replicas = groups.get_expert_data_parallel_group(groups.group_name(case.options["ep_size"]))
        for name, value in results[-1].items():
            if ".experts." in name:  # ranks with the same tokens share them out differently; the sum is what is used
                dist.all_reduce(value, group=replicas)
    theirs, ours = results
    assert torch.equal(ours["exp_counts"], theirs["exp_counts"])
    for name, value in theirs.items():
        if value.is_floating_point():
            assert_close(ours[name], value, tolerance=2e-5)
    deepspeed.comm.all_gather_into_tensor = gather
    reset()


def layer_group(case: Case) -> dist.ProcessGroup:
    return groups.get_expert_parallel_group(groups.group_name(case.options["ep_size"]))


def initialized_groups(tensor_parallel: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """What `groups.initialize` makes on this rank."""
    start_deepspeed()
    reset()
    mpu = Mpu(tensor_parallel) if tensor_parallel > 1 else None
    try:
        groups.initialize(mpu=mpu, **arguments)
        names = list(groups.get_expert_parallel_group_dict())
        return {
            name: (
                groups.get_expert_parallel_group_ranks(name),
                groups.get_expert_data_parallel_group_ranks(name),
                dist.get_process_group_ranks(groups.get_expert_parallel_group(name)),
                dist.get_process_group_ranks(groups.get_expert_data_parallel_group(name)),
                groups.get_expert_parallel_rank(name),
                groups.get_expert_data_parallel_world_size(name),
                dist.get_process_group_ranks(upstream_groups._get_expert_parallel_group(name)),
                upstream_groups._get_expert_parallel_world_size(name),
            )
            for name in names
        } | {"max": groups.get_max_expert_size(), "again": raises(lambda: groups.initialize())}
    finally:
        reset()


def raises(call: Any) -> str:
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def lazily_initialized(tensor_parallel: int) -> list[str]:
    """The groups of a layer of the documentation's kind after the engine's call, when nobody initialised any."""
    reset()
    if tensor_parallel > 1:
        upstream_groups.mpu = Mpu(tensor_parallel)
    layer = compat.MoE(D, EXPERTS["linear"](), 4)
    layer.set_deepspeed_parallelism()
    names = list(groups.get_expert_parallel_group_dict())
    reset()
    return names


def documented_layers(ep_size: int, num_ep_list: list[int]) -> list[tuple[int, int, str]]:
    """Layers whose sizes follow from `groups.initialize`: (ep_size, local experts, group name) by number of experts."""
    reset()
    groups.initialize(ep_size, num_ep_list=num_ep_list)
    layers = [compat.MoE(D, EXPERTS["linear"](), count, drop_tokens=False) for count in num_ep_list]
    for layer in layers:
        output, _, _ = layer(torch.randn(5 + dist.get_rank(), D))
        assert torch.isfinite(output).all()
    reset()
    return [(layer.ep_size, layer.num_local_experts, layer.expert_group_name) for layer in layers]


def refused(arguments: dict[str, Any]) -> str:
    """What `groups.initialize` says."""
    reset()
    found = raises(lambda: groups.initialize(**arguments))
    reset()
    return found
