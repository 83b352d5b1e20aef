"""Write the two tables of docs/numbers.md: which tokens' bits depend on their batch, and how far the gradients of the
auxiliary losses depend on how a batch is spread over ranks and micro-batches.

    python benchmarks/invariance.py

Not a measurement of speed: a busy machine gives the same numbers. For the cost, see benchmarks/invariance_cost.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is first imported
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from marked_table import write_table  # noqa: E402

from moe_triton import MoE  # noqa: E402
from tests.helpers.loss_gradients import CELLS, error_of_cell, table  # noqa: E402
from tests.helpers.ranks import started  # noqa: E402

TOKENS, HIDDEN = 512, 256
SIZES = (1, 2, 7, 32, 33, 100, 255)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def changed(layer: MoE, x: torch.Tensor, size: int) -> float:
    """The share of tokens [0, 1] whose bits differ from those in the whole batch, in batches of `size`."""
    whole = layer(x).output
    parts = torch.cat([layer(part).output for part in x.split(size)])
    return (whole != parts).any(-1).double().mean().item()


def permuted(layer: MoE, x: torch.Tensor) -> float:
    order = torch.randperm(len(x))
    return (layer(x[order]).output != layer(x).output[order]).any(-1).double().mean().item()


@torch.no_grad()
def of_batches() -> list[str]:
    lines = [
        f"| dtype | `batch_invariant` | {' | '.join(f'T={size}' for size in SIZES)} | permuted |",
        f"|---|---|{'--:|' * (len(SIZES) + 1)}",
    ]
    for dtype in DTYPES:
        for invariant in (False, True):
            torch.manual_seed(0)
            layer = MoE(HIDDEN, 192, num_experts=8, top_k=2, batch_invariant=invariant, dtype=dtype)
            x = torch.randn(TOKENS, HIDDEN, dtype=dtype)
            shares = [changed(layer, x, size) for size in SIZES] + [permuted(layer, x)]
            name = str(dtype).removeprefix("torch.")
            lines.append(f"| {name} | {invariant} | {' | '.join(f'{share:.0%}' for share in shares)} |")
            print(lines[-1], flush=True)
    return lines


def of_ranks() -> list[str]:
    with started(4) as ranks:
        errors = [max(ranks.run(error_of_cell, *cell)) for cell in CELLS]
    lines = table(errors)
    print("\n".join(lines))
    return lines


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, lines in (("batches", of_batches()), ("gradients", of_ranks())):
        write_table("numbers.md", name, "invariance", "\n".join(lines))


if __name__ == "__main__":
    main()
