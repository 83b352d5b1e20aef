"""The report's charts: the heat map is a PNG of our own making."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
from matplotlib.image import imread

from moe_triton.training.charts import COLUMNS, RAMP, heat_map, png, ramp_colors


def test_a_png_is_read_back_bit_for_bit():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    found = imread(io.BytesIO(png(pixels)), format="png")
    assert np.array_equal((found[..., :3] * 255).round().astype(np.uint8), pixels)


def test_colors_go_along_the_ramp():
    stops = [tuple(int(color[at : at + 2], 16) for at in (1, 3, 5)) for color in RAMP]
    assert [tuple(color) for color in ramp_colors(np.linspace(0, 1, len(RAMP))).tolist()] == stops
    assert [tuple(color) for color in ramp_colors(np.array([-1.0, 9.0])).tolist()] == [stops[0], stops[-1]]
    middle = ramp_colors(np.array([0.5 / (len(RAMP) - 1)]))[0]
    assert np.abs(middle - np.mean(stops[:2], 0)).max() <= 0.5


def test_a_heat_map_has_a_row_for_each_expert():
    """A busy expert is dark and an idle one white, in the row and the columns of its steps."""
    load = np.zeros((2 * COLUMNS, 4))
    load[COLUMNS:, 2] = 2.0
    data = re.search(r"base64,([^\"]+)", heat_map(load, 2.0, "layer 0"))[1]
    pixels = imread(io.BytesIO(base64.b64decode(data)), format="png")[..., :3]
    assert pixels.shape == (4, COLUMNS, 3)
    dark = pixels.sum(-1) < 1
    assert dark[2, COLUMNS // 2 :].all()
    assert dark.sum() == COLUMNS // 2
    assert (pixels[[0, 1, 3]] == 1).all()
