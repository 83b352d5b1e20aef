"""Runs the Gluon kernels' own source on a CPU: the partitions of a program in any order that the barriers allow.

Triton's interpreter does not know Gluon. Here the source of `gluon.pipeline`, `down`, `up` and `d_hidden` (and of the
device functions that they share with the plain kernels) is executed as Python, over NumPy arrays, with emulated
primitives:

    partitions   threads of which one runs at a time, until it reaches a primitive; then a seeded generator picks what
                 goes on: a partition whose wait is over, or the end of a copy or of a product that is under way
    copies       make their target NaN when they start, and fill it when they end; TMA then reports its bytes, cp.async
                 the arrivals of its threads, warp by warp
    products     read their operands when they end, not when they are issued
    mbarriers    count arrivals and bytes, and complete phases, as PTX defines it
    clusters     every CTA runs the source on its share of each block; a multicast load ends in each CTA when it likes,
                 and so does an arrival at another CTA's barrier

So a stage that is read too early, or filled too early, gives NaN in the result. `Race` is raised by a product whose
operands cp.async wrote, unless a proxy fence lies between: one of its own partition, or one that reached it through a
barrier; and by what reaches a CTA whose partitions are at their end. `Deadlock` is raised when nobody can go on.
`changes` to the source make variants that ought to fail.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.helpers.gluon_memory import (
    Barrier,
    Barriers,
    Descriptor,
    Layout,
    Place,
    Pointer,
    PointerType,
    Race,
    Scalar,
    Shared,
    Tile,
    load,
    store,
)
from tests.helpers.gluon_source import Source

WARP = 32


class Deadlock(Exception):
    """Every partition waits, and nothing is under way."""


class Stopped(BaseException):
    """Ends the other partitions once one has failed."""


class Partition:
    """One role of a CTA, on a thread that runs only while it has the turn; number -1: what comes before the roles."""

    def __init__(self, cta: int, number: int, body: Callable[[], None], warps: int) -> None:
        self.cta, self.number, self.body, self.warps = cta, number, body, warps
        self.ready: Callable[[], bool] = lambda: True
        self.turn = threading.Semaphore(0)
        self.is_done = self.is_ready = False
        self.fenced = 0  # time of the latest proxy fence that this partition made or learnt of
        self.products: list[Callable[[], None]] = []  # under way; they end in order
        self.copies: list[list[Callable[[], None]]] = [[] for _ in range(warps)]  # cp.async and arrivals, in order
        self.groups: list[list[Any]] = [[]]  # cp.async groups, the open one last


class Emulator:
    """One launch. `seed` and `pace` (weights of what is under way, the consumers, the producer) make the order.

    In a cluster the second CTA has the weights that follow, or the first one's. meets: the CTAs wait for each other
    before their roles begin, as Triton makes them.
    """

    def __init__(
        self,
        seed: int,
        pace: Sequence[float] = (1, 1, 1, 1),
        changes: Mapping[str, str] | None = None,
        meets: bool = True,
    ) -> None:
        self.random, self.pace, self.meets, self.ctas = random.Random(seed), pace, meets, 1
        self.time = 0
        self.program = self.programs = 0
        self.running: Partition | None = None
        self.partitions: list[Partition] = []
        self.threads: list[threading.Thread] = []
        self.memory: list[Any] = []  # what was allocated, in every CTA
        self.allocations: list[int] = []  # of each CTA
        self.over = threading.Semaphore(0)
        self.stopping = False
        self.error: BaseException | None = None
        self.under_way: list[Callable[[], None]] = []  # TMA loads, which end in any order
        self.issued: list[int] = []  # the consumer of every product, in order of issue
        self.source = Source(self.primitives(), changes or {})

    def launch(self, module: str, kernel: str, programs: int, **arguments: Any) -> None:
        """Run the programs, or clusters, one after another: they share nothing that they write."""
        self.programs, self.ctas = programs, arguments["TILE"].CTAS
        function = self.source.function(f"moe_triton_kernels.gluon.{module}", kernel)
        for self.program in range(programs):
            self.run_program(partial(function, **arguments))

    # -- the order of events --

    def run_program(self, body: Callable[[], None]) -> None:
        """Every CTA runs the body, until all partitions are at their end or one has failed."""
        self.error, self.stopping, self.under_way = None, False, []
        self.partitions, self.threads, self.memory, self.allocations = [], [], [], [0] * self.ctas
        for cta in range(self.ctas):
            self.start(Partition(cta, -1, body, 4))
        self.running = self.partitions[0]
        self.running.turn.release()
        self.over.acquire()
        self.running, self.stopping = None, True
        for partition, thread in zip(self.partitions, self.threads, strict=True):
            partition.turn.release()
            thread.join()
        if self.error is not None:
            raise self.error

    def start(self, partition: Partition) -> None:
        self.partitions.append(partition)
        self.threads.append(threading.Thread(target=self.run, args=(partition,), daemon=True))
        self.threads[-1].start()

    def warp_specialize(self, roles: Sequence[tuple[Any, tuple]], warps: Sequence[int], _: Sequence[int]) -> None:
        partition = self.pause()
        partition.is_ready = True
        if self.meets:
            mains = [other for other in self.partitions if other.number < 0]
            self.pause(lambda: all(main.is_ready for main in mains))
        for number, ((role, arguments), count) in enumerate(zip(roles, (4, *warps), strict=True)):
            self.start(Partition(partition.cta, number, partial(role, *arguments), count))

    def has_ended(self, cta: int) -> bool:
        return all(partition.is_done for partition in self.partitions if partition.cta == cta)

    def later(self, cta: int, event: Callable[[], None]) -> None:
        """Let this happen in the memory of a CTA at any time from now on."""

        def reach() -> None:
            if self.has_ended(cta):
                raise Race("the CTA has ended")
            event()

        self.under_way.append(reach)

    def run(self, partition: Partition) -> None:
        partition.turn.acquire()
        try:
            if not self.stopping:
                partition.body()
                partition.is_done = True
                self.go_on(partition)
        except Stopped:
            pass
        except BaseException as error:
            self.error = error
            self.over.release()

    def pause(self, ready: Callable[[], bool] = lambda: True) -> Partition:
        """Give up the turn until `ready` holds and the generator picks this partition again."""
        partition = self.running
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
            for partition in self.partitions:
                if not partition.is_done and partition.ready():
                    events.append(partition)
                    place = 3 * partition.cta + partition.number % 3  # the producer's pace before the roles, too
                    weights.append(self.pace[1 + place % (len(self.pace) - 1)])
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

    def allocate(self, dtype: Any, shape: Sequence[int], layout: Layout) -> Shared | Barriers:
        cta, share = self.running.cta, layout.share(shape, self.ctas)
        place = self.allocations[cta]
        self.allocations[cta] += 1
        if place == len(self.memory) and dtype is np.int64:
            self.memory.append([[Barrier() for _ in range(share[0])] for _ in range(self.ctas)])
        elif place == len(self.memory):
            self.memory.append([(np.full(share, np.nan, dtype), np.zeros(share, np.int64)) for _ in range(self.ctas)])
        if dtype is np.int64:
            return Barriers(self.memory[place], cta, is_common=bool(layout.cga) and share == tuple(shape))
        return Shared(self.memory[place], cta, is_spread=share != tuple(shape))

    def init(self, place: Place, count: int) -> None:
        self.pause()
        if not place.is_far:
            place.barrier.init(count * (self.ctas if place.is_common else 1))

    def wait(self, place: Place, phase: int) -> None:
        if not place.is_far:
            partition = self.pause(lambda: place.barrier.passed(phase))
            partition.fenced = max(partition.fenced, place.barrier.completed_fenced)

    def arrive(self, place: Place, count: int, pred: bool = True) -> None:
        partition = self.pause()
        if pred and place.is_far:
            self.later(place.owner, partial(place.barrier.arrive, count, partition.fenced))
        elif pred:
            place.barrier.arrive(count, partition.fenced)

    def expect(self, place: Place, count: int) -> None:
        partition = self.pause()
        place.barrier.bytes += count
        place.barrier.arrive(1, partition.fenced)

    def fence(self) -> None:
        self.pause().fenced = self.time

    def tma_load(
        self, descriptor: Descriptor, at: Sequence[int], place: Place, target: Shared, multicast: bool = False
    ) -> None:
        cta, (first, *others) = self.pause().cta, at
        rows = target.shape[0]
        assert [rows * (self.ctas if target.is_spread else 1), *target.shape[1:]] == descriptor.block
        if multicast:
            assert not target.is_spread
            for other in range(self.ctas) if cta == 0 else ():  # the first CTA issues it
                self.load(descriptor, at, place.barriers[other], target.seen_by(other))
        else:
            self.load(descriptor, [first + cta * rows if target.is_spread else first, *others], place.barrier, target)

    def load(self, descriptor: Descriptor, at: Sequence[int], barrier: Barrier, target: Shared) -> None:
        target.data[...] = np.nan

        def end() -> None:
            target.data[...] = descriptor.read(at, target.shape)
            target.written[...] = 0
            barrier.bytes -= 2 * target.data.size
            barrier.complete()

        self.later(target.cta, end)

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

    def cp_async_arrive(self, place: Place, increment_count: bool) -> None:
        assert not increment_count
        for queue in self.pause().copies:
            queue.append(lambda: place.barrier.arrive(WARP))

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

        def arange(start: int, end: int, layout: Layout) -> Tile:
            (share,) = layout.share([end - start], self.ctas)
            first = start + (self.running.cta * share if share < end - start else 0)
            return np.arange(first, first + share).view(Tile)

        layouts = {
            "NVMMASharedLayout": lambda cga_layout, **_: Layout(cga_layout),
            "NVMMADistributedLayout": lambda *of: Layout(of[3]),
            "BlockedLayout": lambda *of: Layout(of[4]),
            "SliceLayout": lambda dim, parent: parent.without(dim),
        }
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
            arange=arange,
            sum=lambda x, axis: x.sum(axis),
            zeros=lambda shape, dtype, layout: np.zeros(layout.share(shape, self.ctas), dtype).view(Tile),
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
            mbarrier=SimpleNamespace(MBarrierLayout=Layout, **barrier),
            fence_async_shared=self.fence,
            tma_load=self.tma_load,
            cp_async=self.cp_async,
            cp_async_arrive=self.cp_async_arrive,
            commit_group=self.commit_group,
            wait_group=self.wait_group,
            warpgroup_mma=self.mma,
            warpgroup_mma_wait=self.mma_wait,
        )
