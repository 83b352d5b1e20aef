"""Training one model: the steps, their metrics, their checkpoints; then its held-out loss and a sample of its text."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_triton.layers import Experts, update_choice_biases
from moe_triton.training.checkpoint import Checkpoint, restore, write_checkpoint
from moe_triton.training.config import TrainConfig
from moe_triton.training.data import Corpus, batch, evaluation_windows
from moe_triton.training.errors import TrainingError
from moe_triton.training.files import MetricsFile
from moe_triton.training.model import LanguageModel
from moe_triton.training.workers import ALONE, Workers

WARM_UP = 0.1  # share of the steps
FINAL_LR = 0.1  # share of the peak learning rate


class RunFiles(NamedTuple):
    """Where one model of a run keeps its state; `checkpoint` is a folder."""

    checkpoint: Path
    metrics: Path


def run_files(out: Path, kind: str) -> RunFiles:
    """Return the files of the "moe" or the "dense" model under `out`."""
    prefix = "" if kind == "moe" else f"{kind}_"
    return RunFiles(out / f"{prefix}checkpoint", out / f"{prefix}metrics.jsonl")


def learning_rate(config: TrainConfig, kind: str, step: int) -> float:
    """Return the rate: linear warm-up over a tenth of the steps, then a half cosine down to a tenth of the peak."""
    warm_up = max(1, round(WARM_UP * config.steps))
    if step <= warm_up:
        return config.peak_lr(kind) * step / warm_up
    progress = (step - warm_up) / (config.steps - warm_up)
    return config.peak_lr(kind) * (FINAL_LR + (1 - FINAL_LR) * (1 + math.cos(math.pi * progress)) / 2)


def make_optimizer(model: LanguageModel, config: TrainConfig) -> torch.optim.AdamW:
    """Make AdamW with weight decay on matrices and none on norms."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def train_model(
    kind: str,
    config: TrainConfig,
    corpus: Corpus,
    out: Path,
    *,
    start: Callable[[LanguageModel], None] = lambda model: None,
    resume_from: Checkpoint | None = None,
    compare_dense: bool = False,
    checkpoint_every: int = 10,
    on_step: Callable[[dict[str, Any]], None] = lambda record: None,
    workers: Workers = ALONE,
) -> LanguageModel:
    """Train the "moe" or "dense" model to `config.steps` and returns it.

    Writes one line of metrics per step and a checkpoint every `checkpoint_every` steps (and at the start and the end)
    under `out`; `start` gives a new model its first weights, and `resume_from` continues, with the same bits as a run
    that was never interrupted. `on_step` sees every record. Of several `workers` each computes its share of every
    batch, and the first one writes. Raises TrainingError: files that cannot be written or do not fit, a loss that is
    not finite.
    """
    device = torch.device(config.device)
    torch.manual_seed(config.seed)
    model = LanguageModel(config, kind, workers).to(device)
    optimizer = make_optimizer(model, config)
    files = run_files(out, kind)
    done = 0
    if resume_from is None:
        start(model)
    else:
        restore(resume_from.path, model, optimizer)
        done = resume_from.step

    def save(step: int) -> None:
        if metrics is not None:
            metrics.sync()
        checkpoint = Checkpoint(
            path=files.checkpoint, step=step, config=config, digest=corpus.digest, compare_dense=compare_dense
        )
        write_checkpoint(checkpoint, model, optimizer)

    fault = partial(record_fault, config=config, kind=kind)
    with MetricsFile(files.metrics, done, fault) if workers.is_first else contextlib.nullcontext() as metrics:
        if resume_from is None:
            save(0)  # a directory that cannot hold a checkpoint shows at once
        for step in range(done + 1, config.steps + 1):
            tokens = batch(corpus.train, config.seed, step, config.batch_size, config.seq_len)
            lr = learning_rate(config, kind, step)
            record = train_step(model, optimizer, tokens.to(device), lr, config.grad_clip, workers)
            record = {"step": step, **record}
            if not math.isfinite(record["train_loss"] + record["grad_norm"]):
                raise TrainingError(
                    f"the {kind} model's loss or gradient is not finite at step {step}: a lower "
                    f"{'--lr' if kind == 'moe' else '--dense-lr'} than {config.peak_lr(kind):g} may help"
                )
            if metrics is not None:
                metrics.write(record)
                on_step(record)
            if step % checkpoint_every == 0 or step == config.steps:
                save(step)
    return model


def train_step(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    tokens: Tensor,
    lr: float,
    grad_clip: float,
    workers: Workers = ALONE,
) -> dict[str, Any]:
    """Do one step on tokens [B, S + 1], of which every worker computes its share; return metrics as plain numbers.

    train_loss    mean cross-entropy in nats per byte, without the auxiliary loss
    aux_loss      the weighted load-balance and z losses, mean over layers
    dropped       share of the assignments that the capacity dropped
    max_load      the busiest expert's load as a multiple of the mean, over all layers
    expert_load   assignments wanted per layer and expert, [L][E]
    """
    start = time.perf_counter()
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = lr
    num_tokens = tokens[:, 1:].numel()
    mine = workers.share(tokens)
    with kept_assignments(model) as kept:
        out = model(mine[:, :-1])
    # shares that sum to the mean over the whole batch, so that the gradients of all workers do too
    loss = F.cross_entropy(out.logits.flatten(0, 1), mine[:, 1:].flatten(), reduction="sum") / num_tokens
    optimizer.zero_grad()
    (loss + out.aux_loss).backward()
    grad_norm = clip(model, grad_clip, workers)
    optimizer.step()
    update_choice_biases(model)
    sums = workers.sum(torch.stack([loss.detach(), out.aux_loss.detach()]).double())
    train_loss, aux_loss = sums.tolist()
    record: dict[str, Any] = {"train_loss": train_loss, "lr": lr, "grad_norm": grad_norm.item(), "aux_loss": aux_loss}
    if model.kind == "moe":
        load_LE = workers.sum(out.expert_counts.double())
        num_kept = workers.sum(torch.stack(kept).double().sum())
        record["dropped"] = ((load_LE.sum() - num_kept) / load_LE.sum().clamp_min(1)).item()
        record["max_load"] = (load_LE.amax(1) / load_LE.mean(1).clamp_min(1e-9)).max().item()
        record["expert_load"] = load_LE.long().tolist()
    record["seconds"] = time.perf_counter() - start
    record["tokens_per_s"] = num_tokens / record["seconds"]
    return record


NUMBERS = ("train_loss", "lr", "grad_norm", "aux_loss", "seconds", "tokens_per_s")  # of every record
MOE_NUMBERS = ("dropped", "max_load")


def record_fault(record: dict[str, Any], *, config: TrainConfig, kind: str) -> str | None:
    """Return what a record of `train_step` lacks, for a model of this kind; None where it is complete."""
    for name in NUMBERS if kind == "dense" else NUMBERS + MOE_NUMBERS:
        value = record.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"{name}: got {value!r}, wanted a number"
    if kind == "dense":
        return None
    load: Any = record.get("expert_load")
    shape = (config.num_layers, config.num_experts)
    is_table = isinstance(load, list) and all(isinstance(row, list) and len(row) == shape[1] for row in load)
    if not is_table or len(load) != shape[0] or not all(type(count) is int for row in load for count in row):
        return f"expert_load: wanted {shape[0]} lists of {shape[1]} counts"
    return None


def clip(model: LanguageModel, grad_clip: float, workers: Workers) -> Tensor:
    """Clip the gradients of the whole batch; return their norm."""
    if workers.groups is None:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    from moe_triton.distributed import clip_grad_norm_, reduce_gradients  # DTensor takes seconds to import

    reduce_gradients(model, workers.groups, rule="sum")
    return clip_grad_norm_(model, grad_clip, workers.groups)


@contextlib.contextmanager
def kept_assignments(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the number of assignments that survived the capacity, a scalar for every layer that runs."""
    found: list[Tensor] = []

    def note(_module: nn.Module, inputs: tuple[Any, ...], _out: Tensor) -> None:
        found.append(inputs[2].offsets[-1])

    hooks = [layer.register_forward_hook(note) for layer in model.modules() if isinstance(layer, Experts)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def evaluate(model: LanguageModel, text: Tensor, config: TrainConfig, workers: Workers = ALONE) -> float:
    """Return the mean cross-entropy in nats per byte over fixed windows of `text` [N] uint8; nothing is dropped."""
    model.eval()
    windows = evaluation_windows(text, config.seq_len)
    total = torch.zeros((), dtype=torch.float64, device=config.device)
    for batch_of_windows in windows.split(config.batch_size):
        tokens = workers.share(batch_of_windows).to(config.device)
        logits = model(tokens[:, :-1]).logits
        total += F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
    return workers.sum(total).item() / windows[:, 1:].numel()


@torch.no_grad()
def generate(model: LanguageModel, prompt: bytes, length: int, config: TrainConfig, temperature: float = 0.8) -> bytes:
    """Return `length` bytes that the model writes after `prompt`, sampled at `temperature` with the run's seed."""
    model.eval()
    generator = torch.Generator().manual_seed(config.seed)
    text = list(prompt)
    for _ in range(length):
        window = torch.tensor([text[-config.seq_len :]], device=config.device)
        probabilities = (model(window).logits[0, -1].float() / temperature).softmax(-1)
        text.append(int(torch.multinomial(probabilities.cpu(), 1, generator=generator)))
    return bytes(text[len(prompt) :])
