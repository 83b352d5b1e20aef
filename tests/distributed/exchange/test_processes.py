"""Whether a process has ended, as far as another one can see."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from moe_triton.distributed.exchange import processes
from moe_triton.distributed.exchange.processes import Identity, state_of


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


def identity_of(pid: int) -> Identity:
    return processes.pid_space(), pid, processes.start_time(pid)


def test_states_of_a_process(child):
    who = identity_of(child.pid)
    assert state_of(who) == ""
    child.send_signal(signal.SIGSTOP)
    os.waitpid(child.pid, os.WUNTRACED)
    assert state_of(who) == "stopped"
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert state_of(who) == "dead", "it has ended, though nobody has waited for it"
    child.wait()
    assert state_of(who) == "dead"


def test_another_process_with_the_same_number_is_not_the_one(child):
    space, pid, started = identity_of(child.pid)
    assert state_of((space, pid, started - 1)) == "dead"


def test_a_process_that_cannot_be_looked_at_is_not_dead(child, monkeypatch):
    who = identity_of(child.pid)
    monkeypatch.setattr(processes, "stat_of", lambda pid: [])  # hidden, or no file descriptor is left
    assert state_of(who) == ""
    child.kill()
    child.wait()
    assert state_of(who) == "dead"


# the file by itself: its package imports torch, which takes seconds
IDENTITY = f"""
import runpy
found = runpy.run_path({processes.__file__!r})
print(*found["identity"](), found["state_of"](found["identity"]()))
"""


def in_a_namespace(*options: str) -> list[str]:
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", *options, sys.executable, "-c", IDENTITY]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if "unshare" in done.stderr:
        pytest.skip(f"this machine does not make namespaces: {done.stderr.strip()}")
    return done.stdout.split()


@pytest.mark.parametrize("options", [["--mount-proc"], []], ids=["its own /proc", "the host's /proc"])
def test_a_process_of_another_pid_namespace_is_not_dead(options):
    found = in_a_namespace(*options)
    assert len(found) == 3, "a process does not find itself dead, whatever /proc it has"
    space, pid, started = map(int, found)
    assert space != processes.pid_space(), "the host has the same name and the same boot"
    assert state_of((space, pid, started)) == ""


def test_a_machine_without_namespaces_looks_for_nobody(monkeypatch):
    def none(path: str) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(os, "readlink", none)
    unknown = processes.pid_space.__wrapped__()
    assert unknown != processes.pid_space.__wrapped__(), "no two processes have the same"
