"""Where readings go: every number arrives under its name, at its step."""

from __future__ import annotations

import json

import torch

from moe_triton import load_statistics
from moe_triton.metrics import JsonlSink, TensorBoardSink, WandbSink, load_scalars

READING = {
    "layers.0": load_statistics(torch.tensor([3, 1]), dropped=1, balance=1.25, z=4.0),
    "layers.1": load_statistics(torch.tensor([0, 4])),
}


class Writer:
    """What a SummaryWriter and a run of wandb's are called with."""

    def __init__(self):
        self.seen = []

    def add_scalar(self, name, value, step):
        self.seen.append((name, value, step))

    def log(self, numbers, step=None):
        self.seen += [(name, value, step) for name, value in numbers.items()]


def test_scalars():
    found = load_scalars(READING)
    assert found["moe/layers.0/max_load"] == 1.5
    assert found["moe/layers.0/balance"] == 1.25
    assert found["moe/layers.0/dropped"] == 0.25
    assert found["moe/layers.1/idle"] == 1.0
    assert "moe/layers.1/balance" not in found  # not known
    assert all(isinstance(value, float) for value in found.values())


def test_tensorboard_and_wandb_get_the_same():
    seen = []
    for sink in (TensorBoardSink, WandbSink):
        writer = Writer()
        sink(writer)(READING, 7, "eval")
        assert {(name, value) for name, value, _ in writer.seen} == set(load_scalars(READING, "moe/eval").items())
        assert {step for *_, step in writer.seen} == {7}
        seen.append(writer.seen)
    assert seen[0] == seen[1]


def test_jsonl(tmp_path):
    sink = JsonlSink(tmp_path / "load.jsonl")
    sink(READING, 3, "train")
    sink(READING, 4, "eval")
    first, second = map(json.loads, (tmp_path / "load.jsonl").read_text().splitlines())
    assert (first["step"], first["mode"], second["step"], second["mode"]) == (3, "train", 4, "eval")
    assert first["layers"]["layers.0"]["loads"] == [1.5, 0.5]
    assert first["layers"]["layers.1"]["z"] is None
