"""Which expert lies in which slot of which rank when hot experts are replicated: computed on the host.

Logical experts are the model's E experts. Physical ones are the P slots that hold their weights: rank r holds slots
r*P/ranks to (r+1)*P/ranks - 1, and a hot expert has several, its replicas. The idea is that of EPLB, DeepSeek's expert
parallelism load balancer (DeepSeek-V3, arXiv 2412.19437, section 3.4): replicate by load, then pack with equal slots.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe_triton.checks import FLOATS, INTEGERS, check_int, check_tensor

EVEN = 1.01  # max/mean load that needs no further search
TRIES = 4096  # slots that the search for better replicas may pack: hundreds of tries on few slots, some on hundreds


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A map between E logical experts and P physical slots; int32 tensors on one device.

    physical_to_logical  [P]     the expert in each slot
    replicas             [E]     how many slots hold each expert, at least 1
    logical_to_physical  [E, R]  the slots of each expert in ascending order, -1 past its replicas; R = max(replicas)
    rank_loads           [ranks] fp64, expected load of each rank when an expert's load spreads evenly over its replicas
    """

    physical_to_logical: Tensor
    replicas: Tensor
    logical_to_physical: Tensor
    rank_loads: Tensor

    @property
    def num_ranks(self) -> int:
        return self.rank_loads.shape[0]

    @property
    def slots_per_rank(self) -> int:
        return self.physical_to_logical.shape[0] // self.num_ranks

    @property
    def imbalance(self) -> float:
        """Load of the busiest rank over the mean, lambda of the cost model; 1 without any load."""
        mean = self.rank_loads.mean().item()
        return self.rank_loads.max().item() / mean if mean > 0 else 1.0

    def to(self, device: torch.device | str) -> Placement:
        return Placement(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def plan_placement(
    load_E: Tensor,
    num_slots: int,
    num_ranks: int,
    *,
    ranks_per_node: int | None = None,
    num_groups: int | None = None,
    previous: Placement | None = None,
) -> Placement:
    """Return a placement that evens out the ranks' loads, the same for the same arguments on every process.

    load_E: [E], any real dtype: tokens per expert, counted or expected, finite and not negative.
    num_slots: P, a multiple of num_ranks, at least E. Every expert gets one slot; each further one goes to the expert
        with the most load per replica, and single replicas move on from there while that helps the busiest rank. Two
        replicas of one expert share a rank only when there are more of them than ranks.
    ranks_per_node: with it, and when the nodes divide the `num_groups` expert groups, whole groups are packed into
        nodes first and experts are replicated within their node: group-limited routing then keeps a token on few nodes,
        and replicas sum their gradients within the node; the loads come out less even where one expert outweighs its
        node. Otherwise everything is placed over all ranks at once.
    num_groups: groups of consecutive experts, as of group-limited routing. Default: every expert is one of its own.
    previous: renames ranks and slots such that few experts have to move; the loads stay the same.

    Raises ValueError or TypeError, naming the argument.
    """
    load = check_load(load_E)
    num_experts = len(load)
    check_int("num_ranks", num_ranks, low=1)
    check_int("num_slots", num_slots, low=num_experts)
    if num_slots % num_ranks:
        raise ValueError(f"num_slots: got {num_slots}, wanted a multiple of the {num_ranks} ranks")
    nodes = 1
    if ranks_per_node is not None:
        check_int("ranks_per_node", ranks_per_node, low=1)
        if num_ranks % ranks_per_node:
            raise ValueError(f"ranks_per_node: got {ranks_per_node}, wanted a divisor of the {num_ranks} ranks")
        nodes = num_ranks // ranks_per_node
    groups = num_experts if num_groups is None else num_groups
    check_int("num_groups", groups, low=1)
    if num_experts % groups:
        raise ValueError(f"num_groups: got {groups}, wanted a divisor of the {num_experts} experts")
    if groups % nodes:
        nodes = 1
    ranks: list[list[int]] = []
    for experts in experts_of_nodes(load, groups, nodes):
        placed = replicate_and_pack([load[e] for e in experts], num_slots // nodes, num_ranks // nodes)
        ranks += [[experts[i] for i in rank] for rank in placed]
    if previous is not None:
        ranks = align(ranks, previous, num_experts, num_ranks // nodes)
    return build_placement(torch.tensor(ranks).view(-1), load_E, num_ranks)


def check_load(load_E: Tensor) -> list[float]:
    check_tensor("load_E", load_E, shape=["E"], dtypes=FLOATS + INTEGERS)
    load: list[float] = load_E.detach().double().cpu().tolist()
    if not load:
        raise ValueError("load_E: got no experts, wanted at least 1")
    for expert, value in enumerate(load):
        if not 0 <= value < float("inf"):
            raise ValueError(f"load_E: got {value} for expert {expert}, wanted finite loads >= 0")
    return load


def experts_of_nodes(load: Sequence[float], groups: int, nodes: int) -> list[list[int]]:
    """Return the experts of each node, ascending: whole groups, as many per node, with loads as even as may be."""
    size = len(load) // groups
    sums = [sum(load[g * size : (g + 1) * size]) for g in range(groups)]
    packed = pack(sums, nodes, range(groups))
    return [[e for g in sorted(node) for e in range(g * size, (g + 1) * size)] for node in packed]


def replicate_and_pack(load: Sequence[float], slots: int, ranks: int) -> list[list[int]]:
    """Choose every rank's experts: `replicate`, `pack`, then one replica at a time from expert to expert, the best
    of at most TRIES // slots exchanges, as long as the busiest rank gains.

    With few slots per rank a cold expert beside a hot one can be worth more than a smaller share of the hot one; with
    many the first packing is even already.
    """

    def place(counts: Sequence[int]) -> tuple[float, list[list[int]]]:
        items = [e for e, count in enumerate(counts) for _ in range(count)]
        found = [[items[i] for i in rank] for rank in pack([load[e] / counts[e] for e in items], ranks, items)]
        return max(sum(load[e] / counts[e] for e in rank) for rank in found), found

    counts = replicate(load, slots, ranks)
    busiest, found = place(counts)
    tries = TRIES // slots if slots > ranks else 0  # on one slot per rank `replicate` is the best there is
    while busiest > EVEN * sum(load) / ranks:
        takers = sorted((e for e in range(len(load)) if counts[e] < ranks), key=lambda e: (-load[e] / counts[e], e))
        givers = sorted((e for e in range(len(load)) if counts[e] > 1), key=lambda e: (load[e] / (counts[e] - 1), e))
        pairs = [(taker, giver) for taker in takers for giver in givers if taker != giver][:tries]
        tries -= len(pairs)
        changes = [[count + (e == t) - (e == g) for e, count in enumerate(counts)] for t, g in pairs]
        better = min(((*place(changed), changed) for changed in changes), key=lambda tried: tried[0], default=None)
        if better is None or better[0] > busiest * (1 - 1e-12):
            break
        busiest, found, counts = better
    return found


def replicate(load: Sequence[float], slots: int, ranks: int) -> list[int]:
    """Replicas of each expert: one each, then one at a time to the most load per replica (ties: the fewest, then the
    lowest expert). None gets more than `ranks` before all have as many. This minimises the largest load per replica.
    """
    counts = [1] * len(load)
    heap = [(ranks == 1, -value, 1, e) for e, value in enumerate(load)]
    heapq.heapify(heap)
    for _ in range(slots - len(load)):
        _, _, _, e = heap[0]
        counts[e] += 1
        heapq.heapreplace(heap, (counts[e] >= ranks, -load[e] / counts[e], counts[e], e))
    return counts


def pack(weights: Sequence[float], bins: int, kinds: Sequence[int]) -> list[list[int]]:
    """Pack items 0..N-1 into `bins` bins of N/bins items each, with sums as even as may be; ascending within a bin.

    Equal kinds share a bin only when there are more of one than bins. Heaviest first into the lightest bin that has
    room and lacks the kind, or, should that come to a dead end, all dealt out in turn; then `refine`.
    """
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], kinds[i], i))
    result = pack_heaviest_first(order, weights, bins, kinds)
    if result is None:
        result = [order[b::bins] for b in range(bins)]  # equal kinds are neighbours: they land in different bins
    refine(result, np.array(weights, dtype=np.float64), np.array(kinds, dtype=np.int64))
    return [sorted(items) for items in result]


def pack_heaviest_first(
    order: Sequence[int], weights: Sequence[float], bins: int, kinds: Sequence[int]
) -> list[list[int]] | None:
    result: list[list[int]] = [[] for _ in range(bins)]
    held: list[set[int]] = [set() for _ in range(bins)]
    sums = [0.0] * bins
    for item in order:
        room = [b for b in range(bins) if len(result[b]) < len(order) // bins and kinds[item] not in held[b]]
        if not room:
            return None
        lightest = min(room, key=lambda b: (sums[b], b))
        result[lightest].append(item)
        held[lightest].add(kinds[item])
        sums[lightest] += weights[item]
    return result


def refine(bins: list[list[int]], weights: NDArray[np.float64], kinds: NDArray[np.int64]) -> None:
    """Swap an item of the heaviest bin with a lighter one of another bin, each time the pair that leaves the lowest
    larger sum, until none helps. No bin gets a kind that it has already."""
    size = len(bins[0])
    slack = 1e-12 * weights.sum()  # below it is rounding
    has = np.zeros((len(bins), int(kinds.max()) + 1), dtype=bool)
    for b, items in enumerate(bins):
        has[b, kinds[items]] = True
    for _ in range(len(weights) * len(bins)):
        slots = np.array(bins)  # [bins, size]
        sums = weights[slots].sum(1)
        heavy = int(sums.argmax())
        mine, others = slots[heavy], slots.reshape(-1)
        less = weights[mine][:, None] - weights[others]  # [size, bins * size]: what the heavy bin would lose
        gap = np.repeat(sums[heavy] - sums, size)
        taken = np.repeat(has[:, kinds[mine]].T, size, axis=1) | has[heavy, kinds[others]]
        larger = np.where((less > slack) & (less < gap - slack) & ~taken, np.maximum(-less, less - gap), np.inf)
        a, place = np.unravel_index(int(larger.argmin()), larger.shape)
        if not np.isfinite(larger[a, place]):
            return
        other, b = divmod(int(place), size)
        bins[heavy][a], bins[other][b] = bins[other][b], bins[heavy][a]
        for changed in (heavy, other):
            has[changed] = False
            has[changed, kinds[bins[changed]]] = True


def align(ranks: list[list[int]], previous: Placement, num_experts: int, block: int) -> list[list[int]]:
    """The same ranks under other names, whose experts keep their slots as far as they were on the rank before.

    Nodes of `block` ranks, then the ranks within each, take the names of those with which they share most experts.
    """
    wanted = (num_experts, sum(len(rank) for rank in ranks), len(ranks))
    got = (previous.replicas.shape[0], previous.physical_to_logical.shape[0], previous.num_ranks)
    if got != wanted:
        raise ValueError(f"previous: got (experts, slots, ranks) {got}, wanted {wanted}")
    old: list[list[int]] = previous.physical_to_logical.view(len(ranks), -1).tolist()

    def nodes(all_ranks: list[list[int]]) -> list[list[list[int]]]:
        return [all_ranks[i : i + block] for i in range(0, len(all_ranks), block)]

    def flat(node: list[list[int]]) -> list[int]:
        return [e for rank in node for e in rank]

    new_nodes, old_nodes = nodes(ranks), nodes(old)
    renamed = []
    for node, at in zip(match([flat(n) for n in new_nodes], [flat(n) for n in old_nodes]), old_nodes, strict=True):
        mine = new_nodes[node]
        for rank, before in zip(match(mine, at), at, strict=True):
            renamed.append(keep_slots(mine[rank], before))
    return renamed


def match(new: Sequence[Sequence[int]], old: Sequence[Sequence[int]]) -> list[int]:
    """Pair each of `old` with one of `new`, those that share most first; ties: the lowest old, then the lowest new."""
    old_counts, new_counts = [Counter(items) for items in old], [Counter(items) for items in new]
    pairs = sorted((-(old_counts[o] & new_counts[n]).total(), o, n) for o in range(len(old)) for n in range(len(new)))
    chosen: dict[int, int] = {}
    used: set[int] = set()
    for _, o, n in pairs:
        if o not in chosen and n not in used:
            chosen[o] = n
            used.add(n)
    return [chosen[o] for o in range(len(old))]


def keep_slots(experts: Sequence[int], before: Sequence[int]) -> list[int]:
    """Return a rank's experts in an order that leaves those in place that the rank had `before`."""
    left = Counter(experts)
    slots: list[int | None] = []
    for e in before:
        keep = left[e] > 0
        left[e] -= keep
        slots.append(e if keep else None)
    arriving = iter(sorted(left.elements()))
    return [next(arriving) if e is None else e for e in slots]


def build_placement(physical_to_logical: Tensor, load_E: Tensor, num_ranks: int) -> Placement:
    """Build the Placement of a map [P], int32 or int64, on the CPU: a checkpoint's, or `arange(E)` without replicas.

    Raises ValueError or TypeError when an expert has no slot, an id is not one, or the ranks do not divide the slots.
    """
    load = torch.tensor(check_load(load_E), dtype=torch.float64)
    check_tensor("physical_to_logical", physical_to_logical, shape=["P"], dtypes=INTEGERS)
    check_int("num_ranks", num_ranks, low=1)
    map_P = physical_to_logical.detach().cpu().long()
    if map_P.numel() % num_ranks:
        raise ValueError(f"num_ranks: got {num_ranks}, wanted a divisor of the {map_P.numel()} slots")
    num_experts = load.shape[0]
    low, high = (int(map_P.min()), int(map_P.max())) if map_P.numel() else (0, 0)
    if low < 0 or high >= num_experts:
        raise ValueError(f"physical_to_logical: got ids {low} to {high}, wanted 0 to {num_experts - 1}")
    replicas_E = torch.zeros(num_experts, dtype=torch.int64).scatter_add_(0, map_P, torch.ones_like(map_P))
    if int(replicas_E.min()) == 0:
        raise ValueError(f"physical_to_logical: got no slot for expert {int(replicas_E.argmin())}, wanted one or more")
    by_expert_P = torch.argsort(map_P, stable=True)
    first_E = replicas_E.cumsum(0) - replicas_E
    which_P = torch.arange(map_P.numel()) - first_E[map_P[by_expert_P]]
    slots_ER = torch.full((num_experts, int(replicas_E.max())), -1, dtype=torch.int64)
    slots_ER[map_P[by_expert_P], which_P] = by_expert_P
    return Placement(
        physical_to_logical=map_P.int(),
        replicas=replicas_E.int(),
        logical_to_physical=slots_ER.int(),
        rank_loads=(load / replicas_E)[map_P].view(num_ranks, -1).sum(1),
    )


def replica_of(experts: Tensor, placement: Placement) -> Tensor:
    """Get the physical ids [T, K] of the choices `experts` [T, K] (int32 or int64), in their dtype: t takes replica
    t mod replicas[e], so that an expert's tokens spread over its replicas. What is no expert (-1, or >= E) becomes -1.

    No host sync; `placement` must be on the device of `experts`.
    """
    check_tensor("experts", experts, shape=["T", "K"], dtypes=INTEGERS)
    check_tensor("placement", placement.replicas, device=experts.device)
    num_experts, most = placement.logical_to_physical.shape
    valid_TK = (experts >= 0) & (experts < num_experts)
    expert_TK = torch.where(valid_TK, experts, 0).long()
    token_T1 = torch.arange(experts.shape[0], device=experts.device)[:, None]
    which_TK = token_T1 % placement.replicas[expert_TK]
    slot_TK = placement.logical_to_physical.view(-1)[expert_TK * most + which_TK]
    return torch.where(valid_TK, slot_TK, -1).to(experts.dtype)


def moves(old: Placement, new: Placement) -> list[tuple[int, int]]:
    """List the copies (source slot, destination slot) that turn `old` into `new`, by destination: one per slot whose
    expert changes, none for the others. All sources are read before any destination is written.

    The source is on the destination's rank where that rank held the expert, so that as few copies as possible cross
    ranks; among the others it is the replica that has sent least so far, then the lowest slot.
    """
    sizes = [(len(p.replicas), len(p.physical_to_logical), p.num_ranks) for p in (old, new)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"new: got (experts, slots, ranks) {sizes[1]}, wanted {sizes[0]}, those of old")
    before, after = old.physical_to_logical.tolist(), new.physical_to_logical.tolist()
    holders: list[list[int]] = [[] for _ in range(len(old.replicas))]
    for slot, e in enumerate(before):
        holders[e].append(slot)
    width = old.slots_per_rank
    sent = [0] * len(before)
    found = []
    for slot, e in enumerate(after):
        if before[slot] == e:
            continue
        source = min(holders[e], key=lambda s: (s // width != slot // width, sent[s], s))
        sent[source] += source // width != slot // width
        found.append((source, slot))
    return found
