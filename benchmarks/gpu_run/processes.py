"""Starts steps as processes of their own, and reads what they report: a line of JSON on stdout for each item.

A process of its own, because an illegal access takes the whole GPU context with it and a kernel that hangs can only be
killed from outside. Each is the leader of a process group, so that what it has started (compute-sanitizer and its
child) ends with it. It reads its stdin, which ends with this process, in whatever way that ends (see `worker`).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from gpu_run.schedule import Found, Process, Step

Command = Callable[[Step, Sequence[str], float], Sequence[str]]  # of a step, its items and its seconds
LAST = 3  # lines of what a process said, where it died
KEPT = 64 << 10  # bytes of what it said, in the log


class StepProcess:
    """A process that runs a step. What it writes to stderr is added to the file `log` when it has ended."""

    def __init__(self, title: str, command: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.title, self.log, self.rest = title, log, b""
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            start_new_session=True,
        )  # fmt: skip
        self.why: str | None = None  # it ended
        os.set_blocking(self.output.fileno(), False)

    @property
    def output(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def found(self) -> list[tuple[str, Found | None]]:
        self.rest += b"" if self.output.closed else self.output.read() or b""
        *lines, self.rest = self.rest.split(b"\n")
        reports: list[tuple[str, Found | None]] = []
        for line in lines:
            content: dict[str, Any] = json.loads(line)
            reports.append((content.pop("item"), content or None))
        return reports

    def end(self) -> str | None:
        if self.why is None and self.process.poll() is not None:
            code, said = self.process.returncode, self.close()
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            self.why = "" if code == 0 else f"the process died ({how}): {' | '.join(said[-LAST:])[:500]}"
        return self.why

    def kill(self) -> None:
        if self.why is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.close()
            self.why = "killed"

    def close(self) -> list[str]:
        """Take what there is to take, and end the rest of its group. Returns the lines of stderr."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.rest += self.output.read() or b""
        for pipe in (self.process.stdin, self.output):
            if pipe is not None:
                pipe.close()
        size = self.errors.seek(0, os.SEEK_END)
        self.errors.seek(max(0, size - KEPT))
        said = self.errors.read().decode(errors="replace")
        self.errors.close()
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"== {self.title}: exit code {self.process.returncode}\n{said}\n" if said else "")
        return said.strip().splitlines()


class Processes:
    """The `Launcher` of real processes."""

    def __init__(self, command: Command, log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.command, self.log = command, log
        self.environment = {**os.environ, **(environment or {})}

    def start(self, step: Step, items: Sequence[str], seconds: float) -> StepProcess:
        return StepProcess(step.name, self.command(step, items, seconds), self.environment, self.log)

    def wait(self, processes: Sequence[Process], seconds: float) -> None:
        """Returns also where a process closes its output, which it does when it ends."""
        outputs = [one.output for one in processes if isinstance(one, StepProcess)]
        ready, _, _ = select.select(outputs, [], [], seconds)
        for one in processes:
            if isinstance(one, StepProcess) and one.output in ready and not one.output.peek(1):  # type: ignore[attr-defined]
                one.process.wait()
