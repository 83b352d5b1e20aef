"""Tables between markers in the pages of docs/, each with the name of the script that makes it."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"
MARKED = re.compile(r"(<!-- table: ([^>]+?) \(benchmarks/(\w+)\.py\) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def write_table(page: str, name: str, script: str, text: str) -> None:
    """Put `text` between the markers of the table `name`, which benchmarks/`script`.py makes, in docs/`page`."""
    path, filled = DOCS / page, []

    def fill(found: re.Match[str]) -> str:
        if found.groups()[1:3] != (name, script):
            return found[0]
        filled.append(name)
        return f"{found[1]}{text}\n{found[4]}"

    document = MARKED.sub(fill, path.read_text(encoding="utf-8"))
    if filled != [name]:
        raise ValueError(f"{path}: got {len(filled)} tables called {name!r} of {script}.py, wanted one")
    path.write_text(document, encoding="utf-8")
