"""A small language model with MoE layers, in a training loop of your own: PyTorch and moe_triton, nothing else.

    python examples/train_language_model.py --steps 200

The text is the source of torch.nn.functional, byte by byte; its last tenth is held out. Takes about a minute on a CPU.
`moe-triton train` is the same with checkpoints, a report and a dense model beside it.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_triton import MoE
from moe_triton.distributed import ExpertParallel


class Block(nn.Module):
    """Causal attention, then an MoE layer in the place of the feed-forward block; a residual around each."""

    def __init__(self, width: int, expert_parallel: ExpertParallel | None = None) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.moe = MoE(
            width,
            intermediate_size=width,
            num_experts=8,
            top_k=2,
            aux_loss_weight=0.01,  # keeps the load even
            z_loss_weight=0.001,
            expert_parallel=expert_parallel,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)  # [q k v, B, H, S, d/H]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        out = self.moe(self.norms[1](x))
        return x + out.output, out.aux_loss, out.expert_counts


class LanguageModel(nn.Module):
    """Bytes [B, S] -> logits of the next byte [B, S, 256], the sum of the aux losses, tokens per expert by layer."""

    def __init__(self, width: int = 64, layers: int = 2, expert_parallel: ExpertParallel | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.positions = nn.Embedding(512, width)
        self.blocks = nn.ModuleList([Block(width, expert_parallel) for _ in range(layers)])
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        aux_loss, counts = x.new_zeros(()), []
        for block in self.blocks:
            x, aux, count = block(x)
            aux_loss = aux_loss + aux
            counts.append(count)
        return self.head(self.norm(x)), aux_loss, counts


def read_text() -> tuple[Tensor, Tensor]:
    """The bytes to train on, and those that are held out."""
    text = torch.tensor(list(Path(F.__file__).read_bytes()))
    return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


def windows(text: Tensor, count: int, length: int, step: int) -> Tensor:
    """`count` windows of length + 1 bytes, drawn anew in each step; the same on every machine."""
    starts = torch.randint(len(text) - length, (count,), generator=torch.Generator().manual_seed(step))
    return torch.stack([text[start : start + length + 1] for start in starts.tolist()])


def next_byte_loss(logits: Tensor, window: Tensor) -> Tensor:
    """The mean cross-entropy in nats per byte."""
    return F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=128, help="bytes of a window, at most 512")
    parser.add_argument("--lr", type=float, default=5e-3, help="peak learning rate")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    text, held_out = read_text()
    model = LanguageModel().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 20) * (0.55 + 0.45 * math.cos(math.pi * step / options.steps))
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(text):,} bytes of text, on {device}")

    for step in range(options.steps):
        window = windows(text, 16, options.length, step).to(device)
        logits, aux_loss, counts = model(window[:, :-1])
        loss = next_byte_loss(logits, window)
        optimizer.zero_grad()
        (loss + aux_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0 or step == options.steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}  tokens per expert {counts[0].tolist()}", flush=True)

    model.eval()
    window = windows(held_out, 32, options.length, step=0).to(device)
    with torch.no_grad():
        print(f"held-out loss {next_byte_loss(model(window[:, :-1])[0], window).item():.3f} nats per byte")


if __name__ == "__main__":
    main()
