"""What a rank says when its launcher ends it."""

from __future__ import annotations

import os
import signal
from types import FrameType

import torch.distributed as dist

from moe_triton.distributed.exchange.failure_board import failure_board, logger


def explain_termination() -> None:
    """Log on SIGTERM which ranks have died, then end as usual; otherwise the process exits silently.

    For programs under a launcher such as torchrun, which ends the other ranks a moment after one has died. Call it in
    the main thread.
    """
    before = signal.getsignal(signal.SIGTERM)

    def explain(number: int, frame: FrameType | None) -> None:
        if dist.is_available() and dist.is_initialized():
            board = failure_board()
            dead = ", ".join(f"rank {rank} has died" for rank in board.dead(board.identities))
            logger.error("rank %d: terminated: %s", dist.get_rank(), dead or "no rank is known to have died")
        if callable(before):
            before(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, explain)
