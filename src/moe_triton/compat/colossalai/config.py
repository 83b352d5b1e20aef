"""The config of `launch`: a dict, a Python file of assignments, or a JSON file; and what of it is acted on."""

from __future__ import annotations

import json
import runpy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_triton.checks import check_int, check_number

UNSUPPORTED = ("fp16", "zero", "amp")  # they change training upstream, and would silently change nothing here


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `launch` and `initialize` read of a config.

    moe_size, exchange     parallel.moe: size, and options of `moe_triton.distributed.ExpertParallel` (v0.0.2)
    max_ep_size            top level (v0.1.6)
    tensor_size            parallel.tensor: a size, or a dict with one
    gradient_accumulation  backward passes per optimizer step
    clip_grad_norm         largest norm of all gradients together; 0 does not clip
    """

    moe_size: int | None = None
    exchange: dict[str, Any] = field(default_factory=dict)
    max_ep_size: int | None = None
    tensor_size: int = 1
    gradient_accumulation: int = 1
    clip_grad_norm: float = 0.0


def read_config(config: str | Path | dict[str, Any]) -> dict[str, Any]:
    """Return a config as a dict; a .py file's is what it assigns, without names that begin with an underscore.

    A Python file is run: it has to be trusted as a program is.

    Raises ValueError for a file of another kind, TypeError for another argument, FileNotFoundError.
    """
    if isinstance(config, dict):
        return dict(config)
    if not isinstance(config, (str, Path)):
        raise TypeError(f"config: got {type(config).__name__}, wanted a dict or the path of a .py or .json file")
    path = Path(config)
    if path.suffix not in (".py", ".json"):
        raise ValueError(f"config: got {str(path)!r}, wanted a .py or .json file")
    if not path.is_file():
        raise FileNotFoundError(f"config: {path} does not exist")
    if path.suffix == ".json":
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"config: {path} holds a {type(found).__name__}, wanted an object")
        return found
    return {name: value for name, value in runpy.run_path(str(path)).items() if not name.startswith("_")}


def settings_of(config: dict[str, Any]) -> Settings:
    """Return the checked settings of a config; other names in it are the user's own."""
    for name in UNSUPPORTED:
        if config.get(name):
            raise ValueError(f"{name}: got {config[name]!r}, which this package does not do; wanted it left out")
    parallel = config.get("parallel") or {}
    if not isinstance(parallel, dict):
        raise TypeError(f"parallel: got {type(parallel).__name__}, wanted a dict")
    unknown = set(parallel) - {"moe", "tensor", "pipeline"}
    if unknown:
        raise ValueError(f"parallel: got {', '.join(sorted(unknown))}, wanted moe, tensor")
    pipeline, _ = _size("pipeline", parallel.get("pipeline", 1))
    if pipeline != 1:
        raise ValueError(f"parallel.pipeline: got {pipeline}, wanted 1: there is no pipeline parallelism here")
    moe_size, max_ep_size = None, config.get("max_ep_size")
    exchange: dict[str, Any] = {}
    if "moe" in parallel:
        moe_size, exchange = _size("moe", parallel["moe"])
    if max_ep_size is not None:
        check_int("max_ep_size", max_ep_size, low=1)
        if moe_size is not None:
            raise ValueError("max_ep_size: got one beside parallel.moe.size, wanted one of the two")
    tensor_size, options = _size("tensor", parallel.get("tensor", 1))
    mode = options.pop("mode", None)
    if mode not in (None, "1d") or options:
        raise ValueError(f"parallel.tensor: got {parallel['tensor']!r}, wanted dict(size=N, mode='1d')")
    accumulation, clip = config.get("gradient_accumulation", 1), config.get("clip_grad_norm", 0.0)
    check_int("gradient_accumulation", accumulation, low=1)
    check_number("clip_grad_norm", clip, low=0)
    return Settings(
        moe_size=moe_size,
        exchange=exchange,
        max_ep_size=max_ep_size,
        tensor_size=tensor_size,
        gradient_accumulation=accumulation,
        clip_grad_norm=float(clip),
    )


def _size(name: str, value: Any) -> tuple[int, dict[str, Any]]:
    """Return (size, the other options) of one kind of parallelism."""
    options = dict(value) if isinstance(value, dict) else {"size": value}
    if "size" not in options:
        raise ValueError(f"parallel.{name}: got {value!r}, wanted a size")
    size = options.pop("size")
    check_int(f"parallel.{name}.size", size, low=1)
    return size, options
