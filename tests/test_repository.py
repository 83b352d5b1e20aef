"""The files around the code agree with it and with each other: workflows, forms, the site's navigation, the version."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import moe_triton

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / ".github/workflows").glob("*.yml")))


def test_the_version_is_in_one_place() -> None:
    assert "version" not in PROJECT
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", moe_triton.__version__)
    assert moe_triton.__version__ not in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_python_versions_are_those_that_the_workflow_tests() -> None:
    classified = {name.split(" :: ")[-1] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", name)}
    assert classified == set(re.findall(r'python: "(3\.\d+)"', WORKFLOWS))
    oldest = min(classified, key=lambda version: int(version.split(".")[1]))
    assert PROJECT["requires-python"] == f">={oldest}"


def test_the_oldest_torch_and_triton_are_tested() -> None:
    oldest = {
        name: re.search(rf"{name}>=([\d.]+)", " ".join(PROJECT["dependencies"]))[1] for name in ("torch", "triton")
    }
    assert f'torch: "{oldest["torch"]}' in WORKFLOWS
    assert f"triton=={oldest['triton']}" in WORKFLOWS


def test_workflows_make_what_there_is() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    made = re.findall(r"run: make ([\w-]+)", WORKFLOWS)
    assert set(made) <= set(targets)
    assert {"lint", "docs", "wheel", "gpu"} <= set(made)


def test_forms_ask_for_the_environment() -> None:
    forms = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert len(forms) >= 2
    for path in forms:
        assert "moe-triton info --json" in path.read_text(encoding="utf-8"), path.name


def test_every_page_is_in_the_navigation_and_in_the_index() -> None:
    pages = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    assert sorted(re.findall(r": (\w+\.md)$", navigation, re.MULTILINE)) == pages
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| .*\]\((\w+\.md)\) \|", index, re.MULTILINE)) | set(
        re.findall(r"^\| \[.*?\]\((\w+\.md)\) \|", index, re.MULTILINE)
    ) == set(pages) - {"index.md"}


def test_charts_are_an_extra() -> None:
    assert PROJECT["optional-dependencies"]["plot"] == ["matplotlib"]
    assert "matplotlib" not in " ".join(PROJECT["dependencies"])
