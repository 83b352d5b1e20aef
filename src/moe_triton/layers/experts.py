"""The containers of expert weights, and the dense MLP with the same activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moe_triton.autograd.experts import run_experts
from moe_triton.checks import check_int
from moe_triton.distributed.checkpoint.global_tensors import as_global, expert_layout
from moe_triton.distributed.exchange.expert_parallel import ExpertParallel, unless_alone
from moe_triton.distributed.exchange.meter import ExchangeMeter
from moe_triton.distributed.exchange.overlap import Deferred
from moe_triton.distributed.exchange.stages import ExchangedLayer
from moe_triton.distributed.holders import StackedExperts
from moe_triton.distributed.replicas.placement import build_placement, plan_placement, replica_of
from moe_triton.experts import (
    check_activation,
    check_adapters,
    check_call,
    check_fp8,
    fp8_flags,
    moe_mlp,
    with_adapters,
)
from moe_triton.layers.load import CountsLoad
from moe_triton.layers.lora import TakesLora
from moe_triton.layers.quantized import QuantizedProjection, projection_of
from moe_triton.records import (
    GATED,
    Dispatch,
    ExpertCall,
    ExpertParameters,
    ExpertSpec,
    Lora,
)
from moe_triton.reference import activate
from moe_triton.runtime import autocast_dtype, is_batch_invariant
from moe_triton.torch_internals import inside_fsdp1, is_fsdp2_class, is_plain, parameter_of, record


class Experts(TakesLora, CountsLoad, StackedExperts):
    """E expert MLPs as plain stacked parameters in the transformers layout.

    gate_up_proj [E, 2n, d] ([E, n, d] for an ungated activation), down_proj [E, d, n], and with `bias`
    gate_up_proj_bias [E, 2n] and down_proj_bias [E, d]. Each expert starts like an `nn.Linear` pair, with the same
    values however the experts are spread. With `expert_parallel` E is the number of the local experts, and n that of
    their local slice: under expert tensor parallelism each rank has n / etp columns of gate, of up and of down. With
    `ExpertParallel(redundant_experts=R)` a rank holds (E + R) / ep slots; `placement` says which expert is in each.
    With `fp8` the products are in fp8 (`moe_triton.moe_mlp`), and the parameters stay in their dtype.
    `add_lora` adds adapters.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        activation: str = "swiglu",
        activation_limit: float | None = None,
        activation_alpha: float | None = None,
        bias: bool = False,
        fp8: bool | str = False,
        recompute: bool = False,
        expert_parallel: ExpertParallel | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("hidden_size", hidden_size, low=1)
        check_int("intermediate_size", intermediate_size, low=1)
        check_int("num_experts", num_experts, low=1)
        check_activation(activation, activation_limit, activation_alpha)
        self.spec = ExpertSpec(
            activation=activation,
            activation_limit=activation_limit,
            activation_alpha=activation_alpha,
            **fp8_flags(fp8),
        )
        self.recompute = recompute
        self.backend = backend
        self.num_experts = num_experts
        self.intermediate_size = intermediate_size
        self.expert_parallel = expert_parallel
        self.gradient_scale: float = 1.0  # apply_fsdp2 corrects FSDP2's average by it
        self.lent_meters: tuple[ExchangeMeter, ...] = ()  # of the call that is running
        if expert_parallel is not None:
            slices = expert_parallel.etp.size
            if intermediate_size % slices:
                raise ValueError(
                    f"intermediate_size: got {intermediate_size}, wanted a multiple of the {slices} expert slices"
                )
            self.layer_name = expert_parallel.new_layer()
            intermediate_size //= slices
        self._place(device)
        num_experts = len(self.local_experts)
        rows = 2 * intermediate_size if activation in GATED else intermediate_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.gate_up_proj = parameter(num_experts, rows, hidden_size)
        self.down_proj = parameter(num_experts, hidden_size, intermediate_size)
        self.gate_up_proj_bias = parameter(num_experts, rows) if bias else None
        self.down_proj_bias = parameter(num_experts, hidden_size) if bias else None
        self.reset_parameters()

    def _place(self, device: torch.device | str | None) -> None:
        """Make the first placement of replicas, before any load is known, and the counters for the next one."""
        parallel, placed, slots = self.expert_parallel, None, 0
        if parallel is not None and parallel.redundant_experts:
            slots = self.num_experts + parallel.redundant_experts
            with torch.device("cpu"):  # the map has values also where the layer is made on the meta device
                placed = plan_placement(
                    torch.ones(self.num_experts), slots, parallel.ep.size, ranks_per_node=parallel.ranks_per_node
                )
        # saved, so that a checkpoint says which expert each slot holds
        slots_map = None if placed is None else torch.empty(slots, dtype=torch.int32, device=device)
        self.register_buffer("physical_to_logical", slots_map)
        self.load = None if placed is None else torch.zeros(self.num_experts, dtype=torch.int64, device=device)
        self.placement = placed

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._read_map()

    def _read_map(self) -> None:
        if self.placement is not None and self.physical_to_logical is not None and not self.physical_to_logical.is_meta:
            loads = torch.ones(self.num_experts)
            self.placement = build_placement(self.physical_to_logical, loads, self.placement.num_ranks)

    def reset_parameters(self) -> None:
        """Draw every expert of the layer from torch's generator, in the order of their ids, and keep what is here.

        However the experts are spread over ranks and sharded by FSDP2, they get the values of one process.
        """
        for name in ("gate_up_proj", "down_proj"):
            shape = self.whole_shape(name)
            bound = 1 / math.sqrt(shape[1])
            self.draw(name, shape, bound)
            if getattr(self, f"{name}_bias") is not None:
                self.draw(f"{name}_bias", shape[:1], bound)
        self.reset_lora()
        if self.placement is not None and self.load is not None:
            self.set_placement(self.placement)
            self.load_on(self.gate_up_proj.device).zero_()

    def whole_shape(self, name: str) -> tuple[int, int]:
        """Return the shape of one expert's whole projection `name`."""
        d, n = self.down_proj.shape[1], self.intermediate_size
        return (d, n) if name == "down_proj" else (2 * n if self.spec.is_gated else n, d)

    @torch.no_grad()
    def draw(self, name: str, shape: tuple[int, ...], bound: float) -> None:
        """Draw the parameter `name` uniformly from -bound to bound; `shape` is that of one whole expert's."""
        parameter = self.get_parameter(name)
        if parameter.is_meta:
            return
        here = as_global(parameter, expert_layout(name, self, name))
        views = [*here.boxes.items(), *here.copies]
        for expert in range(self.num_experts):
            whole = torch.empty(shape, dtype=parameter.dtype, device=parameter.device).uniform_(-bound, bound)
            for (first, *rest), view in views:
                if first <= expert < first + view.shape[0]:
                    box = tuple(slice(low, low + size) for low, size in zip(rest, view.shape[1:], strict=True))
                    view[expert - first] = whole[box]

    def is_sliced(self, parameter: nn.Parameter) -> bool:
        """Return whether expert tensor parallelism splits this parameter."""
        return any(parameter is getattr(self, name) for name in self.sliced_dimensions)

    @property
    def sliced_dimensions(self) -> dict[str, tuple[int, int]]:
        """Return what expert tensor parallelism slices: parameter -> (dimension, parts), 2 for gate and up."""
        gate_up, down = (1, 2 if self.spec.is_gated else 1), (2, 1)
        return {
            **dict.fromkeys(("gate_up_proj", "gate_up_proj_bias", "gate_up_lora_b"), gate_up),
            **dict.fromkeys(("down_proj", "down_lora_a"), down),
        }

    def local_slice(self, name: str, whole: Tensor) -> Tensor:
        """Return this rank's part of one expert's whole parameter `name`: all of it without expert tensor parallelism.

        What `sliced_dimensions` has not is whole on every rank.
        """
        etp = None if self.expert_parallel is None else self.expert_parallel.etp
        if etp is None or etp.size == 1 or name not in self.sliced_dimensions:
            return whole
        dimension, parts = self.sliced_dimensions[name]
        pieces = [part.chunk(etp.size, dimension - 1)[etp.rank] for part in whole.chunk(parts, dimension - 1)]
        return torch.cat(pieces, dimension - 1)

    def check_quantizable(self) -> None:
        """Raise ValueError for projections that `moe_triton.quantize` cannot replace."""
        self.refuse_shards("quantize")
        if self.spec.fp8:
            raise ValueError("quantize: got experts with fp8=True, wanted ones whose products are not in fp8")
        if self.is_quantized or self.lora_is_merged:
            what = "quantised projections" if self.is_quantized else "merged adapters"
            raise ValueError(f"quantize: got experts with {what}, wanted projections as they were made")

    @property
    def is_quantized(self) -> bool:
        """Whether the projections are quantised."""
        return isinstance(self.gate_up_proj, QuantizedProjection)

    def _scaled(self, parameter: Any) -> Any:
        """A parameter whose gradient is scaled; what is not a tensor has none."""
        if self.gradient_scale == 1.0 or not isinstance(parameter, Tensor):
            return parameter
        return ScaleGradient.apply(parameter, self.gradient_scale)

    @property
    def _parameters_in_order(self) -> ExpertParameters:
        gate_up, down = parameter_of(self, "gate_up_proj"), parameter_of(self, "down_proj")
        if isinstance(gate_up, QuantizedProjection) or isinstance(down, QuantizedProjection):
            gate_up, down = projection_of(self, "gate_up_proj"), projection_of(self, "down_proj")
        given = ExpertParameters(gate_up, down, self.gate_up_proj_bias, self.down_proj_bias)
        return given if self.gradient_scale == 1.0 else ExpertParameters(*map(self._scaled, given))

    def _scaled_lora(self, projection: str) -> list[Lora]:
        """Its own adapter, and those that are lent for this call, which are dense parameters."""
        own, lent = self.lora(projection), self.lent_lora.get(f"{projection}_proj", ())
        scaled = [] if own is None else [Lora(self._scaled(own.a), self._scaled(own.b), own.scaling)]
        return [*scaled, *lent]

    def forward(
        self,
        hidden_states: Tensor,
        top_k_weights: Tensor | Uncast,
        dispatched: Dispatch,
        *,
        capacity: Callable[[int], int | None] = lambda num_tokens: None,
        overlap_with: Deferred | None = None,
    ) -> Tensor:
        """hidden_states [T, d], top_k_weights [T, K], a Dispatch of the T tokens over all experts -> [T, d].

        `capacity` (tokens -> places of an expert) and `overlap_with` (computed while rows travel) are for expert
        parallelism.
        """
        call = record(
            ExpertCall,
            hidden=hidden_states,
            weights=uncast(top_k_weights),
            dispatched=dispatched,
            parameters=self._parameters_in_order,
            spec=self.spec,
        )
        gate_up = call.parameters.gate_up
        dtype = gate_up.dtype if isinstance(gate_up, Tensor) else hidden_states.dtype
        if hidden_states.dtype != dtype and autocast_dtype(hidden_states.device) is None:
            raise TypeError(f"hidden_states: got dtype {hidden_states.dtype}, wanted {dtype}, the layer's own")
        if self.adapted or self.lent_lora:
            gate_up_lora, down_lora = self._scaled_lora("gate_up"), self._scaled_lora("down")
            device = hidden_states.device
            check_adapters(call.parameters, self.spec, device, gate_up_lora=gate_up_lora, down_lora=down_lora)
            call = with_adapters(call, gate_up_lora, down_lora)
        if self.load is not None:
            self.count_load(dispatched.counts)
        if (parallel := unless_alone(self.expert_parallel)) is None:
            plain = is_plain(hidden_states)
            check_call(call, is_plain=plain)
            return run_experts(call, recompute=self.recompute, backend=self.backend, is_plain=plain)
        check_fp8(call.parameters, self.spec, hidden_states)
        layer = ExchangedLayer(
            name=self.layer_name,
            num_experts=self.num_experts,
            backend=self.backend,
            capacity=capacity,
            held=self.held_parameters,
            meters=self.lent_meters,
        )
        if self.placement is not None:
            self.placement = self.placement.to(hidden_states.device)
            slots = self.placement.physical_to_logical.shape[0]
            layer = replace(layer, num_experts=slots, slots=partial(replica_of, placement=self.placement))
        return parallel.run(call, layer, recompute=self.recompute, overlap_with=overlap_with)

    def extra_repr(self) -> str:
        num_local, hidden_size, intermediate_size = self.down_proj.shape
        of = "" if num_local == self.num_experts else f" of {self.num_experts}"
        spec, sizes = self.spec, f"{num_local}{of} x ({hidden_size}, {intermediate_size})"
        limit = "" if spec.limit is None else f", activation_limit={spec.limit}"
        alpha = "" if spec.alpha == 1 else f", activation_alpha={spec.alpha}"
        fp8 = f", fp8={spec.fp8_mode!r}" if spec.fp8 else ""
        return f"{sizes}, activation={spec.activation}{limit}{alpha}{fp8}{self.lora_repr()}"


class ScaleGradient(torch.autograd.Function):
    """The identity, with a gradient multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.scale, None


class Uncast:
    """Keep a tensor from FSDP's mixed precision, which casts the tensors among a module's arguments.

    The router weights stay fp32 in every dtype of the experts.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def uncast(weights: Tensor | Uncast) -> Tensor:
    return weights.tensor if isinstance(weights, Uncast) else weights


def casts_inputs(module: nn.Module) -> bool:
    """Return whether the module is Experts as a unit of FSDP2, which changes their class, or of FSDP1, which wraps."""
    if type(module) is Experts:
        return False
    inner = inside_fsdp1(module)
    return isinstance(inner, Experts) and (inner is not module or is_fsdp2_class(type(module)))


class FeedForward(nn.Module):
    """One dense MLP with an expert's layout: gate_up_proj Linear(d, 2n or n), activation, down_proj Linear(n, d)."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "swiglu",
        activation_limit: float | None = None,
        activation_alpha: float | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("intermediate_size", intermediate_size, low=1)
        check_activation(activation, activation_limit, activation_alpha)
        self.activation = activation
        self.activation_limit = activation_limit
        self.activation_alpha = activation_alpha
        rows = 2 * intermediate_size if activation in GATED else intermediate_size
        self.gate_up_proj = nn.Linear(hidden_size, rows, bias=bias, device=device, dtype=dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias, device=device, dtype=dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        if is_batch_invariant() and type(self.gate_up_proj) is type(self.down_proj) is nn.Linear:
            return self._as_one_expert(hidden_states)
        hidden = self.gate_up_proj(hidden_states)
        return self.down_proj(
            activate(hidden, self.activation, limit=self.activation_limit, alpha=self.activation_alpha)
        )

    def _as_one_expert(self, hidden_states: Tensor) -> Tensor:
        """The same by the experts' operation, which can be batch invariant: one expert that every token chooses."""
        up, down = self.gate_up_proj, self.down_proj
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        out = moe_mlp(
            x,
            torch.zeros(x.shape[0], 1, dtype=torch.int32, device=x.device),
            x.new_ones(x.shape[0], 1),
            up.weight[None],
            down.weight[None],
            activation=self.activation,
            activation_limit=self.activation_limit,
            activation_alpha=self.activation_alpha,
            gate_up_bias=None if up.bias is None else up.bias[None],
            down_bias=None if down.bias is None else down.bias[None],
        )
        return out.reshape(hidden_states.shape)
