"""Runs the Gluon kernels' own source on a CPU: the three partitions of a program in any order that the barriers allow.

Triton's interpreter does not know Gluon. Here the source of `gluon.pipeline`, `down`, `up` and `d_hidden` (and of the
device functions that they share with the plain kernels) is executed as Python, over NumPy arrays, with emulated
primitives:

    partitions   threads of which one runs at a time, until it reaches a primitive; then a seeded generator picks what
                 goes on: a partition whose wait is over, or the end of a copy or of a product that is under way
    copies       make their target NaN when they start, and fill it when they end; TMA then reports its bytes, cp.async
                 the arrivals of its threads, warp by warp
    products     read their operands when they end, not when they are issued
    mbarriers    count arrivals and bytes, and complete phases, as PTX defines it

So a stage that is read too early, or filled too early, gives NaN in the result. `Race` is raised by a product whose
operands cp.async wrote, unless a proxy fence lies between: one of its own partition, or one that reached it through a
barrier. `Deadlock` is raised when nobody can go on. `changes` to the source make variants that ought to fail.
"""

from __future__ import annotations

import builtins
import importlib
import math
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any

import numpy as np

from tests.helpers.gluon_memory import (
    Barrier,
    Barriers,
    Descriptor,
    Pointer,
    PointerType,
    Race,
    Scalar,
    Shared,
    Tile,
    load,
    store,
)

EMULATED = [
    f"moe_triton_kernels.{name}"
    for name in (
        "operands",
        "grouped_gemm",
        "tiles",
        "activations",
        "preactivation",
        "gluon.pipeline",
        "gluon.down",
        "gluon.up",
        "gluon.d_hidden",
    )
]
WARP = 32


@lru_cache
def compiled(source: str, path: str) -> CodeType:
    return compile(source, path, "exec")


class Deadlock(Exception):
    """Every partition waits, and nothing is under way."""


class Stopped(BaseException):
    """Ends the other partitions once one has failed."""


class Partition:
    """One role of a program, on a thread that runs only while it has the turn."""

    def __init__(self, number: int, body: Callable[..., None], arguments: Sequence[Any], warps: int) -> None:
        self.number, self.body, self.arguments, self.warps = number, body, arguments, warps
        self.ready: Callable[[], bool] = lambda: True
        self.turn = threading.Semaphore(0)
        self.is_done = False
        self.fenced = 0  # time of the latest proxy fence that this partition made or learnt of
        self.products: list[Callable[[], None]] = []  # under way; they end in order
        self.copies: list[list[Callable[[], None]]] = [[] for _ in range(warps)]  # cp.async and arrivals, in order
        self.groups: list[list[Any]] = [[]]  # cp.async groups, the open one last


class Emulator:
    """One launch. `seed` and `pace` (weights of what is under way, the consumers, the producer) make the order."""

    def __init__(
        self, seed: int, pace: Sequence[float] = (1, 1, 1, 1), changes: Mapping[str, str] | None = None
    ) -> None:
        self.random, self.pace, self.changes = random.Random(seed), pace, dict(changes or {})
        self.changed: set[str] = set()
        self.modules: dict[str, SimpleNamespace] = {}
        self.time = 0
        self.program = self.programs = 0
        self.running: Partition | None = None
        self.partitions: list[Partition] = []
        self.over = threading.Semaphore(0)
        self.stopping = False
        self.error: BaseException | None = None
        self.under_way: list[Callable[[], None]] = []  # TMA loads, which end in any order
        self.issued: list[int] = []  # the consumer of every product, in order of issue
        self.names = self.primitives()

    # -- loading the kernels' source --

    def module(self, name: str) -> SimpleNamespace:
        """The module of this name with emulated imports; the changes are made in whichever has the text."""
        if name not in self.modules:
            path = Path(importlib.import_module(name).__file__)
            source = path.read_text(encoding="utf-8")
            for old, new in self.changes.items():
                if old in source:
                    source = source.replace(old, new)
                    self.changed.add(old)
            space = {"__name__": name, "__builtins__": {**vars(builtins), "__import__": self.import_module}}
            self.modules[name] = module = SimpleNamespace()
            exec(compiled(source, str(path)), space)
            vars(module).update(space)
        return self.modules[name]

    def import_module(self, name: str, *arguments: Any) -> Any:
        if name in EMULATED:
            return self.module(name)
        if name == "moe_triton_kernels.gluon.names":
            return self.names
        if name in ("triton", "triton.language"):
            return SimpleNamespace(
                jit=lambda fn=None, **_: fn or (lambda f: f), constexpr_function=lambda fn: fn, language=self.names.gl
            )
        return builtins.__import__(name, *arguments)

    def launch(self, module: str, kernel: str, programs: int, **arguments: Any) -> None:
        """Run the programs one after another: they share nothing that they write."""
        self.programs = programs
        for self.program in range(programs):
            function = getattr(self.module(f"moe_triton_kernels.gluon.{module}"), kernel)
            if self.changed != set(self.changes):
                raise ValueError("changes: a text is not in the source")
            function(**arguments)

    # -- the order of events --

    def warp_specialize(self, roles: Sequence[tuple[Any, tuple]], warps: Sequence[int], _: Sequence[int]) -> None:
        self.partitions = [Partition(i, *role, n) for i, (role, n) in enumerate(zip(roles, (4, *warps), strict=True))]
        threads = [threading.Thread(target=self.run, args=(partition,), daemon=True) for partition in self.partitions]
        self.error, self.stopping = None, False
        for thread in threads:
            thread.start()
        self.partitions[0].turn.release()
        self.over.acquire()
        self.running, self.stopping = None, True
        for partition, thread in zip(self.partitions, threads, strict=True):
            partition.turn.release()
            thread.join()
        if self.error is not None:
            raise self.error

    def run(self, partition: Partition) -> None:
        partition.turn.acquire()
        try:
            if not self.stopping:
                self.running = partition
                partition.body(*partition.arguments)
                partition.is_done = True
                self.go_on(partition)
        except Stopped:
            pass
        except BaseException as error:
            self.error = error
            self.over.release()

    def pause(self, ready: Callable[[], bool] = lambda: True) -> Partition | None:
        """Give up the turn until `ready` holds and the generator picks this partition again. Nothing outside of one."""
        partition = self.running
        if partition is not None:
            partition.ready = ready
            self.go_on(partition)
            self.time += 1
        return partition

    def go_on(self, partition: Partition) -> None:
        """Events, until one is a partition's next step. If it is another's, sleep until the turn comes back."""
        chosen = self.choose()
        if chosen is partition:
            return
        if chosen is None:
            self.over.release()
            return
        self.running = chosen
        chosen.turn.release()
        if not partition.is_done:
            partition.turn.acquire()
            if self.stopping:
                raise Stopped

    def choose(self) -> Partition | None:
        """The partition that goes on; None when all is done. Ends what the generator picks before that."""
        while True:
            queues = [queue for p in self.partitions for queue in (p.products, *p.copies) if queue]
            events: list[Any] = [*[(self.under_way, i) for i in range(len(self.under_way))], *[(q, 0) for q in queues]]
            weights = [self.pace[0]] * len(events)
            for partition, weight in zip(self.partitions, self.pace[1:], strict=True):
                if not partition.is_done and partition.ready():
                    events.append(partition)
                    weights.append(weight)
            if not events:
                if all(partition.is_done for partition in self.partitions):
                    return None
                raise Deadlock
            event = self.random.choices(events, weights)[0]
            if isinstance(event, Partition):
                return event
            queue, i = event
            queue.pop(i)()

    # -- primitives --

    def allocate(self, dtype: Any, shape: Sequence[int], _: Any) -> Shared | Barriers:
        if dtype is np.int64:
            return Barriers(shape[0])
        return Shared(np.full(shape, np.nan, dtype), np.zeros(shape, np.int64))

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = count

    def wait(self, barrier: Barrier, phase: int) -> None:
        partition = self.pause(lambda: barrier.passed(phase))
        partition.fenced = max(partition.fenced, barrier.completed_fenced)

    def arrive(self, barrier: Barrier, count: int, pred: bool = True) -> None:
        partition = self.pause()
        if pred:
            barrier.arrive(count, partition.fenced)

    def expect(self, barrier: Barrier, count: int) -> None:
        partition = self.pause()
        barrier.bytes += count
        barrier.arrive(1, partition.fenced)

    def fence(self) -> None:
        if partition := self.pause():
            partition.fenced = self.time

    def tma_load(self, descriptor: Descriptor, at: Sequence[int], barrier: Barrier, target: Shared) -> None:
        self.pause()
        assert list(target.shape) == descriptor.block
        target.data[...] = np.nan

        def end() -> None:
            target.data[...] = descriptor.read(at)
            target.written[...] = 0
            barrier.bytes -= 2 * target.data.size
            barrier.complete()

        self.under_way.append(end)

    def cp_async(self, target: Shared, pointers: Pointer, mask: Any = True) -> None:
        partition = self.pause()
        assert np.shape(pointers.offsets) == target.shape
        mask = np.broadcast_to(mask, target.shape)
        target.data[...] = np.nan
        for warp, queue in enumerate(partition.copies):
            rows = slice(warp, None, partition.warps)

            def end(rows: slice = rows) -> None:
                target.data[rows] = load(pointers[rows], mask[rows])
                self.time += 1
                target.written[rows] = self.time

            queue.append(end)
            partition.groups[-1].append((queue, end))

    def cp_async_arrive(self, barrier: Barrier, increment_count: bool) -> None:
        assert not increment_count
        for queue in self.pause().copies:
            queue.append(lambda: barrier.arrive(WARP))

    def commit_group(self) -> None:
        self.pause().groups.append([])

    def wait_group(self, pending: int) -> None:
        groups = self.running.groups
        waited = [copy for group in groups[: len(groups) - 1 - pending] for copy in group]
        self.pause(lambda: not any(end in queue for queue, end in waited))

    def mma(self, a: Shared, b: Shared, acc: Tile, use_acc: bool, is_async: bool) -> Tile:
        partition = self.pause()
        assert is_async
        if max(a.written.max(), b.written.max()) > partition.fenced:
            raise Race("a product of unfenced rows")

        def end() -> None:
            acc[...] = (acc if use_acc else 0) + a.data.astype(acc.dtype) @ b.data.astype(acc.dtype)

        partition.products.append(end)
        self.issued.append(partition.number)
        return acc

    def mma_wait(self, pending: int, deps: tuple[Tile]) -> Tile:
        products = self.running.products
        self.pause(lambda: len(products) <= pending)
        return deps[0]

    def primitives(self) -> SimpleNamespace:
        """What `gluon.names` exports, and what the shared device functions use of triton.language."""

        def same(value: Any) -> Any:
            return value

        def where(condition: Any, yes: Any, no: Any) -> Any:
            return (yes if condition else no) if np.ndim(condition) == 0 else np.where(condition, yes, no).view(Tile)

        layouts = dict.fromkeys(
            ("NVMMASharedLayout", "NVMMADistributedLayout", "BlockedLayout", "SliceLayout"), lambda *_, **__: None
        )
        types = {"float32": np.float32, "int64": np.int64, "int32": np.int32, "tensor": None}
        gl = SimpleNamespace(
            **layouts,
            **types,
            shared_memory_descriptor=Shared,
            constexpr=same,
            pointer_type=PointerType,
            multiple_of=lambda pointer, _: pointer,
            static_range=range,
            range=range,
            to_tensor=Scalar,
            program_id=lambda _: self.program,
            num_programs=lambda _: self.programs,
            cdiv=lambda a, b: -(-a // b),
            arange=lambda start, end, layout=None: np.arange(start, end).view(Tile),
            sum=lambda x, axis: x.sum(axis),
            zeros=lambda shape, dtype, layout=None: np.zeros(shape, dtype).view(Tile),
            where=where,
            minimum=np.minimum,
            maximum=np.maximum,
            join=lambda a, b: np.stack([a, b], -1).view(Tile),
            exp=np.exp,
            erf=np.vectorize(math.erf, otypes=[np.float32]),
            sigmoid=lambda x: 0.5 + 0.5 * np.tanh(0.5 * x),
            load=load,
            store=store,
            convert_layout=lambda value, layout: value,
            allocate_shared_memory=self.allocate,
            warp_specialize=self.warp_specialize,
        )
        barrier = {"init": self.init, "wait": self.wait, "arrive": self.arrive, "expect": self.expect}
        return SimpleNamespace(
            gl=gl,
            gluon=SimpleNamespace(jit=lambda fn=None, **_: fn or same, constexpr_function=same),
            aggregate=same,
            mbarrier=SimpleNamespace(MBarrierLayout=lambda: None, **barrier),
            fence_async_shared=self.fence,
            tma_load=self.tma_load,
            cp_async=self.cp_async,
            cp_async_arrive=self.cp_async_arrive,
            commit_group=self.commit_group,
            wait_group=self.wait_group,
            warpgroup_mma=self.mma,
            warpgroup_mma_wait=self.mma_wait,
        )
