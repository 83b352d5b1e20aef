"""`QuantizedWeight`: one projection of all experts in few bits, frozen, accepted wherever a projection is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_triton.checks import FLOATS, check_choice, check_tensor
from moe_triton.quantization import formats, fp8
from moe_triton.quantization.formats import E2M1_MAX, E4M3_MAX, FORMATS, Format

PARTS = ("codes", "scales", "zeros", "global_scale")


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """One projection of E experts, [E, out, in], in one of the formats of `moe_triton.quantization.formats`.

    format        "mxfp4", "nvfp4", "fp8", "int4" or "int8"
    codes         [E, out, in] float8_e4m3fn (fp8) or uint8 (int8); [E, out, in/2] uint8 in formats of four bits
    scales        [E, out, in/group]; [E, ceil(out/128), ceil(in/128)] for fp8
    zeros         [E, out, in/group] uint8, zero points of integer formats; None where they are symmetric
    global_scale  [E] fp32 for nvfp4, multiplies; else None
    is_transposed as a projection it counts as [E, in, out], though its codes lie as above

    It is never trained: it has no gradient, and nothing of its size in a wider dtype is kept by the operations that
    take it. Raises ValueError or TypeError where the parts do not fit together.
    """

    format: str
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    global_scale: Tensor | None = None
    is_transposed: bool = False

    def __post_init__(self) -> None:
        check_choice("format", self.format, tuple(FORMATS))
        found = self.kind
        check_tensor("codes", self.codes, shape=("E", "out", "in"), dtypes=(found.codes,))
        device = self.codes.device
        num_experts, rows, columns = self._stored_shape
        check_tensor("scales", self.scales, shape=(num_experts, "out", "in"), dtypes=found.scales, device=device)
        wanted_rows = -(-rows // found.rows)
        if self.scales.shape[1] != wanted_rows or not self._groups:
            raise ValueError(
                f"scales: got shape {list(self.scales.shape)}, wanted one for every {found.rows} x "
                f"{' or '.join(map(str, found.groups))} numbers of [{num_experts}, {rows}, {columns}]"
            )
        if self.zeros is not None:
            if not found.is_integer:
                raise ValueError(f"zeros: got a tensor for {self.format}, wanted None")
            check_tensor("zeros", self.zeros, shape=tuple(self.scales.shape), dtypes=(torch.uint8,), device=device)
        if (self.global_scale is not None) != (self.format == "nvfp4"):
            wanted = "[E] fp32" if self.format == "nvfp4" else "None"
            raise ValueError(f"global_scale: wanted {wanted} for {self.format}")
        if self.global_scale is not None:
            check_tensor(
                "global_scale", self.global_scale, shape=(num_experts,), dtypes=(torch.float32,), device=device
            )

    @property
    def kind(self) -> Format:
        return FORMATS[self.format]

    @property
    def _stored_shape(self) -> tuple[int, int, int]:
        num_experts, rows, columns = self.codes.shape
        return num_experts, rows, columns * self.kind.codes_per_element

    @property
    def shape(self) -> torch.Size:
        """[E, out, in], or [E, in, out] where transposed: what the projection would have unquantised."""
        num_experts, rows, columns = self._stored_shape
        return torch.Size((num_experts, columns, rows) if self.is_transposed else (num_experts, rows, columns))

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self._groups[0]

    @property
    def _groups(self) -> list[int]:
        """The group that the shapes of codes and scales imply; none where they do not fit together."""
        columns, number, kind = self._stored_shape[2], self.scales.shape[2], self.kind
        whole = [group for group in kind.groups if kind.rows > 1 or columns % group == 0]
        return [group for group in whole if -(-columns // group) == number]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts().values())

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, experts: slice) -> QuantizedWeight:
        """Return the projection of some experts, as views."""
        if not isinstance(experts, slice):
            raise TypeError(f"experts: got {experts!r}, wanted a slice")
        return self._with(lambda part: part[experts])

    @property
    def mT(self) -> QuantizedWeight:
        """The transpose, over the same codes."""
        return replace(self, is_transposed=not self.is_transposed)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """Return the same on another device."""
        return self._with(lambda part: part.to(device))

    def resized(self, num_experts: int) -> QuantizedWeight:
        """Return an uninitialised weight of so many experts, of the same format and sizes."""
        return self._with(lambda part: part.new_empty((num_experts, *part.shape[1:])))

    def _with(self, change: Callable[[Tensor], Tensor]) -> QuantizedWeight:
        changed: dict[str, Any] = {name: change(part) for name, part in self.parts().items()}
        return replace(self, **changed)

    def parts(self) -> dict[str, Tensor]:
        """Return the tensors that there are, by field."""
        found = {name: getattr(self, name) for name in PARTS}
        return {name: part for name, part in found.items() if part is not None}

    def dequantize(
        self,
        dtype: torch.dtype = torch.bfloat16,
        *,
        expert: int | None = None,
        rows: slice = slice(None),
        columns: slice = slice(None),
    ) -> Tensor:
        """Return the numbers in `dtype`, computed in fp32: `shape`, or two-dimensional for one expert.

        rows, columns: of the last two dimensions of `shape`, slices that begin at the edge of a block.
        """
        picked = slice(None) if expert is None else slice(expert, expert + 1)
        if self.is_transposed:
            rows, columns = columns, rows
        kind, (_, num_rows, num_columns) = self.kind, self._stored_shape
        row_codes, row_blocks = _parts(rows, num_rows, kind.rows, 1)
        column_codes, column_blocks = _parts(columns, num_columns, self.group, kind.codes_per_element)
        numbers = formats.values_of(self.codes[picked, row_codes, column_codes], kind)
        scales = formats.scales_of(self.scales[picked, row_blocks, column_blocks])
        if self.global_scale is not None:
            scales = scales * self.global_scale[picked, None, None]
        if kind.rows > 1:
            wide = scales.repeat_interleave(self.group, 2)[..., : numbers.shape[2]]
            numbers = numbers * wide.repeat_interleave(kind.rows, 1)[:, : numbers.shape[1]]
        else:
            blocks = numbers.unflatten(2, (-1, self.group))
            if self.zeros is not None:
                blocks = blocks.sub_(self.zeros[picked, row_blocks, column_blocks, None].to(blocks.dtype))
            elif kind.is_integer:
                blocks = blocks.sub_(kind.zero_point)
            # powers of two are exact in bf16, so that nothing wider is needed for bf16
            exact = kind.name == "mxfp4" and dtype == torch.bfloat16
            numbers = (blocks * scales[..., None].to(dtype if exact else torch.float32)).flatten(2)
        numbers = numbers.to(dtype) if expert is None else numbers[0].to(dtype)
        return numbers.mT if self.is_transposed else numbers

    @classmethod
    def from_mxfp4(cls, blocks: Tensor, scales: Tensor, *, is_transposed: bool = False) -> QuantizedWeight:
        """Take gpt-oss's layout: blocks uint8 [E, out, in/32, 16] (or [E, out, in/2]), scales uint8 [E, out, in/32]."""
        check_tensor("blocks", blocks, dtypes=(torch.uint8,))
        if blocks.dim() not in (3, 4) or (blocks.dim() == 4 and blocks.shape[3] != 16):
            raise ValueError(f"blocks: got shape {list(blocks.shape)}, wanted [E, out, in/32, 16] or [E, out, in/2]")
        codes = blocks.flatten(2) if blocks.dim() == 4 else blocks
        return cls(format="mxfp4", codes=codes, scales=scales, is_transposed=is_transposed)

    @classmethod
    def from_fp8_blocks(cls, weight: Tensor, scale_inv: Tensor, *, is_transposed: bool = False) -> QuantizedWeight:
        """Take DeepSeek-V3's layout: weight float8_e4m3fn [E, out, in], scale_inv fp32, one for each 128 x 128 block.

        The scales multiply. A merged gate and up projection is right where the gate's rows are a multiple of 128.
        """
        return cls(format="fp8", codes=weight, scales=scale_inv, is_transposed=is_transposed)

    @classmethod
    def from_nvfp4(
        cls, weight: Tensor, scales: Tensor, global_scale: Tensor, *, divides: bool = False, is_transposed: bool = False
    ) -> QuantizedWeight:
        """Take nvfp4: weight uint8 [E, out, in/2], scales float8_e4m3fn [E, out, in/16], global_scale [E] or [] fp32.

        divides: False for ModelOpt's weight_scale_2, which multiplies; True for compressed-tensors'
        weight_global_scale, which divides.
        """
        check_tensor("global_scale", global_scale, dtypes=(torch.float32,))
        factor = (global_scale.reciprocal() if divides else global_scale).reshape(-1).expand(len(weight)).contiguous()
        return cls(format="nvfp4", codes=weight, scales=scales, global_scale=factor, is_transposed=is_transposed)

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        format: str,
        *,
        group: int | None = None,
        symmetric: bool = True,
        is_transposed: bool = False,
    ) -> QuantizedWeight:
        """Quantise a projection by rounding to the nearest number, ties to the even code.

        Args:
            weight: [E, out, in] of a float dtype ([E, in, out] where is_transposed).
            format: "mxfp4" (scales as OCP MX v1.0: see `formats.e8m0_of`), "nvfp4" (global scale amax / 2688 of each
                expert, block scale amax / 6 of it in e4m3), "fp8" (scale amax / 448 of each 128 x 128 block), "int4" or
                "int8" (scale amax / 7 or / 127 of each group; with zero points (max - min) / 15 or / 255).
            group: columns that share a scale, for integer formats 32, 64 or 128. Default: 32 for int4, 128 for int8.
            symmetric: for integer formats; False stores a zero point for each group.

        Raises ValueError where `in` is no multiple of the group (fp8 takes any size), and for what a format has not.
        """
        formats.check_format(format, group, symmetric)
        check_tensor("weight", weight, shape=("E", "out", "in"), dtypes=FLOATS)
        kind = FORMATS[format]
        group = kind.groups[0] if group is None else group
        rows_first = weight.mT if is_transposed else weight
        if kind.rows == 1 and rows_first.shape[2] % group:
            raise ValueError(
                f"weight: got {rows_first.shape[2]} input columns for {format}, wanted a multiple of {group}"
            )
        one_by_one = [_quantize_one(expert.float(), kind, group, symmetric) for expert in rows_first.detach()]
        stacked = {name: torch.stack([parts[name] for parts in one_by_one]) for name in one_by_one[0]}
        return cls(format=format, is_transposed=is_transposed, **stacked)

    def to_tensors(self, name: str) -> dict[str, Tensor]:
        """Return plain tensors for a state dict or a safetensors file, under `name`.<format>.<part>."""
        transposed = ".transposed" if self.is_transposed else ""
        return {f"{name}.{self.format}{transposed}.{part}": tensor for part, tensor in self.parts().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], name: str) -> QuantizedWeight:
        """Return what `to_tensors` was given under this name. Raises ValueError where it is not there."""
        found: dict[tuple[str, bool], dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith(f"{name}."):
                format_, *transposed, part = key.removeprefix(f"{name}.").split(".")
                if format_ in FORMATS and part in PARTS and transposed in ([], ["transposed"]):
                    found.setdefault((format_, bool(transposed)), {})[part] = tensor
        if len(found) != 1:
            raise ValueError(f"tensors: got {len(found)} quantised weights named {name!r}, wanted one")
        (((format_, is_transposed), parts),) = found.items()
        return cls(format=format_, is_transposed=is_transposed, **parts)


def _parts(part: slice, size: int, block: int, per_element: int) -> tuple[slice, slice]:
    """A slice of a stored dimension, of its codes and of its blocks."""
    found = range(size)[part]
    if found.step != 1 or found.start % block:
        raise ValueError(f"rows, columns: got {part}, wanted a slice that begins at a multiple of {block}")
    codes = slice(found.start // per_element, -(-found.stop // per_element))
    return codes, slice(found.start // block, -(-found.stop // block))


def _quantize_one(weight: Tensor, kind: Format, group: int, symmetric: bool) -> dict[str, Tensor]:
    """The parts of one expert [out, in] fp32."""
    if kind.name == "fp8":
        return dict(zip(("codes", "scales"), fp8.quantize(weight, kind.rows, group), strict=True))
    blocks = weight.unflatten(1, (-1, group))  # [rows, groups, group]
    if kind.is_integer:
        return _quantize_integers(blocks, kind, symmetric)
    largest = blocks.abs().amax(2)
    if kind.name == "mxfp4":
        scales = formats.e8m0_of(largest)
        codes = formats.nearest_e2m1(blocks / formats.scales_of(scales)[..., None])
        return {"codes": formats.pack(codes.flatten(1)), "scales": scales}
    global_scale = _no_zeros(largest.amax() / (E2M1_MAX * E4M3_MAX))
    scales = (largest / E2M1_MAX / global_scale).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    codes = formats.nearest_e2m1(blocks / _no_zeros(scales.float() * global_scale)[..., None])
    return {"codes": formats.pack(codes.flatten(1)), "scales": scales, "global_scale": global_scale}


def _quantize_integers(blocks: Tensor, kind: Format, symmetric: bool) -> dict[str, Tensor]:
    """The parts of one expert from its blocks [out, groups, group]."""
    top = (1 << kind.bits) - 1
    if symmetric:
        scales = _no_zeros(blocks.abs().amax(2) / (kind.zero_point - 1))
        zeros = torch.full_like(scales, kind.zero_point)
    else:
        low, high = blocks.amin(2).clamp(max=0), blocks.amax(2).clamp(min=0)
        scales = _no_zeros((high - low) / top)
        zeros = (-low / scales).round().clamp(0, top)
    codes = ((blocks / scales[..., None]).round() + zeros[..., None]).clamp(0, top).to(torch.uint8).flatten(1)
    parts = {"codes": formats.pack(codes) if kind.bits == 4 else codes, "scales": scales}
    return parts if symmetric else {**parts, "zeros": zeros.to(torch.uint8)}


def _no_zeros(scales: Tensor) -> Tensor:
    """The scales, with 1 for blocks of zeros only."""
    return torch.where(scales == 0, 1.0, scales)
