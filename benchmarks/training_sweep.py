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

from moe_triton import load_statistics
from moe_triton.backends.torch.processor import this_processor
from moe_triton.training.config import KINDS, TrainConfig
from moe_triton.training.data import load_corpus
from moe_triton.training.files import replace_file
from moe_triton.training.job import circumstances
from moe_triton.training.loop import evaluate, train_model

RESULTS = Path(__file__).parent / "results" / "training"
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
SEEDS = (0, 1, 2)
OF_A_RUN = ("model", "seed", "lr", "router", "dtype", "fp8", "backend")  # what tells the runs of a file apart
# older results are of the defaults
LATER = {name: getattr(TrainConfig, name) for name in ("router", "dtype", "fp8", "backend")}


def run(kind: str, settings: dict[str, Any], part: str, points: int = 0) -> dict[str, Any]:
    """One training and its loss on one part of the text: the held-out part is left alone while rates are chosen.

    points: into how many parts of the steps the curve of the training loss is cut, each with its mean; 0: no curve.
    """
    config = TrainConfig(**settings)
    torch.set_num_threads(config.threads)
    corpus = load_corpus(None, config.seq_len)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as out:
        model = train_model(
            kind,
            config,
            corpus,
            Path(out),
            checkpoint_every=config.steps,
            on_step=records.append,
        )
    total, active = model.parameter_counts()
    last = records[-max(1, len(records) // 10) :]
    found = {
        "model": kind,
        "seed": config.seed,
        "lr": config.peak_lr(kind),
        **{name: getattr(config, name) for name in LATER},
        f"{part}_loss": evaluate(model, getattr(corpus, part), config),
        "train_loss_of_last_tenth": mean(record["train_loss"] for record in last),
        "parameters": total,
        "active_parameters": active,
    }
    if points:
        losses = torch.tensor([record["train_loss"] for record in records])
        found["curve"] = [round(piece.mean().item(), 4) for piece in losses.tensor_split(points)]
    return found if kind == "dense" else {**found, **load_of(last, config)}


def load_of(records: list[dict[str, Any]], config: TrainConfig) -> dict[str, float]:
    """Means over steps and layers: the load's entropy (1 when even), the share that the capacity dropped, and the
    experts that worked on a token."""
    layers = [torch.tensor(load) for record in records for load in record["expert_load"]]
    kept = [(1 - record["dropped"]) * sum(map(sum, record["expert_load"])) for record in records]
    return {
        "load_entropy": mean(load_statistics(load).entropy for load in layers),
        "dropped": mean(record["dropped"] for record in records),
        "experts_per_token": mean(kept) / (config.num_layers * config.batch_size * config.seq_len),
    }


def identity(found: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a run apart."""
    return tuple({**LATER, **found}[name] for name in OF_A_RUN)


def run_all(
    path: Path, jobs: list[tuple[str, dict[str, Any]]], part: str, *, workers: int = 2, points: int = 0, **common: Any
) -> dict[str, Any]:
    """Runs what `path` does not hold yet, some at a time, and writes it after each run; all runs have `common`.

    points: of the curve of the training loss (`run`).
    """
    config = TrainConfig(**common)
    jobs = [(kind, {**common, **settings}) for kind, settings in jobs]
    facts = {"processor": this_processor().name, **circumstances(config, load_corpus(None, config.seq_len))}
    for name in ("seed", "lr", "dense_lr", *LATER):  # each run has its own
        del facts["config"][name]
    results: dict[str, Any] = {**facts, "runs": []}
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
        settings = {**facts["config"], **results["config"]}  # one that is newer than the file was at its default
        for name in LATER:
            settings.pop(name, None)
        if settings != facts["config"] or results["data"] != facts["data"]:
            raise SystemExit(f"{path} holds results of other settings or another text: move it away first")
    done = {identity(found) for found in results["runs"]}

    def planned(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
        made = TrainConfig(**settings)
        return {**made.as_dict(), "model": kind, "lr": made.peak_lr(kind)}

    left = [(kind, settings) for kind, settings in jobs if identity(planned(kind, settings)) not in done]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(run, kind, settings, part, points) for kind, settings in left]
        for future in concurrent.futures.as_completed(futures):
            found = future.result()
            print(json.dumps(found), flush=True)
            results["runs"].append(found)
            results["runs"].sort(key=lambda r: (KINDS.index(r["model"]), *identity(r)[1:]))
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
