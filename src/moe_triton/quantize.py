"""`moe_triton.quantize`: keep the experts of a model in few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from moe_triton.distributed.checkpoint.hub_names import pretrained
from moe_triton.integrations import transformers as hf
from moe_triton.integrations.experts_interface import KEY, implementation, registry
from moe_triton.layers import Experts
from moe_triton.layers.quantized import projection_of, quantize_projection
from moe_triton.quantization import QuantizedWeight
from moe_triton.quantization.formats import check_format


class Quantized(NamedTuple):
    """An experts module whose projections are quantised now: its dotted name, its class, and bytes before and after."""

    name: str
    kind: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class QuantizeReport:
    """What `quantize` did; `print(report)` shows it line by line."""

    format: str
    quantized: list[Quantized]

    def __str__(self) -> str:
        before = sum(entry.bytes_before for entry in self.quantized)
        after = sum(entry.bytes_after for entry in self.quantized)
        lines = [
            f"moe_triton.quantize: {len(self.quantized)} experts modules in {self.format}, "
            f"{before / 2**20:.1f} MiB before, {after / 2**20:.1f} MiB after"
        ]
        lines += [f"  {entry.name or '(the model itself)'} [{entry.kind}]" for entry in self.quantized]
        return "\n".join(lines)


def quantize(model: nn.Module, format: str, *, group: int | None = None, symmetric: bool = True) -> QuantizeReport:
    """Replace the experts' projections of a model by `QuantizedWeight`s, in place, which freezes them.

    The experts of our own layers, and those of transformers models that `moe_triton.swap` has switched to ours, also
    under PEFT's adapters, which then train over the quantised base. All else of the model stays as it is. Numbers that
    the format can represent keep their values: a gpt-oss that transformers has dequantised is in "mxfp4" what it was.
    A transformers model gets a quantizer and `config.quantization_config` (`moe_triton.MoeTritonConfig`): Trainer
    accepts it under adapters, and `save_pretrained` writes what `from_pretrained` loads with the same bits.

    Args:
        model: any Module.
        format, group, symmetric: as in `QuantizedWeight.quantize`.

    Returns:
        QuantizeReport with `.quantized`, a list of (name, kind, bytes before, bytes after).

    Raises:
        TypeError: model is no Module. ValueError: no experts that run on moe_triton, such as a transformers model
        before `swap`; experts that are quantised; sizes that do not fit the format. Then nothing is changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")
    check_format(format, group, symmetric)
    found = [(name, module) for name, module in model.named_modules() if _is_ours(module)]
    if not found:
        raise ValueError("model: got no experts that run on moe_triton, wanted some (see moe_triton.swap)")
    weights = [_quantized(name, module, format, group, symmetric) for name, module in found]
    entries = []
    for (name, module), parts in zip(found, weights, strict=True):
        before = sum(getattr(module, part).nbytes for part in parts)
        for part, weight in parts.items():
            quantize_projection(module, part, weight)
        after = sum(weight.nbytes for weight in parts.values())
        entries.append(Quantized(name, type(module).__name__, before, after))
    for whole in _outermost_pretrained(model):
        if getattr(whole, "hf_quantizer", None) is None:  # another one has the model's linear layers
            _attach_quantizer(whole, format, group, symmetric)
    return QuantizeReport(format, entries)


def _outermost_pretrained(model: nn.Module) -> list[nn.Module]:
    """The transformers models in `model`, also below PEFT's wrappers, that lie in no other."""
    if pretrained(model) is not None:
        return [model]
    return [found for child in model.children() for found in _outermost_pretrained(child)]


def _attach_quantizer(model: nn.Module, format: str, group: int | None, symmetric: bool) -> None:
    """Give a transformers model the quantizer of its experts; those that are not quantised are named in its config."""
    from moe_triton.integrations.quantizer import MoeTritonConfig, MoeTritonHfQuantizer, without_wrappers

    others = [
        without_wrappers(name)
        for name, module in model.named_modules()
        if registry(module) is not None and not _is_ours(module)
    ]
    config = MoeTritonConfig(format, group=group, symmetric=symmetric, modules_to_not_convert=others or None)
    MoeTritonHfQuantizer(config, pre_quantized=False).attach(model)


def _is_ours(module: nn.Module) -> bool:
    """Return whether this is an experts module that runs on moe_triton."""
    return isinstance(module, Experts) or (registry(module) is not None and implementation(module) == KEY)


def _quantized(
    name: str, module: nn.Module, format: str, group: int | None, symmetric: bool
) -> dict[str, QuantizedWeight]:
    """The module's projections, quantised; the module is left as it is."""
    if isinstance(module, Experts):
        module.check_quantizable()
    elif getattr(module, "moe_triton_fp8", False):
        raise ValueError(f"model: {name} was swapped with fp8=True, wanted experts whose products are not in fp8")
    weights = {}
    for part in hf.projection_names(module):
        parameter = projection_of(module, part)
        if not isinstance(parameter, Tensor):
            raise ValueError(f"model: {name}.{part} is quantised, wanted a parameter")
        try:
            weights[part] = QuantizedWeight.quantize(
                parameter, format, group=group, symmetric=symmetric, is_transposed=hf.is_transposed(module)
            )
        except ValueError as error:
            raise ValueError(f"{name}.{part}: {error}") from error
    return weights
