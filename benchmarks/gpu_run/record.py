"""The file that a run leaves: rewritten, whole, with every result that comes in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from gpu_run.schedule import Found
from moe_triton.benchmarking.report import write_json

SCHEMA = "moe-triton-gpu/1"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def result_path(facts: dict[str, Any], folder: Path) -> Path:
    """Where the results of this device and commit lie; "dirty" where files differ from the commit."""
    commit = facts["commit"]
    name = "unknown" if commit is None else commit["hash"][:10] + "-dirty" * commit["dirty"]
    return folder / slug(facts["device"]["name"]) / f"gpu-{name}.json"


class Record:
    """What is known of one device and commit: item -> results. `facts` are those of this run."""

    def __init__(self, facts: dict[str, Any], folder: Path) -> None:
        self.facts, self.path = facts, result_path(facts, folder)
        self.items: dict[str, Found] = {}

    def load(self, folders: list[Path]) -> None:
        """The results of earlier runs: the first file there is that the same sources made."""
        for folder in folders:
            path = result_path(self.facts, folder)
            if path.is_file():
                content = json.loads(path.read_text(encoding="utf-8"))
                if (content.get("schema"), content.get("source")) == (SCHEMA, self.facts["source"]):
                    self.items = content["items"]
                    return

    def write(self) -> None:
        """The old file or the new one: never half of each."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"schema": SCHEMA, **self.facts, "items": self.items})
