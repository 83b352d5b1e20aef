"""Expert parallelism: how an MoE layer's experts are spread over ranks. Rules: docs/distributed.md."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moe_triton import runtime
from moe_triton.autograd.experts import in_context
from moe_triton.autograd.flat import flatten, form_of
from moe_triton.checks import check_choice, check_int
from moe_triton.distributed.exchange.all_to_all import AllToAll, exchange_in_node, exchange_over_slices
from moe_triton.distributed.exchange.channel import Channel, Listener, report_failure
from moe_triton.distributed.exchange.counts import NodeCounts, SliceSizes
from moe_triton.distributed.exchange.function import Exchanged, StagedCall
from moe_triton.distributed.exchange.layer_names import new_layer_name
from moe_triton.distributed.exchange.local_experts import LocalExperts
from moe_triton.distributed.exchange.overflow import Overflows
from moe_triton.distributed.exchange.overlap import Deferred
from moe_triton.distributed.exchange.plain_ddp import refuse_plain_ddp
from moe_triton.distributed.exchange.schedule import DescribedCall, described
from moe_triton.distributed.exchange.stages import (
    ExchangedLayer,
    ExchangeSpec,
    InnermostStage,
    MakeExchange,
    Stage,
)
from moe_triton.distributed.exchange.telemetry import metered_exchange, metered_experts
from moe_triton.distributed.exchange.tensor_parallel import gather_tokens, slice_tokens, sum_slices_gradients
from moe_triton.distributed.exchange.transport import Shape
from moe_triton.distributed.expert_groups import ExpertGroups, all_ep_groups, expert_groups, two_levels
from moe_triton.distributed.groups import Group, ParallelGroups, number_of_ranks
from moe_triton.records import Dispatch, ExpertCall, matrix_shape
from moe_triton.torch_internals import applied, never_compiled

MODES = ("dropless", "capacity", "bounded", "allgather")
LOSS_REDUCTIONS = ("sum", "mean")
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # in the repr of functions and objects
COMPARISON = "comparison of configurations (forward)", "comparison of configurations (backward)"
DISPATCH_DTYPES = (None, torch.float8_e4m3fn)


class ExpertParallel:
    """Spreads the experts of MoE layers over the ranks of a group; given to `MoE(expert_parallel=...)`.

    The E experts lie in runs of L = ceil(E / ep) over the group's ranks. Each rank passes its own tokens and gets its
    own outputs; every rank of the group must call the layers in the same order, with any number of tokens, none
    included. After backward each rank's expert parameters hold the gradient of all tokens of the group; what is left
    to reduce is in `moe_triton.distributed.reduce_gradients`.

    Args:
        group_or_mesh: where the experts are spread. None: the default group, or one process alone where
            torch.distributed is not initialised. A ProcessGroup: that one, if it is the world. A DeviceMesh: its
            dimension "ep" (the only one of a 1-D mesh), "edp" (other tokens, the same experts) and "etp" where it has
            them; "tp" and "pp" are left alone. `ParallelGroups`: from `make_groups`; with tensor parallelism of the
            tokens it must be these.
        mode: "dropless": exactly the wanted rows; one host sync per call, for the sizes. "capacity": even exchange of
            [E, C, d] for layers with a capacity factor; as "dropless" where it drops nothing, as an infinite
            eval_capacity_factor asks. "bounded": room for every possible row. "allgather": every
            rank sees all tokens. The last three have fixed sizes and no host sync, given `max_tokens_per_rank`.
        chunks: the exchange is cut up into so many, each issued before the one before it is computed.
        deduplicate: a token travels once to each rank that has several of its experts. False sends a row per choice,
            which makes every sum the single process's, bit for bit; so does `moe_triton.batch_invariant`.
        max_tokens_per_rank: the most tokens that any rank passes in a call; None asks the others in each call (one
            host sync) in the modes of fixed size.
        max_rows_per_pair: in mode "bounded", less room for each (chunk, pair of ranks) than the worst case needs.
            Rows without room raise: at once on a CPU, in the next call (or `check()`) on a GPU.
        ranks_per_node: exchange in two levels: between nodes once per (token, node), then inside the node. Must divide
            the group, whose ranks lie node by node. Mode "dropless" only.
        redundant_experts: slots beyond one per expert, for replicas of hot ones (DeepSeek-V3): a token's choice goes to
            one of its expert's replicas. E + this must be a multiple of the group's ranks. `rebalance` moves replicas
            to where the load is; `reduce_gradients` sums their gradients.
        loss_reduction: how the ranks' losses make the global one. "mean": they average to it, as every rank's mean over
            its own tokens does, and so do the layers' aux_loss. "sum": they sum to it, as losses divided by the tokens
            of all ranks do. The rule of what reduces the gradients has to be the same.
        exchange: what moves the rows: `DeepEP`, `SymmetricMemory`, or a `MakeExchange` of yours. None: the package's
            own exchange over torch.distributed; mode, chunks, deduplicate and ranks_per_node are its options.
        dispatch_dtype: torch.float8_e4m3fn sends the rows of the forward pass as e4m3 codes with an fp32 scale per 128
            numbers (DeepSeek-V3); the experts compute with what they stand for. Results and all gradients travel in the
            dtype of the hidden states, and the gradient passes the rounding as if it were the identity.
        always_exchange: exchange in a group of one as well: to test and to measure the path where there is one rank.
        listener: called with a word for every step, as it is issued; for tests and profiling.

    Raises:
        ValueError, TypeError: an argument out of range or of the wrong kind, by name.
    """

    def __init__(
        self,
        group_or_mesh: dist.ProcessGroup | DeviceMesh | ParallelGroups | ExpertGroups | None = None,
        *,
        mode: str = "dropless",
        chunks: int = 1,
        deduplicate: bool = True,
        max_tokens_per_rank: int | None = None,
        max_rows_per_pair: int | None = None,
        ranks_per_node: int | None = None,
        redundant_experts: int = 0,
        loss_reduction: str = "mean",
        exchange: MakeExchange | None = None,
        dispatch_dtype: torch.dtype | None = None,
        always_exchange: bool = False,
        listener: Listener | None = None,
    ) -> None:
        check_choice("mode", mode, MODES)
        check_int("chunks", chunks, low=1)
        check_choice("loss_reduction", loss_reduction, LOSS_REDUCTIONS)
        if max_tokens_per_rank is not None:
            check_int("max_tokens_per_rank", max_tokens_per_rank, low=0)
        if max_rows_per_pair is not None:
            check_int("max_rows_per_pair", max_rows_per_pair, low=1)
            if mode != "bounded":
                raise ValueError(f"max_rows_per_pair: got {max_rows_per_pair} with mode {mode!r}, wanted 'bounded'")
        if dispatch_dtype not in DISPATCH_DTYPES:
            raise ValueError(f"dispatch_dtype: got {dispatch_dtype}, wanted torch.float8_e4m3fn or None")
        if exchange is not None:
            own = {"mode": (mode, "dropless"), "chunks": (chunks, 1), "deduplicate": (deduplicate, True)}
            for name, (got, wanted) in {**own, "ranks_per_node": (ranks_per_node, None)}.items():
                if got != wanted:
                    raise ValueError(f"{name}: got {got!r} with exchange={exchange!r}, wanted {wanted!r}")
        self.own_exchange = AllToAll(mode=mode, max_rows_per_pair=max_rows_per_pair)
        self.make_exchange: MakeExchange = self.own_exchange if exchange is None else exchange
        self.dispatch_dtype = dispatch_dtype
        self.mode, self.chunks, self.deduplicate = mode, chunks, deduplicate
        self.max_tokens_per_rank, self.max_rows_per_pair = max_tokens_per_rank, max_rows_per_pair
        self.loss_reduction, self.listener = loss_reduction, listener
        self.always_exchange = always_exchange
        check_int("redundant_experts", redundant_experts, low=0)
        self.redundant_experts, self.ranks_per_node = redundant_experts, ranks_per_node
        groups = expert_groups(group_or_mesh)
        if always_exchange and groups.ep.handle is None:
            raise ValueError("always_exchange: got True without torch.distributed, wanted init_process_group before")
        self.ep, self.edp, self.etp, self.tp, self.data = groups.ep, groups.edp, groups.etp, groups.tp, groups.data
        self.between_nodes, self.in_node = groups.alone, self.ep
        every_ep = all_ep_groups(group_or_mesh, self.ep)
        if ranks_per_node is not None:
            self.between_nodes, self.in_node = two_levels(groups, every_ep, ranks_per_node, mode)
        self._all_ranks = tuple(sorted(rank for ranks in every_ep for rank in ranks))
        self._overflows = Overflows()
        self._channels: dict[tuple[str, str], Channel] = {}
        self._calls: dict[
            tuple[object, ...], tuple[DescribedCall, DescribedCall, Shape]
        ] = {}  # by all that they depend on

    @property
    def is_alone(self) -> bool:
        """Return whether no row has to travel: a group of one, with whole experts and tokens of its own."""
        exchanges = self.always_exchange or self.redundant_experts > 0
        return not exchanges and self.ep.size == 1 and self.etp.size == 1 and self.tp.size == 1

    def experts_of(self, num_experts: int, rank: int | None = None) -> range:
        """Return the global ids of the experts of this rank of the group, or of another one.

        Raises ValueError where a rank of the group would have none.
        """
        per_rank = -(-num_experts // self.ep.size)
        if per_rank * (self.ep.size - 1) >= num_experts:
            raise ValueError(
                f"num_experts: got {num_experts} for {self.ep.size} ranks in runs of {per_rank}, "
                "wanted at least one expert on every rank"
            )
        rank = self.ep.rank if rank is None else rank
        return range(rank * per_rank, min((rank + 1) * per_rank, num_experts))

    def has_copies_on(self, ranks: Iterable[int]) -> bool:
        """Return whether all of these global ranks hold the experts that this rank holds, the same slices of them."""
        if self.ep.size == 1 and self.etp.size == 1:
            return True
        return set(ranks) <= set(self.edp.ranks if self.edp.size > 1 else (dist.get_rank(),))

    def new_layer(self) -> str:
        """Return a name for a layer's messages, by the order of creation, which has to be the same on all ranks."""
        return new_layer_name(self._all_ranks)

    def __deepcopy__(self, memo: object) -> ExpertParallel:
        """Return this one: the copy of a layer shares the process groups."""
        return self

    def __getstate__(self) -> dict[str, object]:
        """Return what can be pickled: neither process groups (see `Group`) nor the listener."""
        return {**vars(self), "listener": None, "_overflows": Overflows(), "_channels": {}, "_calls": {}}

    def most_tokens(self, num_tokens: int, device: torch.device, layer: str) -> int:
        """Return the most tokens that any rank passes in this call: as the user said, or asked of the others."""
        if self.max_tokens_per_rank is not None:
            if num_tokens > self.max_tokens_per_rank:
                raise ValueError(f"max_tokens_per_rank: got {self.max_tokens_per_rank} for a call with {num_tokens}")
            return self.max_tokens_per_rank
        if self.ep.size == 1:
            return num_tokens
        most = torch.tensor([num_tokens], device=device)
        channel, phase = self._channel(self.ep, layer), "exchange of the token counts"
        channel.all_reduce(most, phase, dist.ReduceOp.MAX)
        return channel.to_host(phase, most)()[0]

    def _token_limit(self, num_tokens: int, device: torch.device, layer: str) -> int | None:
        """The most tokens of any rank in this call; None where the exchange does not need it, or nobody said it."""
        is_own = self.make_exchange is self.own_exchange
        unknown = self.mode == "dropless" if is_own else self.max_tokens_per_rank is None
        return None if unknown else self.most_tokens(num_tokens, device, layer)

    def run(
        self, call: ExpertCall, layer: ExchangedLayer, *, recompute: bool = False, overlap_with: Deferred | None = None
    ) -> Tensor:
        """Compute the experts' outputs [T, d] for this rank's tokens, under autocast as PyTorch's products do.

        call: of all ranks' experts, with the parameters of the local ones. overlap_with: computed while rows travel.
        """
        dtype, call = call.hidden.dtype, in_context(call)
        if call.spec.batch_invariant:
            layer = replace(layer, deduplicate=False)
        if call.spec.batch_invariant and self.mode == "allgather":  # each rank adds up what its own experts make
            raise ValueError("mode: got 'allgather' with batch_invariant, wanted 'dropless' or 'bounded'")
        if self.etp.size > 1:
            slices = self._channel(self.etp, f"{layer.name}, expert slices")
            call = replace(call, parameters=sum_slices_gradients(call.parameters, slices))
        with runtime.without_autocast(call.hidden.device):
            experts = LocalExperts(
                num_experts=len(call.parameters.gate_up),
                backend=runtime.choose(layer.backend, call.hidden.device, call.hidden.dtype).name,
                form=form_of(call.parameters),
                spec=call.spec,
                width=matrix_shape(call.parameters.gate_up),
                recompute=recompute,
                adds_bias=self.etp.rank == 0,
                note=self.listener or (lambda event: None),
            )
            parameters = flatten(call.parameters)
            out = self.exchange(call.hidden, call.weights, call.dispatched, experts, parameters, layer, overlap_with)
            return out.to(dtype)

    @never_compiled  # the order of collectives is Python's
    def exchange(
        self,
        hidden: Tensor,
        weights: Tensor,
        dispatched: Dispatch,
        experts: InnermostStage,
        parameters: Sequence[Tensor],
        layer: ExchangedLayer,
        overlap_with: Deferred | None = None,
    ) -> Tensor:
        """Compute what `experts` make of this rank's tokens on their ranks, [T, d].

        hidden [T, d]; weights [T, K]; dispatched: to all ranks' experts. parameters: those that `experts` has gradients
        for. overlap_with: computed while rows travel.
        """
        with report_failure(layer.name):
            if experts.backend == "reference":
                raise ValueError("backend: got 'reference' with expert parallelism, wanted 'auto', 'triton' or 'torch'")
            if self._overflows.found:
                self.check()
            refuse_plain_ddp(layer.name, layer.held, self.has_copies_on)
            ids = layer.ids(dispatched)
            forward, backward, shape = self._described(hidden, ids, experts, layer)
            schedule = self._agree(forward, COMPARISON[0], layer.name, hidden.device)
            num_tokens, tp = hidden.shape[0], None
            if self.tp.size > 1:
                tp, same = self._channel(self.tp, layer.name), described({"tokens of the tp ranks": num_tokens})
                tp.agree(same, "comparison of the number of tokens", hidden.device)
            limit = self._token_limit(num_tokens, hidden.device, layer.name)
            if tp is not None:  # the tp ranks hold the same tokens: each sends a share of them
                hidden, weights, ids = (slice_tokens(x, tp) for x in (hidden, weights, ids))
            places = layer.capacity(limit) if self.mode == "capacity" and limit is not None else None
            limit = None if limit is None else -(-limit // self.tp.size)
            stage = self._stages(experts, shape, schedule, layer, limit, places, overlap_with)
            is_training = torch.is_grad_enabled() and (
                hidden.requires_grad or weights.requires_grad or any(x.requires_grad for x in parameters)
            )

            def before_backward() -> report_failure:
                self._agree(backward, COMPARISON[1], layer.name, hidden.device)
                return report_failure(layer.name)

            call = StagedCall(stage, experts, is_training, before_backward)
            out = applied(Exchanged, hidden, weights, ids, call, *parameters)
            return out if tp is None else gather_tokens(out, tp, num_tokens)

    def check(self) -> None:
        """Raise for the rows that found no room in an earlier call; waits for the device."""
        self._overflows.check()

    @never_compiled
    def global_counts(self, counts: Tensor, num_tokens: Tensor, layer: str) -> tuple[Tensor, Tensor]:
        """Counts [E] and the number of tokens [], summed over all ranks that have tokens of their own; no gradient."""
        both = torch.cat([counts.double(), num_tokens.reshape(1).double()])
        for group in self.data:
            if group.size > 1:
                channel = self._channel(group, layer)
                if group.ranks != self.ep.ranks:  # those have agreed already
                    what = {"layer": str(layer), "num_experts": counts.numel()}
                    channel.agree(described(what), "sum of the expert counts", both.device)
                channel.all_reduce(both, "sum of the expert counts")
        return both[:-1].to(counts.dtype), both[-1].to(num_tokens.dtype)

    @property
    def loss_scale(self) -> int:
        """What turns a share of a loss that sums over ranks into one that averages, by `loss_reduction`."""
        return 1 if self.loss_reduction == "sum" else number_of_ranks(self.data)

    def _channel(self, group: Group, layer: str) -> Channel:
        if (found := self._channels.get((group.name, layer))) is None:
            found = self._channels[group.name, layer] = Channel(group=group, layer=layer, listener=self.listener)
        return found

    def _stages(
        self,
        experts: InnermostStage,
        shape: Shape,
        schedule: int,
        layer: ExchangedLayer,
        limit: int | None,
        places: int | None,
        overlap_with: Deferred | None,
    ) -> Stage:
        """The local experts, inside the exchange over their slices, inside the exchange over their ranks."""
        inner = metered_experts(experts, layer.meters)
        exchanges = self.ep.size > 1 or self.always_exchange
        if overlap_with is not None:
            overlap_with.meters = layer.meters
        sizes = node = None
        if self.etp.size > 1:
            slices = self._channel(self.etp, f"{layer.name}, expert slices")
            are_equal = (
                exchanges and self.make_exchange is self.own_exchange and self.own_exchange.has_fixed_sizes(places)
            )
            sizes = None if are_equal else SliceSizes(slices)
            inner = exchange_over_slices(inner, shape, slices, sizes, None if exchanges else overlap_with)
        if not exchanges:
            return metered_exchange(inner, layer.meters)
        channel = self._channel(self.in_node, layer.name)
        if self.between_nodes.size > 1:
            node = NodeCounts(channel=channel, schedule=schedule, slices=sizes)
            inner = exchange_in_node(inner, shape, node, self.dispatch_dtype)
            channel, sizes = self._channel(self.between_nodes, layer.name), None
            shape = shape.runs_of(shape.per_rank * self.in_node.size, shape.chunks)
        watch, dtype = self._overflows.watch, self.dispatch_dtype
        spec = ExchangeSpec(channel, shape, schedule, watch, limit, places, dtype, overlap_with, sizes, node)
        return metered_exchange(self.make_exchange(inner, spec), layer.meters)

    def _described(
        self, hidden: Tensor, ids: Tensor, experts: InnermostStage, layer: ExchangedLayer
    ) -> tuple[DescribedCall, DescribedCall, Shape]:
        """What has to be the same on all ranks of a layer, forward and backward, by the names of its arguments."""
        # two values tell any two capacities apart: the floor and the factor
        even = (layer.capacity(0), layer.capacity(1 << 20)) if self.mode == "capacity" else None
        shown = experts.description()
        sizes = layer.name, layer.num_experts, ids.shape[1], hidden.shape[1], hidden.dtype, layer.deduplicate, even
        key = (*sizes, self.mode, self.chunks, self.loss_reduction, experts.backend, *shown.values())
        if (found := self._calls.get(key)) is None:
            deduplicate = layer.deduplicate and self.deduplicate
            what = {
                "layer": layer.name, "num_experts": layer.num_experts, "top_k": ids.shape[1],
                "hidden_size": hidden.shape[1], "dtype": str(hidden.dtype), "ep": self.ep.size, "etp": self.etp.size,
                "mode": self.mode, "chunks": self.chunks, "deduplicate": deduplicate,
                "max_tokens_per_rank": self.max_tokens_per_rank, "max_rows_per_pair": self.max_rows_per_pair,
                "ranks_per_node": self.in_node.size, "backend": experts.backend, "capacity": even,
                "loss_reduction": self.loss_reduction, "exchange": ADDRESS.sub("", repr(self.make_exchange)),
                "dispatch_dtype": str(self.dispatch_dtype), **shown,
            }  # fmt: skip
            forward, backward = (described({"direction": name, **what}) for name in ("forward", "backward"))
            shape = Shape(
                num_experts=layer.num_experts, per_rank=-(-layer.num_experts // self.ep.size), chunks=self.chunks,
                deduplicate=deduplicate, backend=experts.backend,
            )  # fmt: skip
            found = self._calls[key] = forward, backward, shape
        return found

    def _agree(self, call: DescribedCall, phase: str, layer: str, device: torch.device) -> int:
        """The schedule of the expert-parallel group with the call; compared as `Channel.agree` says."""
        schedule = 0
        for group in (self.ep, self.etp, self.tp):
            if group.size > 1:
                rolling = self._channel(group, layer).agree(call, phase, device)
                schedule = rolling if group is self.ep else schedule
        return schedule

    def __repr__(self) -> str:
        return f"ExpertParallel(ep={self.ep.size}, etp={self.etp.size}, mode={self.mode!r}, chunks={self.chunks})"


def unless_alone(parallel: ExpertParallel | None) -> ExpertParallel | None:
    """Return the ExpertParallel of a layer whose rows have to travel; None where all is on this rank."""
    return None if parallel is None or parallel.is_alone else parallel
