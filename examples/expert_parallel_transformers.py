"""Train a Qwen3-MoE of transformers with its experts over ranks, and save it as transformers loads it.

The same steps also run in one process: the losses are the same. Runs on a CPU in seconds:

torchrun --nproc_per_node 4 examples/expert_parallel_transformers.py
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_triton
from moe_triton.distributed import ExpertParallel, clip_grad_norm_, make_groups, reduce_gradients

CONFIG = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


def batches(steps: int, sequences: int, positions: int) -> list[torch.Tensor]:
    """Random bytes that repeat, so that there is something to learn; the same on every rank."""
    draw = torch.Generator().manual_seed(1)
    pattern = torch.randint(0, CONFIG["vocab_size"], (positions,), generator=draw)
    shifts = torch.randint(0, positions, (steps, sequences), generator=draw).tolist()
    return [torch.stack([pattern.roll(shift) for shift in row]) for row in shifts]


def train(model: torch.nn.Module, data: list[torch.Tensor], rank: int = 0, ranks: int = 1) -> list[float]:
    """Return the loss of every step over all ranks, each of which has its own part of every batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for batch in data:
        ids = batch.chunk(ranks)[rank]
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        total = loss.detach().clone()
        if ranks > 1:
            reduce_gradients(model)
            clip_grad_norm_(model, 1.0)
            dist.all_reduce(total)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(total.item() / ranks)
    return losses


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sequences", type=int, default=8, help="of a batch over all ranks")
    parser.add_argument("--backend", default="gloo", help="of torch.distributed")
    chosen = parser.parse_args(arguments)
    dist.init_process_group(chosen.backend)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = f"cuda:{rank % torch.cuda.device_count()}" if chosen.backend == "nccl" else "cpu"
    groups = make_groups(ep=ranks)
    data = [batch.to(device) for batch in batches(chosen.steps, chosen.sequences, positions=32)]

    shared = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(shared)
    folder = Path(str(shared[0]))
    torch.manual_seed(0)
    whole = Qwen3MoeForCausalLM(Qwen3MoeConfig(**CONFIG))
    if rank == 0:  # a checkpoint as from the hub
        whole.save_pretrained(folder / "start")
    dist.barrier()

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "start"))
    report = moe_triton.swap(model, expert_parallel=ExpertParallel(groups))
    moe_triton.load_pretrained(model, folder / "start", device=device)
    losses = train(model.train(), data, rank, ranks)
    files = moe_triton.export_safetensors(folder / "trained" / "model.safetensors", model)

    moe_triton.swap(whole.to(device))
    alone = train(whole.train(), data)  # every process by itself
    if rank == 0:
        print(report)
        for step, (spread, single) in enumerate(zip(losses, alone, strict=True)):
            print(f"step {step:3}  loss over {ranks} ranks {spread:.6f}, in one process {single:.6f}")
        again = AutoModelForCausalLM.from_pretrained(folder / "trained")
        difference = max(
            (a - b.cpu()).abs().max().item()
            for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True)
        )
        print(f"{files[0]}: loaded by AutoModelForCausalLM, at most {difference:.1e} from the one process's weights")
        assert max(abs(a - b) for a, b in zip(losses, alone, strict=True)) < 1e-3
        shutil.rmtree(folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
