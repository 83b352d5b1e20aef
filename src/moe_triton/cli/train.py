"""`moe-triton train`: the main job."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from moe_triton.cli.arguments import EXIT_FAULT, EXIT_INTERRUPTED, EXIT_USAGE, fail
from moe_triton.distributed import ExpertParallelError
from moe_triton.training import TrainConfig, TrainingError, run_job
from moe_triton.training.config import KINDS
from moe_triton.training.routers import ROUTERS

DEFAULTS = TrainConfig()


def setting(name: str, text: str) -> Any:
    """The option of a `TrainConfig` field; unset, it takes the saved run's value on resume and else the default."""
    default = getattr(DEFAULTS, name)
    words = "a GPU where there is one" if name == "device" else default
    return typer.Option(f"--{name.replace('_', '-')}", help=f"{text} (default: {words})", show_default=False)


def train(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Directory of the run: metrics, checkpoints, summary.json, report.html.")],
    data: Annotated[
        Path | None,
        typer.Option(help="A text file, or a directory of them (default: the Python standard library's source)."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint; start if there is none.")
    ] = False,
    compare_dense: Annotated[
        bool, typer.Option("--compare-dense", help="Train the dense model with the same active parameters too.")
    ] = False,
    from_dense: Annotated[
        Path | None,
        typer.Option(help="Start as copies of the dense model of this run, one with --compare-dense, and its sizes."),
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 10,
    steps: Annotated[int | None, setting("steps", "Optimizer steps.")] = None,
    seed: Annotated[int | None, setting("seed", "Of the weights and the batches.")] = None,
    lr: Annotated[float | None, setting("lr", "Peak learning rate of the mixture of experts.")] = None,
    dense_lr: Annotated[float | None, setting("dense_lr", "Peak learning rate of the dense model.")] = None,
    batch_size: Annotated[int | None, setting("batch_size", "Sequences per step.")] = None,
    seq_len: Annotated[int | None, setting("seq_len", "Bytes per sequence.")] = None,
    num_layers: Annotated[int | None, setting("num_layers", "Transformer blocks.")] = None,
    hidden_size: Annotated[int | None, setting("hidden_size", "Width of the model.")] = None,
    num_heads: Annotated[int | None, setting("num_heads", "Attention heads.")] = None,
    intermediate_size: Annotated[int | None, setting("intermediate_size", "Width of one expert.")] = None,
    num_experts: Annotated[int | None, setting("num_experts", "Experts per block.")] = None,
    top_k: Annotated[int | None, setting("top_k", "Experts per token.")] = None,
    router: Annotated[str | None, setting("router", f"{', '.join(ROUTERS)}.")] = None,
    capacity_factor: Annotated[
        float | None, setting("capacity_factor", "An expert's limit, in even shares; 0: none.")
    ] = None,
    capacity_groups: Annotated[
        int | None, setting("capacity_groups", "Parts of a batch with a capacity each; a multiple of the processes.")
    ] = None,
    ep: Annotated[int, typer.Option(help="Under torchrun: over how many processes the experts are spread.")] = 1,
    ep_mode: Annotated[
        str, typer.Option(help="How rows travel to them: dropless, capacity, bounded or allgather.")
    ] = "dropless",
    ep_chunks: Annotated[int, typer.Option(help="Pieces in which they travel while others are computed.")] = 1,
    aux_loss_weight: Annotated[float | None, setting("aux_loss_weight", "Of the load-balance loss.")] = None,
    z_loss_weight: Annotated[float | None, setting("z_loss_weight", "Of the router's z loss.")] = None,
    weight_decay: Annotated[float | None, setting("weight_decay", "Of AdamW, on matrices.")] = None,
    grad_clip: Annotated[float | None, setting("grad_clip", "Largest gradient norm.")] = None,
    dtype: Annotated[
        str | None, setting("dtype", "float32; float64 to compare runs to the last digits; bfloat16: products in bf16.")
    ] = None,
    fp8: Annotated[bool | None, setting("fp8", "Compute the experts' products in fp8; CPUs emulate it.")] = None,
    backend: Annotated[str | None, setting("backend", "auto, triton, torch or reference.")] = None,
    device: Annotated[str | None, setting("device", "cpu, cuda, cuda:1, ...")] = None,
    threads: Annotated[int | None, setting("threads", "CPU threads; more help larger models.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json at the end, and nothing else.")] = False,
) -> None:
    """Train a small mixture-of-experts language model on the bytes of a text, and write a report.

    Exit code: 0; 1 when another process fails; 2 for bad arguments; 130 when interrupted (--resume goes on).
    """
    options = {field.name: ctx.params[field.name] for field in fields(TrainConfig)}
    options["data"] = None if data is None else str(data.absolute())
    try:
        summary = run_job(
            out,
            {name: value for name, value in options.items() if value is not None},
            resume=resume,
            compare_dense=compare_dense,
            from_dense=from_dense,
            checkpoint_every=checkpoint_every,
            ep=ep,
            ep_mode=ep_mode,
            ep_chunks=ep_chunks,
            console=Console(stderr=as_json),
        )
    except TrainingError as error:
        fail("train", str(error), EXIT_USAGE)
    except ExpertParallelError as error:
        fail("train", f"{error}; the last checkpoint is intact", EXIT_FAULT)
    except KeyboardInterrupt:
        fail("train", f"interrupted; go on with: moe-triton train --out {out} --resume", EXIT_INTERRUPTED)
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        typer.echo(json.dumps(summary, indent=1))
        return
    typer.echo(f"report: {out / 'report.html'}")
    typer.echo(f"held-out loss: {', '.join(held_out(summary))}")


def held_out(summary: dict[str, Any]) -> list[str]:
    """The held-out losses in words, in nats per byte."""
    return [f"{kind} {summary[kind]['held_out_loss']:.4f}" for kind in KINDS if kind in summary]
