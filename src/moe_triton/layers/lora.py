"""LoRA adapters as parameters of a layer's experts (arXiv 2106.09685)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moe_triton.checks import check_choice, check_int, check_number
from moe_triton.records import Lora
from moe_triton.reference import wide
from moe_triton.torch_internals import is_fsdp2_class

PROJECTIONS = ("gate_up", "down")


class TakesLora(nn.Module):
    """Experts that can have an adapter for each projection.

    Its parameters are `gate_up_lora_a` [E, r, d], `gate_up_lora_b` [E, 2n, r], `down_lora_a` [E, r, n] and
    `down_lora_b` [E, d, r], None without one: spread over ranks, saved and loaded as the projections are. While an
    adapter is merged, it is no part of the module, whose state dict is then that of one without adapters.

    `lent_lora` has further adapters, by the projection's parameter, that whoever calls the module sets for this call.
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __init__(self) -> None:
        super().__init__()
        self.lora_scaling = 1.0
        self.lent_lora: dict[str, Sequence[Lora]] = {}
        self._merged: dict[str, nn.Parameter] = {}
        self.adapted: tuple[str, ...] = ()  # the projections that have an adapter, merged or not
        for name in PROJECTIONS:
            self.register_parameter(f"{name}_lora_a", None)
            self.register_parameter(f"{name}_lora_b", None)

    def add_lora(
        self,
        r: int,
        alpha: float,
        *,
        rslora: bool = False,
        projections: Sequence[str] = PROJECTIONS,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Give every expert adapters, x (W + scaling * B A)^T, and freeze the projections and biases.

        A starts as an `nn.Linear` does, with the same values however the experts are spread, and B as zeros: so the
        layer computes what it did. Set `requires_grad` of the projections to train them too. Add adapters before
        DistributedDataParallel, FSDP2 and the optimizer see the parameters.

        Args:
            r: the rank, any number >= 1.
            alpha: the scaling is alpha / r.
            rslora: the scaling is alpha / sqrt(r) (arXiv 2312.03732).
            projections: "gate_up", "down" or both.
            dtype: of the adapters, None for the projections' (torch's default where these are quantised). torch.float32
                over narrower ones keeps small updates; the products cast the adapters in each forward.

        Raises:
            ValueError, TypeError: an argument out of range; experts that have adapters; experts that FSDP2 has sharded.
        """
        check_int("r", r, low=1)
        check_number("alpha", alpha)
        if not projections:
            raise ValueError("projections: got none, wanted gate_up, down or both")
        for name in projections:
            check_choice("projections", name, PROJECTIONS)
        if self._merged or any(self.lora(name) is not None for name in PROJECTIONS):
            raise ValueError("add_lora: got experts that have adapters, wanted experts without")
        self.refuse_shards("add_lora")
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(False)
        self.lora_scaling = alpha / (math.sqrt(r) if rslora else r)
        self.adapted = tuple(projections)
        for name in projections:
            like = getattr(self, f"{name}_proj")
            num_experts, size_out, size_in = like.shape
            own = like.dtype if isinstance(like, nn.Parameter) else torch.get_default_dtype()
            for key, shape in (("a", (r, size_in)), ("b", (size_out, r))):
                empty = torch.empty(num_experts, *shape, dtype=dtype or own, device=like.device)
                setattr(self, f"{name}_lora_{key}", nn.Parameter(empty))
        self.reset_lora()

    def reset_lora(self) -> None:
        """Draw A again from torch's generator and set B to zeros."""
        for name in PROJECTIONS:
            if (lora := self.lora(name)) is not None:
                size_in = self.whole_shape(f"{name}_proj")[1]
                self.draw(f"{name}_lora_a", (lora.a.shape[1], size_in), 1 / math.sqrt(size_in))
                nn.init.zeros_(lora.b)

    def lora(self, projection: str) -> Lora | None:
        """Return the adapter of "gate_up" or "down"; None where there is none or it is merged."""
        a = getattr(self, f"{projection}_lora_a")
        return None if a is None else Lora(a, getattr(self, f"{projection}_lora_b"), self.lora_scaling)

    def merge_lora(self) -> None:
        """Add scaling * B A to the projections, and take the adapters out until `unmerge_lora` puts them back.

        One expert after the other, in fp32 (fp64 for fp64), rounded to the projections' dtype: outputs are equal up to
        that rounding. The optimizer of merged adapters cannot be saved.

        Raises:
            ValueError: experts without adapters, or sharded by FSDP2.
        """
        self.refuse_shards("merge_lora")
        if any(not isinstance(getattr(self, f"{name}_proj"), nn.Parameter) for name in PROJECTIONS):
            raise ValueError("merge_lora: got quantised projections, wanted projections in a float dtype")
        if all(self.lora(name) is None for name in PROJECTIONS):
            what = "merged adapters" if self._merged else "experts without adapters"
            raise ValueError(f"merge_lora: got {what}, wanted adapters from add_lora")
        self._add_adapters(1)
        self._take_out()

    def unmerge_lora(self) -> None:
        """Undo `merge_lora`: up to the rounding of the projections' dtype they are what they were.

        Raises:
            ValueError: no adapters are merged.
        """
        if not self._merged:
            raise ValueError("unmerge_lora: got no merged adapters, wanted merge_lora before")
        self._put_back()
        self._add_adapters(-1)

    def _take_out(self) -> None:
        self._merged = {name: p for name, p in self.named_parameters(recurse=False) if "_lora_" in name}
        for name in self._merged:
            setattr(self, name, None)

    def _put_back(self) -> None:
        for name, parameter in self._merged.items():
            setattr(self, name, parameter)
        self._merged = {}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move and cast merged adapters with the module."""
        is_merged = bool(self._merged)
        self._put_back()
        super()._apply(fn, recurse)
        if is_merged:
            self._take_out()
        return self

    @torch.no_grad()
    def _add_adapters(self, sign: int) -> None:
        for name in PROJECTIONS:
            if (lora := self.lora(name)) is not None:
                projection = self.get_parameter(f"{name}_proj")
                dtype = wide(projection.dtype)
                for matrix, a, b in zip(projection, lora.a.to(dtype), lora.b.to(dtype), strict=True):
                    matrix.copy_(matrix.to(dtype) + sign * lora.scaling * (b @ a))

    @property
    def lora_is_merged(self) -> bool:
        return bool(self._merged)

    def refuse_shards(self, what: str) -> None:
        """Raise ValueError for experts that FSDP2 has sharded; `what` is the method that was called."""
        if is_fsdp2_class(type(self)):
            raise ValueError(f"{what}: got experts that FSDP2 has sharded, wanted them before apply_fsdp2")

    def whole_shape(self, name: str) -> tuple[int, int]:
        """Return the shape of one expert's whole parameter `name`, of which there may be a slice here."""
        raise NotImplementedError

    def draw(self, name: str, shape: tuple[int, ...], bound: float) -> None:
        """Draw the parameter `name` uniformly from -bound to bound; `shape` is that of one whole expert's."""
        raise NotImplementedError

    def lora_repr(self) -> str:
        """Return what `extra_repr` says of adapters: their ranks."""
        given: dict[str, Any] = {name: self.lora(name) for name in PROJECTIONS}
        ranks = ", ".join(f"{name} r={lora.a.shape[1]}" for name, lora in given.items() if lora is not None)
        return f", lora: {ranks}" if ranks else ", lora merged" if self._merged else ""
