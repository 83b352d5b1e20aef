"""The example of router replay: it prints its losses, and the replay brings the two models together."""

from __future__ import annotations

import runpy
from pathlib import Path

import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "router_replay.py"


def test_the_example(capsys):
    script = runpy.run_path(str(EXAMPLE))
    history = script["main"]()
    printed = capsys.readouterr().out
    assert len(history) == script["STEPS"]
    for step, found in enumerate(history):
        assert f"step {step}  loss {found['loss']:+.4f}" in printed
    off_with, off_without = (
        torch.tensor([found[key] for found in history]) for key in ("off_with_replay", "off_without")
    )
    assert (off_with < off_without).all()
    assert off_with.mean() < 0.7 * off_without.mean()
    assert all(torch.isfinite(torch.tensor(found["loss"])) for found in history)
