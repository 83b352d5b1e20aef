"""The main job: train the mixture of experts, train the dense model beside it if asked, write summary and report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from moe_triton.runtime import installed_version
from moe_triton.training.checkpoint import Checkpoint, read_checkpoint, restore
from moe_triton.training.config import KINDS, TrainConfig, check_machine, default_device
from moe_triton.training.data import Corpus, evaluation_windows, load_corpus
from moe_triton.training.display import Display
from moe_triton.training.errors import TrainingError
from moe_triton.training.files import locked_directory, read_metrics, reason, replace_file
from moe_triton.training.from_dense import check_upcycling, read_dense, sizes_from_dense, upcycle_into
from moe_triton.training.loop import evaluate, generate, run_files, train_model
from moe_triton.training.model import LanguageModel
from moe_triton.training.report import render_report
from moe_triton.training.workers import Workers, started_workers

PACKAGES = ("moe-triton", "torch", "triton", "safetensors")
SAMPLE_BYTES = 400


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run, in one of its processes.

    saved  the checkpoints that it continues, by kind of model
    dense  that of the dense model which the mixture of experts starts from, or None
    """

    out: Path
    config: TrainConfig
    corpus: Corpus
    saved: Mapping[str, Checkpoint]
    dense: Checkpoint | None
    compare_dense: bool
    checkpoint_every: int
    console: Console
    workers: Workers


def run_job(
    out: Path,
    options: Mapping[str, Any],
    *,
    resume: bool = False,
    compare_dense: bool = False,
    from_dense: Path | None = None,
    checkpoint_every: int = 10,
    ep: int = 1,
    ep_mode: str = "dropless",
    ep_chunks: int = 1,
    console: Console | None = None,
) -> dict[str, Any]:
    """Do what `moe-triton train` does: write everything under `out`, and return what summary.json holds.

    options: the fields of `TrainConfig` that are given; the rest are the defaults or, on resume, the saved run's.
    resume: continue from the checkpoints under `out`, whichever model was being trained; start anew if there are none.
    compare_dense: train the dense model with the same active parameters too, on the same bytes.
    from_dense: a run with `compare_dense`, whose dense model is made a mixture of experts to start from
        (`moe_triton.upcycle`). A run that is resumed has started already.
    ep, ep_mode, ep_chunks: under torchrun, over how many processes the experts are spread, and how rows travel (see
        `moe_triton.distributed.ExpertParallel`). They do not change the curve beyond rounding, and may be others on
        resume, as may the number of processes.

    Raises TrainingError, a ValueError: settings, data or files that do not work, in one line that names them. What was
    saved before stays as it was.
    """
    if checkpoint_every < 1:
        raise TrainingError(f"checkpoint_every: got {checkpoint_every}, wanted at least 1")
    device = str(options.get("device") or saved_device(out, resume) or default_device())
    with started_workers(ep, ep_mode, ep_chunks, device) as workers, contextlib.ExitStack() as lock:
        with workers.together():  # the first process holds the lock of the directory, before it looks into it
            is_new = not out.is_dir()
            if workers.is_first and not is_new:
                lock.enter_context(locked_directory(out))
        with workers.together():
            saved = saved_checkpoints(out, resume)
            dense = None if from_dense is None or saved else read_dense(from_dense)
            if dense is not None:
                options = sizes_from_dense(options, dense)
            config, corpus = prepared(workers, out, options, saved)
            if dense is not None:
                check_upcycling(config, dense)
        with workers.together():
            if workers.is_first and is_new:
                make_directory(out)
                lock.enter_context(locked_directory(out))
                if saved_checkpoints(out, resume):
                    raise TrainingError(f"--out: another process has just trained in {out}; name another directory")
        run = Run(
            out=out,
            config=config,
            corpus=corpus,
            saved=saved,
            dense=dense,
            compare_dense=compare_dense or "dense" in saved or any(c.compare_dense for c in saved.values()),
            checkpoint_every=checkpoint_every,
            console=(Console() if console is None else console) if workers.is_first else Console(quiet=True),
            workers=workers,
        )
        with cpu_threads(config.threads):
            return train_and_report(run)


def prepared(
    workers: Workers, out: Path, options: Mapping[str, Any], saved: Mapping[str, Checkpoint]
) -> tuple[TrainConfig, Corpus]:
    """Return the settings and the text. Raises TrainingError where they, the saved run and the workers do not fit."""
    config = settings(options, saved, out)
    if config.capacity_factor and config.num_groups % workers.world:
        raise TrainingError(
            f"capacity_groups: got {config.num_groups}, wanted a multiple of the {workers.world} processes"
        )
    parallel = workers.expert_parallel()
    if parallel is not None:
        try:
            parallel.experts_of(config.num_experts)
        except ValueError as error:
            raise TrainingError(str(error)) from error
    corpus = load_corpus(None if config.data is None else Path(config.data), config.seq_len)
    for checkpoint in saved.values():
        if checkpoint.digest != corpus.digest:
            raise TrainingError(f"--data: {corpus.source} is not the text that {checkpoint.path} was trained on")
    return config, corpus


def make_directory(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainingError(f"--out: cannot make {out}: {reason(error)}") from error


def train_and_report(run: Run) -> dict[str, Any]:
    """Train and measure every model, then write the summary and the report."""
    config, corpus, workers = run.config, run.corpus, run.workers
    size = sum(part.numel() for part in (corpus.train, corpus.validation, corpus.held_out))
    run.console.print(f"{corpus.source}: {corpus.num_files} files, {size:,} bytes", highlight=False, soft_wrap=True)
    results: dict[str, Any] = {}
    sample: dict[str, str] = {}
    for kind in KINDS if run.compare_dense else KINDS[:1]:
        model = train_kind(run, kind)
        results[kind] = measure(run, model)
        if kind == "moe":
            whole = whole_model(run, model)
            sample = write_sample(whole, config, corpus) if workers.is_first else {}
    spread = {"processes": workers.world, "ep": 1 if workers.groups is None else workers.groups.ep.size}
    summary = {**results, "sample": sample, **circumstances(config, corpus), **spread}
    if workers.is_first:
        history = {kind: read_metrics(run_files(run.out, kind).metrics) for kind in results}
        text = json.dumps(summary, indent=2, allow_nan=False)
        replace_file(run.out / "summary.json", [text.encode() + b"\n"])
        replace_file(run.out / "report.html", [render_report(summary, history).encode()])
    return summary


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads inside, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def saved_checkpoints(out: Path, resume: bool) -> dict[str, Checkpoint]:
    """Return the checkpoints to continue from, by kind of model. A run that would be overwritten is an error.

    Without `resume` that is any run which did a step; with it, one whose metrics are there without their checkpoint.
    """
    if out.exists() and not out.is_dir():
        raise TrainingError(f"--out: {out} is not a directory")
    saved = {}
    for kind in KINDS:
        files = run_files(out, kind)
        if (old := files.checkpoint.with_suffix(".safetensors")).exists():
            raise TrainingError(
                f"--out: {old} is of an earlier version, which this one cannot go on from; name another directory"
            )
        found, has_steps = read_checkpoint(files.checkpoint), has_contents(files.metrics)
        if has_steps and found is None:
            raise TrainingError(
                f"--out: {out} holds {files.metrics.name} but no {files.checkpoint.name} to go on from; "
                "put it back, or name another directory"
            )
        if found is not None:
            if not resume and (has_steps or found.step):
                raise TrainingError(f"--out: {out} already holds a run; go on with --resume, or name another directory")
            saved[kind] = found
    return saved if resume else {}


def saved_device(out: Path, resume: bool) -> str | None:
    """Return the device of the run to continue; None where there is none."""
    found = read_checkpoint(run_files(out, "moe").checkpoint) if resume else None
    return None if found is None else found.config.device


def has_contents(path: Path) -> bool:
    """Return whether writing the file would lose anything."""
    return path.exists() and (not path.is_file() or path.stat().st_size > 0)


def settings(options: Mapping[str, Any], saved: Mapping[str, Checkpoint], out: Path) -> TrainConfig:
    """Return the run's settings: the saved ones, which the options must not contradict, or options over defaults."""
    configs = [checkpoint.config for checkpoint in saved.values()]
    if len({dataclasses.replace(config, data=None) for config in configs}) > 1:
        raise TrainingError(f"--resume: the checkpoints in {out} are of different runs")
    before = configs[-1].as_dict() if configs else {}
    try:
        config = TrainConfig(**{**before, **options})
        check_machine(config)
    except (ValueError, TypeError) as error:
        raise TrainingError(str(error)) from error
    for name, value in before.items():
        given = getattr(config, name)
        if given != value and name != "data":  # the text itself is compared, not its path
            option = name.replace("_", "-")
            why = "; its learning rates are made for that many: a longer run is a new one, in another --out"
            raise TrainingError(
                f"--{option}: got {given}, but the run in {out} that --resume continues has {value}"
                + why * (name == "steps")
            )
    return config


def train_kind(run: Run, kind: str) -> LanguageModel:
    """Train one model, or what is left to train of it, with a display."""
    saved, steps = run.saved.get(kind), run.config.steps
    done = 0 if saved is None else saved.step
    if saved is not None:
        is_over = " (it is finished; for more steps, start a new run in another --out)" if done == steps else ""
        run.console.print(f"{kind}: going on after step {done} of {steps}{is_over}", highlight=False, soft_wrap=True)
    options: dict[str, Any] = {}
    if kind == "moe" and run.dense is not None:
        options["start"] = partial(upcycle_into, dense=run.dense)
        run.console.print(
            f"moe: starts from the dense model of {run.dense.path.parent} after step {run.dense.step}",
            highlight=False,
            soft_wrap=True,
        )
    with Display(run.console, kind, steps, done) as display:
        return train_model(
            kind,
            run.config,
            run.corpus,
            run.out,
            **options,
            resume_from=saved,
            compare_dense=run.compare_dense,
            checkpoint_every=run.checkpoint_every,
            on_step=display.update,
            workers=run.workers,
        )


def measure(run: Run, model: LanguageModel) -> dict[str, Any]:
    """Return a trained model's results: losses in nats per byte, sizes, and sums over its steps."""
    config, corpus = run.config, run.corpus
    total, active = model.parameter_counts()
    records = read_metrics(run_files(run.out, model.kind).metrics)
    result = {
        "held_out_loss": evaluate(model, corpus.held_out, config, run.workers),
        "validation_loss": evaluate(model, corpus.validation, config, run.workers),
        "train_loss": records[-1]["train_loss"],
        "parameters": total,
        "active_parameters": active,
        "lr": config.peak_lr(model.kind),
        "steps": config.steps,
        "tokens": config.steps * config.batch_size * config.seq_len,
        "seconds": sum(record["seconds"] for record in records),
    }
    if model.kind == "moe":
        result["dropped"] = sum(record["dropped"] for record in records) / len(records)
    return result


def whole_model(run: Run, model: LanguageModel) -> LanguageModel:
    """Return the trained model with all experts in this process, from its last checkpoint; every worker must call it.

    A text is written byte by byte: exchanges of single tokens would take most of the time.
    """
    if run.workers.groups is None:
        return model
    alone = LanguageModel(run.config, model.kind).to(run.config.device)
    restore(run_files(run.out, model.kind).checkpoint, alone)
    return alone


def write_sample(model: LanguageModel, config: TrainConfig, corpus: Corpus) -> dict[str, str]:
    """Return a prompt of the held-out text and the model's continuation; bytes that are not UTF-8 are U+FFFD."""
    middle = corpus.held_out.numel() // 2
    text = bytes(corpus.held_out[middle : middle + 4096].tolist())
    lines = text.splitlines(keepends=True)
    prompt = b"".join(lines[1:5])[-config.seq_len :] or text[: config.seq_len // 2]
    written = generate(model, prompt, SAMPLE_BYTES, config)
    return {"prompt": prompt.decode(errors="replace"), "text": written.decode(errors="replace")}


def circumstances(config: TrainConfig, corpus: Corpus) -> dict[str, Any]:
    """Return the settings, the text, the software and the machine."""
    device = torch.device(config.device)
    windows = evaluation_windows(corpus.held_out, config.seq_len)
    return {
        "config": config.as_dict(),
        "data": {
            "source": corpus.source,
            "files": corpus.num_files,
            "train_bytes": corpus.train.numel(),
            "validation_bytes": corpus.validation.numel(),
            "held_out_bytes": corpus.held_out.numel(),
            "held_out_bytes_measured": windows[:, 1:].numel(),
            "sha256": corpus.digest,
        },
        "versions": {"python": platform.python_version(), **{name: installed_version(name) for name in PACKAGES}},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "machine": f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }
