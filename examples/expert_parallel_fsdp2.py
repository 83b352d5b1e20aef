"""Expert parallelism with FSDP2: the language model of train_language_model.py on several processes.

    torchrun --nproc_per_node 4 examples/expert_parallel_fsdp2.py --ep 2

The experts are spread over --ep ranks; FSDP2 shards the rest. The losses are those of one process on the same batches:
the example trains both and prints them side by side. Takes seconds on a CPU, over gloo; on GPUs over NCCL, which has
not been tried yet.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from train_language_model import LanguageModel, next_byte_loss, read_text, windows

from moe_triton.distributed import ExpertParallel, apply_fsdp2, clip_grad_norm_, make_groups

BATCH, LENGTH, LR = 16, 64, 3e-3  # of all ranks together


def train_alone(steps: int, device: torch.device) -> list[float]:
    """The loss of every step on one process, which the others need not repeat."""
    torch.manual_seed(0)
    text, _ = read_text()
    model = LanguageModel().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    losses = []
    for step in range(steps):
        window = windows(text, BATCH, LENGTH, step).to(device)
        logits, aux_loss, _ = model(window[:, :-1])
        loss = next_byte_loss(logits, window)
        optimizer.zero_grad()
        (loss + aux_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ep", type=int, default=2, help="ranks that share one set of experts")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    rank, world = dist.get_rank(), dist.get_world_size()
    if BATCH % world:
        raise SystemExit(f"got {world} processes, wanted a divisor of the {BATCH} windows of a batch")

    torch.manual_seed(0)  # the same weights as on one process, however the experts are spread
    groups = make_groups(ep=options.ep)
    model = LanguageModel(expert_parallel=ExpertParallel(groups)).to(device)
    apply_fsdp2(model, groups, blocks=model.blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)  # after apply_fsdp2, which replaces the parameters

    text, _ = read_text()
    alone = train_alone(options.steps, device) if rank == 0 else []
    if rank == 0:
        print(f"{world} processes, {options.ep} of them share one set of experts")
        print("step   one process   spread")
    for step in range(options.steps):
        window = windows(text, BATCH, LENGTH, step).chunk(world)[rank].to(device)  # this rank's share
        logits, aux_loss, _ = model(window[:, :-1])
        loss = next_byte_loss(logits, window)
        optimizer.zero_grad()
        (loss + aux_loss).backward()  # FSDP2 reduces the gradients here; reduce_gradients is not called
        clip_grad_norm_(model, 1.0)  # of moe_triton.distributed: the norm of the whole model
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0 and (step % 5 == 0 or step == options.steps - 1):
            print(f"{step:4d}   {alone[step]:11.6f}   {mean.item() / world:.6f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
