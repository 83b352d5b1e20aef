"""`moe-triton tune --cpu`: which policy it chooses, what it keeps, and that the library reads it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_triton.backends.torch import cpu
from moe_triton.backends.torch.processor import this_processor
from moe_triton.benchmarking import cpu_tuning
from moe_triton.benchmarking.cpu_tuning import Tuned, keep, tune_cpu
from moe_triton.cli import app

SMALL = tuple(replace(case, tokens=8, hidden=16, intermediate=8, experts=2, top_k=1) for case in cpu_tuning.CASES)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Cases of a few microseconds, and the place of the file."""
    monkeypatch.setattr(cpu_tuning, "CASES", SMALL)
    monkeypatch.setenv(cpu.VARIABLE, str(tmp_path / "cpu.json"))
    return tmp_path / "cpu.json"


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("seconds", "faster"), [({"mkl": 0.5, "mm": 3.0}, "mkl"), ({"mm": 0.5}, "mm")])
def test_the_fastest_is_chosen(seconds: dict[str, float], faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def rounds(calls, timer, **options):
        return {name: [seconds.get(name, 1.0)] * 5 for name in calls}

    monkeypatch.setattr(cpu_tuning, "run_rounds", rounds)
    monkeypatch.setattr(cpu_tuning, "make_policy", lambda name, processor: name)
    monkeypatch.setattr(cpu_tuning, "experts_step", lambda case, policy: policy)
    found = tune_cpu(1.0)
    assert found.policy == faster
    assert set(found.times) == set(cpu.POLICIES)
    assert found.ratio(found.table) == 1


@pytest.mark.usefixtures("small")
def test_a_tie_stays_with_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = next(rule for rule in cpu.RULES if rule.fits(this_processor())).policy
    monkeypatch.setattr(
        cpu_tuning, "run_rounds", lambda calls, *a, **k: {n: [1.0 if n == table else 0.99] for n in calls}
    )
    assert tune_cpu(1.0).policy == table


def test_the_command_keeps_what_the_library_reads(small: Path) -> None:
    result = CliRunner().invoke(app, ["tune", "--cpu", "--budget", "0.1"])
    assert result.exit_code == 0, result.output
    kept = json.loads(small.read_text(encoding="utf-8"))
    (entry,) = kept.values()
    assert entry["policy"] in cpu.POLICIES
    assert f"{entry['policy']} (" in result.output
    chosen = cpu.choose_policy(this_processor())
    assert (chosen.policy, str(small) in chosen.reason) == (entry["policy"], True)
    facts = json.loads(CliRunner().invoke(app, ["info", "--json"]).output)
    assert facts["cpu_policy"]["policy"] == entry["policy"]
    assert facts["devices"][0]["instruction_sets"] == list(this_processor().instruction_sets)


def test_other_processors_entries_stay(small: Path) -> None:
    small.write_text(json.dumps({"another": {"policy": "mm"}}), encoding="utf-8")
    keep(Tuned(policy="mkl", table="mm", times={"mkl": [0.5], "mm": [1.0]}), small, "today")
    assert cpu.read_policies(small) == {"another": "mm", cpu.policy_key(this_processor()): "mkl"}


def test_a_broken_file_stays(small: Path) -> None:
    small.write_text("{", encoding="utf-8")
    result = CliRunner().invoke(app, ["tune", "--cpu", "--budget", "0.1"])
    assert (result.exit_code, small.read_text(encoding="utf-8")) == (2, "{")
    assert CliRunner().invoke(app, ["info"]).exit_code == 1
