"""The charts of the load are PNG files with something in them."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

import moe_triton
from moe_triton import LoadMonitor, load_statistics, plot_load, plot_load_map


def test_the_load_over_time(tmp_path):
    model = nn.Sequential(*(moe_triton.MoE(8, 4, 4, top_k=2, capacity_factor=1.0) for _ in range(2)))
    history = []
    with LoadMonitor(model) as monitor:
        for _ in range(3):
            x = torch.randn(12, 8)
            for layer in model:
                x = layer(x).output
            history.append(monitor.read())
    plot_load(history, tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ValueError, match="history: got nothing"):
        plot_load([], tmp_path / "x.png")


def test_the_map_of_layers_and_experts(tmp_path):
    """Layers may have different numbers of experts; an expert without any load is marked."""
    from matplotlib.image import imread

    counts = {"a": [9, 1, 2, 4], "b": [8, 4, 4, 2, 0, 4], "c": [0, 0, 0, 0]}
    reading = {name: load_statistics(torch.tensor(values)) for name, values in counts.items()}
    plot_load_map(reading, tmp_path / "map.png")
    pixels = imread(tmp_path / "map.png")[..., :3]
    is_red = (pixels[..., 0] > 0.5) & (pixels[..., 2] < 0.3)
    is_blue = (pixels[..., 2] > 0.3) & (pixels[..., 0] < 0.1)
    assert is_red.sum() > 100
    assert is_blue.sum() > 100
    with pytest.raises(ValueError, match="reading: got nothing"):
        plot_load_map({}, tmp_path / "x.png")


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else real(name, *more)
    )
    for draw in (lambda path: plot_load([], path), lambda path: plot_load_map({}, path)):
        with pytest.raises(ImportError, match=r"charts need matplotlib.*pip install 'moe-triton\[plot\]'"):
            draw(tmp_path / "x.png")
