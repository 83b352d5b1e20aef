"""Where readings go: a JSONL file, TensorBoard, or a logger in the shape of wandb's run.

A sink is called with what `LoadMonitor.read` gave, the step, and "train" or "eval".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moe_triton.metrics.statistics import LoadStatistics

Reading = Mapping[str, LoadStatistics]
Sink = Callable[[Reading, int, str], None]


def load_scalars(reading: Reading, prefix: str = "moe") -> dict[str, float]:
    """Return a reading as numbers by name, "<prefix>/<layer>/<statistic>"; what is not known is left out.

    Of the ranks' rows and seconds the largest: "received_rows", "exchange_s", and "rank_imbalance".
    """
    found: dict[str, float] = {}
    for layer, statistics in reading.items():
        values = statistics._asdict()
        if (exchange := values.pop("exchange")) is not None:
            values |= {"received_rows": max(exchange.rows), "exchange_s": max(exchange.seconds)}
            values["rank_imbalance"] = exchange.imbalance
        known = {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
        found |= {f"{prefix}/{layer}/{name}": value for name, value in known.items()}
    return found


def as_json(statistics: LoadStatistics) -> dict[str, Any]:
    """Return statistics as plain values."""
    exchange = statistics.exchange
    return {**statistics._asdict(), "exchange": None if exchange is None else exchange._asdict()}


class JsonlSink:
    """Appends a line of JSON per reading to a file: {"step", "mode", "layers": {name: statistics}}."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __call__(self, reading: Reading, step: int, mode: str = "train") -> None:
        layers = {name: as_json(statistics) for name, statistics in reading.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "mode": mode, "layers": layers}) + "\n")


class TensorBoardSink:
    """Writes `load_scalars` to a SummaryWriter, which has `add_scalar(name, value, step)`."""

    def __init__(self, writer: Any):
        self.writer = writer

    def __call__(self, reading: Reading, step: int, mode: str = "train") -> None:
        for name, value in load_scalars(reading, f"moe/{mode}").items():
            self.writer.add_scalar(name, value, step)


class WandbSink:
    """Logs `load_scalars` to a run, which has `log(numbers, step=...)`."""

    def __init__(self, run: Any):
        self.run = run

    def __call__(self, reading: Reading, step: int, mode: str = "train") -> None:
        self.run.log(load_scalars(reading, f"moe/{mode}"), step=step)
