"""What a run shows: the bar fits 80 columns, and plain lines come every ten steps."""

from __future__ import annotations

import io
import re

from rich.console import Console

from moe_triton.training.display import Display

RECORD = {"train_loss": 1.2345, "tokens_per_s": 53594.2, "dropped": 0.1234, "max_load": 2.5}


def show(console: Console, kind: str, record: dict[str, float], steps: int) -> str:
    with Display(console, kind, steps, 0) as display:
        for step in range(1, steps + 1):
            display.update({"step": step, **record})
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


def test_bar_on_a_terminal_fits_80_columns() -> None:
    shown = show(Console(file=io.StringIO(), force_terminal=True, width=80), "moe", RECORD, 1500)
    last = re.split(r"[\r\n]", shown.rstrip())[-1]
    assert "1500/1500" in last
    assert "loss 1.234  53,594 tok/s  drop 12.3%  load 2.50x" in last


def test_plain_lines_elsewhere() -> None:
    lines = show(Console(file=io.StringIO(), width=80), "moe", RECORD, 23).splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"moe step {step}/23" for step in (1, 10, 20, 23)]
    assert lines[0].endswith("loss 1.234  53,594 tok/s  drop 12.3%  load 2.50x")


def test_dense_model_has_no_experts_to_show() -> None:
    record = {"train_loss": 1.2345, "tokens_per_s": 53594.2}
    shown = show(Console(file=io.StringIO(), width=80), "dense", record, 1)
    assert shown.splitlines() == ["dense step 1/1  loss 1.234  53,594 tok/s"]
