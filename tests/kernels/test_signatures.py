"""Signatures of the kernels package: what runs on the host is typed, and takes records rather than long lists."""

from __future__ import annotations

import ast
from pathlib import Path

import moe_triton_kernels

ROOT = Path(moe_triton_kernels.__file__).parent
DEVICE = ("triton.jit", "triton.constexpr_function", "gluon.jit", "gluon.constexpr_function")


def functions() -> list[tuple[str, ast.FunctionDef, bool]]:
    """(file and name, definition, whether it runs on the device) of every function."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names = [ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list]
                found.append((f"{path.relative_to(ROOT)}: {node.name}", node, any(name in DEVICE for name in names)))
    return found


def parameters(node: ast.FunctionDef) -> list[ast.arg]:
    return [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]


def test_host_functions_are_typed() -> None:
    """mypy cannot ask for it: device code, in the same files, has no types."""
    untyped = [
        name
        for name, node, on_device in functions()
        if not on_device
        and (
            node.returns is None
            or any(arg.annotation is None and arg.arg not in ("self", "cls") for arg in parameters(node))
        )
    ]
    assert untyped == []


def test_signatures_are_short() -> None:
    """Arguments that belong together travel in one record."""
    lengths = {name: (len(parameters(node)), on_device) for name, node, on_device in functions()}
    assert {name for name, (length, on_device) in lengths.items() if length > 12 and not on_device} == set()
    assert {name for name, (length, _) in lengths.items() if length > 18} == set()
