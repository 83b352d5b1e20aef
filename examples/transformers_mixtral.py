"""A tiny random Mixtral on moe_triton: swap it, check it against its own eager path, train it, generate from it.

Runs on a CPU in seconds: python examples/transformers_mixtral.py
"""

from __future__ import annotations

import torch
from transformers import MixtralConfig, MixtralForCausalLM

import moe_triton


def main() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=None,
        experts_implementation="eager",
    )
    model = MixtralForCausalLM(config)
    tokens = torch.randint(0, config.vocab_size, (4, 32))

    with torch.no_grad():
        eager = model(tokens).logits
    print(moe_triton.swap(model))
    with torch.no_grad():
        ours = model(tokens).logits
    error = (ours - eager).square().mean().sqrt() / eager.square().mean().sqrt()
    print(f"relative RMS error of the logits against the eager path: {error:.1e}")

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(31):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step:2d}  loss {loss.item():.3f}")

    model.eval()
    generated = model.generate(tokens[:1, :8], max_new_tokens=8, do_sample=False)
    print("prompt   ", generated[0, :8].tolist())
    print("continued", generated[0, 8:].tolist())
    print("text was ", tokens[0, 8:16].tolist())


if __name__ == "__main__":
    main()
