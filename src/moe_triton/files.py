"""Files that are either the old one or the new one, never half of each."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from pathlib import Path


def reason(error: OSError) -> str:
    """The system's words for an error, such as "No space left on device"."""
    return error.strerror or str(error)


def replace_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes `path` atomically: a temporary file beside it, flushed to disk, then renamed over it.

    Whatever happens on the way (a full disk, ctrl-C), the old file stays as it was and the temporary one is removed;
    a kill may leave `path` + ".tmp" behind, which the next write overwrites. Raises OSError.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_directory(path: Path) -> None:
    """Makes a rename durable. Only POSIX systems can open a directory; elsewhere the rename alone has to do."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_checksum(path: Path) -> int:
    """CRC-32 of a file's bytes."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
