"""GPTQ's and AWQ's layers, packed here as those two pack them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_triton.quantization.checkpoints import AWQ_ORDER, from_awq, from_gptq

E, IN, OUT, GROUP = 2, 128, 16, 64


def packed(codes: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Codes of `bits` along `dim`, an int32 for every 32 / bits of them; `order`: which one comes when."""
    codes = codes.movedim(dim, -1)
    per = 32 // bits
    groups = codes.reshape(*codes.shape[:-1], -1, per).long()
    word = sum(groups[..., (order or range(per))[slot]] << bits * slot for slot in range(per))
    word = torch.where(word >= 1 << 31, word - (1 << 32), word)
    return word.to(torch.int32).movedim(-1, dim)


def layers(bits: int) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Codes [in, out], zero points and scales [in / group, out], and the numbers [E, out, in]."""
    codes = [torch.randint(0, 1 << bits, (IN, OUT)) for _ in range(E)]
    zeros = [torch.randint(1, (1 << bits) - 1, (IN // GROUP, OUT)) for _ in range(E)]
    scales = [(torch.rand(IN // GROUP, OUT) + 0.5).half() for _ in range(E)]
    wide = [(c - z.repeat_interleave(GROUP, 0)) * s.float().repeat_interleave(GROUP, 0)
            for c, z, s in zip(codes, zeros, scales, strict=True)]  # fmt: skip
    return codes, zeros, scales, torch.stack(wide).mT


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq(bits: int, version: int) -> None:
    codes, zeros, scales, expected = layers(bits)
    qweight = [packed(c, bits, 0) for c in codes]
    qzeros = [packed(z - int(version == 1), bits, 1) for z in zeros]
    g_idx = [torch.arange(IN, dtype=torch.int32) // GROUP] * E
    weight = from_gptq(qweight, qzeros, scales, bits=bits, g_idx=g_idx, version=version)
    assert (weight.format, weight.group) == (f"int{bits}", GROUP)
    assert torch.equal(weight.dequantize(torch.float32), expected)
    with pytest.raises(ValueError, match=r"g_idx: got reordered rows for expert 1 \(desc_act=True\)"):
        from_gptq(qweight, qzeros, scales, bits=bits, g_idx=[g_idx[0], g_idx[0].flip(0)])


def test_awq() -> None:
    codes, zeros, scales, expected = layers(4)
    weight = from_awq([packed(c, 4, 1, AWQ_ORDER) for c in codes], [packed(z, 4, 1, AWQ_ORDER) for z in zeros], scales)
    assert torch.equal(weight.dequantize(torch.float32), expected)


def test_what_does_not_fit() -> None:
    codes, zeros, scales, _ = layers(4)
    qweight, qzeros = [packed(c, 4, 0) for c in codes], [packed(z, 4, 1) for z in zeros]
    with pytest.raises(ValueError, match="qweight: got 2 layers, 2 qzeros and 1 scales, wanted E of each"):
        from_gptq(qweight, qzeros, scales[:1])
    with pytest.raises(TypeError, match=r"qweight: got dtype torch.int64, wanted torch.int32"):
        from_gptq([c.long() for c in qweight], qzeros, scales)
    with pytest.raises(ValueError, match="version: got 3, wanted 1 or 2"):
        from_gptq(qweight, qzeros, scales, version=3)
    with pytest.raises(ValueError, match="bits: got '3'"):
        from_gptq(qweight, qzeros, scales, bits=3)
