"""What README and docs/ show runs: every Python block on one process, every command line against the real parser.

The loops over batches are in `tests/distributed/test_snippets.py`, on four ranks against one process.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import moe_triton
from moe_triton.cli import app
from tests.helpers.colossalai_context import forget
from tests.test_structure import LEVELS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
LOOP = "for x, y in batches"  # tested on ranks

# What a page takes for granted, in small: run before its blocks, which share one namespace.
BEFORE = {
    "README.md": """
from tests.helpers.families import tiny_model
model = tiny_model("mixtral")
""",
    "docs/checkpoints.md": """
model = moe_triton.MoE(16, 8, num_experts=4, top_k=2)
optimizer = torch.optim.AdamW(model.parameters())
""",
    "docs/colossalai.md": """
images = torch.rand(4, 3, 224, 224)
train_data = test_data = [(images, torch.tensor([0, 1, 2, 3]))]
""",
    "docs/distributed.md": """
from moe_triton.distributed import ExpertParallel
groups = None
""",
    "docs/finetuning.md": """
from transformers import LlamaConfig, LlamaForCausalLM
from tests.helpers.families import tiny_model
name, dense_name = "tiny", "dense"
tiny_model("qwen3_moe").save_pretrained(name)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(dense_name)
tokens = torch.randint(0, 64, (8, 16))
rows = [{"input_ids": row, "labels": row} for row in tokens]
""",
    "docs/profiling.md": """
model = moe_triton.MoE(16, 8, num_experts=4, top_k=2)
steps, history = 2, []
log = dict
""",
    "docs/router_replay.md": """
from tests.helpers.families import tiny_model
rollout_model, model = tiny_model("mixtral").eval(), tiny_model("mixtral").train()
prompts = torch.randint(2, 64, (2, 4))
""",
    "docs/routing_statistics.md": """
from tests.helpers.families import tiny_model
model = tiny_model("mixtral").train()
tokens, mask = torch.randint(2, 64, (2, 6)), torch.ones(2, 6, dtype=torch.long)
dataset = [{"input_ids": row, "labels": row} for row in torch.randint(2, 64, (20, 6))]
group = None
class run:
    log = staticmethod(lambda numbers, step: None)
""",
    "docs/simulate.md": """
counts_E, new_counts_E = torch.arange(256), torch.arange(256).flip(0)
experts_TK = torch.randint(256, (8, 2))
""",
    "docs/transformers.md": """
from transformers import AutoModelForCausalLM
from tests.helpers.families import tiny_model
name = "tiny"
tiny_model("mixtral").save_pretrained(name)
tokens = torch.randint(0, 64, (2, 8))
dataset = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (8, 8))]
""",
}
ONE_RANK = """dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)"""
SMALLER = {  # what one process on a CPU cannot do, or not quickly
    "docs/colossalai.md": {
        "size=2": "size=1",
        "capacity_factor=1.2": "capacity_factor=1.2, depth=1",
        "epochs=10": "epochs=1",
    },
    "docs/transformers.md": {
        'dist.init_process_group("nccl")': ONE_RANK,
        'device="cuda"': 'device="cpu"',
        'output_dir="run", ': 'output_dir="run", report_to=[], use_cpu=True, ',
    },
    "docs/many_gpus.md": {
        '"cuda", (2, 4, 2, 1)': '"cpu", (1, 1, 1, 1)',
        '"cuda", (2, 1, 8)': '"cpu", (1, 1, 1)',
        "dense = init": f"{ONE_RANK}\ndense = init",
    },
    "docs/finetuning.md": {'output_dir="run", ': 'output_dir="run", report_to=[], use_cpu=True, '},
}
NOT_RUN = {
    "engine, *_ = deepspeed.initialize(": "needs the engine on two ranks: tests/compat/deepspeed/",
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def runnable(page: str) -> list[str]:
    found = [block for block in blocks(page, "python") if LOOP not in block]
    return [block for block in found if not any(part in block for part in NOT_RUN)]


@pytest.mark.parametrize("page", [name for name in NAMES if runnable(name)])
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"torch": torch, "moe_triton": moe_triton}
    code = "\n".join([BEFORE.get(page, ""), *runnable(page)])
    for old, new in SMALLER.get(page, {}).items():
        assert old in code, f"{page}: {old!r} is gone"
        code = code.replace(old, new)
    try:
        exec(compile(code, page, "exec"), names)
    finally:
        if page == "docs/colossalai.md":
            forget()
        elif torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_every_python_block_is_run_or_listed() -> None:
    texts = [block for page in NAMES for block in blocks(page, "python")]
    for part in NOT_RUN:
        assert any(part in text for text in texts), f"{part!r} is gone"
    for page in NAMES:
        for block in blocks(page, "python"):
            ast.parse(block)
        text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.search(r"^    (from|import|>>>|\w+ = |moe-triton|torchrun|python) ?", text, re.MULTILINE), page


def command_lines(page: str) -> list[str]:
    """The command lines of a page: those of its bash blocks, and what stands in backticks and looks like one."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [line.split(" #")[0].strip() for block in blocks(page, "bash") for line in block.splitlines()]
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    commands = ("moe-triton ", "torchrun ", "python benchmarks/", "python docs/", "python -m ")
    return [line for line in found if line.startswith(commands) and "..." not in line]


class Parsed(Exception):
    """The options have been parsed."""


def parse_cli(arguments: list[str]) -> None:
    root = typer.main.get_command(app)
    if arguments == ["--version"]:
        return
    command = root.commands[arguments[0]]  # type: ignore[attr-defined]
    if not arguments[1:]:  # the name alone, in the text
        return
    with contextlib.suppress(typer.Exit):  # --help prints, and stops
        command.make_context(arguments[0], list(arguments[1:]))


def parse_script(run: Callable[[], object], arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script as far as its options, whichever of argparse and typer parses them."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        real(self, *args, **kwargs)
        raise Parsed

    def stop(*_args: Any) -> Any:
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(typer.core.TyperCommand, "invoke", stop)
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(Parsed):
        run()


def split(line: str) -> list[str]:
    """The words of a command line, with the optional parts of a synopsis left out and torchrun taken off."""
    words = shlex.split(re.sub(r"\[[^]]*\]", "", line))
    if words[0] == "torchrun":
        start = words.index("-m") if "-m" in words else next(i for i, word in enumerate(words) if word.endswith(".py"))
        words = ["python", *words[start:]]
    return ["moe-triton", *words[3:]] if words[:3] == ["python", "-m", "moe_triton"] else words


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


LINES = sorted({line for page in NAMES for line in command_lines(page)})


@pytest.mark.parametrize("line", LINES)
def test_command_lines_parse(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = split(line)
    if words[0] == "moe-triton":
        parse_cli(words[1:])
    elif words[:2] == ["python", "-m"]:
        parse_script(lambda: runpy.run_module(words[2], run_name="__main__", alter_sys=True), words[2:], monkeypatch)
    else:
        assert words[0] == "python", line
        path = ROOT / words[1]
        monkeypatch.syspath_prepend(str(path.parent))
        if path.parent.name == "examples":
            assert path.is_file()
            return
        text = path.read_text(encoding="utf-8")
        assert "parse_args" in text or "typer" in text, f"{line}: would run, for want of a parser"
        parse_script(lambda: runpy.run_path(str(path), run_name="__main__"), words[1:], monkeypatch)


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for page in NAMES:
        for name in re.findall(r"(?:^|`)make ([\w-]+)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE):
            assert name in targets, f"{page}: make {name}"


OTHERS = ["ARCHITECTURE.md", "CONTRIBUTING.md", "RELEASING.md", "SECURITY.md", "examples/README.md"]


@pytest.mark.parametrize("page", [*NAMES, *OTHERS])
def test_links_and_paths_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert "://" in link or ((ROOT / page).parent / link).exists(), f"{page}: {link}"
    for path in re.findall(r"`((?:tests|src|kernels|benchmarks|docs|examples)/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), f"{page}: {path}"


def test_the_order_of_imports_is_that_of_the_test() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    written = re.findall(
        r"^ +\d+  ([\w, ]+)$", text.split("<!-- order of imports -->")[1].split("<!--")[0], re.MULTILINE
    )
    assert [line.split(", ") for line in written] == LEVELS


def test_the_call_chains_are_those_of_the_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(sys, "argv", ["architecture.py", "--check"])
    with pytest.raises(SystemExit) as found:
        runpy.run_path(str(ROOT / "docs" / "architecture.py"), run_name="__main__")
    assert found.value.code == 0, capsys.readouterr().out
