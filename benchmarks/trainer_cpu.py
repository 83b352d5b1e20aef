"""transformers' Trainer on a small Qwen3-MoE, with the experts of each implementation: seconds a step on a CPU.

    python benchmarks/trainer_cpu.py [--hidden 256 --intermediate 256 --experts 8 --top-k 2 --threads 1 --rounds 9]

What a new user would try first. All implementations start from the same weights and see the same batches; their losses
must agree. They take turns over rounds, and what counts is the median of the rounds' ratios. Run it on a machine that
does nothing else. Needs transformers and accelerate.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainerCallback, TrainingArguments

from moe_triton.benchmarking.environment import caption, environment
from moe_triton.benchmarking.report import write_json
from moe_triton.benchmarking.timing import Times, ratios, spread
from moe_triton.integrations.transformers import register

RESULT = Path(__file__).parent / "results" / "cpu" / "trainer.json"
WAYS = ("moe_triton", "grouped_mm", "eager")
WARM_UP = 2  # steps that are not timed


class Steps(TrainerCallback):
    """Seconds of every step after the first ones, and its loss."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def train(way: str, options: argparse.Namespace, folder: str) -> Steps:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=1000, hidden_size=options.hidden, moe_intermediate_size=options.intermediate,
        num_hidden_layers=2, num_experts=options.experts, num_experts_per_tok=options.top_k,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, experts_implementation=way,
    )  # fmt: skip
    rows = torch.randint(0, 1000, (options.batch * (options.steps + WARM_UP), options.length))
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=options.batch, max_steps=options.steps + WARM_UP,
        learning_rate=1e-3, report_to=[], save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    steps = Steps()
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(Qwen3MoeForCausalLM(config), arguments, train_dataset=dataset, callbacks=[steps]).train()
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, number in (
        ("hidden", 256), ("intermediate", 256), ("experts", 8), ("top-k", 2), ("batch", 8), ("length", 128),
        ("steps", 6), ("rounds", 9), ("threads", 1),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=number, help=f"default {number}")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    register()
    times: dict[str, Times] = {way: [] for way in WAYS}
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for way in WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]:
                steps = train(way, options, folder)
                timed = sorted(steps.seconds[WARM_UP:])
                times[way].append(timed[len(timed) // 2])
                losses[way] = steps.losses
    for way in WAYS[1:]:
        torch.testing.assert_close(losses[way], losses["moe_triton"], rtol=1e-3, atol=0.0, msg=f"{way}: other losses")
    rows: dict[str, dict[str, Any]] = {}
    print("| experts | ms a step | times ours (20% to 80%) |\n|---|--:|--:|")
    for way in WAYS:
        seconds, over = spread(times[way]), ratios(times[way], times["moe_triton"])
        assert seconds is not None
        assert over is not None
        rows[way] = {"seconds": asdict(seconds), "times_ours": asdict(over)}
        print(f"| {way} | {1e3 * seconds.p50:.1f} | {over.p50:.2f} ({over.p20:.2f} to {over.p80:.2f}) |", flush=True)
    record = {
        "schema": "moe-triton-trainer/1",
        **environment(torch.device("cpu")),
        "settings": {name: value for name, value in vars(options).items() if name != "out"},
        "ways": rows,
        "losses": losses["moe_triton"],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, record)
    print(caption(record), options.out, sep="\n")


if __name__ == "__main__":
    main()
