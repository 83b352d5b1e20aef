"""Draw the figures of README.md and docs/ as SVG; `python benchmarks/tables.py` writes them into docs/assets/.

The same data gives the same bytes, so that a test can compare a figure with its results.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

TEAL, GREY, RED, INK, PALE = "#1f6f8b", "#b8c4cc", "#c0492b", "#1c2b33", "#eaf3f6"
FONT = "font-family=\"-apple-system, 'Segoe UI', Helvetica, Arial, sans-serif\""


class Bar(NamedTuple):
    """One bar of a chart: its label, its length in the unit of the axis, and what is written behind it."""

    label: str
    value: float
    note: str


class Panel(NamedTuple):
    """One panel of a chart: a title, and groups of bars by the group's name."""

    title: str
    groups: dict[str, list[Bar]]


class Box(NamedTuple):
    """One box of a diagram: a name, and what is computed in it, line by line."""

    name: str
    lines: tuple[str, ...]


def text(x: float, y: float, words: str, size: int = 11, *, middle: str = "start", color: str = INK) -> str:
    """Words whose start, middle or end (`middle`) is at x; bold from 14 pixels on, with a white rim against lines."""
    weight = 600 if size >= 14 else 400
    return (
        f'<text x="{x:.1f}" y="{y:g}" font-size="{size}" font-weight="{weight}" text-anchor="{middle}" fill="{color}" '
        f'stroke="#ffffff" stroke-width="3" paint-order="stroke">{escape(words)}</text>'
    )


def rectangle(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> str:
    radius = 6 if stroke != "none" else 0
    return (
        f'<rect x="{x:.1f}" y="{y:g}" width="{width:.1f}" height="{height:g}" rx="{radius}" '
        f'fill="{fill}" stroke="{stroke}"/>'
    )


def arrow(x: float, to_x: float, y: float) -> str:
    return (
        f'<line x1="{x:.1f}" y1="{y:g}" x2="{to_x:.1f}" y2="{y:g}" stroke="{INK}" stroke-width="1.4" '
        'marker-end="url(#head)"/>'
    )


def drawing(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """An SVG with a white ground, which dark pages need, and a title for those who cannot see it."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" {FONT}>',
        f"<title>{escape(title)}</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>',
        rectangle(0, 0, width, height, "#ffffff"),
    )
    return "\n".join([*head, *parts, "</svg>", ""])


FORWARD = (
    Box("gate", ("logits in fp32 from", "16-bit operands")),
    Box("route", ("scores, exact top-k,", "weights, the sums", "that losses need")),
    Box("dispatch", ("capacity drops, sort", "by expert; no padding,", "no host sync")),
    Box("up", ("gather, gate and up", "products, bias,", "activation")),
    Box("down", ("product, bias,", "times router weight")),
    Box("combine", ("sum of a token's rows", "in fixed order")),
)
BACKWARD = (
    Box("gate", ("gradients of its", "weight and input")),
    Box("route", ("gradient of the logits,", "of losses too")),
    Box("combine", ("sum of a token's rows", "in fixed order")),
    Box("d_rows", ("gradient of the", "gathered rows")),
    Box("d_weight", ("of up and down, from", "gathered operands")),
    Box("d_hidden", ("gather, product, grad-", "ients of activation and", "router weights")),
)


def layer_flow() -> str:
    """Draw how the layer computes: one box for each fused kernel, forward and backward."""
    left, width, height, gap = 28, 138, 84, 15
    parts = [
        text(left, 28, "forward: hidden states [T, d] to output [T, d]", 14),
        text(left, 164, "backward: the gradients of everything, in the same way", 14),
    ]
    for row, y, is_forward in ((FORWARD, 44, True), (BACKWARD, 180, False)):
        for i, (name, lines) in enumerate(row):
            x = left + i * (width + gap)
            parts.append(rectangle(x, y, width, height, PALE, TEAL))
            parts.append(text(x + width / 2, y + 21, name, 14, middle="middle", color=TEAL))
            parts += [text(x + width / 2, y + 39 + 15 * j, line, middle="middle") for j, line in enumerate(lines)]
            if i:
                ends = (x - gap, x - 1) if is_forward else (x, x - gap + 1)
                parts.append(arrow(*ends, y + height / 2))
    kept = "kept for backward: hidden states and the pre-activation [S, 2n]; with recompute=True only the hidden states"
    parts.append(text(left, 288, kept))
    return drawing(960, 304, "The layer's flow, one box for each fused kernel, forward and backward", parts)


def bar_chart(panels: Sequence[Panel], *, axis: str, limit: str, ours: str) -> str:
    """Draw panels side by side with horizontal bars, those of `ours` coloured, and a line named `limit` at 1."""
    width, left, line, labels, notes = 960, 24, 19, 112, 92
    panel_width = (width - left) / len(panels)
    longest = max(1.0, *(bar.value for panel in panels for bars in panel.groups.values() for bar in bars))
    scale = (panel_width - labels - notes) / longest
    rows = max(sum(len(bars) * line + 30 for bars in panel.groups.values()) for panel in panels)
    parts = [text(left, 66 + rows + 4, axis)]
    for i, panel in enumerate(panels):
        x, y = left + i * panel_width, 66
        start = x + labels
        at = start + scale
        parts.append(text(x, 26, panel.title, 15))
        parts.append(text(at, 46, limit, middle="middle", color=RED))
        bars_and_notes = []
        for group, bars in panel.groups.items():
            bars_and_notes.append(text(x, y, group, 12))
            y += 8
            for bar in bars:
                color = TEAL if bar.label == ours else GREY
                parts.append(rectangle(start, y, bar.value * scale, line - 5, color))
                bars_and_notes.append(text(start - 8, y + 12, bar.label, 12, middle="end"))
                bars_and_notes.append(text(start + bar.value * scale + 5, y + 12, bar.note))
                y += line
            y += 22
        parts.append(
            f'<line x1="{at:.1f}" y1="52" x2="{at:.1f}" y2="{y - 26:g}" stroke="{RED}" stroke-dasharray="4 3"/>'
        )
        parts += bars_and_notes
    return drawing(width, 66 + rows + 20, f"{axis}; {' and '.join(panel.title for panel in panels)}", parts)
