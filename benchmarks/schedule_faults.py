"""What three gloo ranks raise when one of them fails or goes its own way, where waits only queue as under NCCL.

    python benchmarks/schedule_faults.py [--timeout SECONDS]

Writes the table of docs/distributed.md. It takes seven minutes: what is only noticed by time takes the time-out.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is first imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from marked_table import write_table

from tests.helpers.ranks import started
from tests.helpers.schedule_faults import CASES, WORLD, Raised, rows, what_others_raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timeout", type=float, default=30.0, help="of the groups, in seconds")
    timeout_s = parser.parse_args().timeout
    found: dict[tuple[str, str], list[Raised]] = {}
    with started(WORLD) as ranks:
        for fault, mode in CASES:
            found[fault, mode] = what_others_raise(ranks, mode, fault, timeout_s)
            print(rows(found, timeout_s)[-1], found[fault, mode][0].message, flush=True)
    write_table("distributed.md", "schedule faults", "schedule_faults", "\n".join(rows(found, timeout_s)))


if __name__ == "__main__":
    main()
