"""Checkpoints and metrics: whole or absent, verified when read, cut back on resume."""

from __future__ import annotations

import dataclasses
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe_triton import distributed
from moe_triton.training import files
from moe_triton.training.checkpoint import Checkpoint, read_checkpoint, restore, write_checkpoint
from moe_triton.training.config import TrainConfig
from moe_triton.training.errors import TrainingError
from moe_triton.training.files import MetricsFile, read_metrics, replace_file
from moe_triton.training.loop import make_optimizer, train_step
from moe_triton.training.model import LanguageModel

TINY = TrainConfig(
    steps=9, batch_size=2, seq_len=16, num_layers=1, hidden_size=8, num_heads=2, intermediate_size=8, num_experts=4
)


def trained(steps: int, seed: int = 0) -> tuple[LanguageModel, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = LanguageModel(TINY, "moe")
    optimizer = make_optimizer(model, TINY)
    for _ in range(steps):
        train_step(model, optimizer, torch.randint(0, 256, (2, 17)), 1e-2, 1.0)
    return model, optimizer


def save(path: Path, model: LanguageModel, optimizer: torch.optim.AdamW, step: int) -> Checkpoint:
    checkpoint = Checkpoint(path=path, step=step, config=TINY, digest="abc", compare_dense=True)
    write_checkpoint(checkpoint, model, optimizer)
    return checkpoint


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("steps", [0, 3])
def test_round_trip_goes_on_with_the_same_bits(tmp_path: Path, steps: int) -> None:
    model, optimizer = trained(steps)
    written = save(tmp_path / "c", model, optimizer, steps)
    drawn = torch.rand(3)
    assert read_checkpoint(tmp_path / "c") == written

    other, other_optimizer = trained(1, seed=5)
    restore(tmp_path / "c", other, other_optimizer)
    assert torch.equal(torch.rand(3), drawn)  # the generator goes on where it was
    for (name, mine), theirs in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    tokens = torch.randint(0, 256, (2, 17))
    for _ in range(2):  # the second loss depends on the moments too
        first = train_step(model, optimizer, tokens, 1e-2, 1.0)["train_loss"]
        assert train_step(other, other_optimizer, tokens, 1e-2, 1.0)["train_loss"] == first
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_forgotten_moments_would_show(tmp_path: Path) -> None:
    """The round trip above can fail: without AdamW's state the next step goes elsewhere."""
    model, optimizer = trained(3)
    save(tmp_path / "c", model, optimizer, 3)
    other, other_optimizer = trained(0)
    restore(tmp_path / "c", other)
    tokens = torch.randint(0, 256, (2, 17))
    train_step(model, optimizer, tokens, 1e-2, 1.0)
    train_step(other, other_optimizer, tokens, 1e-2, 1.0)
    assert not torch.equal(model.head.weight, other.head.weight)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "one byte", "missing", "manifest", "foreign"])
def test_a_damaged_checkpoint_is_named_and_kept(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "c"
    save(folder, *trained(1), 1)
    file = folder / "checkpoint.json" if damage == "manifest" else next(folder.glob("tensors-*/*"))
    data = file.read_bytes()
    if damage == "one byte":
        changed = bytearray(data)
        changed[-1000] ^= 1
        file.write_bytes(changed)
    elif damage == "missing":
        file.unlink()
    elif damage == "foreign":  # a checkpoint, but of something else
        distributed.save_checkpoint(folder, trained(0)[0], extra={"epoch": 1})
        file = folder / "checkpoint.json"
    else:
        file.write_bytes({"empty": b"", "garbage": os.urandom(5000)}.get(damage, data[:-30]))
    before = snapshot(folder)
    model, optimizer = trained(0)
    weights = [weight.clone() for weight in model.parameters()]
    with pytest.raises(TrainingError, match=str(file)):
        read_checkpoint(folder) and restore(folder, model, optimizer)
    assert snapshot(folder) == before
    assert all(torch.equal(mine, was) for mine, was in zip(model.parameters(), weights, strict=True))


def test_a_checkpoint_of_other_sizes_does_not_fit(tmp_path: Path) -> None:
    save(tmp_path / "c", *trained(1), 1)
    model = LanguageModel(dataclasses.replace(TINY, hidden_size=16), "moe")
    with pytest.raises(TrainingError, match=r"/c/checkpoint\.json has shape"):
        restore(tmp_path / "c", model, make_optimizer(model, TINY))


def test_nothing_counts_before_the_first_save_is_complete(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path / "c") is None
    (tmp_path / "c" / "tensors-000001").mkdir(parents=True)  # as a kill leaves it
    assert read_checkpoint(tmp_path / "c") is None


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Writing beyond 4000 bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    model, optimizer = trained(1)
    save(tmp_path / "c", model, optimizer, 1)
    before = snapshot(tmp_path)
    request.getfixturevalue("small_disk")
    with pytest.raises(TrainingError, match=r"save_checkpoint to .*/c, writing: .*File too large.*intact"):
        save(tmp_path / "c", model, optimizer, 2)
    assert snapshot(tmp_path) == before
    assert len(list((tmp_path / "c").glob("tensors-*"))) == 1


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_any_point_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    path = tmp_path / "file"
    replace_file(path, [b"old"])

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(files.os, failing, fail)
    expected = TrainingError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match=r"No space left on device" if isinstance(error, OSError) else None):
        replace_file(path, [b"new ", b"contents"])
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, 0) as metrics:
        for step in range(1, 6):
            metrics.write({"step": step, "train_loss": 1 / step})
            assert len(read_metrics(path)) == step  # flushed line by line
    with open(path, "ab") as file:
        file.write(b'{"step": 6, "trai')  # killed in the middle of a line
    with MetricsFile(path, 3) as metrics:
        metrics.write({"step": 4, "train_loss": 0.1})
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4]
    assert read_metrics(path)[-1]["train_loss"] == 0.1


@pytest.mark.parametrize("lines", [b"", b'{"step": 1}\n', b'{"step": 1}\n{"step": 2}', b'{"step": 1}\nnonsense\n'])
def test_missing_metrics_are_named_and_kept(tmp_path: Path, lines: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines)
    with pytest.raises(TrainingError, match=r"metrics\.jsonl: line \d is not step \d"):
        MetricsFile(path, 2)
    assert path.read_bytes() == lines


def write_lines(path: Path, count: int) -> None:
    with MetricsFile(path, 0) as metrics:
        for step in range(1, count + 1):
            metrics.write({"step": step, "words": "x" * 50})


def test_metrics_on_a_full_disk(tmp_path: Path, small_disk: None) -> None:
    write_lines(tmp_path / "metrics.jsonl", 20)
    with pytest.raises(TrainingError, match=r"cannot write .*metrics\.jsonl"):
        write_lines(tmp_path / "metrics.jsonl", 100)
