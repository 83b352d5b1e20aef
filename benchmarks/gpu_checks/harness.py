"""How a check is described, run, and reported: each in a process of its own, several at a time, none for ever.

A process of its own, because an illegal access takes the whole GPU context with it, a kernel that hangs can only be
killed from outside, and compiling dozens of kernel variants one after another would take longer than there is time.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SCRIPT = Path(__file__).parent.parent / "gpu_check.py"
RESULTS = SCRIPT.parent / "results"
SCHEMA = "moe-triton-gpu-check/1"
GOOD = ("ok", "skipped")


class Skipped(Exception):
    """A check that does not apply here; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a check runs on.

    device   where the kernels run
    tiny     sizes that Triton's interpreter gets through in seconds, and no bf16, which it computes wrongly
    seconds  what a check that repeats itself may spend on it
    """

    device: torch.device
    tiny: bool = False
    seconds: float = 60.0

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        few = (torch.float32, torch.float16)
        return few if self.tiny else (*few, torch.bfloat16)

    def need_gpu(self) -> None:
        if self.device.type != "cuda":
            raise Skipped("needs a GPU")


Check = Callable[[Setting], str]  # returns what it did, in a line; raises AssertionError where something is wrong


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is filled with NaN (integers: their largest value), so that nothing can lean on what nobody wrote.

    torch does this itself in its deterministic mode; operations that have no deterministic version only warn.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = filled


@contextmanager
def compilations() -> Iterator[list[str]]:
    """The names of the kernels that Triton specialises within: also where the binary comes from its cache on disk."""
    import triton

    names: list[str] = []
    before = triton.knobs.runtime.jit_post_compile_hook

    def note(*_: object, fn: Any, **__: object) -> None:
        names.append(fn.name)

    triton.knobs.runtime.jit_post_compile_hook = note
    try:
        yield names
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before


def run_here(check: Check, setting: Setting) -> dict[str, Any]:
    """One check in this process: result ("ok", "skipped" or "failed"), detail and seconds."""
    begin = time.perf_counter()
    try:
        result, detail = "ok", check(setting)
    except Skipped as reason:
        result, detail = "skipped", str(reason)
    except Exception as error:  # whatever it is, it is what the check found
        result, detail = "failed", f"{type(error).__name__}: {error}"
    return {"result": result, "detail": detail, "seconds": round(time.perf_counter() - begin, 1)}


def run_apart(
    names: Sequence[str],
    command: Callable[[str], Sequence[str]],
    *,
    jobs: int,
    budget_s: float,
    on_result: Callable[[str, dict[str, Any]], None],
) -> None:
    """Every check in a process of its own, `jobs` at a time. At the end of the budget the rest is killed, or not run.

    `on_result` is called with each as it ends. What is killed has failed; what never began is "not run".
    """
    end = time.perf_counter() + budget_s

    def run(name: str) -> dict[str, Any]:
        begin = time.perf_counter()
        if begin > end:
            return {"result": "not run", "detail": "out of time", "seconds": 0.0}
        try:
            done = subprocess.run(
                command(name), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=end - begin
            )
            found = result_in(done)
        except subprocess.TimeoutExpired:
            found = {"result": "failed", "detail": "out of time: killed"}
        return {**found, "seconds": round(time.perf_counter() - begin, 1)}

    with ThreadPoolExecutor(jobs) as pool:
        results = {pool.submit(run, name): name for name in names}
        for future in as_completed(results):
            on_result(results[future], future.result())


def result_in(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The line of a check's output that holds its result, or what there is to say when there is none."""
    lines = done.stdout.strip().splitlines()
    line = next((line for line in reversed(lines) if line.startswith('{"result": ')), None)
    if line is None:
        return {"result": "failed", "detail": f"exit {done.returncode}: {' | '.join(lines[-3:])}"}
    return json.loads(line)


def worker_command(name: str, seed: int, device: str, seconds: float) -> list[str]:
    options = ["--worker", name, "--seed", str(seed), "--device", device, "--seconds", str(seconds)]
    return [sys.executable, str(SCRIPT), *options]


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def result_path(facts: dict[str, Any], kind: str, folder: Path) -> Path:
    """Where the results of this device and commit lie; "dirty" where files differ from the commit."""
    commit = facts["commit"]
    name = "unknown" if commit is None else commit["hash"][:10] + "-dirty" * commit["dirty"]
    return folder / slug(facts["device"]["name"]) / f"{kind}-{name}.json"


def table(results: dict[str, dict[str, Any]]) -> str:
    """One line per check: name, result, seconds, detail."""
    width = max((len(name) for name in results), default=0)
    lines = [f"{'check':{width}}  {'result':7}  {'seconds':>7}  detail"]
    for name, found in results.items():
        detail = found["detail"].replace("\n", " ")[:200]
        lines.append(f"{name:{width}}  {found['result']:7}  {found['seconds']:7.1f}  {detail}")
    return "\n".join(lines)
