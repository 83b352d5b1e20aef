"""LoRA on the experts of a tiny Qwen3-MoE with PEFT and Trainer: train, merge, save, reload, against eager experts.

The model is random, the text real: the source of this file, byte by byte. Runs on a CPU in seconds:
python examples/finetune_lora.py. Needs transformers, peft and accelerate.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Trainer, TrainingArguments

import moe_triton

STEPS = 5


def make_model() -> nn.Module:
    """The same adapted model every time; a pretrained one comes from `from_pretrained`."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=64,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=64,
        experts_implementation="eager",
    )
    model = AutoModelForCausalLM.from_config(config)
    adapters = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    return get_peft_model(model, adapters)


def train(model: nn.Module, tokens: Tensor, folder: str) -> list[float]:
    """The loss of every step."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=2e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def loss_of(model: nn.Module, tokens: Tensor) -> float:
    with torch.no_grad():
        return model.eval()(input_ids=tokens, labels=tokens).loss.item()


def main() -> None:
    text = torch.tensor(list(Path(__file__).read_bytes()))  # ASCII: the 128 tokens of the model
    tokens = text[: 4 * 64].view(4, 64)
    with tempfile.TemporaryDirectory() as folder:
        eager = make_model()
        eager_losses = train(eager, tokens, folder)

        model = make_model()
        print(moe_triton.swap(model))
        losses = train(model, tokens, folder)
        for step, (ours, theirs) in enumerate(zip(losses, eager_losses, strict=True), start=1):
            print(f"step {step}  loss {ours:.6f}  with eager experts {theirs:.6f}")
        final, eager_final = loss_of(model, tokens), loss_of(eager, tokens)
        print(f"trained    loss {final:.6f}  with eager experts {eager_final:.6f}")

        merged = model.merge_and_unload()
        print(f"merged     loss {loss_of(merged, tokens):.6f}")
        moe_triton.export_safetensors(Path(folder) / "merged" / "model.safetensors", merged)
        reloaded = AutoModelForCausalLM.from_pretrained(Path(folder) / "merged", experts_implementation="eager")
        print(f"reloaded   loss {loss_of(reloaded, tokens):.6f}  with eager experts")


if __name__ == "__main__":
    main()
