"""transformers' Trainer: the losses of our experts are those of its own, with and without PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

import moe_triton
from tests.helpers.families import VOCAB, only_ours, tiny_model

STEPS = 3
TRAINED = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")


def sequences() -> list[dict[str, torch.Tensor]]:
    """As many as one batch has, so that every step sees them all."""
    rows = torch.randint(0, VOCAB, (2, 8), generator=torch.Generator().manual_seed(7))
    return [{"input_ids": row, "labels": row} for row in rows]


def model_of(family: str, with_peft: bool) -> Any:
    model = tiny_model(family)
    if not with_peft:
        return model
    torch.manual_seed(2)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "o_proj"], target_parameters=names))


def losses(model: nn.Module, folder: Path, **options: Any) -> list[float]:
    """The loss of every step."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=sequences())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def both(family: str, with_peft: bool, folder: Path, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of ours, and those of the eager experts."""
    eager = model_of(family, with_peft)
    expected = losses(eager, folder, **options)
    ours = model_of(family, with_peft)
    report = moe_triton.swap(ours)
    assert report.swapped
    assert not report.skipped
    with only_ours(ours):
        actual = losses(ours, folder, **options)
    assert len(expected) == STEPS
    assert expected[-1] < expected[0]  # something was learnt, and the steps were taken
    return torch.tensor(actual), torch.tensor(expected)


@pytest.mark.parametrize(
    ("family", "with_peft"),
    [*((family, False) for family in TRAINED), ("gpt_oss", True)],
)
def test_losses_equal_eagers(family, with_peft, tmp_path):
    actual, expected = both(family, with_peft, tmp_path)
    assert (actual / expected - 1).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("family", "with_peft", "use_reentrant"),
    [("qwen3_moe", True, False), ("qwen3_moe", True, True), ("gpt_oss", False, True)],
    ids=["peft", "peft-reentrant", "full-reentrant"],
)
def test_gradient_checkpointing(family, with_peft, use_reentrant, tmp_path):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    actual, expected = both(family, with_peft, tmp_path, **options)
    assert (actual / expected - 1).abs().max() <= 1e-6


def test_bf16_autocast(tmp_path):
    """Against float32: ours err no more than twice as much as eager, whose experts are rounded to bf16 likewise."""
    actual, expected = both("qwen3_moe", True, tmp_path, bf16=True)
    exact = torch.tensor(losses(model_of("qwen3_moe", True), tmp_path))
    eager, ours = ((values / exact - 1).abs().max().item() for values in (expected, actual))
    assert eager > 0
    assert ours <= max(2 * eager, 5e-3)
