"""transformers' experts interface: under which name a module's forward looks its implementation up, and where."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

KEY = "moe_triton"


def registry(module: nn.Module) -> Any:
    """Return the registry that the module's forward looks its implementation up in, or None where it does not."""
    return registry_of(type(module))


def registry_of(cls: Any) -> Any:
    """Return the registry of a class's forward: a free variable of the wrapper that transformers' decorator puts on."""
    forward = cls.forward
    while forward is not None:
        code = getattr(forward, "__code__", None)
        if code is not None and "experts_interface" in code.co_freevars:
            return forward.__closure__[code.co_freevars.index("experts_interface")].cell_contents
        forward = getattr(forward, "__wrapped__", None)
    return None


def implementation(module: nn.Module) -> str | None:
    """Return the name of the implementation that the module's config asks for."""
    return getattr(getattr(module, "config", None), "_experts_implementation", None)


def use_ours(module: nn.Module, whole: Any = None) -> None:
    """Let an experts module look ours up: by the switch of the transformers model around it, or by its own config.

    whole: the model; None: its switch is not to be used, which affects all of its experts.
    """
    if implementation(module) != KEY and whole is not None:
        whole.set_experts_implementation(KEY)
    if implementation(module) != KEY:
        config: Any = copy.copy(module.config)
        # PreTrainedConfig's public setter also writes to the sub-configs, which the copy shares with the original
        internal = hasattr(config, "_experts_implementation_internal")
        setattr(config, f"_experts_implementation{'_internal' if internal else ''}", KEY)
        module.config = config
