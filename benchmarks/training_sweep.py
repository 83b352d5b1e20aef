"""The learning rates and the seeds behind the defaults of `moe-triton train`.

    python benchmarks/training_sweep.py rates   # every learning rate of the grid, both models: by validation loss
    python benchmarks/training_sweep.py seeds   # three seeds with the defaults: by held-out loss

Both write JSON under benchmarks/results/training/, run by run, and go on from there when they are started again.
Each run is a whole training with `TrainConfig`'s defaults, two at a time.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from moe_triton.backends.torch.processor import this_processor
from moe_triton.training.config import KINDS, TrainConfig
from moe_triton.training.data import load_corpus
from moe_triton.training.files import replace_file
from moe_triton.training.job import circumstances
from moe_triton.training.loop import evaluate, train_model

RESULTS = Path(__file__).parent / "results" / "training"
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
SEEDS = (0, 1, 2)


def run(kind: str, settings: dict[str, Any], part: str) -> dict[str, Any]:
    """One training and its loss on one part of the text: the held-out part is left alone while rates are chosen."""
    config = TrainConfig(**settings)
    torch.set_num_threads(config.threads)
    corpus = load_corpus(None, config.seq_len)
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as out:
        model = train_model(
            kind,
            config,
            corpus,
            Path(out),
            checkpoint_every=config.steps,
            on_step=lambda record: losses.append(record["train_loss"]),
        )
    total, active = model.parameter_counts()
    return {
        "model": kind,
        "seed": config.seed,
        "lr": config.peak_lr(kind),
        f"{part}_loss": evaluate(model, getattr(corpus, part), config),
        "train_loss_of_last_tenth": mean(losses[-max(1, len(losses) // 10) :]),
        "parameters": total,
        "active_parameters": active,
    }


def run_all(path: Path, jobs: list[tuple[str, dict[str, Any]]], part: str) -> dict[str, Any]:
    """Runs what `path` does not hold yet, two at a time, and writes it after each run."""
    config = TrainConfig()
    facts = {"processor": this_processor().name, **circumstances(config, load_corpus(None, config.seq_len))}
    for name in ("seed", "lr", "dense_lr"):  # each run has its own
        del facts["config"][name]
    results: dict[str, Any] = {**facts, "runs": []}
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
        settings = {**facts["config"], **results["config"]}  # one that is newer than the file was at its default
        if settings != facts["config"] or results["data"] != facts["data"]:
            raise SystemExit(f"{path} holds results of other settings or another text: move it away first")
    done = {(found["model"], found["seed"], found["lr"]) for found in results["runs"]}
    left = [
        (kind, settings)
        for kind, settings in jobs
        if (kind, (made := TrainConfig(**settings)).seed, made.peak_lr(kind)) not in done
    ]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        futures = [pool.submit(run, kind, settings, part) for kind, settings in left]
        for future in concurrent.futures.as_completed(futures):
            found = future.result()
            print(json.dumps(found), flush=True)
            results["runs"].append(found)
            results["runs"].sort(key=lambda r: (KINDS.index(r["model"]), r["seed"], r["lr"]))
            replace_file(path, [json.dumps(results, indent=2).encode() + b"\n"])
    return results


def rates() -> None:
    jobs = [(kind, {"lr": rate, "dense_lr": rate}) for rate in RATES for kind in KINDS]
    results = run_all(RESULTS / "learning_rates.json", jobs, "validation")
    for kind in KINDS:
        best = min((r for r in results["runs"] if r["model"] == kind), key=lambda r: r["validation_loss"])
        print(f"{kind}: best learning rate {best['lr']:g}, validation loss {best['validation_loss']:.4f}")


def seeds() -> None:
    jobs = [(kind, {"seed": seed}) for seed in SEEDS for kind in KINDS]
    results = run_all(RESULTS / "seeds.json", jobs, "held_out")
    losses = {kind: [r["held_out_loss"] for r in results["runs"] if r["model"] == kind] for kind in KINDS}
    for kind in KINDS:
        print(f"{kind}: held-out loss {mean(losses[kind]):.4f}, standard deviation {stdev(losses[kind]):.4f}")


if __name__ == "__main__":
    commands = {"rates": rates, "seeds": seeds}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=commands)
    commands[parser.parse_args().what]()
