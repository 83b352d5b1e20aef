"""One kernel with everything that its compilation depends on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel to compile.

    name         unique within an architecture; begins with the name of the operation
    fn           the @triton.jit or @gluon.jit function
    signature    argument name -> Triton type ("*bf16", "i32", "tensordesc<...>", ...), None for an argument that is
                 None, or, where the argument is a tuple, a tuple of the same kind, in which anything but a string is a
                 constant; arguments that are in `constexprs` may be left out
    constexprs   argument name -> value
    num_warps, num_stages, num_ctas, maxnreg   launch options
    aligned      arguments that are multiples of 16, a tuple's as "tuple.field"; None: every pointer, as torch allocates
    sample       compiled by default; the others only with --all
    wants        the counts of the Report that must not be 0: what the main loop is meant to compile to
    """

    name: str
    fn: Any
    signature: Mapping[str, Any]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    num_ctas: int = 1  # programs of a cluster
    maxnreg: int = 255  # launch.MAX_REGISTERS; importing it would import Triton
    aligned: Sequence[str] | None = None
    sample: bool = True
    wants: Sequence[str] = ()

    @property
    def constants(self) -> dict[str, Any]:
        """Every compile-time constant by its name ("PACKED", "weight.ALIGNMENT"), without a "TILE." or the like."""
        kinds = [leaf for name, kind in self.signature.items() for leaf in leaves(name, kind, ())]
        inner = {name: kind for name, _, kind in kinds if not isinstance(kind, str)}
        own = {name.split(".")[1] if name.partition(".")[0].isupper() else name: kind for name, kind in inner.items()}
        return {**self.constexprs, **own}


def integers_of(fn: Any, *known: Mapping[str, Any]) -> list[str]:
    """The arguments of a kernel that nothing else knows: its integers."""
    return [name for name in fn.arg_names if not any(name in names for names in known)]


def pointers_of(signature: Mapping[str, Any]) -> list[str]:
    """The aligned pointers, within tuples too: all but num_tiles, which is one of several counts, 4 bytes apart."""
    kinds = [(name, kind) for arg, value in signature.items() for name, _, kind in leaves(arg, value, ())]
    return [name for name, kind in kinds if str(kind).startswith("*") and name != "tiles.num_tiles"]


def leaves(name: str, value: Any, path: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """(name, path, value) of an argument, or, where it is a tuple, of everything within it ("tiles.table", (7, 0))."""
    if not isinstance(value, tuple):
        yield name, path, value
        return
    fields = getattr(value, "_fields", range(len(value)))
    for index, (part, inner) in enumerate(zip(fields, value, strict=True)):
        yield from leaves(f"{name}.{part}", inner, (*path, index))
