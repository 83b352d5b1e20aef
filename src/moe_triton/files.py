"""Files that are either the old one or the new one, never half of each."""

from __future__ import annotations

import contextlib
import os
import socket
import zlib
from collections.abc import Iterable, Iterator
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


class Locked(Exception):
    """Another process holds the lock; the message names it where it is known."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file `path`, which is removed at the end; a process that ends in whatever way holds it no longer.

    Raises Locked where another process holds it, OSError where the file cannot be made. Where the system has no such
    locks nothing is locked.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        yield
        return
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise Locked(holder or "another process") from None
        except OSError:  # a file system without locks
            pass
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # the holder before has removed the file in between
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


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
