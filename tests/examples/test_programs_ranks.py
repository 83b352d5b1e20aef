"""Expert parallelism with FSDP2: the example's losses on four ranks are those that it computes on one process."""

from __future__ import annotations

import re

from tests.helpers.examples import run_example


def test_expert_parallel_fsdp2(four_ranks):
    first, *others = four_ranks.run(run_example, "expert_parallel_fsdp2.py", "--ep", "2", "--steps", "6")
    assert others == ["", "", ""], "rank 0 alone prints"
    rows = re.findall(r"^ *(\d+) +([\d.]+) +([\d.]+)$", first, re.MULTILINE)
    assert [int(step) for step, _, _ in rows] == [0, 5]
    for _, alone, spread in rows:
        assert abs(float(alone) - float(spread)) < 1e-4
    assert float(rows[-1][1]) < float(rows[0][1]) - 0.5
