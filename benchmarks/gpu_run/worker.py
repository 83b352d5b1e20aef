"""The process of one step: runs its items one after another, and reports each on stdout as soon as it is known."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from gpu_checks.setting import Setting, Skipped

from gpu_run.device import assembler

Item = Callable[[Setting], "str | dict[str, Any]"]  # returns what it did in a line, or figures, or raises
LOST = ("CUDA error", "illegal memory access", "unspecified launch failure")  # the GPU is lost to this process
MISTAKE = 3  # the exit code after one of these


def end_with_parent() -> None:
    """Kill this process and all that it has started when its stdin ends, as it does when the parent ends."""

    def wait() -> None:
        while os.read(0, 1024):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def run_item(item: Item, setting: Setting) -> dict[str, Any]:
    """status: "ok", "skipped", "failed", "out of memory", or what the item says; note; seconds; and its figures."""
    begin = time.perf_counter()
    try:
        found = item(setting)
        result = {"status": "ok", **({"note": found} if isinstance(found, str) else {"note": "", **found})}
    except Skipped as reason:
        result = {"status": "skipped", "note": str(reason)}
    except torch.OutOfMemoryError as error:
        result = {"status": "out of memory", "note": str(error).splitlines()[0]}
    except Exception as error:  # whatever it is, it is what the item found; the next one is tried
        result = {"status": "failed", "note": f"{type(error).__name__}: {error}"[:2000]}
    return {**result, "seconds": round(time.perf_counter() - begin, 1), "ptxas": assembler()}


def run_items(
    items: Mapping[str, Item],
    setting: Setting,
    report: Callable[[dict[str, Any]], None],
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Items in order, while the longest one so far still fits into the time; the exit code of the process."""
    begin, longest = clock(), 0.0
    for name, item in items.items():
        left = setting.seconds - (clock() - begin)
        if left < longest:
            break
        start = clock()
        report({"item": name})
        found = run_item(item, replace(setting, seconds=left))
        longest = max(longest, clock() - start)
        report({"item": name, **found})
        if any(text in found["note"] for text in LOST):
            return MISTAKE
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


def main(items: Mapping[str, Item], names: Sequence[str], setting: Setting, *, watch: bool) -> int:
    """The named items of a step; `watch`: end with the process that stdin belongs to."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to stderr: stdout is for reports only
    if watch:
        end_with_parent()

    def report(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    code = run_items({name: items[name] for name in names}, setting, report)
    sys.stderr.flush()
    return code
