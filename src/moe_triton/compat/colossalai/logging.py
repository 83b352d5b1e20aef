"""A logger for chosen ranks."""

from __future__ import annotations

import logging
from collections.abc import Sequence

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

    def _log(self, level: int, message: str, ranks: Sequence[int] | None) -> None:
        if ranks is None or global_context.get_global_rank() in ranks:
            self._logger.log(level, message)

    def debug(self, message: str, ranks: Sequence[int] | None = None) -> None:
        self._log(logging.DEBUG, message, ranks)

    def info(self, message: str, ranks: Sequence[int] | None = None) -> None:
        self._log(logging.INFO, message, ranks)

    def warning(self, message: str, ranks: Sequence[int] | None = None) -> None:
        self._log(logging.WARNING, message, ranks)

    def error(self, message: str, ranks: Sequence[int] | None = None) -> None:
        self._log(logging.ERROR, message, ranks)


def get_dist_logger(name: str = "colossalai") -> DistributedLogger:
    """The logger of a name."""
    return DistributedLogger(name)
