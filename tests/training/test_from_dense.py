"""`moe-triton train --from-dense`: the mixture of experts starts as the dense model of another run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_triton.distributed import load_checkpoint
from moe_triton.training import TrainConfig, TrainingError, run_job
from moe_triton.training.files import read_metrics
from moe_triton.training.from_dense import read_dense, upcycle_into
from moe_triton.training.model import LanguageModel
from tests.helpers.compare import assert_close

SIZES = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 9,
    "num_experts": 6,
    "batch_size": 4,
    "seq_len": 16,
}  # fmt: skip  (a dense block is 2 * 9 + 2 = 20 wide)


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("from_dense")
    (folder / "text.txt").write_text("how much wood would a woodchuck chuck? " * 400)
    run_job(folder / "a", {**SIZES, "steps": 30, "data": str(folder / "text.txt")}, compare_dense=True)
    return folder / "a"


@pytest.mark.parametrize(("intermediate_size", "top_k"), [(20, 2), (10, 2), (5, 4)])
def test_the_first_logits_are_the_dense_models(dense_run, intermediate_size, top_k):
    saved = read_dense(dense_run)
    dense = LanguageModel(saved.config, "dense").eval()
    load_checkpoint(saved.path, dense)
    sizes = {**SIZES, "num_experts": 8, "intermediate_size": intermediate_size, "top_k": top_k}
    model = LanguageModel(TrainConfig(**sizes), "moe").eval()
    upcycle_into(model, saved)
    tokens = torch.randint(0, 256, (3, 12))
    with torch.no_grad():
        assert_close(model(tokens).logits, dense(tokens).logits, tolerance=1e-6)


def test_a_run_goes_on_from_it(dense_run, tmp_path):
    options = {"num_experts": 8, "batch_size": 4, "seq_len": 16, "steps": 6, "lr": 1e-3, "capacity_factor": 0.0}
    options["data"] = str(dense_run.parent / "text.txt")
    summary = run_job(tmp_path / "b", options, from_dense=dense_run)
    assert summary["config"]["intermediate_size"] == 20
    assert summary["config"]["hidden_size"] == 16
    before = read_metrics(dense_run / "dense_metrics.jsonl")
    after = read_metrics(tmp_path / "b" / "metrics.jsonl")
    assert (
        abs(after[0]["train_loss"] - before[-1]["train_loss"]) < 0.3 < before[0]["train_loss"] - after[0]["train_loss"]
    )
    resumed = run_job(tmp_path / "b", {}, from_dense=dense_run, resume=True)
    assert resumed["moe"]["held_out_loss"] == summary["moe"]["held_out_loss"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 32}, "--hidden-size: got 32, but the dense model has 16"),
        ({"intermediate_size": 8}, "--intermediate-size: got 8, wanted a divisor of the dense model's 20"),
        ({"intermediate_size": 10, "num_experts": 7}, "--num-experts: got 7, wanted a multiple of the 2 experts"),
        ({"intermediate_size": 10, "top_k": 3}, "--top-k: got 3, wanted a multiple of the 2 experts"),
        ({"top_k": 1}, "--top-k: got 1, wanted at least 2 with --from-dense"),
    ],
)
def test_what_does_not_fit_is_one_line(dense_run, tmp_path, options, message):
    with pytest.raises(TrainingError, match=message):
        run_job(tmp_path / "c", options, from_dense=dense_run)
    assert not (tmp_path / "c").exists()


def test_a_run_without_a_dense_model(tmp_path):
    with pytest.raises(TrainingError, match=r"--from-dense: .* holds no dense model; train one there with --compare-d"):
        run_job(tmp_path / "c", {}, from_dense=tmp_path)
