"""Log the load of every expert while a model trains: to a JSONL file, to TensorBoard where it is installed, as a chart.

    python examples/log_routing.py --out routing-log
    tensorboard --logdir routing-log

Two runs of the language model of train_language_model.py, with and without a load-balance loss: compare the load of
their busiest experts. Takes seconds on a CPU. The charts need matplotlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from train_language_model import LanguageModel, next_byte_loss, read_text, windows

from moe_triton import LoadMonitor, plot_load
from moe_triton.metrics import JsonlSink, TensorBoardSink


def tensorboard_sink(folder: Path) -> TensorBoardSink | None:
    """A sink for TensorBoard; None, and a line that says so, where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("TensorBoard is not installed (pip install tensorboard): writing the JSONL file only")
        return None
    return TensorBoardSink(SummaryWriter(folder))


def train(out: Path, aux_loss_weight: float, steps: int) -> float:
    """Train, log every 10 steps into `out`, and return the load of the busiest expert at the end."""
    torch.manual_seed(0)
    text, _ = read_text()
    model = LanguageModel()
    for block in model.blocks:
        block.moe.aux_loss_weight = aux_loss_weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    monitor = LoadMonitor(model)
    out.mkdir(parents=True, exist_ok=True)
    log = out / "load.jsonl"
    log.unlink(missing_ok=True)  # JsonlSink appends
    sinks = [JsonlSink(log), tensorboard_sink(out)]
    history = []
    for step in range(1, steps + 1):
        window = windows(text, 16, 64, step)
        logits, aux_loss, _ = model(window[:, :-1])
        optimizer.zero_grad()
        (next_byte_loss(logits, window) + aux_loss).backward()
        optimizer.step()
        if step % 10 == 0:
            reading = monitor.read(mode="train")  # waits for the device, and starts counting anew
            history.append(reading)
            for sink in filter(None, sinks):
                sink(reading, step, "train")
            busiest = max(statistics.max_load for statistics in reading.values())
            print(f"step {step:3d}  busiest expert {busiest:.2f} times the mean", flush=True)
    plot_load(history, out / "load.png")
    return busiest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("routing-log"))
    parser.add_argument("--steps", type=int, default=60, help="a multiple of 10")
    options = parser.parse_args()
    for name, weight in (("balanced", 0.01), ("unbalanced", 0.0)):
        print(f"aux_loss_weight={weight}: {options.out / name}")
        train(options.out / name, weight, options.steps)


if __name__ == "__main__":
    main()
