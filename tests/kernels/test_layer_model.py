"""The model on paper: its arithmetic, and that its instructions are those of the binaries."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from moe_triton_kernels.tools import layer_model
from moe_triton_kernels.tools.floors import DEVICES, Shape
from moe_triton_kernels.tools.layer_model import COST, LOOPS, predict, seconds_of, shapes, with_instructions
from moe_triton_kernels.tools.offline import Report

H200 = DEVICES["h200"]
SHAPE = Shape(tokens=8192, hidden=2048, intermediate=768, experts=128, top_k=8)


def test_no_kernel_is_predicted_below_its_floor():
    for name, shape in shapes().items():
        for kernels in predict(shape, H200).values():
            assert all(kernel.seconds >= kernel.floor > 0 for kernel in kernels), name


def test_twice_the_tokens_take_at_most_twice_as_long():
    for part in ("forward", "backward"):
        once = seconds_of(predict(SHAPE, H200)[part]) - COST.rest
        twice = seconds_of(predict(replace(SHAPE, tokens=16384), H200)[part]) - COST.rest
        assert 1.5 * once < twice < 2.02 * once


def test_a_longer_loop_costs_once_it_is_longer_than_its_products():
    def down(instructions: int) -> float:
        kernels = predict(SHAPE, H200, loops=with_instructions(f"down={instructions}"))["forward"]
        return next(kernel.seconds for kernel in kernels if kernel.kernel == "down")

    assert down(1000) > 1.5 * down(90)
    assert down(90) == down(100)  # the products take longer


def test_instructions_are_checked():
    for text in ("down", "down=many", "sideways=3"):
        with pytest.raises(ValueError, match="wanted kernel=number"):
            with_instructions(text)


def test_the_instructions_are_those_of_the_binary(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Of one kernel; `--binaries` compiles all. Another compiler makes slightly different loops."""
    assert layer_model.CASES.keys() == LOOPS.keys()
    monkeypatch.setattr(layer_model, "CASES", {"down": layer_model.CASES["down"]})
    assert layer_model.print_binaries() == 0, capsys.readouterr().out


def test_instructions_of_another_binary_are_out_of_date(monkeypatch: pytest.MonkeyPatch):
    report = Report(kernel="", arch="sm_90", registers=200, spills=0, shared_bytes=0, loop=106, order=[])
    found = [("down", "down_bf16_128x256x64_k", LOOPS["down"].instructions, report, 1)]
    monkeypatch.setattr(layer_model, "binaries", lambda: found)
    assert layer_model.print_binaries() == 1
    monkeypatch.undo()
    monkeypatch.setattr(layer_model, "compile_parallel", lambda *_: ({}, "no compiler"))
    with pytest.raises(RuntimeError, match="does not compile: no compiler"):
        layer_model.binaries()


def test_the_command_prints_every_layer():
    command = [sys.executable, "-m", "moe_triton_kernels.tools.layer_model"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(any(line.startswith(name) for line in done.stdout.splitlines()) for name in shapes())
    assert "not measured" in done.stdout
