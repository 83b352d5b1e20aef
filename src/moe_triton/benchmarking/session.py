"""The file that a run is kept in: rewritten atomically after every cell, so that an interrupted run goes on from it.

A cell is one case in one mode (or its stages). Its key covers everything that was asked for and everything it was
measured with (device, versions, our source), so that a cell is only taken over where measuring it again would measure
the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moe_triton.benchmarking.cases import Case
from moe_triton.benchmarking.report import write_json
from moe_triton.benchmarking.results import Run, document, read_results
from moe_triton.benchmarking.stages import StageTable, table_from

MADE_ANEW = ("created", "commit")  # facts that may differ between two sessions of one run
NOT_OF_A_CELL = ("suite", "modes", "command")  # settings that say which cells there are, not how one is measured
STAGES = "stages"  # the "mode" of a cell that holds stages


@dataclass(kw_only=True)
class Session:
    """The cells of one command.

    path      where they are kept; None keeps nothing
    facts     device, versions and commit
    settings  what was asked for
    source    digest of the code that measures
    """

    path: Path | None
    facts: dict[str, Any]
    settings: dict[str, Any]
    source: str
    order: list[str] = field(default_factory=list)
    found: dict[str, Run | StageTable] = field(default_factory=dict)

    def key(self, case: Case, mode: str, names: Sequence[str]) -> str:
        """Of a cell; keys asked for are the cells of this command, in that order."""
        facts = {name: value for name, value in self.facts.items() if name not in MADE_ANEW}
        asked = {name: value for name, value in self.settings.items() if name not in NOT_OF_A_CELL}
        parts = [asdict(case), mode, list(names), asked, facts, self.source]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        if key not in self.order:
            self.order.append(key)
        return key

    def resume(self) -> None:
        """Takes over what the file holds. ValueError where it is no result of ours: it is not overwritten."""
        if self.path is None or not self.path.exists():
            return
        results = read_results(self.path, str(self.path))
        self.found = {run.key: run for run in results.runs if run.key}
        try:
            tables = [table_from(value) for value in results.facts.get(STAGES, [])]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} holds a broken table of stages: {error}") from error
        self.found |= {table.key: table for table in tables}

    def add(self, key: str, cell: Run | StageTable) -> None:
        """Keeps a finished cell, and rewrites the file. OSError where the disk is full or read-only."""
        cell.key = key
        self.found[key] = cell
        self.write()

    def cells(self) -> list[Run | StageTable]:
        return [self.found[key] for key in self.order if key in self.found]

    @property
    def runs(self) -> list[Run]:
        return [cell for cell in self.cells() if isinstance(cell, Run)]

    @property
    def stages(self) -> list[StageTable]:
        return [cell for cell in self.cells() if isinstance(cell, StageTable)]

    def document(self) -> dict[str, Any]:
        """Everything as plain values."""
        stages = [asdict(table) for table in self.stages]
        return {**document(self.runs, self.facts, self.settings), STAGES: stages}

    def write(self) -> None:
        if self.path is not None:
            write_json(self.path, self.document())
