"""What a rank has done on one group, as a hash that costs no message: ranks that have done the same have the same."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from moe_triton.distributed.groups import Group

MOST_CALLS = 1024  # of a step that are kept to say what differs
MASK = (1 << 31) - 1
MULTIPLIER = 1_000_003  # odd, so that what differs once goes on to differ


class DescribedCall(NamedTuple):
    """What a rank is about to do on a group, by name, and 31 bits that are the same on all ranks for the same."""

    what: Mapping[str, object]
    fingerprint: int


def described(what: Mapping[str, object]) -> DescribedCall:
    """Return the call with these names and values, which have to be hashable."""
    return DescribedCall(what, _fingerprint(tuple(what.items())))


@lru_cache(maxsize=4096)  # layers do the same in every step
def _fingerprint(items: tuple[tuple[str, object], ...]) -> int:
    return zlib.crc32(repr(sorted(items)).encode()) & MASK


@dataclass
class Schedule:
    """What this rank has done on a group since its default group was made, or since the ranks failed together.

    compares_always  whether a rank on a GPU compares every call
    rolling          hash of all of it, 31 bits
    compared         the hash that was compared last
    calls            since then
    """

    group: Group
    compares_always: bool = False
    rolling: int = 0
    compared: int = 0
    calls: deque[Mapping[str, object]] = field(default_factory=lambda: deque(maxlen=MOST_CALLS))

    def add(self, call: DescribedCall) -> int:
        """Add one call and return the new hash."""
        self.calls.append(call.what)
        self.rolling = (self.rolling * MULTIPLIER + call.fingerprint) & MASK
        return self.rolling

    def cut(self) -> list[Mapping[str, object]]:
        """Begin a new step, and return the calls of the last one."""
        calls = list(self.calls)
        self.compared = self.rolling
        self.calls.clear()
        return calls
