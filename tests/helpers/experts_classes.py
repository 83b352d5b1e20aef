"""Every experts class that the installed transformers has, and one small module of each."""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

from moe_triton.swap import EXPERTS
from tests.helpers.experts_modules import D, E, N

MODELS = Path(transformers.__file__).parent / "models"
SIZES = {
    **dict.fromkeys(["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"], E),
    **dict.fromkeys(["hidden_size", "moe_hidden_size", "d_model"], D),
    **dict.fromkeys(["intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size"], N),
    "d_ff": N,
    "n_shared_experts": 2,
}


# a decorator, a class or a function at the left margin: to parse the files would take two seconds
HEAD = re.compile(r"^(?:@([\w.]+)|(class|def|async def) (\w+))", re.M)


@cache
def classes_by_decorator() -> tuple[list[str], list[str]]:
    """The classes called experts in transformers' modeling files as "family.Class": with its interface, and without."""
    with_interface, without = [], []
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        decorators = []
        for decorator, kind, name in HEAD.findall(path.read_text()):
            if decorator:
                decorators.append(decorator)
                continue
            if kind == "class" and "use_experts_implementation" in decorators:
                with_interface.append(f"{path.parent.name}.{name}")
            elif kind == "class" and EXPERTS.search(name):
                without.append(f"{path.parent.name}.{name}")
            decorators = []
    return with_interface, without


def experts_class(name: str) -> type[nn.Module]:
    family, _, cls = name.partition(".")
    return getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), cls)


class TinyConfig:
    """The defaults of a family's text model, with small sizes; a name that neither has is an AttributeError."""

    def __init__(self, family: str):
        module = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
        classes = [
            cls
            for cls in vars(module).values()
            if isinstance(cls, type) and issubclass(cls, PreTrainedConfig) and cls.__module__ == module.__name__
        ]
        text = [cls for cls in classes if "Text" in cls.__name__]
        self._defaults = [cls() for cls in text or classes]
        self._experts_implementation = "eager"

    def __getattr__(self, name: str) -> object:
        if name in SIZES:
            return SIZES[name]
        for config in () if name.startswith("_") else self._defaults:
            if hasattr(config, name):
                return getattr(config, name)
        raise AttributeError(name)


def tiny_experts(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A module of this class on its eager implementation, with weights large enough to reach its clamps."""
    module = experts_class(name)(TinyConfig(name.partition(".")[0]))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=2.0 if parameter.dim() == 2 else 1.5)
    return module.to(dtype)
