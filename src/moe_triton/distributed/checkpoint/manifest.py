"""The manifest of a checkpoint: what it holds and in which files, as JSON. Replacing it is what makes a save count."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_triton.distributed.errors import CheckpointError
from moe_triton.files import reason, replace_file

NAME = "checkpoint.json"
FORMAT = "moe_triton.distributed/1"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A checkpoint but for its tensors.

    data       the folder of the safetensors files, inside the checkpoint's own
    files      file name -> {"bytes", "crc32"}
    tensors    key -> {"shape", "dtype"} of the global tensor
    experts    expert module -> {"num_experts", and "placement" where it has one}
    optimizer  what `optimizer_state.describe` says, or None
    extra      the user's, encoded
    """

    data: str
    files: dict[str, dict[str, int]]
    tensors: dict[str, dict[str, Any]]
    experts: dict[str, dict[str, Any]]
    optimizer: dict[str, Any] | None
    extra: Any

    def write(self, folder: Path) -> None:
        """Replace the folder's manifest atomically. Raises OSError."""
        body = json.dumps({"format": FORMAT, **asdict(self)})
        replace_file(folder / NAME, [f'{{"crc32": {zlib.crc32(body.encode())}, "manifest": {body}}}\n'.encode()])

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raise CheckpointError naming the file: not there, unreadable, damaged or of another kind."""
        path = folder / NAME
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            body = found["manifest"]
            if found["crc32"] != zlib.crc32(json.dumps(body).encode()):
                raise ValueError("its contents do not match their checksum")
            if body.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            return cls(**body)
        except FileNotFoundError as error:
            raise CheckpointError(f"{folder} holds no checkpoint: there is no {path}") from error
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {reason(error)}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged or is not a manifest of moe_triton: {error}") from error


def encode(name: str, value: object) -> Any:
    """Return a value as JSON that `decode` turns into the same one: tuples and small tensors included.

    Raises TypeError naming what cannot be saved so.
    """
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, list):
        return [encode(f"{name}[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": [encode(f"{name}[{i}]", item) for i, item in enumerate(value)]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(f"{name}[{key!r}]", item) for key, item in value.items()}}
    if isinstance(value, Tensor) and not value.is_complex():
        return {"tensor": value.detach().cpu().tolist(), "dtype": dtype_name(value.dtype), "shape": list(value.shape)}
    kind = "dict with keys that are no strings" if isinstance(value, dict) else type(value).__name__
    raise TypeError(f"{name}: got {kind}, wanted None, a number, string, tensor, or a list, tuple or dict of such")


def decode(value: Any) -> Any:
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "tuple" in value:
        return tuple(decode(item) for item in value["tuple"])
    if "dict" in value:
        return {key: decode(item) for key, item in value["dict"].items()}
    return torch.tensor(value["tensor"], dtype=dtype_of(value["dtype"])).reshape(value["shape"])


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    return getattr(torch, name)
