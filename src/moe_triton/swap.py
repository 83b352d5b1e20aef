"""`moe_triton.swap`: put our experts into a model that exists, and say what was and what was not swapped."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from moe_triton.checks import check_choice
from moe_triton.distributed.exchange.expert_parallel import ExpertParallel
from moe_triton.distributed.holders import StackedExperts
from moe_triton.experts import fp8_flags
from moe_triton.integrations import peft
from moe_triton.integrations import transformers as hf
from moe_triton.integrations.experts_interface import implementation, registry, use_ours
from moe_triton.layers import Experts, MoE
from moe_triton.layers.quantized import QuantizedProjection
from moe_triton.runtime import BACKENDS


class Swapped(NamedTuple):
    """A module that runs on moe_triton now: its dotted name in the model, its class, and what was done."""

    name: str
    kind: str
    action: str


class Skipped(NamedTuple):
    """A module that looks like a mixture of experts and was left alone: its dotted name, its class, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class SwapReport:
    """What `swap` did; `print(report)` shows it line by line."""

    swapped: list[Swapped]
    skipped: list[Skipped]

    def __str__(self) -> str:
        if not self.swapped and not self.skipped:
            return "moe_triton.swap: found no mixture-of-experts layers, and changed nothing"
        lines = [f"moe_triton.swap: {len(self.swapped)} swapped, {len(self.skipped)} left alone"]
        groups: tuple[tuple[str, Sequence[tuple[str, str, str]]], ...] = (("+", self.swapped), ("-", self.skipped))
        for mark, entries in groups:
            lines += [f"  {mark} {name or '(the model itself)'} [{kind}]: {what}" for name, kind, what in entries]
        return "\n".join(lines)


class How(NamedTuple):
    """What `swap` was asked for."""

    backend: str
    expert_parallel: ExpertParallel | None
    fp8: bool | str


def swap(
    model: nn.Module, *, backend: str = "auto", expert_parallel: ExpertParallel | None = None, fp8: bool | str = False
) -> SwapReport:
    """Let the MoE blocks of `model` run on moe_triton, in place. Weights and state-dict keys stay as they are.

    It recognises the experts modules of transformers (those with its experts interface), in a whole model, in a part of
    one, or alone. A whole model is switched by its own `set_experts_implementation`. Then each experts module is
    checked: one that the switch does not reach, or that has no model above it, gets its own config that says
    "moe_triton". `model.set_experts_implementation("eager")` undoes the former. Calling swap again changes
    nothing but the backend and whether products are in fp8.

    DeepSpeed's MoE layers (deepspeed.moe.layer.MoE) are replaced by `moe_triton.compat.deepspeed`'s, which take over
    their parameters as they are. The experts of DeepSpeed's AutoEP (GroupedExperts) run on ours where they are.

    Args:
        model: any Module.
        backend: "auto", "triton", "torch" or "reference", for every swapped module.
        expert_parallel: over which ranks the experts of transformers' modules are spread: every rank keeps its own of
            them, and then passes its own batch. Whatever else the model has is on every rank. Give it a model on the
            meta device, and `moe_triton.load_pretrained` its weights, so that no rank ever holds all experts. Make the
            optimizer afterwards: the projections are new parameters.
        fp8: compute the products of transformers' experts in fp8 (True or "mxfp8", see `moe_mlp`) to train; parameters
            stay in their dtype. Experts whose gate we do not know, quantised ones and DeepSpeed's layers are left alone
            then.

    Returns:
        SwapReport with `.swapped` and `.skipped`, lists of (name, kind, what was done or the reason). A module that
        looks like a mixture of experts but is unknown is listed in the latter.

    Raises:
        TypeError: model is no Module, expert_parallel no ExpertParallel. ValueError: an unknown backend; experts that
        cannot be spread as asked.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")
    check_choice("backend", backend, BACKENDS)
    if expert_parallel is not None and not isinstance(expert_parallel, ExpertParallel):
        raise TypeError(f"expert_parallel: got {type(expert_parallel).__name__}, wanted an ExpertParallel or None")
    fp8_flags(fp8)
    how, report = How(backend, expert_parallel, fp8), SwapReport([], [])
    peft.install()
    handled: list[str] = []  # names of the modules that are dealt with, together with all below them
    for name, module in list(model.named_modules()):  # a recogniser may replace modules
        if any(_is_below(name, root) for root in handled):
            continue
        for recognizer in RECOGNIZERS:
            entry = recognizer(model, name, module, how)
            if entry is not None:
                handled.append(name)
                if isinstance(entry, Swapped):
                    report.swapped.append(entry)
                else:
                    report.skipped.append(entry)
                break
    blocks = [(name, module) for name, module in model.named_modules() if BLOCK.search(type(module).__name__)]
    for name, module in reversed(blocks):  # the innermost first
        if not any(_is_below(name, root) or _is_below(root, name) for root in handled):
            handled.append(name)
            report.skipped.append(Skipped(name, _kind(module), UNKNOWN))
    return report


# Recognisers: (model, name, module, how) -> None for a module that is not theirs, else what became of it. ---------


def transformers_experts(model: nn.Module, name: str, module: nn.Module, how: How) -> Swapped | Skipped | None:
    """Switch an experts module whose class has transformers' `use_experts_implementation`."""
    if registry(module) is None:
        return None
    reason = _obstacle(module, how)
    if reason is not None:
        return Skipped(name, _kind(module), reason)
    key = hf.register()
    if implementation(module) != key:
        whole = _outermost_pretrained(model, name)
        # its switch affects all experts: one that cannot run ours would raise at its next forward
        if whole is not None and any(registry(m) is not None and _obstacle(m, how) for m in whole.modules()):
            whole = None
        use_ours(module, whole)
    module.moe_triton_backend, module.moe_triton_fp8 = how.backend, how.fp8  # type: ignore[assignment]
    if how.expert_parallel is not None:
        hf.spread_experts(module, how.expert_parallel)
    activation = hf.fused_activation(module)
    size_l, size_d = hf.latent_sizes(module)
    mode = f", in {'fp8' if how.fp8 is True else how.fp8}" if how.fp8 else ""
    runs = (
        f"fused, {activation}{mode}" if activation else "our products, with the module's own gate called between them"
    )
    if getattr(module, "has_post_expert_norm", False):
        runs += ", then its post_expert_norm"
    if size_l != size_d:
        runs += f", in a latent space of {size_l} of {size_d} numbers"
    if isinstance(module, StackedExperts):
        here = module.local_experts
        runs += f", experts {here[0]} to {here[-1]} of {module.num_experts} on this rank"
    return Swapped(name, _kind(module), f"experts_implementation={key!r}, backend={how.backend!r}: {runs}")


def deepspeed_layer(model: nn.Module, name: str, module: nn.Module, how: How) -> Swapped | Skipped | None:
    """Replace DeepSpeed's MoE by ours. Nothing of DeepSpeed is imported before such a layer is met."""
    upstream = sys.modules.get("deepspeed.moe.layer")
    if upstream is None or not isinstance(module, upstream.MoE):
        return None
    from moe_triton.compat.deepspeed import convert

    reason = convert.obstacle(module)
    if reason is None and how.fp8:
        reason = NO_FP8
    if reason is None and name == "":
        reason = "is the model itself: there is nothing above it to put another layer into"
    if reason is not None:
        return Skipped(name, _kind(module), reason)
    layer = convert.from_upstream(module, how.backend)
    for parent in list(model.modules()):  # a shared layer is replaced wherever it is
        for key, child in parent._modules.items():
            if child is module:
                parent._modules[key] = layer
    mlp = layer.deepspeed_moe.experts.mlp
    runs = "called one by one" if mlp is None else f"fused, {mlp.activation}"
    return Swapped(
        name, _kind(module), f"moe_triton.compat.deepspeed.layer.MoE, backend={how.backend!r}: experts {runs}"
    )


def deepspeed_grouped_experts(model: nn.Module, name: str, module: nn.Module, how: How) -> Swapped | Skipped | None:
    """Switch the experts of a layer that DeepSpeed's AutoEP has made, after `deepspeed.initialize`."""
    upstream = getattr(sys.modules.get("deepspeed.moe.ep_experts"), "GroupedExperts", None)
    if upstream is None or not isinstance(module, upstream):
        return None
    from moe_triton.compat.deepspeed import auto_ep

    reason = NO_FP8 if how.fp8 else auto_ep.obstacle(module)
    if reason is not None:
        return Skipped(name, _kind(module), reason)
    auto_ep.use_ours(module, how.backend)
    fused = auto_ep.ACTIVATIONS[module.activation][0]
    return Swapped(name, _kind(module), f"moe_triton.compat.deepspeed.auto_ep, backend={how.backend!r}: fused, {fused}")


def own(model: nn.Module, name: str, module: nn.Module, how: How) -> Skipped | None:
    """Leave a layer of ours as it is."""
    compat = sys.modules.get("moe_triton.compat.deepspeed.layer")
    if isinstance(module, (MoE, Experts)) or (compat is not None and isinstance(module, compat.MoE)):
        return Skipped(name, _kind(module), "is moe_triton's own already")
    return None


def unknown_experts(model: nn.Module, name: str, module: nn.Module, how: How) -> Skipped | None:
    """List stacked weights, or a list of modules, called experts that no recogniser above knows."""
    if not EXPERTS.search(type(module).__name__) and not EXPERTS.search(name.rpartition(".")[2]):
        return None
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        reason = "a list of experts: which of them a token takes is known only to the code around it"
        return Skipped(name, _kind(module), reason) if len(module) > 1 else None
    stacked = any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))
    return Skipped(name, _kind(module), UNKNOWN) if stacked else None


RECOGNIZERS = (
    own,
    transformers_experts,
    deepspeed_layer,
    deepspeed_grouped_experts,
    unknown_experts,
)  # the first that recognises a module handles it

EXPERTS = re.compile(r"[Ee]xperts?([A-Z]|$)")
BLOCK = re.compile(r"(MoE|Moe|MOE|MixtureOfExperts)(Block|Layer)?$")
NO_FP8 = "fp8: got True, which is for experts of transformers' interface and for MoE(fp8=True)"
UNKNOWN = "looks like a mixture of experts, but its class has no interface that moe_triton knows"


# What we know of transformers' modules --------------------------------------------------------------------------------


def _obstacle(module: nn.Module, how: How) -> str | None:
    """Return why this module, which dispatches, cannot run our experts; None where it can."""
    hf.register()
    if hf.KEY not in registry(module):
        return f"its class looks its implementation up in a registry of its own ({type(registry(module)).__name__})"
    reason = hf.obstacle(module)
    if reason is None and how.fp8 and hf.fused_activation(module) is None:
        reason = "fp8: got True for a gate that has to be called, wanted one that moe_triton fuses"
    if reason is None and how.fp8 and isinstance(module.down_proj, QuantizedProjection):
        reason = "fp8: got True for quantised projections, wanted ones in a float dtype"
    return reason


def _outermost_pretrained(model: nn.Module, name: str) -> Any:
    """Return the outermost transformers model that the module `name` lies in, or None."""
    base = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", ())
    return next((module for module in _path(model, name) if isinstance(module, base)), None)


def _path(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """Return the modules from `model` down to the one called `name`."""
    yield model
    for part in filter(None, name.split(".")):
        model = getattr(model, part)
        yield model


def _is_below(name: str, root: str) -> bool:
    return root == "" or name == root or name.startswith(f"{root}.")


def _kind(module: nn.Module) -> str:
    return type(module).__name__
