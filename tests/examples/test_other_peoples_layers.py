"""The examples with transformers' and Colossal-AI's interfaces, in small."""

from __future__ import annotations

import re

import transformers  # noqa: F401  (marks the file: it needs a peer)

from tests.helpers.examples import run_example


def test_transformers_mixtral():
    printed = run_example("transformers_mixtral.py")
    assert "2 swapped, 0 left alone" in printed
    assert float(re.search(r"eager path: ([\d.e+-]+)", printed)[1]) < 1e-5
    first, *_, last = map(float, re.findall(r"loss ([\d.]+)", printed))
    assert last < 0.5 * first


def test_colossalai_widenet(tmp_path):
    printed = run_example("colossalai_widenet.py", "--epochs", "1", "--experts", "2", "--out", str(tmp_path))
    assert (tmp_path / "curves.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert 0 < float(re.findall(r"accuracy ([\d.]+)", printed)[-1]) <= 100
