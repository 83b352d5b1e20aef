"""Registers our quantizer with transformers as soon as both are imported, in whichever order, and imports neither."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

WHERE = "transformers.quantizers.auto"  # the module that has the registries


def register_quantizer() -> None:
    """Register `MoeTritonConfig` and its quantizer, now or when transformers' own are imported. Once or more often."""
    if WHERE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    if importlib.util.find_spec("transformers.core_model_loading") is not None:  # since transformers 5
        importlib.import_module("moe_triton.integrations.quantizer")


class _Finder(MetaPathFinder):
    """Finds one module as the others would, and registers after it has run."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != WHERE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                _register()

            loader.exec_module = run_and_register
        return spec
