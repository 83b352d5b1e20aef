"""The bytes to train on: reading, splitting and batching. Everything here is a pure function of its arguments."""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_triton.training.errors import TrainingError
from moe_triton.training.files import reason

# Tests, bundled packages, and directories of tables rather than programs.
SKIPPED = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"})
PARTS = ("train", "validation", "held_out")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Three disjoint parts of a text, each [N] uint8 on the CPU.

    train       what batches are drawn from
    validation  what settings such as the learning rate are chosen by
    held_out    what the final losses are measured on, and nothing else
    source      where the bytes come from, in words
    num_files   files read
    digest      SHA-256 of the three parts
    """

    train: Tensor
    validation: Tensor
    held_out: Tensor
    source: str
    num_files: int
    digest: str


def load_corpus(path: Path | None, seq_len: int) -> Corpus:
    """Read a file, a directory of text, or (None) the source of the Python standard library, and splits it.

    A twentieth of the files is held out and a twentieth is for validation: whole files, chosen by the SHA-256 of their
    relative path, so that neither the machine nor the order of reading matters. Where that leaves a part without a
    window of seq_len + 1 bytes (one file, few files), the ends of all files are taken instead.

    Raises TrainingError that names the path: missing, unreadable, without text, too short.
    """
    if path is None:
        root = Path(sysconfig.get_paths()["stdlib"])
        names = list(relative_files(root, ".py", SKIPPED))
        source = f"source of the Python {platform.python_version()} standard library"
    else:
        if not path.exists():
            raise TrainingError(f"--data: {path} does not exist")
        root = path if path.is_dir() else path.parent
        names = list(relative_files(root, "", ())) if path.is_dir() else [path.name]
        source = str(path)
    texts = {}
    for name in sorted(names):
        try:
            text = (root / name).read_bytes()
        except OSError as error:
            raise TrainingError(f"--data: cannot read {root / name}: {reason(error)}") from error
        if text and b"\0" not in text[:8192]:  # a NUL byte: not a text
            texts[name] = text
    place = root if path is None else path
    if not texts:
        raise TrainingError(f"--data: {place} holds no text")

    parts = split_by_file(texts)
    if any(len(part) <= seq_len for part in parts):
        parts = split_by_tail(texts)
    for name, part in zip(PARTS, parts, strict=True):
        if len(part) <= seq_len:
            size = sum(len(text) for text in texts.values())
            raise TrainingError(
                f"--data: {place} is too short: of its {size} bytes {len(part)} are the {name} part, "
                f"wanted more than --seq-len {seq_len}"
            )
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    train, validation, held_out = (torch.from_numpy(np.frombuffer(part, dtype=np.uint8).copy()) for part in parts)
    return Corpus(
        train=train,
        validation=validation,
        held_out=held_out,
        source=source,
        num_files=len(texts),
        digest=digest.hexdigest(),
    )


def relative_files(root: Path, suffix: str, skipped: Collection[str]) -> Iterator[str]:
    """Yield the POSIX paths of the files, relative to `root`, without hidden and `skipped` directories."""
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in skipped and not name.startswith(".")]
        for name in names:
            file = Path(directory, name)
            if name.endswith(suffix) and file.is_file():
                yield file.relative_to(root).as_posix()


def part_of(name: str) -> str:
    """Return the part of a file, by the SHA-256 of its relative path: of twenty files one, one and eighteen."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 20
    return {0: "held_out", 1: "validation"}.get(bucket, "train")


def split_by_file(texts: dict[str, bytes]) -> list[bytes]:
    """Return (train, validation, held_out), whole files each, in order of their names."""
    return [b"\n".join(text for name, text in texts.items() if part_of(name) == part) for part in PARTS]


def split_by_tail(texts: dict[str, bytes]) -> list[bytes]:
    """Return (train, validation, held_out): the first 18 twentieths of every file, the next one, the last one."""
    cuts = [(0.0, 0.9), (0.9, 0.95), (0.95, 1.0)]
    return [
        b"\n".join(text[int(len(text) * low) : int(len(text) * high)] for text in texts.values()) for low, high in cuts
    ]


def batch(text: Tensor, seed: int, step: int, batch_size: int, seq_len: int) -> Tensor:
    """Return the windows of step `step`: [batch_size, seq_len + 1] int64, drawn uniformly from `text` [N] uint8.

    It depends on the arguments alone, so a resumed run, and the dense model, see the same bytes in the same order.
    """
    starts = np.random.default_rng([seed, step]).integers(0, text.numel() - seq_len, size=batch_size)
    return torch.stack([text[start : start + seq_len + 1] for start in starts.tolist()]).long()


def evaluation_windows(text: Tensor, seq_len: int, limit: int = 512) -> Tensor:
    """Return at most `limit` windows, spread evenly, that predict no byte twice: [W, seq_len + 1] int64."""
    available = (text.numel() - 1) // seq_len
    count = min(limit, available)
    starts = [i * available // count * seq_len for i in range(count)]
    return torch.stack([text[start : start + seq_len + 1] for start in starts]).long()
