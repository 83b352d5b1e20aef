"""The notebook: its cells run, print what is committed, and draw."""

from __future__ import annotations

import contextlib
import io
import json

import matplotlib
import matplotlib.pyplot as plt

from tests.helpers.examples import EXAMPLES, one_thread


def test_the_notebook_runs():
    notebook = json.loads((EXAMPLES / "walk_through.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict = {}
    before = matplotlib.get_backend()
    matplotlib.use("Agg")
    try:
        for cell in cells:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed), one_thread():
                exec(compile("".join(cell["source"]), f"cell {cell['id']}", "exec"), names)
            outputs = cell["outputs"]
            assert bool(printed.getvalue()) == any(output["output_type"] == "stream" for output in outputs)
            assert len(plt.get_fignums()) == sum("image/png" in output.get("data", {}) for output in outputs)
            plt.close("all")
    finally:
        matplotlib.use(before)
    assert names["error"] < 1e-5, "moe_experts is the plain loop"
    assert names["kept"] < names["T"] * names["K"], "something was dropped"
