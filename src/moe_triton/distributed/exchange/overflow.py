"""Rows that found no room on their way: every rank raises for them, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from moe_triton.distributed.errors import ExpertParallelError
from moe_triton.distributed.exchange.channel import Channel


@dataclass
class Overflows:
    """The flags of earlier calls: the channel that exchanged them, the limit that was passed, and how to read them."""

    found: list[tuple[Channel, str, Callable[[], list[int]]]] = field(default_factory=list)

    def watch(self, channel: Channel, overflow: Tensor, limit: str) -> None:
        """Let every rank know whether rows were left out anywhere: `overflow` [] int32 is 1 where they were here.

        `limit` says what this rank would have needed, for the message. Raises at once on a CPU, else in `check`.
        """
        flags = overflow.new_empty(channel.group.size)
        channel.all_gather(flags, overflow.reshape(1), "exchange of overflows")()
        self.found.append((channel, limit, channel.to_host("exchange of overflows", flags)))
        if overflow.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raise for the rows that found no room in an earlier call; waits for the device."""
        found, self.found = self.found, []
        for channel, limit, read in found:
            ranks = [rank for rank, flag in zip(channel.group.ranks, read(), strict=True) if flag]
            if ranks:
                had = f"rank {', '.join(map(str, ranks))} had {limit}"
                raise ExpertParallelError(f"{channel.layer}: {had}; they were left out")
