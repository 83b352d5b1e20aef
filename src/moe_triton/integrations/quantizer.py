"""transformers' quantizer for experts in few bits: loads, saves and trains them under the method "moe_triton"."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, PrefixChange, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from moe_triton.checks import check_choice
from moe_triton.integrations import transformers as hf
from moe_triton.integrations.experts_interface import KEY, registry, use_ours
from moe_triton.layers import Experts
from moe_triton.layers.quantized import QuantizedProjection, quantize_projection
from moe_triton.quantization import QuantizedWeight
from moe_triton.quantization.formats import FORMATS, check_format


@register_quantization_config(KEY)
class MoeTritonConfig(QuantizationConfigMixin):
    """Ask transformers to keep the experts of a model in few bits, as `moe_triton.quantize` does.

        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=moe_triton.MoeTritonConfig("mxfp4"))

    Projections are quantised while they are loaded, one of one layer at a time. `save_pretrained` writes codes and
    scales, and this into config.json: `from_pretrained(folder)` then loads the same bits, once moe_triton is imported.

    Args:
        format, group, symmetric: as in `QuantizedWeight.quantize`.
        modules_to_not_convert: names of experts modules that stay in the model's dtype, as transformers matches them.
        quant_method: "moe_triton".

    Raises ValueError for a format, a group or a quant_method that there is not.
    """

    def __init__(
        self,
        format: str = "mxfp4",
        *,
        group: int | None = None,
        symmetric: bool = True,
        modules_to_not_convert: list[str] | None = None,
        quant_method: str = KEY,
    ) -> None:
        check_format(format, group, symmetric)
        check_choice("quant_method", quant_method, (KEY,))
        self.format, self.group, self.symmetric = format, group, symmetric
        self.modules_to_not_convert, self.quant_method = modules_to_not_convert, quant_method

    def quantized(self, weight: Tensor, is_transposed: bool) -> QuantizedWeight:
        """Return a projection in this format."""
        return QuantizedWeight.quantize(
            weight, self.format, group=self.group, symmetric=self.symmetric, is_transposed=is_transposed
        )


@register_quantizer(KEY)
class MoeTritonHfQuantizer(HfQuantizer):
    """Load, save and train models whose experts are `QuantizedWeight`s.

    Trainer accepts such a model under adapters, and refuses it without any, as all of its parameters in few bits are
    frozen. `model.dequantize()` gives it parameters again.
    """

    quantization_config: MoeTritonConfig

    def attach(self, model: Any) -> None:
        """Become the quantizer of a model whose experts are quantised already."""
        given, own = model.config, copy.copy(model.config)  # other models may have been made from the same one
        for module in model.modules():
            if getattr(module, "config", None) is given:
                module.config = own
        model.is_quantized, model.quantization_method, model.hf_quantizer = True, KEY, self
        self.postprocess_model(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Switch the experts to ours; where codes are to be loaded, make room for them. The model is on "meta"."""
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError(
                f"distributed_config: got one with quantization_config {self.quantization_config.format!r}, wanted "
                "None: see moe_triton.swap(expert_parallel=) and moe_triton.quantize"
            )
        hf.register()
        found = list(self._experts(model))
        if not found:
            raise ValueError(f"model: got {type(model).__name__} without experts to quantise, wanted some")
        for name, module in found:
            if (reason := hf.obstacle(module)) is not None:
                raise ValueError(f"{name}: {reason}")
        others = len(found) < sum(map(_has_experts, model.modules()))  # which the switch must not affect
        for name, module in found:
            if not isinstance(module, Experts):
                use_ours(module, None if others else model)
            for part in hf.projection_names(module):
                codes = self._room(f"{name}.{part}", getattr(module, part), hf.is_transposed(module))
                if self.pre_quantized:
                    _put(module, part, codes)

    def _room(self, name: str, parameter: Tensor, is_transposed: bool) -> QuantizedWeight:
        """What a parameter will be, on "meta". Raises ValueError for sizes that the format does not take."""
        try:
            one = self.quantization_config.quantized(parameter[:1].to("meta"), is_transposed)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return one.resized(len(parameter))

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        owner, _, part = param_name.rpartition(".")
        module = model.get_submodule(owner)
        return (
            _has_experts(module)
            and part in hf.projection_names(module)
            and should_convert_module(owner, self.quantization_config.modules_to_not_convert)
        )

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        if param.is_floating_point() and param.dim() == 3 and self.param_needs_quantization(model, param_name):
            return FORMATS[self.quantization_config.format].bits / 8
        return super().param_element_size(model, param_name, param)

    def get_quantize_ops(self) -> ConversionOps:
        return Quantize(self.quantization_config)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        """Check that all projections are there, and let their codes be saved under the names that the model has."""
        for name, module in self._experts(model):
            for part in hf.projection_names(module):
                if not _is_loaded(getattr(module, part), self.pre_quantized):
                    raise ValueError(f"{name}.{part}: missing in the checkpoint, wanted all projections of the experts")
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is None:  # as `save_pretrained` takes them for a model that was not loaded
            from transformers.conversion_mapping import get_model_conversion_mapping

            found = get_model_conversion_mapping(model, add_legacy=False)
            conversions = [conversion for conversion in found if not isinstance(conversion, PrefixChange)]
        model._weight_conversions = [conversion for conversion in conversions if not _converts_experts(conversion)]

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for _, module in self._experts(model):
            for part in hf.projection_names(module):
                numbers = getattr(module, part).weight.dequantize(dtype or torch.bfloat16).contiguous()
                delattr(module, part)
                module.register_parameter(part, nn.Parameter(numbers))
        return model

    def _experts(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The experts modules that are quantised, by the names that they have without PEFT's wrappers."""
        for name, module in model.named_modules():
            bare = without_wrappers(name)
            if _has_experts(module) and should_convert_module(bare, self.quantization_config.modules_to_not_convert):
                yield bare, module


class Quantize(ConversionOps):
    """Put a projection that has just been loaded into its module, as codes."""

    def __init__(self, config: MoeTritonConfig) -> None:
        self.config = config

    def convert(
        self, input_dict: dict[str, Any], *, model: Any, full_layer_name: str, missing_keys: set[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        (given,) = input_dict.values()
        owner, _, part = full_layer_name.rpartition(".")
        module = model.get_submodule(owner)
        weight = given[0] if isinstance(given, list) else given
        _put(module, part, self.config.quantized(weight, hf.is_transposed(module)))
        missing_keys.discard(full_layer_name)
        return {}


def without_wrappers(name: str) -> str:
    """Return a module's name as it is without PEFT's wrappers around it."""
    return name.replace(".base_layer", "")


def _has_experts(module: nn.Module) -> bool:
    return isinstance(module, Experts) or registry(module) is not None


def _put(module: nn.Module, part: str, weight: QuantizedWeight) -> None:
    quantize_projection(module, part, weight)
    getattr(module, part)._is_hf_initialized = True  # transformers would fill it with random numbers


def _is_loaded(projection: Any, from_codes: bool) -> bool:
    """Whether a projection has codes, and, where these come from files, whether transformers has put them there."""
    if not isinstance(projection, QuantizedProjection):
        return False
    return not from_codes or all(getattr(part, "_is_hf_initialized", False) for part in projection.buffers())


def _converts_experts(conversion: Any) -> bool:
    """Whether a conversion joins the hub's matrices to a projection: their codes are saved as they lie."""
    parts = {target.rpartition(".")[2] for target in conversion._original_target_patterns}
    return isinstance(conversion, WeightConverter) and not parts.isdisjoint(("gate_up_proj", "up_proj", "down_proj"))
