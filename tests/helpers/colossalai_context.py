"""A clean Colossal-AI context, in this process or in a rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moe_triton.compat.colossalai.context import MOE_CONTEXT, global_context
from moe_triton.compat.colossalai.context.random import reset_seeds
from moe_triton.compat.colossalai.launching import setup


def forget() -> None:
    """Undo `launch`."""
    global_context.destroy()
    MOE_CONTEXT.reset()
    reset_seeds()


@contextmanager
def launched(config: dict[str, Any], seed: int = 1024) -> Iterator[None]:
    """The contexts as after `launch(config)`; torch.distributed runs, or there is one process."""
    forget()
    setup(config, seed)
    try:
        yield
    finally:
        forget()
