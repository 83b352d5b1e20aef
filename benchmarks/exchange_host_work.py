"""Host work of an expert-parallel layer per direction, with 64 ranks and no communication.

    python benchmarks/exchange_host_work.py [--ep N] [--repeats N] [--case NAME ...] [--json | --write]

A process group of torch's backend "fake" sends nothing; here an all-to-all gives every rank what it sends, and waits
only queue, as on a GPU. So what is timed is the host's: Python, and calls of operators on next to no data. "operators
alone" repeats the same operators in a plain loop; the difference is Python's, and is what the limit is for. Of each the
shortest time counts, since other work of the machine only adds to it.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from marked_table import write_table
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from moe_triton.backends.torch import dispatch as cpu_dispatch
from moe_triton.backends.torch import rows as cpu_rows
from moe_triton.dispatch import dispatch
from moe_triton.distributed import ExpertParallel, make_groups
from moe_triton.distributed.exchange import channel, failure_board
from moe_triton.distributed.exchange.stages import ExchangedLayer, Saved

LIMIT_US = 60.0
# what runs in numpy or numba on a CPU, for which a GPU launches a kernel
KERNELS = ((cpu_dispatch, "_in_expert_order_by_numpy"), (cpu_dispatch, "sort_by_loop"), (cpu_rows, "_sum_by_loop"))


class Recorded(TorchDispatchMode):
    """Keeps the operators that run, to run them again; KERNELS are operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], object]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        self.calls.append(lambda: function(*args, **kwargs))
        return function(*args, **kwargs)

    def recording(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        """A kernel that is recorded, in the place of the operators inside it."""

        def run(*args: Any) -> Any:
            before = len(self.calls)
            result = kernel(*args)
            self.calls[before:] = [lambda: kernel(*args)]
            return result

        return run


class Over:
    """A collective that is over, and an event that has happened."""

    def wait(self, timeout: object = None) -> None: ...

    def record(self) -> None: ...

    def query(self) -> bool:
        return True


def all_to_all(out: torch.Tensor, rows: torch.Tensor, *_: object, **__: object) -> Over:
    if out.shape == rows.shape:
        out.copy_(rows)
    return Over()


def shortest_us(functions: Sequence[Callable[[], Callable[[], object]]], repeats: int) -> list[float]:
    """The shortest time of what each function makes; they take turns, so that all of them meet the machine's quiet."""
    shortest = [float("inf")] * len(functions)
    gc.disable()
    for _ in range(repeats):
        for i, make in enumerate(functions):
            call = make()
            start = time.perf_counter()
            call()
            shortest[i] = min(shortest[i], time.perf_counter() - start)
    gc.enable()
    return [1e6 * seconds for seconds in shortest]


@dataclass
class NoExperts:
    """The innermost stage of an exchange, with next to nothing to do."""

    num_experts: int
    backend: str = "torch"
    weights: list[Tensor] = field(default_factory=list)

    def description(self) -> Mapping[str, object]:
        return {}

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, assignments: int, saved: Saved) -> Tensor:
        self.weights.append(weights)
        return x

    def start_backward(self, call: int, grad: Tensor, saved: Saved) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: (grad, self.weights[call])

    def backward_weights(self, wanted: Sequence[bool], saved: Saved) -> Sequence[Tensor | None]:
        return []


@dataclass(frozen=True)
class Case:
    """An exchange: options of ExpertParallel, sizes of groups, and places of an expert where it has so many."""

    options: Mapping[str, Any] = field(default_factory=dict)
    etp: int = 1
    places: int | None = None


TOKENS = 16
FIXED = {"max_tokens_per_rank": TOKENS}
CASES = {
    "dropless": Case(),
    "row per choice": Case({"deduplicate": False}),
    "2 chunks": Case({"chunks": 2}),
    "2 levels": Case({"ranks_per_node": 8}),
    "2 slices": Case(etp=2),
    "capacity": Case({"mode": "capacity", **FIXED}, places=4),
    "bounded": Case({"mode": "bounded", **FIXED}),
    "allgather": Case({"mode": "allgather", **FIXED}),
}


def measure(case: Case, ep: int, repeats: int) -> dict[str, dict[str, float]]:
    """{direction: microseconds} of the exchange alone: its experts do nothing."""
    num_experts, top_k, hidden = 4 * ep, 8, 16
    parallel = ExpertParallel(make_groups(ep=ep, etp=case.etp), **case.options)
    layer = ExchangedLayer(name="layer", num_experts=num_experts, capacity=lambda num_tokens: case.places)
    x = torch.randn(TOKENS, hidden, requires_grad=True)
    # all that arrives is what left, which would be for other nodes
    near = 4 * case.options.get("ranks_per_node", ep)
    ids = torch.rand(TOKENS, near).topk(top_k).indices.int()
    dispatched = dispatch(ids, num_experts, capacity=case.places)
    weights = torch.rand(TOKENS, top_k)

    def forward() -> Tensor:
        return parallel.exchange(x, weights, dispatched, NoExperts(4), [], layer)

    found: dict[str, dict[str, float]] = {}
    for direction in ("forward", "backward"):

        def once(direction: str = direction) -> Callable[[], object]:
            if direction == "forward":
                return forward
            out = forward()
            grad = torch.ones_like(out)
            return lambda: out.backward(grad)

        for _ in range(3):
            once()()
        call = once()
        recorded = Recorded()
        with recorded, ExitStack() as patches:
            for module, name in KERNELS:
                patches.enter_context(mock.patch.object(module, name, recorded.recording(getattr(module, name))))
            call()

        def again(calls: Sequence[Callable[[], object]] = recorded.calls) -> None:
            with torch.no_grad():
                for call in calls:
                    call()

        whole, alone = shortest_us([once, lambda: again], repeats)
        found[direction] = {
            "whole": whole,
            "operators alone": alone,
            "python": whole - alone,
            "operators": len(recorded.calls),
        }
    return found


def rows(found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[str]:
    """The lines of the table."""
    columns = [(direction, what) for direction, times in next(iter(found.values())).items() for what in times]
    yield "| exchange | " + " | ".join(f"{direction}, {what}" for direction, what in columns) + " |"
    yield "|---" + "|--:" * len(columns) + "|"
    for name, directions in found.items():
        yield f"| {name} | " + " | ".join(f"{directions[direction][what]:.0f}" for direction, what in columns) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ep", type=int, default=64, help="ranks")
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--case", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--write", action="store_true", help="write the table of docs/distributed.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2 * arguments.ep)
    emulated: list[tuple[Any, str, object]] = [
        (dist, "all_to_all_single", all_to_all),
        (dist, "all_reduce", lambda *_, **__: Over()),
        (channel, "all_gather_single", lambda *_, **__: Over()),
        (channel, "only_queues", lambda device: True),
        (failure_board, "device_event", lambda device: Over()),
        (failure_board, "WATCH_INTERVAL_S", 1e9),
    ]
    with ExitStack() as patches:
        for place, name, value in emulated:  # functions, not mocks: these take microseconds
            patches.enter_context(mock.patch.object(place, name, value))
        found = {name: measure(CASES[name], arguments.ep, arguments.repeats) for name in arguments.case}
    dist.destroy_process_group()
    if arguments.json:
        print(json.dumps(found))
        return
    if arguments.write:
        write_table("distributed.md", "host work", "exchange_host_work", "\n".join(rows(found)))
    print(f"{arguments.ep} ranks, microseconds per layer; the limit for Python is {LIMIT_US:.0f}")
    for name, directions in found.items():
        for direction, times in directions.items():
            shown = "".join(f"  {what} {value:3.0f}" for what, value in times.items())
            print(f"{name:15}{direction:9}{shown}")


if __name__ == "__main__":
    main()
