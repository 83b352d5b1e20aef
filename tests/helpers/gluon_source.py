"""The source of the Gluon kernels as plain Python functions over given primitives (see `gluon_emulator`)."""

from __future__ import annotations

import builtins
import importlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

EMULATED = [
    f"moe_triton_kernels.{name}"
    for name in (
        "operands",
        "grouped_gemm",
        "tiles",
        "activations",
        "preactivation",
        "gluon.cluster",
        "gluon.pipeline",
        "gluon.down",
        "gluon.up",
        "gluon.d_hidden",
    )
]


@lru_cache
def compiled(source: str, path: str) -> CodeType:
    return compile(source, path, "exec")


class Source:
    """The modules, with `names` for what `gluon.names` exports, and with changes in whichever has the text."""

    def __init__(self, names: SimpleNamespace, changes: Mapping[str, str]) -> None:
        self.names, self.changes = names, changes
        self.changed: set[str] = set()
        self.modules: dict[str, SimpleNamespace] = {}

    def function(self, module: str, name: str) -> Callable[..., None]:
        """ValueError where a text that is to change is in no module that it needs."""
        found = getattr(self.module(module), name)
        if self.changed != set(self.changes):
            raise ValueError("changes: a text is not in the source")
        return found

    def module(self, name: str) -> SimpleNamespace:
        if name not in self.modules:
            path = Path(importlib.import_module(name).__file__)
            source = path.read_text(encoding="utf-8")
            for old, new in self.changes.items():
                if old in source:
                    source = source.replace(old, new)
                    self.changed.add(old)
            space = {"__name__": name, "__builtins__": {**vars(builtins), "__import__": self.import_module}}
            self.modules[name] = module = SimpleNamespace()
            exec(compiled(source, str(path)), space)
            vars(module).update(space)
        return self.modules[name]

    def import_module(self, name: str, *arguments: Any) -> Any:
        if name in EMULATED:
            return self.module(name)
        if name == "moe_triton_kernels.gluon.names":
            return self.names
        if name in ("triton", "triton.language"):
            return SimpleNamespace(
                jit=lambda fn=None, **_: fn or (lambda f: f), constexpr_function=lambda fn: fn, language=self.names.gl
            )
        return builtins.__import__(name, *arguments)
