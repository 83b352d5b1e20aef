"""A logger for chosen ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partialmethod

from moe_triton.compat.colossalai.context.parallel_context import global_context


class DistributedLogger:
    """Python's logger of a name; `ranks` says which ranks log, None is all of them."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)
        if not self._logger.handlers:
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            self._logger.addHandler(handler)
            self._logger.setLevel(logging.INFO)
            self._logger.propagate = False

    def _log(self, level: int, message: str, ranks: Sequence[int] | None = None) -> None:
        if ranks is None or global_context.get_global_rank() in ranks:
            self._logger.log(level, message)

    debug = partialmethod(_log, logging.DEBUG)
    info = partialmethod(_log, logging.INFO)
    warning = partialmethod(_log, logging.WARNING)
    error = partialmethod(_log, logging.ERROR)


def get_dist_logger(name: str = "colossalai") -> DistributedLogger:
    """Return the logger of a name."""
    return DistributedLogger(name)
