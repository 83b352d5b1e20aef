"""What is known of a processor, from what systems say of theirs."""

from __future__ import annotations

import pytest
import torch

from moe_triton.backends.torch import processor
from moe_triton.backends.torch.processor import INSTRUCTION_SETS, Processor, this_processor


def test_this_processor() -> None:
    found = this_processor()
    assert found == this_processor.__wrapped__()  # the same at every call
    assert found.name
    assert set(found.instruction_sets) <= set(INSTRUCTION_SETS)
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        assert found.has("avx512")
    assert str(found).startswith(found.name)


CPUINFO = {
    "AMD": "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\n\nprocessor\t: 1\nvendor_id\t: other\n",
    "Intel": "vendor_id\t: GenuineIntel\nmodel name\t: Intel(R) Xeon(R) Processor @ 2.60GHz\n",
    "Arm": "processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU architecture: 8\n",
    "unknown": "vendor_id\t: Somebody\nmodel name\t: a processor\n",
}


@pytest.mark.parametrize("maker", CPUINFO)
def test_cpuinfo(maker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = processor._first_facts(CPUINFO[maker].splitlines())
    monkeypatch.setattr(processor.platform, "processor", lambda: "")
    assert processor._maker(facts, facts.get("model name", "")) == maker


@pytest.mark.parametrize(("line", "family"), [("cpu family\t: 25\n", 25), ("", None), ("cpu family\t: ?\n", None)])
def test_the_family(line: str, family: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_cpuinfo", lambda: processor._first_facts((CPUINFO["AMD"] + line).splitlines()))
    processor.this_processor.cache_clear()
    try:
        assert processor.this_processor().family == family
    finally:
        processor.this_processor.cache_clear()


@pytest.mark.parametrize(
    ("name", "described", "maker"),
    [
        ("Apple M3", "arm", "Apple"),
        ("", "Intel64 Family 6 Model 158 Stepping 10, GenuineIntel", "Intel"),
        ("", "AMD64 Family 25 Model 80 Stepping 0, AuthenticAMD", "AMD"),
        ("", "", "unknown"),
    ],
)
def test_without_cpuinfo(name: str, described: str, maker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor.platform, "processor", lambda: described)
    assert processor._maker({}, name) == maker


def test_bf16_products_need_their_instructions() -> None:
    """oneDNN says that it supports bf16 on the first one, where it converts to fp32."""
    assert not Processor("Intel", "Xeon", ("avx2", "avx512")).has_bf16_products
    assert Processor("Intel", "Xeon", ("avx2", "avx512", "avx512_bf16")).has_bf16_products
    assert Processor("Arm", "Neoverse", ("neon", "bf16")).has_bf16_products
