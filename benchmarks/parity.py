"""Compare compositions of parallelism on four gloo processes with one process, and write the table of
docs/distributed.md.

    python benchmarks/parity.py           # run all of the sample, and write the table
    python benchmarks/parity.py --list    # only show which they are
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is first imported
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from marked_table import write_table

from tests.helpers.parity_matrix import Composition, error_of, rows, sample
from tests.helpers.ranks import started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="run nothing")
    if parser.parse_args().list:
        print("\n".join(rows(dict.fromkeys(sample(), float("nan")))))
        return
    errors: dict[Composition, float] = {}
    with started(4) as ranks:
        for composition in sample():
            errors[composition] = max(ranks.run(error_of, composition))
            print(rows(errors)[-1], flush=True)
    write_table("distributed.md", "parity", "parity", "\n".join(rows(errors)))


if __name__ == "__main__":
    main()
