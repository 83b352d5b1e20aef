"""One kernel with many configurations: those that ship (`moe-triton profile --kernel`), or candidates, each checked.

A candidate is timed beside the best one so far, in interleaved rounds, after its result was held against float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moe_triton import runtime
from moe_triton.benchmarking.cases import Workload
from moe_triton.benchmarking.correctness import TOLERANCE
from moe_triton.benchmarking.kernel_errors import stage_error
from moe_triton.benchmarking.results import first_line
from moe_triton.benchmarking.stages import middle, run_beside_speeds, work_of
from moe_triton.benchmarking.stages_triton import ExpertKernels, shipped_for
from moe_triton.benchmarking.timing import Timer, ratios, run_rounds, spread
from moe_triton.dispatch import dispatch
from moe_triton.kernel_stages import OP_OF, STAGES_OF, in_words
from moe_triton.records import RouterSpec
from moe_triton.reference import wide
from moe_triton_kernels.launch import Config

OK, WRONG, FAILED = "ok", "wrong", "failed"


def open_kernels(workload: Workload) -> ExpertKernels:
    """The experts' kernels over a workload, its tokens routed by its own gate."""
    case, x = workload.case, workload.hidden
    dtype = wide(case.torch_dtype)
    spec = RouterSpec(top_k=case.top_k, normalize=case.top_k > 1)
    with runtime.plain_maths(x):
        logits = x.to(dtype) @ workload.gate.to(dtype).T
        experts, weights, *_ = runtime.routing_backend("triton").route_forward(logits, spec, None, None, None)
        dispatched = dispatch(experts, case.experts, backend="triton")
        return ExpertKernels(workload.call(weights, dispatched), workload.grad_out)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a candidate.

    status   "ok"; "wrong": its result is not within tolerance, so it may not win; "failed": `note` says how
    time_s   median seconds of the operation's stages together; ratio: over the time of the one it ran against
    error    the largest relative RMS error of any expert
    """

    status: str
    time_s: float | None = None
    ratio: float | None = None
    error: float | None = None
    note: str = ""


class Searched:
    """An operation of the experts over one workload, or some of its stages, run with any configuration."""

    def __init__(self, workload: Workload, op: str, timer: Timer, stages: Sequence[str] | None = None) -> None:
        self.workload, self.op, self.timer = workload, op, timer
        self.kernels = open_kernels(workload)
        self.stages = STAGES_OF[op] if stages is None else stages

    @property
    def incumbent(self) -> Config:
        """What runs without a search."""
        self.kernels.problem.chosen = {}
        return self.kernels.problem.running(self.op)

    def call(self, config: Config) -> Callable[[], object]:
        def run() -> list[object]:
            self.kernels.problem.chosen = {self.op: config}
            with runtime.plain_maths(self.workload.hidden):
                return [self.kernels.call(stage)() for stage in self.stages]

        return run

    def error(self, config: Config) -> float:
        """How far the results are from float64."""
        results = self.call(config)()
        assert isinstance(results, list)
        return max(stage_error(self.kernels, s, r) for s, r in zip(self.stages, results, strict=True))

    def verify(self, config: Config) -> Outcome:
        """Runs a configuration once and holds the results against float64.

        One that names a warp-specialized schedule and would run the plain kernel has failed.
        """
        try:
            for stage in self.stages:
                reason = self.kernels.problem.why_plain(stage, config)
                if reason is not None:
                    return Outcome(status=FAILED, note=f"{config.gluon}: the plain kernel would run: {reason}")
            error = self.error(config)
        except Exception as problem:  # out of shared memory, a compiler that gives up, a launch that fails, ...
            return Outcome(status=FAILED, note=first_line(problem))
        if not error <= TOLERANCE[self.workload.case.torch_dtype]:
            return Outcome(status=WRONG, error=error, note=f"relative error {error:.1e}")
        return Outcome(status=OK, error=error)

    def try_out(self, config: Config, against: Config, budget_s: float) -> Outcome:
        """Verifies a configuration and times it beside another one."""
        verified = self.verify(config)
        if verified.status != OK:
            return verified
        try:
            times = run_rounds(
                {"candidate": self.call(config), "against": self.call(against)}, self.timer, budget_s=budget_s
            )
        except Exception as problem:  # out of shared memory, a compiler that gives up, a launch that fails, ...
            return Outcome(status=FAILED, note=first_line(problem))
        ratio = ratios(times["candidate"], times["against"])
        assert ratio is not None
        return Outcome(status=OK, time_s=middle(spread(times["candidate"])), ratio=ratio.p50, error=verified.error)


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One configuration of a kernel, in words; without a time `note` says why."""

    config: str
    time_s: float | None
    flops: int
    floor_s: float
    note: str = ""


def time_shipped(
    workload: Workload, stage: str, timer: Timer, budget_s: float, on_step: Callable[[str, float], None]
) -> list[Timed]:
    """A stage's kernel with every configuration that ships for this device and dtype, fastest first."""
    searched = Searched(workload, OP_OF[stage], timer, stages=(stage,))
    running = searched.incumbent
    _, speeds = run_beside_speeds({}, workload, timer, budget_s / 10)
    work = work_of(stage, workload.case, stage in searched.kernels.problem.decoded)
    floor_s = max(work.flops / speeds.flops_per_s, work.bytes / speeds.bytes_per_s)
    found = []
    configs = list(dict.fromkeys([running, *shipped_for(searched.kernels.problem, searched.op)]))
    for number, config in enumerate(configs):
        words = in_words(config)
        on_step(words, number / len(configs))
        note, time_s = "runs" if config == running else "", None
        try:
            times = run_rounds({"kernel": searched.call(config)}, timer, budget_s=budget_s / len(configs))
            time_s = middle(spread(times["kernel"]))
        except Exception as error:  # a configuration for another size may not fit
            note = f"{note} {first_line(error)}".strip()[:120]
        found.append(Timed(config=words, time_s=time_s, flops=work.flops, floor_s=floor_s, note=note))
    return sorted(found, key=lambda row: float("inf") if row.time_s is None else row.time_s)


def is_fatal(outcome: Outcome) -> bool:
    """Whether the GPU is lost to this process: after a failed launch every later one fails too."""
    return outcome.status == FAILED and torch.cuda.is_available() and "CUDA error" in outcome.note
