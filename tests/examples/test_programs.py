"""The examples that need nothing but torch, in small; what they print says that they learn."""

from __future__ import annotations

import json
import re
import sys
import types

import pytest

from tests.helpers.examples import EXAMPLES, run_example


def losses(printed: str) -> list[float]:
    return [float(found) for found in re.findall(r"loss +([\d.]+)", printed)]


def test_every_example_is_in_the_list():
    listed = set(re.findall(r"\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    assert listed == {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}


def test_train_tiny():
    found = losses(run_example("train_tiny.py"))
    assert len(found) == 5
    assert found[-1] < 0.3 * found[0]


def test_train_language_model():
    found = losses(run_example("train_language_model.py", "--steps", "25", "--length", "32"))
    first, *_, held_out = found
    assert abs(first - 5.6) < 0.3, "a fresh model knows nothing: log(256), and a little more"
    assert held_out < 3.6, "it has learned which bytes there are"


class Writer:
    """Stands for torch.utils.tensorboard.SummaryWriter, which is not installed here."""

    seen: list[tuple[str, float, int]]

    def __init__(self, folder):
        Writer.seen = []

    def add_scalar(self, name, value, step):
        Writer.seen.append((name, value, step))


@pytest.mark.parametrize("installed", [False, True])
def test_log_routing(installed, tmp_path, monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module if installed else None)
    printed = run_example("log_routing.py", "--out", str(tmp_path), "--steps", "10")
    assert ("TensorBoard is not installed" in printed) is not installed
    assert printed.count("busiest expert") == 2
    for name in ("balanced", "unbalanced"):
        (line,) = (tmp_path / name / "load.jsonl").read_text().splitlines()
        reading = json.loads(line)
        assert reading["step"] == 10
        assert [layer["assignments"] for layer in reading["layers"].values()] == [2 * 16 * 64 * 10] * 2
        assert (tmp_path / name / "load.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    if installed:
        assert (
            "moe/train/blocks.0.moe.experts/max_load",
            reading["layers"]["blocks.0.moe.experts"]["max_load"],
            10,
        ) in (Writer.seen)
