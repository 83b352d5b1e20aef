"""Charts as inline SVG: they need no script, no font and no file beside the page."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 720, 280
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 40
POINTS = 400  # drawn per curve
COLUMNS = 240  # of a heat map
RAMP = ("#ffffff", "#dbeafe", "#60a5fa", "#1d4ed8", "#172554")  # of a heat map, from 0 to its high end


class Curve(NamedTuple):
    """One curve: y over the steps 1, 2, 3, ... in a CSS color. `faint` draws it thin and pale, without a legend."""

    name: str
    color: str
    values: Sequence[float]
    faint: bool = False


def smooth(values: Sequence[float], span: float) -> list[float]:
    """Return the exponential moving average over about `span` steps, corrected for its start."""
    decay = math.exp(-1 / max(span, 1e-9))
    total = weight = 0.0
    result = []
    for value in values:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        result.append(total / weight)
    return result


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers (1, 2 or 5 times a power of ten apart) from `low` to `high`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def line_chart(
    curves: Sequence[Curve],
    *,
    label: str,
    low: float,
    high: float,
    percent: bool = False,
    log: bool = False,
    title: str = "",
) -> str:
    """Draw an SVG of curves over steps; what lies outside [low, high] is cut off. log: a logarithmic scale, low > 0."""
    steps = max(len(curve.values) for curve in curves)
    high = max(high, low + 1e-6)
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(step: float) -> float:
        return LEFT + inner_width * (step - 1) / max(steps - 1, 1)

    def y(value: float) -> float:
        if log:
            return TOP + inner_height * math.log(high / max(value, 1e-9)) / math.log(high / low)
        return TOP + inner_height * (high - value) / (high - low)

    parts = [
        f'<div class="scroll"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title or label)}">'
    ]
    for value in ticks(low, high):
        text = f"{value:.3g}%" if percent else f"{value:.4g}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{text}</text>')
    under = HEIGHT - BOTTOM
    whole = [value for value in ticks(1, max(steps, 2), 8) if value == int(value)]
    parts += [f'<text x="{x(value):.1f}" y="{under + 18}" text-anchor="middle">{value:.0f}</text>' for value in whole]
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">step</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 6}">{escape(label)}</text>')
    clip = "clip-" + "".join(letter for letter in label if letter.isalpha())
    parts.append(
        f'<clipPath id="{clip}"><rect x="{LEFT}" y="{TOP}" width="{inner_width}" height="{inner_height}"/></clipPath>'
    )
    for curve in curves:
        stride = max(1, math.ceil(len(curve.values) / POINTS))
        shown = [*range(0, len(curve.values) - 1, stride), len(curve.values) - 1]
        points = " ".join(f"{x(i + 1):.1f},{y(curve.values[i]):.1f}" for i in shown)
        style = 'stroke-width="1" stroke-opacity="0.25"' if curve.faint else 'stroke-width="2"'
        parts.append(
            f'<polyline points="{points}" clip-path="url(#{clip})" fill="none" stroke="{curve.color}" {style}/>'
        )
    for index, curve in enumerate([curve for curve in curves if not curve.faint]):
        top = TOP + 14 + 18 * index
        line = f'x1="{WIDTH - 190}" x2="{WIDTH - 166}" y1="{top}" y2="{top}"'
        parts.append(f'<line {line} stroke="{curve.color}" stroke-width="3"/>')
        parts.append(f'<text x="{WIDTH - 158}" y="{top + 4}">{escape(curve.name)}</text>')
    return "".join([*parts, "</svg></div>"])


def ramp_colors(shares: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the colors [..., 3] of RAMP, evenly spaced and joined by straight lines; below 0 and above 1 its ends."""
    stops = np.array([[int(color[at : at + 2], 16) for at in (1, 3, 5)] for color in RAMP])
    places = np.linspace(0, 1, len(RAMP))
    return np.stack([np.interp(shares, places, channel) for channel in stops.T], -1).round().astype(np.uint8)


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode [height, width, 3] as a PNG (RFC 2083): 8 bits a channel, no filter."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def heat_map(load: NDArray[np.float64], high: float, title: str) -> str:
    """Draw an SVG of the load [steps, E] (1 = the mean) with one row per expert; colors go from 0 to `high`."""
    columns = min(COLUMNS, len(load))
    binned = np.stack([chunk.mean(0) for chunk in np.array_split(load, columns)], axis=1)  # [E, columns]
    data = base64.b64encode(png(ramp_colors(binned / high))).decode()
    rows = binned.shape[0]
    height = max(60, min(12 * rows, 240))
    inner_width = WIDTH - LEFT - RIGHT
    return (
        f'<div class="scroll"><svg viewBox="0 0 {WIDTH} {height + 24}" role="img" aria-label="{escape(title)}">'
        f'<image x="{LEFT}" y="4" width="{inner_width}" height="{height}" preserveAspectRatio="none" '
        f'style="image-rendering: pixelated" href="data:image/png;base64,{data}"/>'
        f'<text x="{LEFT - 8}" y="14" text-anchor="end">0</text>'
        f'<text x="{LEFT - 8}" y="{height + 2}" text-anchor="end">{rows - 1}</text>'
        f'<text x="{LEFT}" y="{height + 20}">{escape(title)}</text>'
        f'<text x="{WIDTH - RIGHT}" y="{height + 20}" text-anchor="end">steps 1 to {len(load)}</text></svg></div>'
    )


def color_bar(high: float) -> str:
    """Return the legend of the heat maps, as a CSS gradient."""
    gradient = f"linear-gradient(to right, {', '.join(RAMP)})"
    return f'<p class="bar">0 <span style="background: {gradient}"></span> {high:g} times the mean load</p>'
