"""The formats of quantised projections: how codes and scales become numbers, and numbers codes and scales.

A projection [E, out, in] is cut into blocks of `rows` x `group` numbers that share one scale:

    number = value(code) * scale           (times the global scale of the expert in nvfp4)
    number = (code - zero point) * scale   (int4, int8)

Codes of four bits lie two in a byte along `in`, the even column in the low half. Sources: OCP Microscaling Formats (MX)
v1.0 for mxfp4; NVIDIA ModelOpt and compressed-tensors for nvfp4; DeepSeek-V3 (arXiv 2412.19437) for fp8 in blocks of
128 x 128; GPTQ and AWQ for int4 and int8.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from moe_triton.checks import check_choice

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the lower three bits of a code; the fourth is the sign
E2M1_MAX, E4M3_MAX = 6.0, 448.0
E8M0_BIAS, E8M0_NAN = 127, 255
INT_GROUPS = (32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Format:
    """What a format's codes and scales are.

    bits    of a code
    rows    of a block
    groups  columns of a block: what is allowed, first the default
    codes   dtype of the tensor of codes
    scales  dtypes that its scales may have
    """

    name: str
    bits: int
    rows: int
    groups: tuple[int, ...]
    codes: torch.dtype
    scales: tuple[torch.dtype, ...]

    @property
    def codes_per_element(self) -> int:
        """How many codes one element of the tensor of codes holds."""
        return 8 // self.bits

    @property
    def is_integer(self) -> bool:
        return self.name.startswith("int")

    @property
    def zero_point(self) -> int:
        """The code of zero in a symmetric integer format."""
        return 1 << (self.bits - 1)


FLOAT_SCALES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = {
    found.name: found
    for found in (
        Format(name="mxfp4", bits=4, rows=1, groups=(32,), codes=torch.uint8, scales=(torch.uint8,)),
        Format(name="nvfp4", bits=4, rows=1, groups=(16,), codes=torch.uint8, scales=(torch.float8_e4m3fn,)),
        Format(name="fp8", bits=8, rows=128, groups=(128,), codes=torch.float8_e4m3fn, scales=(torch.float32,)),
        Format(name="int8", bits=8, rows=1, groups=(128, 64, 32), codes=torch.uint8, scales=FLOAT_SCALES),
        Format(name="int4", bits=4, rows=1, groups=(32, 64, 128), codes=torch.uint8, scales=FLOAT_SCALES),
    )
}


def check_format(format: str, group: int | None, symmetric: bool) -> None:
    """Raise ValueError for a format, a group or a symmetry that there is not."""
    check_choice("format", format, tuple(FORMATS))
    kind = FORMATS[format]
    if group is not None and group not in kind.groups:
        raise ValueError(f"group: got {group} for {format}, wanted {' or '.join(map(str, sorted(kind.groups)))}")
    if not (symmetric or kind.is_integer):
        raise ValueError(f"symmetric: got False for {format}, wanted True")


def unpack(codes: Tensor) -> Tensor:
    """Return the codes of four bits [..., in] that lie in bytes [..., in/2]."""
    return torch.stack([codes & 0xF, codes >> 4], -1).flatten(-2)


def pack(codes: Tensor) -> Tensor:
    """Return bytes [..., in/2] with codes of four bits [..., in], uint8 each."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


@cache
def quads(format_name: str, device: torch.device) -> Tensor:
    """Return the numbers of every two bytes of codes of four bits, before scaling: [65536] int64, four bf16 in each."""
    values = torch.arange(16.0) if format_name == "int4" else torch.tensor([*E2M1, *(-value for value in E2M1)])
    words = torch.arange(1 << 16, dtype=torch.int32)
    codes = torch.stack([words >> shift & 0xF for shift in range(0, 16, 4)], -1)
    return values[codes].bfloat16().view(torch.int64).flatten().to(device)


def values_of(codes: Tensor, kind: Format) -> Tensor:
    """Return the numbers that codes stand for before zero point and scale, [..., in] bf16: all of them are exact.

    Codes of four bits are looked up four at a time, which on CPUs is twice as fast as one by one.
    """
    if kind.bits == 8:
        return codes.to(torch.bfloat16)
    words = codes.contiguous().view(torch.uint16)
    found = quads(kind.name, codes.device).index_select(0, words.flatten().int())
    return found.view(torch.bfloat16).view(*codes.shape[:-1], -1)


@cache
def powers(device: torch.device) -> Tensor:
    """Return the numbers of all E8M0 bytes, [256] fp32."""
    exact = torch.ldexp(torch.ones(256), torch.arange(256) - E8M0_BIAS)
    exact[E8M0_NAN] = float("nan")
    return exact.to(device)


def scales_of(scales: Tensor) -> Tensor:
    """Return scales in fp32, exactly; bytes are E8M0: 2^(byte - 127), and NaN for 255."""
    if scales.dtype != torch.uint8:
        return scales.float()
    return powers(scales.device).index_select(0, scales.flatten().int()).view(scales.shape)


def nearest_e2m1(values: Tensor) -> Tensor:
    """Return the codes [..., in] uint8 of the nearest E2M1 numbers: ties go to the even code, 6 is the largest.

    A NaN becomes 0: its block's scale is what carries it.
    """
    magnitude = values.abs()
    codes = torch.zeros_like(magnitude, dtype=torch.uint8)
    for lower, (below, above) in enumerate(pairwise(E2M1)):
        middle = (below + above) / 2
        codes += magnitude >= middle if lower % 2 else magnitude > middle  # an odd code leaves the tie to the next
    return codes | values.signbit().to(torch.uint8) << 3


def e8m0_of(largest: Tensor) -> Tensor:
    """Return the E8M0 scales of blocks by their largest magnitude: 2^(floor(log2(largest)) - 2), as OCP MX v1.0 does.

    2 is the exponent of 6, E2M1's largest number; what lies above 6 after scaling saturates. A block with a NaN or an
    infinity gets the scale NaN, a block of zeros 2^-127.
    """
    exponent = torch.frexp(largest)[1] - 1  # largest = m 2^exponent with m in [1, 2)
    return _e8m0(exponent - 2, largest)


def e8m0_above(largest: Tensor) -> Tensor:
    """Return the E8M0 scales of blocks of e4m3: the smallest power of two by which nothing is larger than 448.

    OCP MX v1.0 leaves the choice open; so no number saturates, on which training depends (arXiv 2506.08027). What is
    not finite, and zeros, as in `e8m0_of`.
    """
    mantissa, exponent = torch.frexp(largest)  # the mantissa is in [0.5, 1), and 448 is 0.875 * 2^9
    return _e8m0(exponent - 9 + (mantissa > 0.875), largest)


def _e8m0(exponent: Tensor, largest: Tensor) -> Tensor:
    biased = (exponent + E8M0_BIAS).clamp(0, E8M0_NAN - 1)
    biased = torch.where(largest > 0, biased, 0)
    return torch.where(largest.isfinite(), biased, E8M0_NAN).to(torch.uint8)
