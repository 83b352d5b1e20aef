"""PEFT's LoRA on experts (`target_parameters`): adapters as operands of the experts' products.

PEFT's `ParamWrapper` gives a module W + scaling * B A in place of its parameter W, as a new tensor of W's size, twice
per forward. `install()` lets it hand the factors to our experts instead. `moe_triton.integrations.transformers`'
`register()`, `moe_triton.swap` and the first forward of our experts under a ParamWrapper call it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_triton.checks import FLOATS
from moe_triton.distributed.holders import StackedExperts
from moe_triton.integrations.experts_interface import KEY, implementation, registry_of
from moe_triton.layers import Experts
from moe_triton.layers.quantized import QuantizedProjection
from moe_triton.records import Lora
from moe_triton.torch_internals import constant_while_compiling, is_fsdp2_class, shards

CHECKED = ("0.19.1", "0.22")  # PEFT's versions whose ParamWrapper `install` was checked on: from, below
SWAPPED_BEFORE = "0.19.1"  # earlier versions may have the two sizes of a parameter the other way round
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


# Packing --------------------------------------------------------------------------------------------------------------


def unpack(
    lora_a: Tensor, lora_b: Tensor, shape: tuple[int, ...], *, is_transposed: bool = False, version: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return a [E, r, in] and b [E, out, r], views of PEFT's weights of one adapter of an experts parameter.

    PEFT keeps A as [E*r, in], the expert slowest, and B as [out, r*E], the expert fastest. Its versions before 0.19.1
    took `in` for `out` where the parameter is [E, out, in] (0.19.0: where it is [E, in, out]), and so have
    A [E*r, out] and B [in, r*E] with the same strides; sizes that differ show which it is.

    Args:
        lora_a, lora_b: the weights of `lora_A` and `lora_B`.
        shape: of the parameter, [E, out, in], or [E, in, out] with `is_transposed`.
        version: of the PEFT that made them, "0.19.1"; None: not known.

    Raises:
        ValueError: weights that fit neither way; a square parameter with adapters that a version before 0.19.1, or an
        unknown one, has made.
    """
    num_experts, *sizes = shape
    size_in, size_out = sizes if is_transposed else reversed(sizes)
    rank = lora_a.shape[0] // num_experts
    natural = lora_a.shape == (rank * num_experts, size_in) and lora_b.shape == (size_out, rank * num_experts)
    swapped = lora_a.shape == (rank * num_experts, size_out) and lora_b.shape == (size_in, rank * num_experts)
    a = lora_a.view(num_experts, -1, lora_a.shape[1])
    b = lora_b.view(lora_b.shape[0], -1, num_experts).permute(2, 0, 1)
    if natural and swapped and (version is None or _numbers(version) < _numbers(SWAPPED_BEFORE)):
        raise ValueError(
            f"lora_A, lora_B: got adapters of a square parameter {list(shape)} by PEFT {version or 'unknown'}, which "
            "may have in and out swapped; wanted 0.19.1 or later"
        )
    if natural:
        return a, b
    if swapped:
        return b.mT, a.mT
    raise ValueError(
        f"lora_A, lora_B: got shapes {list(lora_a.shape)} and {list(lora_b.shape)}, wanted [{num_experts}*r, {size_in}]"
        f" and [{size_out}, r*{num_experts}]"
    )


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (0, 19, 1) of "0.19.1.dev0@abc"."""
    numbers = []
    for part in version.split("@")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


# Experts on several ranks ---------------------------------------------------------------------------------------------


def _own(factor: Tensor, parameter: Any) -> Tensor:
    """The rows of the experts that are on this rank out of [E, ...]; `parameter` is a DTensor [E, ...]."""
    ((start, *_), local) = shards(parameter)[0]
    return _OwnExperts.apply(factor, start, local.shape[0], parameter.device_mesh.get_group())


class _OwnExperts(torch.autograd.Function):
    """A rank's experts out of a factor that all ranks of a group have; its gradient has those of every rank."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, start: int, count: int, group: Any) -> Tensor:
        ctx.start, ctx.count, ctx.group, ctx.shape = start, count, group, whole.shape
        return whole[start : start + count].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        whole = grads[0].new_zeros(ctx.shape)
        whole[ctx.start : ctx.start + ctx.count] = grads[0]
        dist.all_reduce(whole, group=ctx.group)
        return whole, None, None, None


# The patch ------------------------------------------------------------------------------------------------------------


class _Own(NamedTuple):
    """What PEFT's ParamWrapper does by itself."""

    activate: Callable[..., Any]
    update: Callable[..., Any]
    merge: Callable[..., Any]
    sizes: Callable[..., Any]


def install() -> None:
    """Let PEFT's ParamWrapper hand its factors to our experts, where peft is imported. Once or more often.

    A version of PEFT that this was not checked on is left as it is, with one warning: it adds the adapters to the
    weights, which is correct and slower. Modules that do not run on our experts are PEFT's as before.
    """
    layer = sys.modules.get("peft.tuners.lora.layer")
    wrapper: Any = getattr(layer, "ParamWrapper", None)
    if wrapper is None or hasattr(wrapper, "_moe_triton"):
        return
    wrapper._moe_triton = _Own(
        wrapper._activate_lora, wrapper.update_layer, wrapper.merge, wrapper._get_in_out_features
    )
    (low, high), version = CHECKED, peft_version()
    if not _numbers(low) <= _numbers(version) < _numbers(high):
        warnings.warn(
            f"peft {version}: moe_triton was checked on {low} and later, below {high}; adapters of experts are added "
            "to the weights, which is correct and slower",
            stacklevel=3,
        )
        return
    wrapper._activate_lora, wrapper.update_layer, wrapper.merge = _activate_lora, _update_layer, _merge
    wrapper._get_in_out_features = _get_in_out_features
    model: Any = sys.modules["peft.tuners.lora.model"]
    model.LoraModel._inject_parameters = _with_stand_ins(model.LoraModel._inject_parameters)
    if hasattr(model, "get_tp_plan_and_mesh"):  # since 0.21.2
        model.get_tp_plan_and_mesh = _without_experts(model.get_tp_plan_and_mesh)


@contextmanager
def _activate_lora(self: Any, active_adapters: list[str]) -> Iterator[None]:
    """Lend the adapters to experts that take them, and do what PEFT does for any other module."""
    names = [name for name in active_adapters if name in self.lora_A]
    if names and takes_factors(self.get_base_layer(), self.parameter_name):
        with _lending(self, names):
            yield
    else:
        with self._moe_triton.activate(self, active_adapters):
            yield


def _update_layer(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """Do what PEFT does, and refuse an adapter for our experts whose packing cannot be known."""
    if (slices := _etp_size(self.get_base_layer())) > 1:
        raise ValueError(f"target_parameters: got experts cut into {slices} slices, wanted ExpertParallel with etp=1")
    self._moe_triton.update(self, adapter_name, *args, **kwargs)
    if takes_factors(self.get_base_layer(), self.parameter_name):
        _unpacked(self, adapter_name, getattr(kwargs.get("config"), "peft_version", None) or peft_version())


def _merge(self: Any, *args: Any, **kwargs: Any) -> None:
    """Do what PEFT does, and refuse projections that are no floats."""
    if isinstance(self.get_base_layer()._modules.get(self.parameter_name), QuantizedProjection):
        raise ValueError("merge: got quantised projections, wanted projections in a float dtype")
    if is_spread(self.get_base_layer()):
        raise ValueError("merge: got experts over ranks, wanted to save the adapters and to merge them in one process")
    self._moe_triton.merge(self, *args, **kwargs)


def _get_in_out_features(self: Any, module: nn.Module) -> Any:
    """Do what PEFT does, with an adapter for every expert of all ranks, though a parameter has those of one."""
    found = self._moe_triton.sizes(self, module)
    if is_spread(experts := self.get_base_layer()):
        self.num_experts = experts.num_experts
    return found


def _with_stand_ins(inject: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """PEFT's search for parameters to adapt, which finds quantised projections of our experts as well."""

    def _inject_parameters(self: Any, peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
        with _stand_ins(model):
            return inject(self, peft_config, model, *args, **kwargs)

    return _inject_parameters


@contextmanager
def _stand_ins(model: nn.Module) -> Iterator[None]:
    """Parameters in the place of quantised projections, with their shape and without memory, as long as this lasts."""
    found = [
        (module, name, part)
        for module in model.modules()
        for name, part in module.named_children()
        if isinstance(part, QuantizedProjection) and takes_factors(module, name)
    ]
    for module, name, part in found:
        delattr(module, name)
        module.register_parameter(name, nn.Parameter(torch.zeros((), device=part.device).expand(part.shape), False))
    try:
        yield
    finally:
        for module, name, part in found:
            delattr(module, name)
            setattr(module, name, part)


def is_spread(module: Any) -> bool:
    """Return whether an `ExpertParallel` spreads this module's experts."""
    return isinstance(module, StackedExperts) and module.expert_parallel is not None


def _etp_size(module: Any) -> int:
    return module.expert_parallel.etp.size if is_spread(module) else 1


def peft_version() -> str:
    return sys.modules["peft"].__version__


def _without_experts(plan_and_mesh: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    """PEFT's look into the tensor-parallel plan, which goes on naming experts that are spread by expert instead."""

    def get_tp_plan_and_mesh(model: Any, current_key: str) -> Any:
        module_name, _, name = current_key.rpartition(".")
        module = model.get_submodule(module_name)
        while hasattr(module, "get_base_layer"):
            module = module.get_base_layer()
        return (None, None) if takes_factors(module, name) else plan_and_mesh(model, current_key)

    return get_tp_plan_and_mesh


def takes_factors(module: nn.Module, name: str) -> bool:
    """Whether the module runs on our experts and `name` is a parameter of theirs that adapters may have."""
    ours = isinstance(module, Experts) or (implementation(module) == KEY and _finds_ours(type(module)))
    if ours and name in PROJECTIONS and isinstance(module._modules.get(name), QuantizedProjection):
        return True
    parameter: Any = module._parameters.get(name)
    if (
        not ours
        or name not in PROJECTIONS
        or parameter is None
        or parameter.dim() != 3
        or parameter.dtype not in FLOATS
    ):
        return False
    # a DTensor may be some of the experts, not slices of all
    return all(placement.is_replicate() or placement.is_shard(0) for placement in getattr(parameter, "placements", ()))


@constant_while_compiling  # torch.compile cannot look into the closure of a function that it then traces
def _finds_ours(cls: Any) -> bool:
    """Whether the class's forward finds, under our key, experts that take adapters."""
    mapping = registry_of(cls)
    return mapping is not None and getattr(mapping.get(KEY), "takes_lora", False)


@contextmanager
def _lending(wrapper: Any, names: list[str]) -> Iterator[None]:
    """The wrapper's adapters on its experts module, as long as this lasts. Wrappers of other parameters add theirs."""
    experts, parameter = wrapper.get_base_layer(), wrapper.get_param()
    # a DTensor outside of FSDP2's own units is what expert parallelism has spread
    is_sharded = hasattr(parameter, "device_mesh") and not is_fsdp2_class(type(experts))
    adapters = []
    for key in names:
        factors = _unpacked(wrapper, key)
        if is_spread(experts):  # every rank has all adapters, as a dense parameter: its gradient is summed as theirs
            a, b = (factor[own_rows(experts.local_experts)] for factor in factors)
        else:
            a, b = (_own(factor, parameter) for factor in factors) if is_sharded else factors
        adapters.append(Lora(a, b, wrapper.scaling[key]))
    before = lent_lora(experts)
    experts.lent_lora = {**before, wrapper.parameter_name: adapters}
    try:
        yield
    finally:
        experts.lent_lora = before


def own_rows(experts: Sequence[int]) -> slice | list[int]:
    """Return the index of these experts' rows in [E, ...]."""
    return slice(experts.start, experts.stop) if isinstance(experts, range) else list(experts)


def lent_lora(experts: Any) -> dict[str, list[Lora]]:
    """Return the adapters that an experts module has in this call, by the name of the parameter."""
    return getattr(experts, "lent_lora", {})


def _unpacked(wrapper: Any, key: str, version: str = CHECKED[0]) -> tuple[Tensor, Tensor]:
    experts, parameter = wrapper.get_base_layer(), wrapper.get_param()
    num_experts = experts.num_experts if is_spread(experts) else parameter.shape[0]
    return unpack(
        wrapper.lora_A[key].weight,
        wrapper.lora_B[key].weight,
        (num_experts, *parameter.shape[1:]),
        is_transposed=getattr(experts, "is_transposed", False),
        version=version,
    )
