"""A complete training script with DeepSpeed's engine and our MoE layer: ZeRO 1, expert groups, a checkpoint, resuming.

    torchrun --nproc_per_node 2 examples/deepspeed_train.py --out deepspeed-run
    torchrun --nproc_per_node 2 examples/deepspeed_train.py --out deepspeed-run --steps 60   # goes on

The only line that differs from a script for DeepSpeed's own layer is the import of MoE. The task is a regression that
the experts can split among themselves. Takes seconds on a CPU; the first time DeepSpeed compiles, for two minutes.
Needs deepspeed.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import logger
from torch import Tensor, nn

from moe_triton.compat.deepspeed.layer import MoE  # before: from deepspeed.moe.layer import MoE
from moe_triton.compat.deepspeed.utils import split_params_into_different_moe_groups_for_optimizer

WIDTH, EXPERTS, TOKENS, REGIONS = 32, 8, 256, 8
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 1, "reduce_bucket_size": 10**6},  # elements: by default a buffer of 2 GB
    "steps_per_print": 10**6,  # this script prints by itself
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        expert = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
        self.first = nn.Linear(WIDTH, WIDTH)
        self.moe = MoE(WIDTH, expert, num_experts=EXPERTS, ep_size=dist.get_world_size(), k=2)
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.first(x)
        y, l_aux, counts = self.moe(x)
        return self.last(x + y), l_aux, counts


def sample(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """This rank's inputs around a few centers, and their targets: a linear map for each center."""
    world = torch.Generator().manual_seed(0)
    centers = torch.randn(REGIONS, WIDTH, generator=world)
    maps = torch.randn(REGIONS, WIDTH, WIDTH, generator=world) / WIDTH**0.5
    batch = torch.Generator().manual_seed(1000 * (rank + 1) + step)
    region = torch.randint(REGIONS, (TOKENS,), generator=batch)
    x = centers[region] + 0.3 * torch.randn(TOKENS, WIDTH, generator=batch)
    return x, torch.einsum("td,tde->te", x, maps[region])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("deepspeed-run"), help="where the engine saves its checkpoint")
    options = parser.parse_args()

    logger.setLevel(logging.ERROR)
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = Model()
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=CONFIG)

    start = 0
    if (options.out / "latest").exists():
        engine.load_checkpoint(str(options.out))
        start = engine.global_steps
        if rank == 0:
            print(f"goes on at step {start}")
    for step in range(start, options.steps):
        x, target = (part.to(engine.device) for part in sample(step, rank))
        output, l_aux, counts = engine(x)
        loss = F.mse_loss(output, target)
        engine.backward(loss + 0.01 * l_aux)
        engine.step()
        if rank == 0 and (step % 10 == 0 or step == options.steps - 1):
            print(f"step {step:3d}  loss {loss.item():.4f}  tokens per expert {counts.tolist()}", flush=True)
    engine.save_checkpoint(str(options.out))
    if rank == 0:
        print(f"checkpoint in {options.out}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
