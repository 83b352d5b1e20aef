"""Router replay in the shape of a reinforcement-learning step: one copy of a model rolls out, another one trains.

The rollout runs in bf16 on transformers' eager path, as an inference engine would on kernels of its own; training runs
in fp32 on moe_triton. The two choose other experts for some tokens. With the rollout's choices replayed, the
probabilities of the sampled tokens agree better, and the ratio of policies is near 1 before the first update.

Runs on a CPU in seconds: python examples/router_replay.py
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_triton

VOCAB, PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 64, 16, 4, 12
STEPS, MICRO_BATCHES, CLIP = 5, 2, 0.2


def make_policy() -> nn.Module:
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=5,
        mlp_only_layers=[0],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=32,
        num_experts_per_tok=2,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        experts_implementation="eager",
    )
    model = Qwen3MoeForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def log_probabilities(model: nn.Module, tokens: Tensor) -> Tensor:
    """Tokens [B, S] -> the log-probability of each new token, [B, NEW_TOKENS]."""
    logits = model(tokens[:, :-1]).logits.float()[:, PROMPT_TOKENS - 1 :]
    return logits.log_softmax(-1).gather(-1, tokens[:, PROMPT_TOKENS:, None])[..., 0]


def reward(tokens: Tensor) -> Tensor:
    """[B, S] -> [B]: the share of new tokens in the lower half of the vocabulary."""
    return (tokens[:, PROMPT_TOKENS:] < VOCAB // 2).float().mean(1)


@torch.no_grad()
def roll_out(rollout: nn.Module, recorder: moe_triton.RoutingRecorder) -> tuple[Tensor, Tensor, Tensor]:
    """Sample answers: tokens [B, S], their log-probabilities [B, NEW_TOKENS], and the choices [B, S - 1, layers, K]."""
    prompts = torch.randint(2, VOCAB, (PROMPTS, PROMPT_TOKENS))
    with recorder.record():
        out = rollout.generate(
            prompts, max_new_tokens=NEW_TOKENS, do_sample=True, output_logits=True, return_dict_in_generate=True
        )
    logits = torch.stack(out.logits, 1).float()
    chosen = logits.log_softmax(-1).gather(-1, out.sequences[:, PROMPT_TOKENS:, None])[..., 0]
    return out.sequences, chosen, recorder.by_sequence(PROMPTS)


def policy_loss(new: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """The clipped loss of PPO (arXiv 1707.06347) over log-probabilities [B, NEW_TOKENS]."""
    ratio = (new - old).exp()
    return -torch.minimum(ratio * advantage[:, None], ratio.clamp(1 - CLIP, 1 + CLIP) * advantage[:, None]).mean()


def main() -> list[dict[str, float]]:
    torch.manual_seed(0)
    policy = make_policy()
    rollout = copy.deepcopy(policy).to(torch.bfloat16).eval()
    print(moe_triton.swap(policy))
    policy.model.gradient_checkpointing_enable()
    recorder, replayer = moe_triton.RoutingRecorder(rollout), moe_triton.RoutingRecorder(policy)
    monitor = moe_triton.LoadMonitor(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)

    history = []
    for step in range(STEPS):
        rollout.load_state_dict(policy.state_dict())
        tokens, old, choices = roll_out(rollout, recorder)
        rewards = reward(tokens)
        advantage = (rewards - rewards.mean()) / (rewards.std() + 1e-6)

        with torch.no_grad():  # what training without the replay would see
            without = (log_probabilities(policy.eval(), tokens) - old).exp()
        policy.train()
        losses, ratios = [], []
        for batch in torch.arange(PROMPTS).chunk(MICRO_BATCHES):
            with replayer.replay(choices[batch].flatten(0, 1)):
                new = log_probabilities(policy, tokens[batch])
            loss = policy_loss(new, old[batch], advantage[batch]) / MICRO_BATCHES
            loss.backward()  # checkpointed layers run again here, with the same choices
            losses.append(loss.item())
            ratios.append((new.detach() - old[batch]).exp())
        optimizer.step()
        optimizer.zero_grad()

        found = {
            "loss": sum(losses),
            "reward": rewards.mean().item(),
            "off_with_replay": (torch.cat(ratios) - 1).abs().mean().item(),
            "off_without": (without - 1).abs().mean().item(),
        }
        history.append(found)
        print(
            f"step {step}  loss {found['loss']:+.4f}  reward {found['reward']:.3f}  mean |ratio - 1|: "
            f"{found['off_with_replay']:.4f} with the replay, {found['off_without']:.4f} without"
        )
    for name, statistics in monitor.read(mode="train").items():
        print(f"{name}: {statistics}")
    return history


if __name__ == "__main__":
    main()
