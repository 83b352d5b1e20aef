"""What will run, and why: backend, kernels, configurations, for a module or for a shape, without running anything."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from moe_triton import runtime
from moe_triton.backends.torch.cpu import choose_policy
from moe_triton.backends.torch.fused import codes_in_words, loops_in_words
from moe_triton.backends.torch.processor import this_processor
from moe_triton.checks import check_choice, check_int
from moe_triton.integrations import transformers as hf
from moe_triton.integrations.transformers_routers import RoutedLayer, num_local_experts, routed_layers
from moe_triton.layers import Experts, MoE
from moe_triton.layers.lora import PROJECTIONS
from moe_triton.records import ACTIVATIONS, GATED, ExpertSpec

DEFAULT_TOKENS = 4096
DEVICE_EXPERTS = (
    "F.grouped_mm for bf16 with sizes that are multiples of 8 on GPUs of compute capability 9.x and 10.x; otherwise "
    "one product per expert, for which the host reads the offsets once a pass"
)
SHAPE = ("tokens", "hidden_size", "intermediate_size", "num_experts", "top_k")
ADAPTERS = {
    "triton": "narrow_kernel before up, down, d_hidden and d_rows, which take more steps; d_weight_kernel backward",
    "torch": "two narrow products beside each of the experts'",
    "reference": "two narrow products beside each of the experts'",
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One step: what runs it, its configuration, and where that is from; "" where it has none."""

    step: str
    runs: str
    config: str = ""
    origin: str = ""


EMULATED = Part(
    step="experts, both passes",
    runs="fp8 emulated: operands rounded to e4m3 and multiplied in fp32, an expert at a time, for which the host reads "
    "the offsets once a pass",
)
OPERANDS = Part(
    step="operands in fp8",
    runs="quantize_rows_kernel and quantize_weight_kernel; quantize_columns_kernel (backward); activations by up, "
    "their gradients by d_hidden",
)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What will run for one layer. str() gives it in words.

    name      of the module; "" for a shape
    shape     T, d, n, E, K
    backend   "triton", "torch" or "reference", or "transformers" for experts that are not swapped; reason: why
    parts     step by step
    """

    name: str
    shape: tuple[int, int, int, int, int]
    dtype: torch.dtype
    device: torch.device
    backend: str
    reason: str
    parts: tuple[Part, ...]

    def __str__(self) -> str:
        tokens, d, n, num_experts, top_k = self.shape
        dtype = str(self.dtype).removeprefix("torch.")
        what = f"T={tokens} d={d} n={n} E={num_experts} K={top_k} {dtype} on {self.device}"
        lines = [f"{f'{self.name}: ' if self.name else ''}{what}: backend {self.backend} ({self.reason})"]
        for part in self.parts:
            config = f"  {part.config} (from the {part.origin})" if part.config else ""
            lines.append(f"  {part.step:26} {part.runs}{config}")
        return "\n".join(lines)


def explain(
    module_or_shape: nn.Module | Iterable[int],
    *,
    tokens: int = DEFAULT_TOKENS,
    activation: str = "swiglu",
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> list[Explanation]:
    """What will run for every MoE layer of a module, or for one shape (T, d, n, E, K).

    Args:
        module_or_shape: a module with `moe_triton.MoE` layers (or one itself), a transformers model whose experts have
            its interface, swapped or not, or five sizes.
        tokens: T, for a module; configurations depend on the rows per expert, T K / E.
        activation, dtype, backend: for a shape; a module has its own.
        device: where it would run. None: the module's own; for a shape a GPU if there is one.

    Returns one Explanation per layer. Nothing is launched. On another architecture than this machine's, ask
    `moe-triton tune --dry-run` or `moe-triton inspect`.

    Raises:
        ValueError, TypeError: no MoE layer in the module, a wrong shape, an unknown name. RuntimeError: backend
        "triton" where the kernels cannot run.
    """
    if isinstance(module_or_shape, nn.Module):
        check_int("tokens", tokens, low=1)
        layers = [(name, layer) for name, layer in module_or_shape.named_modules() if isinstance(layer, MoE)]
        found = [explain_layer(name, layer, tokens, device) for name, layer in layers]
        found += [explain_routed(layer, tokens, device) for layer in routed_layers(module_or_shape)]
        if not found:
            raise ValueError(
                "module_or_shape: got a module without a moe_triton.MoE layer and without experts of transformers' "
                "interface, wanted at least one"
            )
        return found
    sizes = tuple(module_or_shape)
    if len(sizes) != len(SHAPE):
        raise ValueError(f"module_or_shape: got {len(sizes)} sizes, wanted {len(SHAPE)}: {', '.join(SHAPE)}")
    for name, size in zip(SHAPE, sizes, strict=True):
        check_int(name, size, low=1)
    check_int("top_k", sizes[4], low=1, high=sizes[3])
    check_choice("activation", activation, ACTIVATIONS)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    shape = (sizes[0], sizes[1], sizes[2], sizes[3], sizes[4])
    return [describe("", shape, dtype, where, backend, activation)]


def explain_layer(name: str, layer: MoE, tokens: int, device: torch.device | str | None) -> Explanation:
    experts: Experts = layer.experts
    _, hidden, intermediate = experts.down_proj.shape
    shape = (tokens, hidden, intermediate, layer.num_experts, layer.top_k)
    weight: Any = experts.gate_up_proj
    where = weight.device if device is None else torch.device(device)
    found = describe(
        name, shape, dtype_of(weight, layer.router), where, experts.backend, experts.spec.activation,
        has_bias=experts.down_proj_bias is not None, recompute=experts.recompute, frozen=frozen_stages(experts),
        ranks={name: lora.a.shape[1] for name in PROJECTIONS if (lora := experts.lora(name)) is not None},
        batch_invariant=layer.batch_invariant, fp8=experts.spec.fp8_mode,
    )  # fmt: skip
    found = replace(found, parts=(*found.parts, *_more_parts(layer, hidden)))
    return with_format(found, weight, experts.spec)


def _more_parts(layer: MoE, latent_size: int) -> Iterator[Part]:
    """What a layer has beside the router and its experts."""
    if layer.latent_down_proj is not None:
        sizes = f"{layer.hidden_size} -> {latent_size}, and back after the sum over experts"
        yield Part(step="latent projections", runs=f"torch linear, {sizes}")
    if layer.shared_expert is not None:
        gate = "" if layer.shared_expert_gate is None else ", times the sigmoid of its own gate"
        yield Part(step="shared expert", runs=f"torch linear on every token{gate}")
    if layer.batch_invariant:
        how = "products of 32 rows each on a CPU, 128 on other devices; one configuration per kernel in Triton"
        yield Part(step="batch invariance", runs=how)


def dtype_of(projection: Any, router: nn.Module) -> torch.dtype:
    """The dtype of a layer's products: its projections', or where these are quantised that of its router."""
    dtype: torch.dtype = (projection if isinstance(projection, Tensor) else next(router.parameters())).dtype
    return dtype


def with_format(found: Explanation, projection: Any, spec: ExpertSpec) -> Explanation:
    """Add what becomes of a quantised projection."""
    if isinstance(projection, Tensor):
        return found
    if found.backend == "triton":
        from moe_triton.kernel_stages import decoded_in_loop, decoding_in_words  # need Triton

        tokens, _, n, num_experts, top_k = found.shape
        weight = projection.weight
        block = weight.kind.rows if weight.is_transposed == spec.is_transposed else weight.group
        in_loop = decoded_in_loop(
            weight.format, spec, found.dtype, n=n, block=block, rows_per_expert=tokens * top_k / num_experts
        )
        found, how = over_codes(found, weight.format, spec, in_loop), decoding_in_words(in_loop)
    elif found.device.type == "cpu" and found.backend == "torch":
        how = codes_in_words(found.dtype)
    else:
        how = "decoded whole, for each product"
    return replace(found, parts=(*found.parts, Part(step=f"projections in {projection.format}", runs=how)))


def over_codes(found: Explanation, format: str, spec: ExpertSpec, in_loop: Sequence[str]) -> Explanation:
    """Give the kernels that decode codes in their loop the configurations that they run with."""
    from moe_triton.kernel_stages import KERNELS, chosen_configs, kernel_in_words  # need Triton
    from moe_triton_kernels.heuristics import BUCKETS
    from moe_triton_kernels.launch import target_of

    tokens, d, n, num_experts, top_k = found.shape

    def changed(part: Part) -> Part:
        op = part.step.removesuffix(" (backward)")
        if op not in in_loop:
            return part
        is_fixed = spec.batch_invariant and op in ("up", "down")
        chosen = chosen_configs(
            d=d, n=n, dtype=found.dtype, num_rows=BUCKETS[-1] * num_experts + 1 if is_fixed else tokens * top_k,
            num_experts=num_experts, is_gated=spec.is_gated, architecture=target_of(found.device).architecture,
            format=format,
        )  # fmt: skip
        own = next(entry for entry in chosen if entry["op"] == op)
        runs = kernel_in_words(KERNELS[op], own["fields"])
        return replace(part, runs=f"{runs}, which decodes", config=own["config"], origin=own["from"])

    return replace(found, parts=tuple(map(changed, found.parts)))


def frozen_stages(experts: Experts) -> tuple[str, ...]:
    """The stages that have nothing to do since their parameter wants no gradient."""
    stages = {
        "d_weight_up": experts.gate_up_proj,
        "d_weight_down": experts.down_proj,
        "d_bias_rows": experts.gate_up_proj_bias,
        "d_bias_gathered": experts.down_proj_bias,
    }
    return tuple(
        stage
        for stage, parameter in stages.items()
        if parameter is not None and not getattr(parameter, "requires_grad", False)  # a quantised projection has none
    )


def explain_routed(layer: RoutedLayer, tokens: int, device: torch.device | str | None) -> Explanation:
    """What will run for a layer of a transformers model: its router, and whatever its experts are switched to."""
    experts: Any = layer.experts
    down = experts.down_proj
    hidden, intermediate = down.shape[-2:][::-1] if experts.is_transposed else down.shape[-2:]
    shape = (tokens, hidden, intermediate, num_local_experts(experts), layer.top_k)
    where = down.device if device is None else torch.device(device)
    dtype = dtype_of(down, layer.router)
    implementation = getattr(experts.config, "_experts_implementation", None)
    routing = Part(step="gate, route", runs=f"{type(layer.router).__name__} of transformers")
    if implementation != hf.KEY:
        obstacle = hf.obstacle(experts)
        reason = "not swapped" if obstacle is None else f"cannot be swapped: {obstacle}"
        runs = f"experts_implementation={implementation!r} of transformers"
        return Explanation(
            name=layer.name, shape=shape, dtype=dtype, device=where, backend="transformers", reason=reason,
            parts=(routing, Part(step="experts", runs=runs)),
        )  # fmt: skip
    activation = hf.fused_activation(experts)
    name = "swiglu" if activation is None else activation.activation
    found = describe(
        layer.name, shape, dtype, where, getattr(experts, "moe_triton_backend", "auto"), name,
        has_bias=experts.has_bias, fp8=getattr(experts, "moe_triton_fp8", False),
    )  # fmt: skip
    rest = [part for part in found.parts if part.step not in ("gate", "route")]
    if activation is None and found.backend != "reference":
        rest = [part for part in rest if part.step == "dispatch"]
        rest.append(
            Part(step="experts, both passes", runs="products of torch, with the module's own gate between them")
        )
    layout = {"is_transposed": experts.is_transposed, "is_concatenated": getattr(experts, "is_concatenated", True)}
    return with_format(replace(found, parts=(routing, *rest)), down, ExpertSpec(activation=name, **layout))


def describe(
    name: str,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    activation: str,
    *,
    has_bias: bool = False,
    recompute: bool = False,
    frozen: Sequence[str] = (),
    batch_invariant: bool = False,
    fp8: bool | str = False,
    ranks: Mapping[str, int] = MappingProxyType({}),
) -> Explanation:
    choice = runtime.choose(backend, device, dtype)
    if choice.name == "triton":
        parts = [
            part
            for part in triton_parts(shape, dtype, device, activation in GATED, has_bias, batch_invariant, fp8)
            if part.step.removesuffix(" (backward)") not in frozen
        ]
    elif choice.name == "torch":
        parts = torch_parts(device, fp8)
    else:
        parts = [Part(step="everything", runs="moe_triton.reference, under plain autograd")]
    if ranks:
        which = ", ".join(f"{name} r={rank}" for name, rank in ranks.items())
        parts.append(Part(step="adapters", runs=f"{ADAPTERS[choice.name]} ({which})"))
    if recompute:
        parts.append(Part(step="backward, first", runs="the up projection again (recompute=True)"))
    return Explanation(
        name=name,
        shape=shape,
        dtype=dtype,
        device=device,
        backend=choice.name,
        reason=choice.reason,
        parts=tuple(parts),
    )


def cpu_experts() -> str:
    chosen = choose_policy(this_processor())
    return (
        "blocks of rows, one after another: an expert's, or those of neighbours in one batched product or one call of "
        f"F.grouped_mm; the rows of the very call decide. Products: {chosen.policy} ({chosen.reason}). "
        f"Compiled loops: {loops_in_words()}"
    )


def torch_parts(device: torch.device, fp8: bool | str = False) -> list[Part]:
    is_cpu = device.type == "cpu"
    return [
        Part(step="gate", runs="torch linear in fp32 (fp64 for fp64 parameters)"),
        Part(
            step="route",
            runs="a stable sort of few keys, else torch.topk over 64-bit keys (exact, ties to the lower index)",
        ),
        Part(step="dispatch", runs="a stable radix sort of the choices" if is_cpu else "torch.sort of the choices"),
        EMULATED if fp8 else Part(step="experts, both passes", runs=cpu_experts() if is_cpu else DEVICE_EXPERTS),
    ]


def triton_parts(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    is_gated: bool,
    has_bias: bool,
    batch_invariant: bool = False,
    fp8: bool | str = False,
) -> list[Part]:
    tokens, d, n, num_experts, top_k = shape
    from moe_triton.backends.triton.experts_fp8 import runs_kernels
    from moe_triton.kernel_stages import FORWARD, KERNELS, chosen_configs, kernel_in_words  # need Triton
    from moe_triton_kernels.fp8 import CODES
    from moe_triton_kernels.heuristics import BUCKETS
    from moe_triton_kernels.launch import target_of

    def by_stage(num_rows: int) -> dict[str, dict[str, Any]]:
        chosen = chosen_configs(
            d=d, n=n, dtype=CODES if fp8 else dtype, num_rows=num_rows, num_experts=num_experts, is_gated=is_gated,
            architecture=target_of(device).architecture,
        )  # fmt: skip
        return {stage: found for found in chosen for stage in found["stages"]}

    parts = [Part(step="gate", runs="torch linear in fp32"), *_routing_parts(tokens, num_experts, top_k)]
    if fp8 == "mxfp8" or (fp8 and not runs_kernels(device)):
        return [*parts, EMULATED]
    config = by_stage(tokens * top_k)
    if batch_invariant:  # one configuration of up and down, whatever the rows
        fixed = by_stage(BUCKETS[-1] * num_experts + 1)
        config |= {stage: fixed[stage] for stage in ("up", "down")}
    if fp8:
        parts.append(OPERANDS)
    for stage, kernel in KERNELS.items():
        if stage.startswith("d_bias") and not has_bias:
            continue
        known = config.get(stage, {"config": "", "from": "", "fields": None})
        step = f"{stage.removesuffix('_backward')} (backward)" if stage not in FORWARD else stage
        runs = kernel_in_words(f"fp8_{kernel}" if fp8 and stage.startswith("d_weight") else kernel, known["fields"])
        parts.append(Part(step=step, runs=runs, config=known["config"], origin=known["from"]))
    return parts


def _routing_parts(tokens: int, num_experts: int, top_k: int) -> list[Part]:
    """What runs before the experts where nothing is dropped; for few tokens it takes fewer launches."""
    from moe_triton_kernels import small_dispatch, small_route  # need Triton
    from moe_triton_kernels.topk_options import TopK

    route, dispatch = "top-k kernels", "permutation kernels"
    if tokens * top_k <= small_dispatch.MAX_SLOTS:
        dispatch = "small_dispatch_kernel, with the tile tables of inference"
    if small_route.is_small(tokens, num_experts, TopK(top_k)):
        route = "top-k kernel; in inference small_route_kernel, with the dispatch and its tile tables"
    return [Part(step="route", runs=route), Part(step="dispatch", runs=dispatch)]
