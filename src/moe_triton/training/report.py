"""The report of a run: one HTML page that needs nothing beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import numpy as np

from moe_triton.training.charts import Curve, color_bar, heat_map, line_chart, smooth

NAMES = {"moe": "mixture of experts", "dense": "dense"}
COLORS = {"moe": "#2563eb", "dense": "#ea580c"}
HEAT_HIGH = 3.0  # load, as a multiple of the mean, at which the colors end

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1f2937; background: #fff; max-width: 780px; margin: 40px auto; padding: 0 20px; }
h1 { font-size: 26px; margin-bottom: 4px; }
h2 { font-size: 18px; margin: 36px 0 8px; border-bottom: 1px solid #e5e7eb; padding-bottom: 4px; }
p { margin: 8px 0; } .note { color: #6b7280; font-size: 14px; }
table { border-collapse: collapse; width: 100%; font-size: 15px; }
th, td { text-align: right; padding: 5px 8px; border-bottom: 1px solid #f3f4f6; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } th { color: #6b7280; font-weight: 500; }
.plain td { text-align: left; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; display: block; margin: 8px 0; } svg text { font-size: 12px; fill: #6b7280; }
.grid { stroke: #e5e7eb; stroke-width: 1; }
.bar { font-size: 14px; color: #6b7280; }
.bar span { display: inline-block; width: 160px; height: 10px; border: 1px solid #e5e7eb; }
pre { background: #f9fafb; border: 1px solid #e5e7eb; border-radius: 6px; padding: 14px; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 13px; }
pre .prompt { color: #9ca3af; }
.scroll { overflow-x: auto; }
@media (max-width: 640px) {
  body { margin: 16px auto; padding: 0 14px; font-size: 15px; } .scroll svg { min-width: 620px; } svg text { font-size: 14px; }
  th, td { padding: 5px 6px; font-size: 14px; }
}
"""  # noqa: E501 (a style sheet)


def render_report(summary: Mapping[str, Any], history: Mapping[str, list[dict[str, Any]]]) -> str:
    """Return the page of a run's summary.json and its metrics by kind of model ("moe", and perhaps "dense")."""
    kinds = list(history)
    sections = [
        ("Held-out loss", results_table(summary, kinds)),
        ("Training loss", loss_chart(history)),
        ("Expert load", load_section(history["moe"])),
        ("Dropped assignments", dropped_section(history["moe"], summary["config"]["capacity_factor"])),
        ("Generated text", sample_section(summary["sample"])),
        ("Data", plain_table(summary["data"].items())),
        ("Settings", plain_table(summary["config"].items())),
        ("Machine", machine_table(summary)),
    ]
    body = "".join(f"<section><h2>{escape(title)}</h2>{content}</section>" for title, content in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>moe-triton train</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>moe-triton train</h1><p>{headline(summary)}</p>{body}</body></html>\n"
    )


def headline(summary: Mapping[str, Any]) -> str:
    moe = summary["moe"]["held_out_loss"]
    text = f"A byte-level transformer with a mixture of experts has a held-out loss of <b>{moe:.4f}</b> nats per byte"
    if "dense" not in summary:
        return text + "."
    dense = summary["dense"]["held_out_loss"]
    return (
        f"{text}; the dense one with the same active parameters, on the same bytes, has <b>{dense:.4f}</b> "
        f"({(moe / dense - 1) * 100:+.1f}%)."
    )


def table(header: Iterable[str], rows: Iterable[Iterable[str]], css: str = "") -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{css}"><tr>{head}</tr>{body}</table></div>'


def results_table(summary: Mapping[str, Any], kinds: list[str]) -> str:
    rows = []
    for kind in kinds:
        result = summary[kind]
        rows.append(
            [
                NAMES[kind],
                f"{result['held_out_loss']:.4f}",
                f"{result['held_out_loss'] / math.log(2):.3f}",
                f"{result['active_parameters']:,}",
                f"{result['parameters']:,}",
                f"{result['lr']:g}",
                f"{result['seconds']:.0f} s",
            ]
        )
    header = ["model", "nats/byte", "bits/byte", "active parameters", "all parameters", "peak lr", "training time"]
    measured = summary["data"]["held_out_bytes_measured"]
    note = f"Mean cross-entropy over {measured:,} held-out bytes that no model was trained on; lower is better."
    return table(header, rows) + f'<p class="note">{note}</p>'


def loss_chart(history: Mapping[str, list[dict[str, Any]]]) -> str:
    curves = []
    for kind, records in history.items():
        losses = [record["train_loss"] for record in records]
        curves.append(Curve(NAMES[kind], COLORS[kind], losses, faint=True))
        curves.append(Curve(NAMES[kind], COLORS[kind], smooth(losses, len(losses) / 100)))
    shown = [value for curve in curves for value in curve.values if math.isfinite(value)]
    low, high = 0.98 * min(shown, default=1.0), 1.02 * max(shown, default=1.0)
    label = "nats per byte, on a logarithmic scale; bold: moving average"
    return line_chart(curves, label=label, low=low, high=high, log=True, title="training loss")


def load_section(records: list[dict[str, Any]]) -> str:
    load = np.array([record["expert_load"] for record in records], dtype=np.float64)  # [steps, L, E]
    load /= load.mean(axis=2, keepdims=True)
    busiest = Curve("busiest expert", COLORS["moe"], [record["max_load"] for record in records])
    maps = "".join(heat_map(load[:, layer], HEAT_HIGH, f"layer {layer}") for layer in range(load.shape[1]))
    chart = line_chart(
        [busiest],
        label="busiest expert of any layer, times the mean load",
        low=0.0,
        high=max(busiest.values) * 1.05,
    )
    return f'<p class="note">Assignments per expert (rows) over the steps.</p>{color_bar(HEAT_HIGH)}{maps}{chart}'


def dropped_section(records: list[dict[str, Any]], capacity_factor: float) -> str:
    if not capacity_factor:
        return "<p>Dropless: no capacity, every assignment is computed (0% dropped).</p>"
    shares = [100 * record["dropped"] for record in records]
    curve = Curve("dropped", COLORS["moe"], shares)
    note = f"Each expert takes at most {capacity_factor:g} times its even share of a training step's assignments."
    chart = line_chart([curve], label="percent of all assignments", low=0.0, high=max(*shares, 1.0), percent=True)
    return f'<p class="note">{note}</p>{chart}'


def sample_section(sample: Mapping[str, str]) -> str:
    note = '<p class="note">Gray: the prompt, from the held-out text. Black: what the mixture of experts wrote.</p>'
    return f'{note}<pre><span class="prompt">{escape(sample["prompt"])}</span>{escape(sample["text"])}</pre>'


def plain_table(items: Iterable[tuple[str, Any]]) -> str:
    rows = [[name.replace("_", " "), f"{value:,}" if type(value) is int else str(value)] for name, value in items]
    return table(["", ""], rows, "plain")


def machine_table(summary: Mapping[str, Any]) -> str:
    items = [*summary["versions"].items(), *((name, summary[name]) for name in ("device", "machine"))]
    return plain_table(items)
