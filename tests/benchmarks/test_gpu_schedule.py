"""The schedule of `make gpu` on a device that is not there: its times, and what is left wherever it ends."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.benchmarks.fake_device import DIES, FOREVER, FakeDevice

# isort: split

from gpu_run import steps
from gpu_run.processes import Processes
from gpu_run.record import Record, result_path
from gpu_run.schedule import GOOD, PHASES, Found, Run, Step, bad_items

BUDGET_S, AGAIN_S = 560.0, 200.0
LISTED = [found.step for found in steps.all_steps()]
ITEMS = [item for step in LISTED for item in step.items]
FACTS = {"device": {"name": "NVIDIA H200"}, "commit": {"hash": "0123456789abcdef", "dirty": False}, "source": "s"}
LENGTHS = {"facts": 4.0, "build": 20.0, "look": 3.0, "prove": 25.0, "measure": 3.0}
PHASE_OF = {item: step.phase for step in LISTED for item in step.items}


FEW_KERNELS = {"build: candidates": 8.0, "build: gluon": 8.0, **{f"build: {part}": 12.0 for part in steps.SETS}}


def usual(item: str) -> float:
    """About 2 s for every kernel that is compiled."""
    few = [seconds for name, seconds in FEW_KERNELS.items() if item.startswith(name)]
    return few[0] if few else LENGTHS[PHASE_OF[item]]


def run(
    length: Callable[[str], float],
    known: dict[str, Found] | None = None,
    budget: float = BUDGET_S,
    chosen: list[Step] | None = None,
    note: Callable[[str, Found], None] = lambda item, found: None,
) -> tuple[FakeDevice, dict[str, Found]]:
    device, known = FakeDevice(length=length), {} if known is None else known
    steps = LISTED if chosen is None else chosen
    whole = Run(steps=steps, known=known, launcher=device, note=note, clock=device.clock)
    whole.mark()
    whole.run(budget)
    return device, known


def test_names_are_distinct_and_can_be_joined() -> None:
    assert len(set(ITEMS)) == len(ITEMS)
    assert len({step.name for step in LISTED}) == len(LISTED)
    assert not any("|" in item for item in ITEMS)
    assert {step.phase for step in LISTED} == {phase.name for phase in PHASES}


def test_the_phases_end_when_they_should() -> None:
    """Where nothing ends by itself: 20 s, 110 s, 150 s, 300 s, 550 s."""
    device, known = run(lambda item: FOREVER)
    ends = {phase.name: max(end for name, _, _, end in device.spans() if name == phase.name) for phase in PHASES}
    assert ends == pytest.approx({"facts": 20, "build": 110, "look": 150, "prove": 300, "measure": 550})
    assert device.now == pytest.approx(550)
    statuses = {known[item]["status"] for item in ITEMS}
    assert statuses == {"out of time", "not run"}


def test_every_operation_runs_within_the_first_hundred_seconds() -> None:
    device, _ = run(lambda item: FOREVER)
    begins = [begin for _, step, begin, _ in device.spans() if step.startswith("smoke")]
    assert begins == pytest.approx([20, 20, 20])


def test_measurements_have_the_gpu_to_themselves() -> None:
    device, known = run(usual)
    spans = device.spans()
    for phase, _, begin, end in spans:
        beside = [other for other in spans if other[2] < end and begin < other[3]]
        assert {other[0] for other in beside} == {phase}  # phases do not overlap
        if phase in ("facts", "look", "measure"):
            assert len(beside) == 1
        else:
            now = [sum(b <= t < e for _, _, b, e in beside) for t in (begin, (begin + end) / 2)]
            assert max(now) <= {p.name: p.jobs for p in PHASES}[phase]
    assert device.now <= BUDGET_S
    assert not [item for item in ITEMS if PHASE_OF[item] == "prove" and known[item]["status"] != "ok"]
    assert sum(known[item]["status"] == "ok" for item in ITEMS) > 0.8 * len(ITEMS)


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_holds_whatever_happens(seed: int) -> None:
    rng = random.Random(seed)
    kinds = [lambda: rng.expovariate(1 / 15), lambda: 0.1, lambda: DIES, lambda: FOREVER]
    weights = rng.choices(((8, 1, 1, 1), (1, 8, 1, 0), (1, 1, 4, 4)))[0]
    lengths = {item: rng.choices(kinds, weights)[0]() for item in ITEMS}
    for budget in (BUDGET_S, AGAIN_S, 30.0):
        device, known = run(lengths.__getitem__, budget=budget)
        assert device.now <= budget
        assert set(known) == set(ITEMS)
        for item in ITEMS:
            if known[item]["status"] == "ok":
                assert lengths[item] not in (DIES, FOREVER)


def test_a_phase_that_ends_early_leaves_its_time() -> None:
    device, _ = run(lambda item: 1.0 if PHASE_OF[item] != "measure" else FOREVER)
    (begin, end) = next((b, e) for phase, step, b, e in device.spans() if step == "kernels")
    assert begin < 150
    assert end - begin > 60 * 1.2
    assert device.now == pytest.approx(550)


def test_what_is_most_decisive_comes_first() -> None:
    order = [step.name for step in LISTED if step.phase == "measure"]
    device, known = run(lambda item: usual(item) if PHASE_OF[item] != "measure" else 40.0)
    assert list(dict.fromkeys(step for phase, step, _, _ in device.spans() if phase == "measure")) == order
    assert order[:3] == ["kernels", "candidates", "layers"]
    for name in order[:3]:
        first = next(step for step in LISTED if step.name == name).items[0]
        assert known[first]["status"] == "ok"


def test_what_did_not_fit_into_its_share_gets_what_others_left() -> None:
    (first, second) = (
        Step(name=name, phase="measure", items=tuple(f"{name}{i}" for i in range(4)), seconds=1) for name in "ab"
    )
    lengths = {"a": 30.0, "b": 1.0}
    device, known = run(lambda item: lengths[item[0]], budget=170.0, chosen=[first, second])
    assert [step for _, step, _, _ in device.spans()] == ["a", "b", "a"]  # 80 s each at first
    assert {found["status"] for found in known.values()} == {"ok"}
    assert device.now <= 160.0


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_a_process_that_dies_takes_one_item_with_it() -> None:
    (layers,) = (step for step in LISTED if step.name == "layers")
    device, known = run(lambda item: DIES if item == layers.items[1] else 1.0)
    assert known[layers.items[1]]["status"] == "failed"
    assert "signal 11" in known[layers.items[1]]["note"]
    assert all(known[item]["status"] == "ok" for item in layers.items if item != layers.items[1])
    assert [step for _, step, _, _ in device.spans()].count("layers") == 2


def test_a_process_that_cannot_begin_is_not_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    start = FakeDevice.start

    def broken(self, step, items, seconds):
        process = start(self, step, items, seconds)
        if step.name == "decode":
            process.events, process.last, process.why = (
                [],
                self.now + 2.0,
                "the process died: ImportError",
            )
        return process

    monkeypatch.setattr(FakeDevice, "start", broken)
    device, known = run(lambda item: 1.0)
    (decode,) = (step for step in LISTED if step.name == "decode")
    assert {known[item]["status"] for item in decode.items} == {"failed"}
    assert "ImportError" in known[decode.items[0]]["note"]
    assert [step for _, step, _, _ in device.spans()].count("decode") == 1


# What is left ---------------------------------------------------------------------------------------------------------


class Ended(Exception):
    """The run, killed from outside."""


@pytest.mark.parametrize("count", [0, 1, 5, 40, 90, 140])
def test_killed_at_any_point_the_results_are_intact(count: int, tmp_path: Path) -> None:
    record = Record(FACTS, tmp_path)
    reported: dict[str, str] = {}
    device = FakeDevice(length=usual)

    def note(item: str, found: Found) -> None:
        if len(reported) == count:
            raise Ended
        reported[item] = found["status"]
        record.write()

    whole = Run(steps=LISTED, known=record.items, launcher=device, note=note, clock=device.clock)
    whole.mark()
    record.write()
    with pytest.raises(Ended):
        whole.run(BUDGET_S)
    content = json.loads(record.path.read_text())
    assert set(content["items"]) == set(ITEMS)
    statuses = {item: found["status"] for item, found in content["items"].items()}
    assert {item: status for item, status in statuses.items() if status != "not run"} == reported
    assert all(process.killed or process.last <= device.now for _, process in device.started)
    again = Record(FACTS, tmp_path)
    again.load([tmp_path])
    assert {item for item, found in again.items.items() if found["status"] in GOOD} == {
        item for item, status in reported.items() if status in GOOD
    }


def test_again_does_what_is_missing(tmp_path: Path) -> None:
    (layers,) = (step for step in LISTED if step.name == "layers")
    bad = {layers.items[0]: "failed", layers.items[3]: "not run", "stress": "out of time"}
    known: dict[str, Found] = {item: {"status": bad.get(item, "ok"), "note": ""} for item in ITEMS}
    device, known = run(lambda item: 2.0, known=known, budget=AGAIN_S)
    ran = {name: [p for _, p in device.started if p.step.name == name] for name in ("layers", "stress", "kernels")}
    assert [len(found) for found in ran.values()] == [1, 1, 0]
    assert bad_items(LISTED, known) == []
    assert {phase for phase, *_ in device.spans()} == {"facts", "build", "prove", "measure"}
    assert device.now < 60
    again, _ = run(lambda item: 2.0, known=known, budget=AGAIN_S)
    assert again.started == []


def test_what_got_no_turn_does_not_replace_what_is_known() -> None:
    known: dict[str, Found] = {item: {"status": "failed", "note": "as before"} for item in ITEMS}
    _, known = run(lambda item: FOREVER, known=known, budget=30.0)
    assert {known[item]["note"] for item in ITEMS if known[item]["status"] == "failed"} == {"as before"}


def test_results_of_other_sources_are_not_taken(tmp_path: Path) -> None:
    record = Record(FACTS, tmp_path)
    record.items["layers"] = {"status": "ok", "note": ""}
    record.write()
    for facts, kept in ((FACTS, True), ({**FACTS, "source": "other"}, False)):
        again = Record(facts, tmp_path / "new")
        again.load([tmp_path / "new", tmp_path])
        assert bool(again.items) == kept


def test_the_name_of_the_file() -> None:
    dirty = {**FACTS, "commit": {"hash": "f" * 40, "dirty": True}}
    assert result_path(dirty, Path("r")) == Path("r/nvidia-h200/gpu-ffffffffff-dirty.json")  # two folders down at most
    assert result_path({**FACTS, "commit": None}, Path("r")).name == "gpu-unknown.json"


# Real processes -------------------------------------------------------------------------------------------------------

SAY = "import json, os, sys, time; say = lambda **x: print(json.dumps(x), flush=True); "
PROGRAMS = {
    "good": "say(item='a'); say(item='a', status='ok', note='', seconds=1)",
    "bad": "say(item='a'); say(item='a', status='ok', note='', seconds=1); say(item='b'); "
    "print('a word', file=sys.stderr, flush=True); os.kill(os.getpid(), 11)",
    "hang": "import subprocess; child = subprocess.Popen(['sleep', '600']); say(item='a'); "
    "say(item='a', status='ok', note=str(child.pid), seconds=1); say(item='b'); time.sleep(600)",
    "none": "sys.exit('no module')",
}


def alive(pid: int) -> bool:
    """Whether a process is there, and not only waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_processes_report_die_and_are_killed_with_what_they_started(tmp_path: Path) -> None:
    def command(step: Step, items, seconds: float) -> list[str]:
        return [sys.executable, "-S", "-c", SAY + PROGRAMS[step.name.split()[0]]]

    chosen = [Step(name=f"{name} 1", phase="prove", items=("a", "b")) for name in PROGRAMS]
    found = {}
    for step in chosen:
        known: dict[str, Found] = {}
        launcher = Processes(command, tmp_path / "gpu.log")
        whole = Run(steps=[step], known=known, launcher=launcher, note=lambda *_: None, clock=time.monotonic)
        whole.mark()
        begin = time.monotonic()
        whole.run(10.0 + 2.0)
        assert time.monotonic() - begin < 10
        found[step.name.split()[0]] = known
    statuses = {name: (known["a"]["status"], known["b"]["status"]) for name, known in found.items()}
    assert statuses == {
        "good": ("ok", "not run"),
        "bad": ("ok", "failed"),
        "hang": ("ok", "out of time"),
        "none": ("failed", "failed"),
    }
    assert found["bad"]["b"]["note"] == "the process died (signal 11): a word"
    assert "exit code 1): no module" in found["none"]["a"]["note"]
    assert not alive(int(found["hang"]["a"]["note"]))
    assert "a word" in (tmp_path / "gpu.log").read_text()


def test_a_worker_ends_with_the_process_that_started_it() -> None:
    """Its stdin ends: it kills its own group, what it started included."""
    root = Path(__file__).parents[2]
    program = (
        f"import sys; sys.path[:0] = [{str(root / 'benchmarks')!r}, {str(root)!r}]\n"
        "import subprocess, time\nfrom gpu_run.worker import end_with_parent\n"
        "child = subprocess.Popen(['sleep', '600'], stdin=subprocess.DEVNULL)\nend_with_parent()\n"
        "print(child.pid, flush=True)\ntime.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", program], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    child = int(process.stdout.readline())
    assert alive(child)
    process.stdin.close()
    assert process.wait(30) == -signal.SIGKILL
    process.stdout.close()
    for _ in range(100):
        if not alive(child):
            break
        time.sleep(0.05)
    assert not alive(child)
