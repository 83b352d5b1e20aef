"""The example of a transformers model over ranks: the losses of one process, and a folder that transformers loads."""

from __future__ import annotations

import re

import pytest

from tests.helpers.examples import run_example


def test_the_example(four_ranks):
    printed, *others = four_ranks.run(run_example, "expert_parallel_transformers.py", "--steps", "4")
    assert others == ["", "", ""], "rank 0 alone prints"
    losses = re.findall(r"over 4 ranks ([\d.]+), in one process ([\d.]+)", printed)
    assert len(losses) == 4
    for spread, alone in losses:
        assert float(spread) == pytest.approx(float(alone), abs=2e-5)
    assert float(losses[-1][0]) < float(losses[0][0])
    assert "experts 0 to 1 of 8 on this rank" in printed
    assert "loaded by AutoModelForCausalLM" in printed
