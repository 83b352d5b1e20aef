"""The search for faster configurations, and the table that it writes.

From the configuration that runs today, the best one's neighbours (one step away in one field) are tried until none is
faster or the time is over: hill climbing. Every candidate is verified before it may win, and is timed beside the best
one in interleaved rounds. Measuring happens in a process of its own; one that dies costs its candidate only.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from moe_triton.benchmarking.cases import Case
from moe_triton.benchmarking.environment import now
from moe_triton.benchmarking.kernel_search import FAILED, OK, Outcome
from moe_triton.benchmarking.report import write_json, write_text
from moe_triton.kernel_stages import OVER_CODES, decoded_in_loop, full_name, in_words
from moe_triton.quantization.formats import FORMATS
from moe_triton.records import ExpertSpec
from moe_triton_kernels.configs import bucket_of, operands
from moe_triton_kernels.configs import read_table as check_table
from moe_triton_kernels.launch import Config
from moe_triton_kernels.tools.offline import TARGETS
from moe_triton_kernels.tools.search import left_out, neighbours, seeds, warp_specialized

SCHEMA = "moe-triton-tune/1"
GAIN = 0.99  # a candidate wins with less than this share of the time of the best so far
PATIENCE_S = 180.0  # for one candidate, its compilation included
START_S = 300.0  # for the worker to import torch and make tensors
Entry = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One entry of the table: an operation at the sizes of a case, with the rows per expert that the case has."""

    case: Case
    op: str
    architecture: str

    @property
    def name(self) -> str:
        """Of the operation in tables: "up_gated", "down", ..."""
        return full_name(self.op, self.case.expert_rows == 2 * self.case.intermediate)

    @property
    def left_out(self) -> str:
        """Which candidates this Triton lacks; "" where it lacks none. No schedule reads codes."""
        return "" if self.case.format is not None else left_out(self.name, self.case.torch_dtype, self.architecture)

    @property
    def bucket(self) -> int:
        return bucket_of(self.case.tokens * self.case.top_k / self.case.experts)

    @property
    def key(self) -> dict[str, Any]:
        """As `moe_triton_kernels.configs.KEYS`."""
        return {
            "op": self.name, "d": self.case.hidden, "n": self.case.intermediate,
            "dtype": operands(self.case.dtype, self.case.format),
            "architecture": self.architecture, "bucket": self.bucket,
        }  # fmt: skip

    def title(self) -> str:
        rows = f"{'more than 64' if self.bucket > 64 else f'up to {self.bucket}'} rows per expert"
        multiplied = operands(self.case.dtype, self.case.format)
        return f"{self.name} d={self.case.hidden} n={self.case.intermediate} {multiplied} {rows}"


def runs_on_its_own(case: Case, op: str) -> bool:
    """Whether an operation has an entry of its own for a case: with codes, if its kernel decodes them in its loop."""
    if case.format is None:
        return True
    return op in decoded_in_loop(
        case.format,
        ExpertSpec(activation=case.activation),
        case.torch_dtype,
        n=case.intermediate,
        block=FORMATS[case.format].rows,
        rows_per_expert=case.tokens * case.top_k / case.experts,
    )


def problems_of(cases: list[Case], ops: list[str], architecture: str) -> list[Problem]:
    """The distinct table entries that the cases ask for; the first case of each stands for it.

    ValueError where there is none: with this many rows, no kernel decodes codes in its loop.
    """
    found: dict[str, Problem] = {}
    for case, op in product(cases, ops):
        if not runs_on_its_own(case, op):
            continue
        problem = Problem(case=case, op=op, architecture=architecture)
        found.setdefault(json.dumps(problem.key), problem)
    if not found:
        raise ValueError(
            f"format: got {cases[0].format!r} where {', '.join(ops)} read no codes, wanted fewer rows per expert, or "
            f"some of {', '.join(OVER_CODES)}: without --format they are tuned as they run"
        )
    return list(found.values())


@dataclass(kw_only=True)
class State:
    """What is known of one problem.

    incumbent   the configuration that runs without a user's table; best: the fastest so far
    best_ratio  best's time over the incumbent's, as the product of the steps
    plain       the fastest without a warp-specialized schedule, whose neighbours are tried too; plain_ratio: likewise
    tried       configuration (as JSON) -> outcome
    """

    incumbent: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    best_ratio: float = 1.0
    plain: dict[str, Any] = field(default_factory=dict)
    plain_ratio: float = 1.0
    tried: dict[str, dict[str, Any]] = field(default_factory=dict)
    is_done: bool = False

    def begin(self, incumbent: dict[str, Any]) -> None:
        """Nothing is faster than what runs, as long as nothing has been tried."""
        self.incumbent = self.incumbent or incumbent
        self.best = self.best or self.incumbent
        self.plain = self.plain or {**self.incumbent, "gluon": None}
        self.tried.setdefault(json.dumps(self.incumbent), {"status": OK, "ratio": 1.0})

    def take(self, candidate: dict[str, Any], ratio: float) -> None:
        """A right candidate, and its time over the best one's."""
        over_incumbent = self.best_ratio * ratio
        if candidate["gluon"] is None and over_incumbent < GAIN * self.plain_ratio:
            self.plain, self.plain_ratio = candidate, over_incumbent
        if ratio < GAIN:
            self.best, self.best_ratio = candidate, over_incumbent


@dataclass(kw_only=True)
class Progress:
    """The search's own file: it is rewritten after every candidate, so that the same command goes on where it was.

    `circumstances` (device, versions, source) are part of every key: another GPU or another kernel starts afresh.
    """

    path: Path
    circumstances: dict[str, Any]
    states: dict[str, State] = field(default_factory=dict)

    def key(self, problem: Problem) -> str:
        return json.dumps([problem.key, self.circumstances], sort_keys=True)

    def load(self) -> None:
        """ValueError where the file is none of ours."""
        if not self.path.exists():
            return
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']!r}")
            self.states = {key: State(**value) for key, value in content["states"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} is no progress of moe-triton tune: {error}") from error

    def state(self, problem: Problem) -> State:
        return self.states.setdefault(self.key(problem), State())

    def write(self) -> None:
        states = {key: asdict(state) for key, state in self.states.items()}
        write_json(self.path, {"schema": SCHEMA, "states": states})


def read_table(path: Path) -> list[Entry]:
    """The entries of a table file, [] where there is none; ValueError where it is broken."""
    if not path.exists():
        return []
    check_table(path)
    return json.loads(path.read_text(encoding="utf-8"))


def merge(entries: list[Entry], problem: Problem, new: Entry | None) -> list[Entry]:
    """The table with the problem's entry replaced; `new` None removes it."""
    kept = [entry for entry in entries if {name: entry[name] for name in problem.key} != problem.key]
    return kept if new is None else [*kept, new]


def write_table(path: Path, entries: list[Entry]) -> None:
    """One entry per line, sorted, so that two tables can be compared and merged by line."""
    lines = sorted(json.dumps(entry) for entry in entries)
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n")


class Crashed(Exception):
    """The worker died, or did not answer in time."""


class Worker:
    """The process that measures one problem, until it is closed."""

    command = (sys.executable, "-m", "moe_triton.benchmarking.tune_worker")

    def __init__(self, problem: Problem, device: torch.device, seed: int, threads: int | None) -> None:
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env={**os.environ, "MOE_TRITON_TABLE": ""},  # against what ships, not against an earlier find
        )  # fmt: skip
        job = {"case": asdict(problem.case), "op": problem.op, "device": str(device), "seed": seed, "threads": threads}
        self.ready = self.ask(job, START_S)

    def ask(self, question: Mapping[str, Any], patience_s: float) -> dict[str, Any]:
        """One line to the worker, and its answer. Raises Crashed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise Crashed("the process died") from error
        if not select.select([self.process.stdout], [], [], patience_s)[0]:
            raise Crashed(f"no answer within {patience_s:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise Crashed(f"the process died ({f'signal {-code}' if code < 0 else f'exit code {code}'})")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what it did not read any more
                    pipe.close()


def try_out(worker: Worker, config: Mapping[str, Any], against: Mapping[str, Any], seconds: float) -> Outcome:
    """Times a configuration beside another one. Raises Crashed."""
    asked = {"config": config, "against": against, "budget_s": seconds}
    return Outcome(**worker.ask(asked, PATIENCE_S + seconds))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a search measures. candidate_s: seconds of timing per candidate."""

    device: torch.device
    seed: int
    threads: int | None
    candidate_s: float


def first_candidates(problem: Problem, config: Config) -> list[Config]:
    """What is far from the configuration that runs, and so is tried before its neighbours."""
    schedules = (
        warp_specialized(config, problem.name, problem.case.torch_dtype, problem.architecture)
        if problem.case.format is None
        else []
    )
    sizes = (problem.name, problem.case.hidden, problem.case.intermediate)
    return [replace(config, gluon=None), *schedules, *seeds(*sizes, problem.architecture)]


def untried(problem: Problem, state: State) -> dict[str, Any] | None:
    """The next candidate; None where all have been tried.

    First those of `first_candidates`, then neighbours of the best one and of the best plain one: a schedule that is
    faster than what runs today need not be faster than the best plain configuration.
    """
    sizes = problem.name, problem.case.hidden, problem.case.intermediate
    found = list(first_candidates(problem, Config(**state.incumbent)))
    for config in (state.best, state.plain):
        found += neighbours(Config(**config), *sizes)
    return next((config for config in map(asdict, found) if json.dumps(config) not in state.tried), None)


def search(
    problem: Problem,
    progress: Progress,
    settings: Settings,
    seconds: float,
    on_try: Callable[[str, Outcome], None],
    clock: Callable[[], float] = time.monotonic,
) -> State:
    """Climbs until no neighbour is faster, or `seconds` are over; keeps the progress after every candidate.

    Raises Crashed where the worker cannot even start (its problem does not fit the device).
    """
    state = progress.state(problem)
    if state.is_done:
        return state
    begin = clock()
    worker: Worker | None = None
    try:
        while clock() - begin < seconds or not state.tried:
            if worker is None:
                worker = Worker(problem, settings.device, settings.seed, settings.threads)
                if "error" in worker.ready:
                    raise Crashed(worker.ready["error"])
                state.begin(worker.ready["incumbent"])
            candidate = untried(problem, state)
            if candidate is None:
                state.is_done = True
                break
            try:
                outcome = try_out(worker, candidate, state.best, settings.candidate_s)
            except Crashed as reason:
                outcome = Outcome(status=FAILED, note=str(reason))
                worker.close()
                worker = None
            if is_faster(outcome) and (gates := broken_gates(problem, candidate)):
                outcome = Outcome(status=FAILED, note=gates)
            state.tried[json.dumps(candidate)] = asdict(outcome)
            if outcome.status == OK and outcome.ratio is not None:
                state.take(candidate, outcome.ratio)
            progress.write()
            on_try(in_words(candidate), outcome)
    finally:
        if worker is not None:
            worker.close()
    progress.write()
    return state


def is_faster(outcome: Outcome) -> bool:
    return outcome.status == OK and outcome.ratio is not None and outcome.ratio < GAIN


def broken_gates(problem: Problem, config: dict[str, Any]) -> str:
    """The offline gates that a configuration breaks, which a measurement may not show; "" where there are none."""
    found: list[str] = []
    if problem.architecture in TARGETS:
        offline_gates(problem, [config], lambda _, report: found.extend([*report["broken"], report["error"]]))
    return ", ".join(filter(None, found))


def confirmed_ratio(problem: Problem, state: State, settings: Settings) -> float:
    """The best one's time over the incumbent's, measured once more directly; 1 where there is nothing better."""
    if state.best == state.incumbent:
        return 1.0
    with contextlib.closing(Worker(problem, settings.device, settings.seed, settings.threads)) as worker:
        outcome = try_out(worker, state.best, state.incumbent, 3 * settings.candidate_s)
    return outcome.ratio if outcome.status == OK and outcome.ratio is not None else 1.0


def entry_of(problem: Problem, state: State, ratio: float, facts: Mapping[str, Any]) -> Entry:
    """The table's entry: the key, the configuration, and how it was found."""
    case = problem.case
    measured = {
        "time_over_incumbent": round(ratio, 4), "incumbent": state.incumbent, "tried": len(state.tried) - 1,
        "tokens": case.tokens, "experts": case.experts, "top_k": case.top_k, "device": facts["device"]["name"],
        "versions": {name: facts["versions"].get(name) for name in ("torch", "triton", "ptxas", "moe-triton")},
        "commit": None if facts["commit"] is None else facts["commit"]["hash"], "created": now(),
    }  # fmt: skip
    return {**problem.key, "config": state.best, "measured": measured}


def offline_gates(
    problem: Problem, configs: list[dict[str, Any]], on_report: Callable[[dict[str, Any], dict[str, Any]], None]
) -> None:
    """Compiles candidates for an architecture that is not there, and tells of each: report, broken gates, error.

    A compiler that dies takes its candidate with it, and the rest is compiled by another process.
    """
    left = list(configs)
    while left:
        case = problem.case
        asked = [{"op": problem.name, "dtype": case.dtype, "format": case.format, "config": config} for config in left]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        process = subprocess.Popen(
            [sys.executable, "-m", "moe_triton_kernels.tools.search", "--arch", problem.architecture],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment,
        )  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(asked))
            process.stdin.close()
            for line in process.stdout:
                on_report(left.pop(0), json.loads(line))
            process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
        if left:
            on_report(left.pop(0), {"report": None, "broken": [], "error": "the compiler's process died"})
