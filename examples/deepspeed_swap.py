"""Change one import: one script inside DeepSpeed's engine, once with DeepSpeed's MoE layer and once with ours.

    torchrun --nproc_per_node 2 examples/deepspeed_swap.py

Two ranks share eight experts. The same seed makes the same weights, the same noise and the same random drops, so the
two loss curves are the same but for rounding. Takes about a minute on a CPU. Needs deepspeed.
"""

from __future__ import annotations

import argparse
import logging

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import logger
from torch import Tensor, nn

hidden_size, num_experts, num_tokens = 32, 8, 256
logger.setLevel(logging.ERROR)


class Block(nn.Module):
    """An MoE layer between two linear ones; `MoE` is whichever was imported."""

    def __init__(self, MoE: type[nn.Module]) -> None:
        super().__init__()
        expert = nn.Sequential(nn.Linear(hidden_size, 64), nn.GELU(), nn.Linear(64, hidden_size))
        self.first = nn.Linear(hidden_size, hidden_size)
        self.moe = MoE(hidden_size, expert, num_experts=num_experts, ep_size=dist.get_world_size(), k=2)
        self.last = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        y, l_aux, _ = self.moe(x)
        return self.last(x + y), l_aux


def train(MoE: type[nn.Module], name: str, steps: int) -> list[float]:
    """The mean loss over all ranks, step by step; rank 0 prints some of them."""
    torch.manual_seed(0)
    model = Block(MoE)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 10**6},  # elements: by default a buffer of 2 GB
        "steps_per_print": 10**6,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    data = torch.Generator().manual_seed(1 + dist.get_rank())
    target_map = torch.randn(hidden_size, hidden_size, generator=torch.Generator().manual_seed(0)) / hidden_size**0.5
    losses = []
    for step in range(steps):
        x = torch.randn(num_tokens, hidden_size, generator=data).to(engine.device)
        torch.manual_seed(step)
        output, l_aux = engine(x)
        loss = F.mse_loss(output, (x @ target_map.to(x)).abs()) + 0.01 * l_aux
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
        if dist.get_rank() == 0 and step % 20 == 0:
            print(f"{name}: step {step} of {steps}, loss {losses[-1]:.6f}", flush=True)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)

    from deepspeed.moe.layer import MoE

    theirs = train(MoE, "deepspeed", steps)

    from moe_triton.compat.deepspeed.layer import MoE

    ours = train(MoE, "moe_triton", steps)

    if dist.get_rank() == 0:
        print("step   deepspeed   moe_triton")
        for step in [*range(0, steps, 10), steps - 1]:
            print(f"{step:4d}   {theirs[step]:9.6f}   {ours[step]:10.6f}")
        worst = max(abs(a - b) / a for a, b in zip(theirs, ours, strict=True))
        print(f"largest relative difference over {steps} steps: {worst:.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
