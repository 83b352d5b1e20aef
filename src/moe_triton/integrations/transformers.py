"""Hugging Face transformers (5 or newer): our experts behind `experts_implementation="moe_triton"`.

After `register()`, a model takes the key in `from_pretrained(..., experts_implementation="moe_triton")` or in
`model.set_experts_implementation("moe_triton")`; `moe_triton.swap(model)` does both. Weights and state dict stay as
they are. The router, the shared experts and everything else of the model keep running in transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_triton.checks import FLOATS
from moe_triton.dispatch import dispatch
from moe_triton.distributed.exchange.expert_parallel import ExpertParallel, unless_alone
from moe_triton.experts import fp8_flags, moe_mlp, with_adapters
from moe_triton.integrations import ep_implementation, fp8_experts, peft
from moe_triton.integrations.called_gate import called_gate_mlp
from moe_triton.integrations.experts_interface import KEY
from moe_triton.integrations.spread_experts import SpreadExperts, compute_over_ranks, scaled, spread
from moe_triton.layers.quantized import QuantizedProjection, projection_of
from moe_triton.records import ExpertCall, ExpertParameters, ExpertSpec
from moe_triton.reference import activate, wide
from moe_triton.torch_internals import constant_while_compiling, real_tensors

# The flags of an experts module, with the values that a module has which does not mention them.
FLAGS = {
    "is_concatenated": True,
    "is_transposed": False,
    "has_bias": False,
    "has_gate": True,
    "has_post_expert_norm": False,
}

GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}

DEFAULT_GATE = "transformers.integrations.moe._default_apply_gate"


class LimitedGate(NamedTuple):
    """The gate of a class: our name of it, the attributes that hold its limit and alpha, and which layout it reads."""

    activation: str
    limit: str
    alpha: str | None = None
    is_concatenated: bool = True


# Gates that cut their input, by "family.Class". What they compute is tried before we go by the name.
LIMITED_GATES = {
    "deepseek_v4.DeepseekV4Experts": LimitedGate("swiglu", "limit"),
    "FP8Experts": LimitedGate("swiglu", "limit"),
    "FP8Experts, alpha": LimitedGate("gpt_oss", "swiglu_limit", "swiglu_alpha"),
    "glm5_next.Glm5NextTextExperts": LimitedGate("swiglu", "swiglu_limit"),
    "gpt_oss.GptOssExperts": LimitedGate("gpt_oss", "limit", "alpha", is_concatenated=False),
    "hy_v4.HYV4Experts": LimitedGate("swiglu", "swiglu_limit"),
    "hy_v4_vl.HYV4VLExperts": LimitedGate("swiglu", "swiglu_limit"),
    "minimax_m3_vl.MiniMaxM3VLExperts": LimitedGate("gpt_oss", "swiglu_limit", "swiglu_alpha"),
    "openai_privacy_filter.OpenAIPrivacyFilterExperts": LimitedGate("gpt_oss", "limit", "alpha"),
}


class Fused(NamedTuple):
    """A gate of `moe_triton.moe_mlp`; a limit and an alpha of None are the activation's own."""

    activation: str
    activation_limit: float | None = None
    activation_alpha: float | None = None

    def __str__(self) -> str:
        parts = [f" {name} {value:g}" for name, value in zip(("limit", "alpha"), self[1:], strict=True) if value]
        return self.activation + ",".join(parts)


# Activations by exact class; a subclass may compute something else.
POINTWISE = {
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.ReLU": "relu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.AccurateGELUActivation": "gelu_tanh",
    "transformers.activations.ReLUSquaredActivation": "relu2",
}
FUNCTIONS = {F.silu: "silu", F.relu: "relu", torch.relu: "relu", F.gelu: "gelu"}


def register() -> str:
    """Register our experts with transformers under the key "moe_triton", and return the key. Once or more often.

    Raises ImportError when transformers 5 or newer is not installed.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError(
            "moe_triton.integrations.transformers needs transformers >= 5 (pip install moe-triton[hf])"
        ) from error
    ALL_EXPERTS_FUNCTIONS.register(KEY, experts_forward)
    fp8_experts.register(experts_forward)
    ep_implementation.register()
    peft.install()
    return KEY


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run an experts module; transformers calls it as the module's forward.

    hidden_states [T, d], top_k_index [T, K] (an id outside [0, E) skips its slot), top_k_weights [T, K] of any
    floating dtype. Computes in the dtype of the module's weights (under autocast in autocast's) and returns [T, d] in
    hidden_states' dtype. A gate that we know is fused; any other is called. So is the module's `post_expert_norm`, on
    each expert's rows before the router weights multiply them. LoRA adapters of PEFT are operands of the products.

    Raises ValueError where `obstacle` names one.
    """
    if (reason := obstacle(module)) is not None:
        raise ValueError(f"{type(module).__name__}: {reason}")
    up_name, down_name = projection_names(module)
    up_proj, down_proj = (
        fp8_experts.codes_of(module, name) or scaled(module, projection_of(module, name))
        for name in (up_name, down_name)
    )
    compute = up_proj.dtype if isinstance(up_proj, Tensor) else hidden_states.dtype
    up_bias = down_bias = None
    if _flag(module, "has_bias"):
        names = (f"{up_name}_bias", f"{down_name}_bias")
        up_bias, down_bias = (scaled(module, getattr(module, name)).to(compute) for name in names)
    down_proj = down_proj.to(compute) if isinstance(down_proj, Tensor) else down_proj
    if compute == torch.float64 or top_k_weights.dtype not in (compute, torch.float32):
        top_k_weights = top_k_weights.to(wide(compute))
    if "parametrizations" in module._modules:  # PEFT was imported after `register`: the next forward gets factors
        peft.install()
    adapters = peft.lent_lora(module)
    up_lora, down_lora = adapters.get(up_name, []), adapters.get(down_name, [])
    is_transposed, is_concatenated = (_flag(module, name) for name in ("is_transposed", "is_concatenated"))
    backend = getattr(module, "moe_triton_backend", "auto")  # what `moe_triton.swap` was asked for
    fp8 = getattr(module, "moe_triton_fp8", False)
    x = hidden_states.to(compute)
    activation = fused_activation(module)

    def experts(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if activation is not None:
            return moe_mlp(
                x,
                index,
                weights,
                up_proj,
                down_proj,
                **activation._asdict(),
                gate_up_bias=up_bias,
                down_bias=down_bias,
                gate_up_lora=up_lora,
                down_lora=down_lora,
                is_transposed=is_transposed,
                is_concatenated=is_concatenated,
                fp8=fp8,
                backend=backend,
            )
        return called_gate_mlp(
            x,
            index,
            weights,
            up_proj,
            down_proj,
            module._apply_gate if _flag(module, "has_gate") else module.act_fn,
            up_bias=up_bias,
            down_bias=down_bias,
            up_lora=up_lora,
            down_lora=down_lora,
            is_transposed=is_transposed,
            backend=backend,
        )

    def normalised(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return _normalised(experts, module.post_expert_norm, x, index, weights, len(up_proj))

    run = normalised if _flag(module, "has_post_expert_norm") else experts
    if (parallel := unless_alone(getattr(module, "expert_parallel", None))) is None:
        return run(x, top_k_index, top_k_weights).to(hidden_states.dtype)
    call = ExpertCall(
        hidden=x,
        weights=top_k_weights,
        dispatched=dispatch(top_k_index, module.exchanged_layer.num_experts, backend=backend),
        parameters=ExpertParameters(up_proj, down_proj, up_bias, down_bias),
        spec=ExpertSpec(
            **(activation._asdict() if activation else {}),
            is_transposed=is_transposed,
            is_concatenated=is_concatenated,
            **fp8_flags(fp8),
        ),
    )
    if is_fused(module):
        out = parallel.run(with_adapters(call, up_lora, down_lora), module.exchanged_layer)
    else:
        out = compute_over_ranks(module, call, parallel, run, [*up_lora, *down_lora])
    return out.to(hidden_states.dtype)


experts_forward.takes_lora = True  # type: ignore[attr-defined]


def _normalised(
    experts: Callable[[Tensor, Tensor, Tensor], Tensor],
    norm: Callable[[Tensor], Tensor],
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    num_experts: int,
) -> Tensor:
    """Run the experts with `norm` before the router weights: each assignment runs as a separate token of weight 1."""
    index_S1 = index.reshape(-1, 1)
    ones_S1 = torch.ones_like(index_S1, dtype=weights.dtype)
    rows_Sd = experts(x.repeat_interleave(index.shape[1], dim=0), index_S1, ones_S1)
    skipped_S1 = (index_S1 < 0) | (index_S1 >= num_experts)
    # a norm need not be finite on zeros, nor zero
    rows_Sd = norm(rows_Sd.masked_fill(skipped_S1, 1)).masked_fill(skipped_S1, 0)
    rows_TKd = rows_Sd.view(*index.shape, -1).to(wide(rows_Sd.dtype))
    return (rows_TKd * weights[..., None]).sum(1)


def spread_experts(module: nn.Module, parallel: ExpertParallel) -> None:
    """Let every rank of `parallel` keep its own experts of a module, with its own batch. Once or more often.

    Raises ValueError for what cannot be spread, with the reason.
    """
    kind = type(module).__name__
    if isinstance(module, SpreadExperts):
        if module.expert_parallel is not parallel:
            raise ValueError(f"expert_parallel: got another one for {kind} that is spread already, wanted the same")
        return
    if parallel.redundant_experts or parallel.mode == "capacity":
        got = "redundant_experts" if parallel.redundant_experts else "mode 'capacity'"
        raise ValueError(f"expert_parallel: got {got} for {kind}, wanted another mode without them")
    if parallel.etp.size > 1 and not is_fused(module):
        raise ValueError(
            f"expert_parallel: got {parallel.etp.size} expert slices for {kind}, whose gate or norm is called on whole "
            "rows; wanted etp=1"
        )
    projections = projection_names(module)
    names = [*projections, *(f"{name}_bias" for name in projections if _flag(module, "has_bias"))]
    for name in names:
        parameter = module._parameters.get(name)
        if parameter is None or hasattr(parameter, "device_mesh"):
            raise ValueError(
                f"{name}: got {type(getattr(module, name)).__name__}, wanted a plain parameter with all experts"
            )
    spread(module, parallel, names)


def obstacle(module: nn.Module) -> str | None:
    """Return why our experts cannot replace this module's (an unknown flag, unexpected weights), or None."""
    for name in unknown_flags(type(module)):
        if getattr(module, name, False) is True:
            return f"{name}: got True, a flag that moe_triton does not know; wanted one of {', '.join(FLAGS)}"
    if _flag(module, "has_gate") and not hasattr(module, "_apply_gate"):
        return "_apply_gate: missing, wanted the method that transformers' decorator adds"
    norm = getattr(module, "post_expert_norm", None)
    if _flag(module, "has_post_expert_norm") and not callable(norm):
        return f"post_expert_norm: got {type(norm).__name__}, wanted a function of rows"
    projections = projection_names(module)
    names = [*projections, *(f"{name}_bias" for name in projections if _flag(module, "has_bias"))]
    for name in names:
        tensor = getattr(module, name, None)
        if (reason := fp8_experts.obstacle(module, name)) is not None:
            return reason
        if isinstance(tensor, QuantizedProjection) or fp8_experts.has_codes(module, name):
            continue
        if not isinstance(tensor, Tensor):
            return f"{name}: got {type(tensor).__name__}, wanted a Tensor"
        if tensor.dtype not in FLOATS:
            return f"{name}: got dtype {tensor.dtype}, wanted one of {', '.join(str(x) for x in FLOATS)}"
        if tensor.dim() != (2 if name.endswith("_bias") else 3):
            each = "vector" if name.endswith("_bias") else "matrix"
            return f"{name}: got shape {list(tensor.shape)}, wanted one {each} per expert"
    return None


def is_fused(module: nn.Module) -> bool:
    """Return whether the experts are one operation: with a gate that we know, and no norm before the router weights."""
    return fused_activation(module) is not None and not _flag(module, "has_post_expert_norm")


def projection_names(module: nn.Module) -> tuple[str, str]:
    """Return the names of a module's up and down projections."""
    return ("gate_up_proj" if _flag(module, "has_gate") else "up_proj", "down_proj")


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module's projections are [E, in, out]."""
    return _flag(module, "is_transposed")


def fused_activation(module: nn.Module) -> Fused | None:
    """Return the activation of `moe_triton.moe_mlp` that is this module's gate; None: its gate has to be called.

    transformers' default gate is act_fn(gate) * up, with gate and up as `is_concatenated` says they lie.
    """
    pointwise = pointwise_name(getattr(module, "act_fn", None))
    if not _flag(module, "has_gate"):
        return None if pointwise is None else Fused(pointwise)
    if "_apply_gate" in vars(module):  # somebody's own, put on this very module
        return None
    cls: Any = type(module)
    gate = cls._apply_gate
    where = fp8_experts.gate_name(module, dotted_name(gate), DEFAULT_GATE)
    if where == DEFAULT_GATE:
        return Fused(GATED[pointwise]) if pointwise in GATED else None
    known = LIMITED_GATES.get(_short_name(where) or where)
    if known is None or _flag(module, "is_concatenated") != known.is_concatenated:
        return None
    if hasattr(module, "act_fn") and pointwise != "silu":
        return None
    limit, alpha = getattr(module, known.limit, None), None if known.alpha is None else getattr(module, known.alpha, 0)
    if not (_is_positive(limit) and (known.alpha is None or _is_positive(alpha))):
        return None
    return Fused(known.activation, limit, alpha) if computes(gate, known, limit, alpha) else None


def _short_name(gate: str) -> str:
    """ "family.Class" of "transformers.models.family.modeling_family.Class._apply_gate"; "" for another name."""
    found = re.fullmatch(r"transformers\.models\.(\w+)\.modeling_\1\.(\w+)\._apply_gate", gate)
    return "" if found is None else f"{found[1]}.{found[2]}"


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and 0 < value < math.inf


def latent_sizes(module: nn.Module) -> tuple[int, int]:
    """Return the size of the vectors that the experts work on, and the model's hidden size: NemotronH projects."""
    down: Any = projection_of(module, "down_proj")
    size = int(down.shape[2 if _flag(module, "is_transposed") else 1])
    hidden_size = getattr(getattr(module, "config", None), "hidden_size", None)
    return size, hidden_size if isinstance(hidden_size, int) else size


def pointwise_name(act_fn: Any) -> str | None:
    """Return our name for an act_fn that we know, or None."""
    if not isinstance(act_fn, nn.Module):
        return FUNCTIONS.get(act_fn)
    kind = type(act_fn)
    if kind is nn.GELU:
        return "gelu" if act_fn.approximate == "none" else "gelu_tanh"
    return POINTWISE.get(dotted_name(kind))


# torch.compile runs these three as plain Python while it traces: it would get __qualname__ wrong, and cannot see which
# attributes a module has in torch 2.11.


@constant_while_compiling
def unknown_flags(cls: Any) -> tuple[str, ...]:
    """Return the has_... and is_... attributes of the class and its constructors, also decorated, not in FLAGS."""
    return _unknown_flags(cls)


@lru_cache(maxsize=256)
def _unknown_flags(cls: Any) -> tuple[str, ...]:
    names: set[str] = set()
    for base in cls.__mro__:
        names.update(vars(base))
        constructor = vars(base).get("__init__")
        while constructor is not None:
            names.update(getattr(getattr(constructor, "__code__", None), "co_names", ()))
            constructor = getattr(constructor, "__wrapped__", None)
    return tuple(sorted(name for name in names if name.startswith(("has_", "is_")) and name not in FLAGS))


@constant_while_compiling
def dotted_name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


@constant_while_compiling
def computes(gate: Any, known: LimitedGate, limit: Any, alpha: Any) -> bool:
    """Return whether the gate still is what its name says: it is tried once on numbers on both sides of its limit."""
    return _tried(gate, known, limit, alpha)


@lru_cache(maxsize=64)
def _tried(gate: Any, known: LimitedGate, limit: float, alpha: float | None) -> bool:
    with real_tensors(), torch.no_grad():
        numbers = (3 * limit * torch.arange(256, dtype=torch.float64, device="cpu").sin()).view(16, 16)
        fields = {"gate_softcap": None, "swiglu_alpha": None, known.limit: limit, known.alpha or "": alpha}
        module = SimpleNamespace(**fields, act_fn=F.silu)
        expected = activate(numbers, known.activation, known.is_concatenated, limit, alpha)
        return torch.allclose(gate(module, numbers), expected, rtol=1e-12, atol=0)


def _flag(module: nn.Module, name: str) -> bool:
    return getattr(module, name, FLAGS[name])
