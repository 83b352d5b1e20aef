"""Tables for a terminal and for pipes: whole where they fit the width, otherwise in a narrow form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

RANGE = re.compile(r" \([-\d.x]+\)$")  # the 20th to 80th percentile behind a median
QUIET = ("", "ok")  # what is not worth a line of its own
BETWEEN = 3  # columns that separate two cells, at most


@dataclass
class Narrowed:
    """A table that fits a width, and what it lost: notes to print below it, and the columns that are left out."""

    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def width(self) -> int:
        """The columns of a terminal that the table takes."""
        cells = zip(self.columns, *self.rows, strict=True)
        return sum(max(map(cell_len, column)) + BETWEEN for column in cells) + 1

    def drop(self, name: str) -> list[str]:
        """Removes a column, and returns its cells."""
        index = self.columns.index(name)
        del self.columns[index]
        return [row.pop(index) for row in self.rows]


def narrow(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, text: Sequence[str], less: Sequence[str]
) -> Narrowed:
    """Fit a table into a width, with as little lost as that takes.

    First a last column of text moves below the table; then ranges go and medians stay; then the columns of `less`, in
    this order, which are named.
    """
    found = Narrowed(list(columns), [list(row) for row in rows])
    if found.width() > width and len(columns) > 1 and columns[-1] in text:
        notes = found.drop(columns[-1])
        found.notes = [f"{row[0]}: {note}" for row, note in zip(found.rows, notes, strict=True) if note not in QUIET]
    if found.width() > width:
        found.rows = [[RANGE.sub("", cell) for cell in row] for row in found.rows]
    for name in less:
        if found.width() > width and name in found.columns:
            found.drop(name)
            found.left_out.append(name)
    return found


def plain_console() -> Console:
    """Return a console without colours where there is no terminal; as wide as COLUMNS says, 80 without it."""
    console = Console()
    return console if console.is_terminal else Console(no_color=True, highlight=False)


def print_table(
    console: Console,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    text: Sequence[str] = (),
    less: Sequence[str] = (),
    styles: Mapping[int, str] | None = None,
    title: str | None = None,
) -> None:
    """Print a table: numbers to the right, the columns that `text` names to the left; lines in a terminal only.

    less: the columns that a narrow form does without, the first one first. styles: by the number of a row.
    """
    found = narrow(columns, rows, console.width, text, less)
    if title is not None:
        console.print(title, highlight=False, markup=False)
    shown = Table(box=Table().box if console.is_terminal else None)
    for name in found.columns:
        is_text = name in text
        shown.add_column(name, justify="left" if is_text else "right", overflow="fold", no_wrap=not is_text)
    for index, cells in enumerate(found.rows):
        shown.add_row(*map(Text, cells), style=(styles or {}).get(index))
    console.print(shown)
    lines = [f"  {note}" for note in found.notes]
    if found.left_out:
        lines.append(f"  without {', '.join(found.left_out)}, for which this terminal is too narrow")
    if lines:
        console.print("\n".join(lines), highlight=False, markup=False)
