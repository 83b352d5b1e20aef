"""The MoE layer in a training loop of one's own: a regression that a mixture of experts can split among its experts.

    python examples/train_tiny.py

Four linear maps, each for one region of the input: every expert can learn one of them. Takes a few seconds on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import moe_triton

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"

hidden_size, regions = 32, 4
centers = torch.randn(regions, hidden_size, device=device)
maps = torch.randn(regions, hidden_size, hidden_size, device=device) / hidden_size**0.5


def sample(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs around the centers, and their targets: the map of the center's region."""
    region = torch.randint(regions, (num_tokens,), device=device)
    x = centers[region] + 0.3 * torch.randn(num_tokens, hidden_size, device=device)
    return x, torch.einsum("td,tde->te", x, maps[region])


layer = moe_triton.MoE(
    hidden_size,
    intermediate_size=64,
    num_experts=8,
    top_k=2,
    capacity_factor=1.5,  # an expert takes at most 1.5 times its even share; the rest is dropped
    aux_loss_weight=0.01,  # keeps the load even
).to(device)
optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)

for step in range(1, 401):
    x, target = sample(512)
    out = layer(x)
    loss = F.mse_loss(out.output, target)
    optimizer.zero_grad()
    (loss + out.aux_loss).backward()
    optimizer.step()
    if step == 1 or step % 100 == 0:
        print(f"step {step:3d}  loss {loss.item():.4f}  tokens per expert {out.expert_counts.tolist()}")
