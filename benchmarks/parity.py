"""Compare compositions of parallelism on four gloo processes with one process, and write the table of
docs/distributed.md.

    python benchmarks/parity.py           # run all of the sample, and write the table
    python benchmarks/parity.py --list    # only show which they are
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before triton is first imported
sys.path.insert(0, str(ROOT))

from tests.helpers.parity_matrix import Composition, error_of, rows, sample  # noqa: E402
from tests.helpers.ranks import started  # noqa: E402

PAGE = ROOT / "docs" / "distributed.md"
TABLE = re.compile(r"(<!-- table: parity \(benchmarks/parity\.py\) -->\n).*?(<!-- end of table -->)", re.DOTALL)


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
    text = "\n".join(rows(errors))
    PAGE.write_text(TABLE.sub(lambda found: f"{found[1]}{text}\n{found[2]}", PAGE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
