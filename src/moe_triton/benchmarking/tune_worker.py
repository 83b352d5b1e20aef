"""The process that `moe-triton tune` measures in, so that a candidate that kills it kills nothing else.

The first line of stdin is the problem; each line after it a candidate and the one to run against. Each is answered by
one line of JSON on stdout.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from typing import Any

import torch

from moe_triton.benchmarking.cases import Case, make_workload
from moe_triton.benchmarking.kernel_search import Searched, is_fatal
from moe_triton.benchmarking.results import first_line
from moe_triton.benchmarking.timing import make_timer
from moe_triton_kernels.launch import Config, target_of


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to stderr: stdout is for answers only

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    problem = json.loads(sys.stdin.readline())
    device = torch.device(problem["device"])
    if problem["threads"] is not None:
        torch.set_num_threads(problem["threads"])
    try:
        workload = make_workload(Case(**problem["case"]), device, problem["seed"])
        searched = Searched(workload, problem["op"], make_timer(device, ahead=True))
        answer({"incumbent": asdict(searched.incumbent), "architecture": target_of(device).architecture})
    except (RuntimeError, ValueError, TypeError) as error:  # out of memory among them
        answer({"error": first_line(error)})
        return 1
    for line in sys.stdin:
        asked = json.loads(line)
        config, against = (Config(**asked[name]) for name in ("config", "against"))
        outcome = searched.try_out(config, against, asked["budget_s"])
        answer(asdict(outcome))
        if is_fatal(outcome):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
