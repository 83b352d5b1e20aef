"""`make gpu`: proves and measures the kernels on the GPU of this machine, in one command of 560 seconds.

    PYTHONPATH=src:kernels python benchmarks/gpu.py [--again] [--only STEP,...] [--budget SECONDS] [--out FOLDER]

Compiles with 12 processes while 3 run every operation once, proves, then measures with the GPU to itself; what is most
decisive comes first. Every result is on disk as soon as it is known: FOLDER/<device>/gpu-<commit>.json, FOLDER being
$OUT where that is set, else benchmarks/results; whenever the run ends, the file holds what came. `--again` does what
failed or is missing there or in benchmarks/results, in 200 seconds. benchmarks/tables.py makes the page of it.
Where there is no repository, MOE_TRITON_COMMIT gives the commit (`git describe --always --abbrev=40 --dirty`).
Exit code: 0; 1 when an item has no good result; 2 with no GPU, or for bad arguments.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

BEGIN = time.monotonic()  # before torch is imported, which takes seconds
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]

import torch  # noqa: E402
from gpu_benches.page import check_line, layer_lines  # noqa: E402
from gpu_checks.setting import Setting  # noqa: E402
from gpu_run import steps, worker  # noqa: E402
from gpu_run.device import own_assembler  # noqa: E402
from gpu_run.processes import Command, Processes  # noqa: E402
from gpu_run.record import Record  # noqa: E402
from gpu_run.schedule import Found, Run, Step, bad_items  # noqa: E402

from moe_triton.benchmarking.environment import environment, source_digest  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
BUDGET_S, AGAIN_S = 560.0, 200.0
SEPARATOR = "|"  # between items: their names have commas


def command(seed: int) -> Command:
    def of(step: Step, items: Sequence[str], seconds: float) -> list[str]:
        options = ["--worker", step.name, "--items", SEPARATOR.join(items), "--seconds", f"{seconds:.1f}"]
        return [sys.executable, str(Path(__file__)), *options, "--seed", str(seed), "--watch"]

    return of


def pick(names: str | None) -> list[Step]:
    """The steps to run: all, or those named and those that they need. ValueError on an unknown name."""
    known = [found.step for found in steps.all_steps()]
    if names is None:
        return known
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in [step.name for step in known]]
    if unknown or not wanted:
        raise ValueError(f"only: got {', '.join(unknown) or 'nothing'}, wanted some of {names_of(known)}")
    return [step for step in known if step.is_needed or step.name in wanted]


def names_of(known: Sequence[Step]) -> str:
    return ", ".join(step.name for step in known if not step.is_needed)


def run_all(options: argparse.Namespace, chosen: Sequence[Step]) -> int:
    facts = {**environment(torch.device("cuda")), "source": source_digest(), "seed": options.seed}
    record = Record(facts, options.out)
    if options.again or options.only is not None:
        record.load([options.out, RESULTS])
    if options.only is not None:  # asked for by name: once more, whatever there is
        for step in chosen:
            for item in () if step.is_needed else step.items:
                record.items.pop(item, None)
    log = record.path.with_suffix(".log")
    record.path.parent.mkdir(parents=True, exist_ok=True)

    def note(item: str, found: Found) -> None:
        record.write()
        at = time.monotonic() - options.begin
        said = found["note"].partition("\n")[0][:150]
        print(f"{at:6.1f}  {found['status']:13}  {item}  {said}", flush=True)

    launcher = Processes(command(options.seed), log, {"OMP_NUM_THREADS": "1", **own_assembler()})
    run = Run(steps=chosen, known=record.items, launcher=launcher, note=note, clock=time.monotonic)
    print(f"{facts['device']['name']}, seed {options.seed}, {options.budget:.0f} s, {record.path}", flush=True)
    run.mark()
    record.write()
    run.run(options.budget - (time.monotonic() - options.begin))
    bad = bad_items(chosen, record.items)
    total = sum(len(step.items) for step in chosen)
    print(f"\n{check_line(record.items)}")
    for line in layer_lines(record.items):
        print(line)
    print(f"{total - len(bad)} of {total} items are good. {record.path}")
    for item in bad:
        print(f"  {record.items[item]['status']}: {item}: {record.items[item]['note'][:300]}")
    return 1 if bad else 0


def work(options: argparse.Namespace) -> int:
    """The items of one step, in this process."""
    items = options.items.split(SEPARATOR)
    torch.manual_seed(options.seed)
    setting = Setting(device=torch.device(options.device), seconds=options.seconds, seed=options.seed)
    return worker.main(steps.find(options.worker).items, items, setting, watch=options.watch)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="only what failed or is missing")
    parser.add_argument("--only", help="names of steps, with commas, and what they need")
    parser.add_argument("--budget", type=float, help=f"seconds for all of it; default {BUDGET_S}, again {AGAIN_S}")
    parser.add_argument("--seed", type=int, help="of the random inputs; default: another one every time")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or RESULTS), help="folder of the results"
    )
    for hidden in ("--worker", "--items"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help=argparse.SUPPRESS)
    parser.add_argument("--watch", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.seed = int(time.time()) % 2**31 if options.seed is None else options.seed
    options.budget = (AGAIN_S if options.again else BUDGET_S) if options.budget is None else options.budget
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    options.begin = BEGIN if arguments is None else time.monotonic()
    if options.worker is not None:
        return work(options)
    try:
        chosen = pick(options.only)
        if options.budget <= 0:
            raise ValueError(f"budget: got {options.budget}, wanted more than 0")
    except ValueError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("gpu: no GPU here: nothing was proved or measured", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs is ended
    return run_all(options, chosen)


if __name__ == "__main__":
    sys.exit(main())
