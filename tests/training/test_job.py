"""`moe-triton train` from the outside: files, kill and resume, bad input."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moe_triton import cli
from moe_triton.cli import app
from moe_triton.training import TrainingError, files, job, loop, run_job
from moe_triton.training.files import read_metrics
from tests.helpers.commands import run_command
from tests.helpers.ranks import fork_context

SIZES = {"batch_size": 2, "seq_len": 32, "num_layers": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 8,
         "num_experts": 4}  # fmt: skip


def flags(**options: object) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module", autouse=True)
def short_samples() -> Iterator[None]:
    """Most of a tiny run's time would be spent on its sample of text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "SAMPLE_BYTES", 8)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("".join(f"line {i}: the {i % 7}th of {i % 13} things <b>\n" for i in range(400)))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A finished run of 12 steps with the dense model beside it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    run_job(out, {**SIZES, "steps": 12, "data": str(text)}, compare_dense=True)
    return out


@pytest.fixture(scope="module")
def thirty(tmp_path_factory: pytest.TempPathFactory, text: Path) -> list[tuple[int, float]]:
    """The losses of 30 steps that nothing interrupted."""
    out = tmp_path_factory.mktemp("thirty") / "run"
    run_job(out, {**SIZES, "steps": 30, "data": str(text)})
    return losses(out / "metrics.jsonl")


def losses(path: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["train_loss"]) for record in read_metrics(path)]


def command(out: Path, *words: str) -> Any:
    return CliRunner().invoke(app, ["train", "--out", str(out), *words])


def test_files_of_a_run(finished: Path, text: Path) -> None:
    names = {"checkpoint", "metrics.jsonl", "dense_checkpoint", "dense_metrics.jsonl", "summary.json", "report.html"}
    assert {path.name for path in finished.iterdir()} == names
    moe, dense = (read_metrics(finished / name) for name in ("metrics.jsonl", "dense_metrics.jsonl"))
    assert [record["step"] for record in moe] == [record["step"] for record in dense] == list(range(1, 13))
    for record in moe:
        assert {"train_loss", "lr", "aux_loss", "dropped", "tokens_per_s", "seconds"} <= record.keys()
        assert [sum(layer) for layer in record["expert_load"]] == [2 * 32 * 2]
    assert "expert_load" not in dense[0]

    summary = json.loads((finished / "summary.json").read_text())
    for kind, records in (("moe", moe), ("dense", dense)):
        result = summary[kind]
        assert 1.0 < result["held_out_loss"] < 6.5
        assert result["train_loss"] == records[-1]["train_loss"]
        assert result["steps"] == 12
        assert result["tokens"] == 12 * 2 * 32
    assert summary["moe"]["held_out_loss"] != summary["dense"]["held_out_loss"]
    data = summary["data"]
    assert data["train_bytes"] + data["validation_bytes"] + data["held_out_bytes"] == text.stat().st_size


def test_report_is_self_contained(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    summary = json.loads((finished / "summary.json").read_text())
    assert "http" not in page
    assert "<script" not in page
    assert "<link" not in page
    assert all(target.startswith("data:image/png;base64,") for target in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert f"{summary['moe']['held_out_loss']:.4f}" in page
    assert f"{summary['dense']['held_out_loss']:.4f}" in page
    assert page.count("<polyline") == 2 * 2 + 2  # both losses, raw and smoothed; the busiest expert; drops
    assert page.count("<image") == 1  # a heat map for the one layer
    assert "&lt;b&gt;" in page  # the prompt, escaped
    assert "<b>\n" not in page


def test_the_dense_model_sees_the_same_bytes(finished: Path, tmp_path: Path, text: Path) -> None:
    """A dense model trained on its own has the same curve as the one beside the mixture of experts."""
    from moe_triton.training.config import TrainConfig
    from moe_triton.training.data import load_corpus
    from moe_triton.training.loop import train_model

    with job.cpu_threads(1):  # as `TrainConfig.threads` says
        train_model("dense", TrainConfig(**SIZES, steps=12), load_corpus(text, 32), tmp_path)
    assert losses(tmp_path / "dense_metrics.jsonl") == losses(finished / "dense_metrics.jsonl")


def start(function: Callable[..., None], *args: Any) -> Any:
    """A process of its own, forked from one that has imported torch already."""
    process = fork_context().Process(target=function, args=args, daemon=True)
    process.start()
    return process


def train_until(victim: str, words: list[str]) -> None:
    """`moe-triton train` that stops itself at step 6 of a model, so that a kill surely falls in the middle."""
    write = files.MetricsFile.write

    def stop(self: Any, record: dict[str, Any]) -> None:
        write(self, record)
        if record["step"] == 6 and self.path.name == victim:
            time.sleep(600)

    files.MetricsFile.write = stop
    sys.argv = ["moe-triton", *words]
    cli.main()


@pytest.mark.parametrize("victim", ["metrics.jsonl", "dense_metrics.jsonl"])
def test_killed_and_resumed_equals_uninterrupted(finished: Path, tmp_path: Path, text: Path, victim: str) -> None:
    """A real SIGKILL while the mixture of experts, or the dense model, is being trained."""
    out = tmp_path / "run"
    words = ["train", "--out", str(out), "--checkpoint-every", "4", "--compare-dense", "--data", str(text),
             *flags(**SIZES, steps=12)]  # fmt: skip
    process = start(train_until, victim, words)
    try:
        while not ((out / victim).exists() and len(read_metrics(out / victim)) == 6):
            assert process.is_alive(), "the run ended before it could be killed"
            time.sleep(0.05)
    finally:
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (out / "summary.json").exists()

    printed = run_command(["train", "--out", out, "--resume"], tmp_path / "printed")
    kind = "moe" if victim == "metrics.jsonl" else "dense"
    assert f"{kind}: going on after step 4 of 12" in printed
    for name in ("metrics.jsonl", "dense_metrics.jsonl"):
        assert losses(out / name) == losses(finished / name)
    expected, found = (json.loads((path / "summary.json").read_text()) for path in (finished, out))
    assert found["moe"]["held_out_loss"] == expected["moe"]["held_out_loss"]
    assert found["dense"]["held_out_loss"] == expected["dense"]["held_out_loss"]
    assert str(out / "report.html") in printed
    moe, dense = (found[kind]["held_out_loss"] for kind in ("moe", "dense"))
    assert printed.splitlines()[-1] == f"held-out loss: moe {moe:.4f}, dense {dense:.4f}"


def die_in_a_save(out: Path, text: Path, module: str, name: str) -> None:
    """SIGKILL where the save of step 20 calls a function."""
    write = loop.write_checkpoint

    def arm(checkpoint: Any, *rest: Any) -> None:
        if checkpoint.step == 20:
            setattr(importlib.import_module(module), name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        write(checkpoint, *rest)

    loop.write_checkpoint = arm
    run_job(out, {**SIZES, "steps": 30, "data": str(text)})


@pytest.mark.parametrize(
    ("moment", "after"),
    [
        ("moe_triton.distributed.checkpoint.storage.write", 10),  # a folder, without files
        ("moe_triton.distributed.checkpoint.manifest.replace_file", 10),  # all files, and the manifest before
        ("shutil.rmtree", 20),  # the new manifest, with the old files beside the new ones
    ],
)
def test_killed_in_a_save_and_resumed_equals_uninterrupted(
    thirty: list[tuple[int, float]], tmp_path: Path, text: Path, moment: str, after: int
) -> None:
    """SIGKILL inside the save of step 20, before the switch or behind it: the bits of 30 steps without a stop."""
    out = tmp_path / "run"
    process = start(die_in_a_save, out, text, *moment.rsplit(".", 1))
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(read_metrics(out / "metrics.jsonl")) == 20
    result = command(out, "--resume")
    assert f"going on after step {after} of 30" in result.stdout
    assert losses(out / "metrics.jsonl") == thirty
    assert len(list((out / "checkpoint").glob("tensors-*"))) == 1


def test_resume_starts_fresh_when_nothing_is_saved(tmp_path: Path, text: Path) -> None:
    summary = run_job(tmp_path / "a", {**SIZES, "steps": 2, "data": str(text)}, resume=True)
    assert summary["moe"]["steps"] == 2
    assert "dense" not in summary


def test_resume_of_a_finished_run_can_add_the_dense_model(finished: Path, tmp_path: Path, text: Path) -> None:
    run_job(tmp_path / "a", {**SIZES, "steps": 12, "data": str(text)})
    run_job(tmp_path / "a", {}, resume=True, compare_dense=True)
    for name in ("metrics.jsonl", "dense_metrics.jsonl"):
        assert losses(tmp_path / "a" / name) == losses(finished / name)


def test_threads_are_as_asked_and_put_back(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(job.Display, "update", lambda self, record: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    run_job(tmp_path / "a", {**SIZES, "steps": 1, "data": str(text), "threads": before + 1})
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_the_text_may_move(finished: Path, tmp_path: Path, text: Path) -> None:
    options = {**SIZES, "steps": 12, "data": str(text)}
    run_job(tmp_path / "a", options)
    (tmp_path / "moved.txt").write_bytes(text.read_bytes())
    run_job(tmp_path / "a", {"data": str(tmp_path / "moved.txt")}, resume=True, compare_dense=True)
    run_job(tmp_path / "a", {}, resume=True)
    assert losses(tmp_path / "a" / "dense_metrics.jsonl") == losses(finished / "dense_metrics.jsonl")


def test_checkpoints_of_different_runs_are_refused(finished: Path, tmp_path: Path, text: Path) -> None:
    run_job(tmp_path / "a", {**SIZES, "steps": 2, "data": str(text)})
    shutil.copytree(finished / "dense_checkpoint", tmp_path / "a" / "dense_checkpoint")
    with pytest.raises(TrainingError, match="of different runs"):
        run_job(tmp_path / "a", {}, resume=True)


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "already holds a run"),
        (["--resume", "--steps", "30"], "--steps: got 30, but the run"),
        (["--resume", "--num-experts", "8"], "--num-experts: got 8"),
        (["--resume", "--steps", "0"], "steps: got 0, wanted at least 1"),
    ],
)
def test_a_run_is_never_overwritten(finished: Path, words: list[str], message: str) -> None:
    before = snapshot(finished)
    result = command(finished, *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert snapshot(finished) == before


def test_resume_with_other_data_is_refused(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("another text " * 400)
    before = snapshot(finished)
    result = command(finished, "--resume", "--data", str(tmp_path / "other.txt"))
    assert result.exit_code == 2
    assert "other.txt is not the text" in result.stderr
    assert snapshot(finished) == before


@pytest.mark.parametrize("pattern", ["checkpoint.json", "tensors-*/*.safetensors"])
def test_a_corrupt_checkpoint_stops_resume_without_loss(tmp_path: Path, text: Path, pattern: str) -> None:
    run_job(tmp_path / "a", {**SIZES, "steps": 2, "data": str(text)})
    checkpoint = next((tmp_path / "a" / "checkpoint").glob(pattern))
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    before = snapshot(tmp_path / "a")
    result = command(tmp_path / "a", "--resume")
    assert result.exit_code == 2
    assert str(checkpoint) in result.stderr
    assert snapshot(tmp_path / "a") == before


def test_resume_without_the_checkpoint_keeps_the_metrics(tmp_path: Path, text: Path) -> None:
    run_job(tmp_path / "a", {**SIZES, "steps": 2, "data": str(text)})
    shutil.rmtree(tmp_path / "a" / "checkpoint")
    before = snapshot(tmp_path / "a")
    result = command(tmp_path / "a", "--resume")
    assert result.exit_code == 2
    assert "holds metrics.jsonl but no checkpoint to go on from" in result.stderr
    assert snapshot(tmp_path / "a") == before


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "checkpoint.safetensors"),
        (["--resume"], "checkpoint.safetensors"),
        (["--resume"], "dense_checkpoint.safetensors"),
    ],
)
def test_a_checkpoint_of_an_earlier_version_is_named_and_kept(
    finished: Path, tmp_path: Path, words: list[str], name: str
) -> None:
    shutil.copytree(finished, tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / name.removesuffix(".safetensors"))
    (tmp_path / "a" / name).write_bytes(b"weights")
    before = snapshot(tmp_path / "a")
    result = command(tmp_path / "a", *words)
    assert result.exit_code == 2
    assert f"{name} is of an earlier version" in result.stderr
    assert result.stderr.count("\n") == 1
    assert snapshot(tmp_path / "a") == before


@pytest.mark.parametrize("name", ["train_loss", "dropped", "expert_load", "seconds"])
def test_a_record_without_a_key_is_named_and_kept(tmp_path: Path, text: Path, name: str) -> None:
    run_job(tmp_path / "a", {**SIZES, "steps": 3, "data": str(text)})
    metrics = tmp_path / "a" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join([lines[0], lines[1].replace(f'"{name}"', '"other"'), lines[2], ""]))
    before = snapshot(tmp_path / "a")
    result = command(tmp_path / "a", "--resume")
    assert result.exit_code == 2
    assert f"metrics.jsonl: line 2: {name}: " in result.stderr
    assert result.stderr.count("\n") == 1
    assert snapshot(tmp_path / "a") == before


@pytest.mark.parametrize("load", [[[16, 16]], [[16, 16, 16, 16], [16, 16, 16, 16]], [[16, 16, 16, "x"]], 3])
def test_a_record_with_another_load_is_named(tmp_path: Path, text: Path, load: Any) -> None:
    run_job(tmp_path / "a", {**SIZES, "steps": 1, "data": str(text)})
    metrics = tmp_path / "a" / "metrics.jsonl"
    metrics.write_text(json.dumps({**json.loads(metrics.read_text()), "expert_load": load}) + "\n")
    with pytest.raises(TrainingError, match=r"line 1: expert_load: wanted 1 lists of 4 counts"):
        run_job(tmp_path / "a", {}, resume=True)


def test_a_checkpoint_is_renamed_when_its_metrics_are_on_disk(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And when its own files are; the folder is synced after the rename: whatever a power cut leaves can go on."""
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_sync(descriptor: int) -> None:
        order.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def note_rename(source: Path, target: Path) -> None:
        order.append("rename " + Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_rename)
    run_job(tmp_path / "a", {**SIZES, "steps": 4, "data": str(text)}, checkpoint_every=2)
    assert order.pop(1) == "sync a"  # where the checkpoint's folder is new
    for save in (1, 2, 3):  # steps 0, 2 and 4
        tensors, *others = order[1:7]
        assert (order[0], tensors.endswith(".safetensors")) == ("sync metrics.jsonl", True)
        switch = ["sync checkpoint.json.tmp", "rename checkpoint.json", "sync checkpoint"]
        assert others == [f"sync tensors-{save:06d}", "sync checkpoint", *switch]
        del order[:7]
    assert order == [
        *("sync summary.json.tmp", "rename summary.json", "sync a"),
        *("sync report.html.tmp", "rename report.html", "sync a"),
    ]


def test_a_run_that_failed_before_its_first_step_does_not_block_the_directory(tmp_path: Path, text: Path) -> None:
    options = {**SIZES, "steps": 2, "data": str(text)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("the device is gone")))
        with pytest.raises(RuntimeError, match="the device is gone"):
            run_job(tmp_path / "a", options)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"checkpoint", "metrics.jsonl"}
    run_job(tmp_path / "a", {**options, "seed": 3})
    assert [step for step, _ in losses(tmp_path / "a" / "metrics.jsonl")] == [1, 2]


def hold(out: Path, holds: Any) -> None:
    """A run that trains for ever, and says when it has its directory."""

    def wait(*_: Any) -> None:
        holds.set()
        time.sleep(600)

    job.train_and_report = wait
    run_job(out, {}, resume=True)


@pytest.mark.parametrize("exists", [True, False])
def test_two_runs_in_one_directory_are_refused(finished: Path, tmp_path: Path, exists: bool) -> None:
    """The second one is told who is there, and changes nothing; a SIGKILL of the first one frees the directory."""
    out = tmp_path / "run"
    if exists:
        shutil.copytree(finished, out)
    holds = fork_context().Event()
    first = start(hold, out, holds)
    try:
        assert holds.wait(120)
        before = snapshot(out)
        result = command(out, "--resume")
        assert result.exit_code == 2
        assert f"--out: process {first.pid} on " in result.stderr
        assert f"is training in {out}" in result.stderr
        assert snapshot(out) == before
    finally:
        first.kill()
        first.join()
    assert first.exitcode == -signal.SIGKILL
    if exists:
        assert command(out, "--resume").exit_code == 0
        assert losses(out / "metrics.jsonl") == losses(finished / "metrics.jsonl")
        assert not (out / ".lock").exists()


def test_a_directory_that_appears_meanwhile_is_not_overwritten(finished: Path, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "run"
    load = job.load_corpus

    def slow(*arguments: Any) -> Any:
        shutil.copytree(finished, out)
        return load(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "load_corpus", slow)
        with pytest.raises(TrainingError, match="already holds a run"):
            run_job(out, {**SIZES, "steps": 2, "data": str(text)})
    shutil.rmtree(out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "load_corpus", slow)
        with pytest.raises(TrainingError, match="another process has just trained"):
            run_job(out, {**SIZES, "steps": 2, "data": str(text)}, resume=True)
    assert losses(out / "metrics.jsonl") == losses(finished / "metrics.jsonl")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--data", "/nowhere/text"], "--data: /nowhere/text does not exist"),
        (["--data", os.devnull], os.devnull),
        (["--top-k", "99"], "top_k: got 99, wanted 1 to"),
        (["--device", "abacus"], "device: got 'abacus'"),
        (["--backend", "abacus"], "backend: got 'abacus'"),
        (["--checkpoint-every", "0"], "checkpoint_every: got 0"),
        (["--ep-mode", "abacus"], "ep_mode: got 'abacus', wanted one of dropless"),
        (["--ep-chunks", "0"], "ep_chunks: got 0, wanted at least 1"),
        (["--threads", "100000"], "threads: got 100000, wanted 1 to"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, words: list[str], named: str) -> None:
    result = command(tmp_path / "a", *words)
    assert result.exit_code == 2
    assert named in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_a_backend_that_cannot_run_here_leaves_no_directory(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    result = command(tmp_path / "a", "--data", str(text), "--backend", "triton", *flags(**SIZES, steps=2))
    assert result.exit_code == 2
    assert result.stderr.startswith("moe-triton train: backend: got 'triton', but")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "a").exists()
    result = command(tmp_path / "a", "--backend", "triton", "--dtype", "float64")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "float64" in result.stderr


def test_out_must_be_a_directory(tmp_path: Path, text: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TrainingError, match=r"--out: .*file"):
            run_job(out, {**SIZES, "steps": 2, "data": str(text)})
    assert (tmp_path / "file").read_text() == "mine"


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, text: Path) -> None:
    with pytest.raises(TrainingError, match=r"moe model's loss or gradient is not finite at step \d+: a lower --lr"):
        run_job(tmp_path / "a", {**SIZES, "steps": 30, "data": str(text), "lr": 1e30})
    assert all(math.isfinite(loss) for _, loss in losses(tmp_path / "a" / "metrics.jsonl"))


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_triton.training.display import Display

    def interrupt(self: Display, record: dict[str, Any]) -> None:
        if record["step"] == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Display, "update", interrupt)
        result = command(tmp_path / "a", "--data", str(text), "--checkpoint-every", "2", *flags(**SIZES, steps=8))
    assert result.exit_code == 130
    assert f"--out {tmp_path / 'a'} --resume" in result.stderr
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"checkpoint", "metrics.jsonl"}
    assert "going on after step 4 of 8" in command(tmp_path / "a", "--resume").stdout
