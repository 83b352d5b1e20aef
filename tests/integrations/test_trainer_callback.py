"""The callback in a Trainer: every step is counted once, evaluation apart, read when the Trainer logs."""

from __future__ import annotations

import json

import torch
from transformers import Trainer, TrainingArguments

import moe_triton
from moe_triton.integrations.trainer import LoadCallback
from moe_triton.metrics import JsonlSink
from tests.helpers.families import VOCAB, tiny_model


def examples(count):
    """Sequences of 6 tokens, of which the last two are padding."""
    rows = [torch.randint(2, VOCAB, (6,)) for _ in range(count)]
    mask = torch.tensor([1, 1, 1, 1, 0, 0])
    return [{"input_ids": row, "attention_mask": mask, "labels": row.masked_fill(mask == 0, -100)} for row in rows]


def test_the_callback(tmp_path):
    model = tiny_model("qwen3_moe")
    moe_triton.swap(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        per_device_eval_batch_size=2, logging_steps=2, eval_strategy="steps", eval_steps=4, save_strategy="no",
        report_to=[], use_cpu=True, gradient_checkpointing=True, disable_tqdm=True,
    )  # fmt: skip
    callback = LoadCallback(JsonlSink(tmp_path / "load.jsonl"))
    trainer = Trainer(
        model=model, args=arguments, train_dataset=examples(20), eval_dataset=examples(3), callbacks=[callback]
    )
    trainer.train()
    per_step = 2 * 2 * 4 * 3  # batch, accumulation, tokens that are no padding, choices
    found = [
        (step, mode, {reading.assignments for reading in readings.values()})
        for step, mode, readings in callback.history
    ]
    assert found == [
        (2, "train", {2 * per_step}),
        (4, "train", {2 * per_step}),
        (4, "eval", {3 * 4 * 3}),
        (5, "eval", {3 * 4 * 3}),
        (5, "train", {per_step}),
    ]
    lines = [json.loads(line) for line in (tmp_path / "load.jsonl").read_text().splitlines()]
    assert [(line["step"], line["mode"]) for line in lines] == [(step, mode) for step, mode, _ in found]
    assert all(len(layer["loads"]) == 8 for layer in lines[0]["layers"].values())
    trainer.evaluate()  # also without training
    assert callback.history[-1][:2] == (5, "eval")
    callback.close()
    model(torch.randint(0, VOCAB, (1, 4)))
    assert callback.monitor is None
