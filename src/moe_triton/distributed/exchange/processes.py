"""Which process a rank is, and whether it runs: as far as another process of the same machine can see."""

from __future__ import annotations

import hashlib
import os
import socket
from functools import cache
from pathlib import Path

Identity = tuple[int, int, int]  # hash of where its process id is valid, process id, its start in clock ticks


def identity() -> Identity:
    """Identify this process by three numbers, so that the other ranks can check whether it runs."""
    return pid_space(), os.getpid(), start_time(os.getpid())


@cache
def pid_space() -> int:
    """Hash where a process id is valid and visible in /proc: machine, boot and namespaces. Random where unknown."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            raise OSError("/proc shows another PID namespace than this process's own")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        namespaces = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("pid", "time")]
        place = repr((socket.gethostname(), boot, namespaces)).encode()
    except OSError:  # then no other rank looks for this process, and this one for none
        place = os.urandom(32)
    return int.from_bytes(hashlib.sha256(place).digest()[:7])


def stat_of(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third (the state) on; empty when it cannot be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return []
    return text.rpartition(")")[2].split()  # the name before it may hold anything


def start_time(pid: int) -> int:
    fields = stat_of(pid)
    return int(fields[19]) if len(fields) > 19 else 0


def state_of(who: Identity) -> str:
    """Return "dead", "stopped", or "" for a process that runs or that cannot be seen from here."""
    space, pid, started = who
    if space != pid_space():
        return ""
    if fields := stat_of(pid):
        if fields[0] in "ZX" or int(fields[19]) != started:
            return "dead"
        return "stopped" if fields[0] in "Tt" else ""
    try:
        os.kill(pid, 0)  # its file may be hidden, or this process may have no file descriptor left to read it
    except ProcessLookupError:
        return "dead"
    except OSError:
        pass
    return ""
