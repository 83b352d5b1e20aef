"""Configurations: deterministic, keyed on sizes known without asking the device, within the kernels' limits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton

from moe_triton_kernels import configs, launch
from moe_triton_kernels.configs import OPS, bucket_of, choose_config
from moe_triton_kernels.heuristics import BUCKETS
from moe_triton_kernels.launch import Config
from moe_triton_kernels.tiles import BLOCK_SIZES
from moe_triton_kernels.tools.shipped import shipped_configs

ARCHITECTURES = (
    "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx950", "interpreter"
)  # fmt: skip
LARGE = {"d": 4096, "n": 2048, "dtype": torch.bfloat16, "num_rows": 65536, "num_experts": 8, "architecture": "sm_90"}


def power_of_two(x: int) -> bool:
    return x > 0 and x & (x - 1) == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("op", OPS)
def test_every_size_gets_legal_blocks(op: str, architecture: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for d, n in ((1, 1), (24, 20), (768, 256), (2880, 2880), (7168, 2048)):
            for rows in (0, 1, 16, 17, 64, 65, 100_000):
                config = choose_config(
                    op, d=d, n=n, dtype=dtype, num_rows=rows, num_experts=1, architecture=architecture
                )
                blocks = (config.block_m, config.block_n, config.block_k)
                assert all(power_of_two(block) and block >= 16 for block in blocks)
                assert config.parts in (1, 2, 4)
                assert config.block_n // config.parts >= 16
                assert config.num_warps in (1, 2, 4, 8)
                if op != "d_weight":
                    assert config.block_m in BLOCK_SIZES  # there is a tile table for it


def test_only_the_bucket_of_rows_per_expert_counts() -> None:
    assert [bucket_of(rows) for rows in (0, 16, 16.5, 32, 64, 64.1, 10**9)] == [16, 16, 32, 32, 64, 128, 128]
    for op in OPS:
        large = [choose_config(op, **{**LARGE, "num_rows": 8 * rows}) for rows in (65, 100, 777, 10**6)]
        assert len(set(large)) == 1
    assert choose_config("up", **{**LARGE, "num_rows": 8}) != choose_config("up", **LARGE)


def test_a_shipped_entry_wins_over_the_heuristic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mine = {"block_m": 64, "block_n": 32, "block_k": 16, "num_warps": 2, "num_stages": 5, "group": 3}
    key = {"op": "down", "d": 4096, "n": 2048, "dtype": "bfloat16", "architecture": "sm_90", "bucket": 128}
    table = tmp_path / "configs.json"
    table.write_text(json.dumps([{**key, "config": mine}]))
    monkeypatch.setattr(configs, "TABLE", table)
    configs.shipped_table.cache_clear()
    try:
        assert choose_config("down", **LARGE) == Config(**mine)
        for other in ({"d": 2048}, {"n": 4096}, {"dtype": torch.float16}, {"architecture": "sm_80"}, {"num_rows": 8}):
            assert choose_config("down", **{**LARGE, **other}) != Config(**mine)
        assert choose_config("d_rows", **LARGE) != Config(**mine)
    finally:
        configs.shipped_table.cache_clear()


@pytest.mark.parametrize("num_tokens", [1, 4, 16, 64])
@pytest.mark.parametrize(
    ("d", "n", "num_experts", "top_k"),
    [
        (2048, 1024, 64, 8),
        (2048, 768, 128, 8),
        (4096, 1536, 128, 8),
        (4096, 14336, 8, 2),
        (7168, 2048, 256, 8),
        (2880, 2880, 32, 4),
    ],
)
def test_decoding_has_enough_bytes_on_the_way(d: int, n: int, num_experts: int, top_k: int, num_tokens: int) -> None:
    """4.3 TB/s times 0.9 us, even where all tokens choose the same experts; what waits fits into a processor."""
    for op, width in (("up_gated", n), ("up", n), ("down", d)):
        rows = num_tokens * top_k
        sizes = {"d": d, "n": n, "num_rows": rows, "num_experts": num_experts, "architecture": "sm_90"}
        config = choose_config(op, dtype=torch.bfloat16, **sizes)
        contraction = n if op == "down" else d
        assert config.block_m == 16
        assert contraction % config.block_k == 0
        programs = min(top_k * triton.cdiv(width, config.block_n), 132 * config.programs_per_sm)
        columns = config.block_n * (2 if op == "up_gated" else 1)
        ahead = min((config.num_stages - 1) * config.block_k, contraction)
        assert programs * ahead * columns * 2 > 4e6
        buffers = (config.num_stages - 1) * config.block_k * (columns + config.block_m) * 2
        assert (buffers + 1024) * config.programs_per_sm <= 228 * 1024


def test_the_shipped_table_is_well_formed() -> None:
    for op, d, n, dtype, architecture, bucket in configs.shipped_table():
        assert op in OPS
        assert bucket in BUCKETS
        assert isinstance(getattr(torch, dtype), torch.dtype)
        assert architecture.startswith(("sm_", "gfx"))
        assert d > 0
        assert n > 0


def test_shipped_configurations_are_listed_once_and_cover_every_op() -> None:
    for architecture in ARCHITECTURES[:-1]:
        entries = shipped_configs(architecture)
        assert len(set(entries)) == len(entries)
        assert {entry.op for entry in entries} == set(OPS)
        for op in OPS:
            first = next(entry for entry in entries if entry.op == op)
            assert first.dtype == "bf16"
            assert first.config == choose_config(op, **{**LARGE, "architecture": architecture})


def test_the_benchmarked_shapes_have_no_configuration_of_their_own() -> None:
    """What `offline` compiles and gates is all that the published model sizes (d, n) meet on a GPU."""
    sizes = [(768, n) for n in (256, 512, 1024)] + [(1536, n) for n in (256, 512, 1024)]
    sizes += [(4096, n) for n in (256, 512, 1024, 1536, 2048, 4096, 8192, 14336)]
    sizes += [(2048, 768), (2048, 1024), (7168, 2048), (2880, 2880)]
    for architecture in ARCHITECTURES[:-1]:
        shipped = {(entry.op, entry.config) for entry in shipped_configs(architecture) if entry.dtype == "bf16"}
        for op in OPS:
            for rows in BUCKETS:
                for d, n in sizes:
                    given = {"d": d, "n": n, "dtype": torch.bfloat16, "num_experts": 1, "num_rows": rows}
                    assert (op, choose_config(op, **given, architecture=architecture)) in shipped


def test_an_unknown_op_and_a_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="op: got 'sideways', wanted one of up_gated"):
        choose_config("sideways", **LARGE)
    monkeypatch.setattr(launch.triton.knobs.runtime, "interpret", False)
    launch.target_of.cache_clear()
    with pytest.raises(ValueError, match="device: got cpu, wanted a GPU, or TRITON_INTERPRET=1"):
        launch.target_of(torch.device("cpu"))
    launch.target_of.cache_clear()


@pytest.mark.parametrize(
    ("version", "fenced"), [("3.6.0", False), ("3.7.0", False), ("3.7.1+git1", True), ("3.9.0", True)]
)
def test_the_proxy_fence_follows_the_version(monkeypatch: pytest.MonkeyPatch, version: str, fenced: bool) -> None:
    """Where Triton does not fence: by hand on Hopper, no pipelining on Blackwell, nothing to do elsewhere."""
    monkeypatch.setattr(launch.triton, "__version__", version)
    config = choose_config("down", **LARGE)
    for architecture in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert (architecture == "sm_90" and not fenced) == launch.tile_of(architecture, config).FENCE
        assert not launch.tile_of(architecture, replace(config, block_m=32)).FENCE  # mma.sync needs none
        stages = launch.pipeline_stages(architecture, config)
        assert stages == (1 if architecture == "sm_100" and not fenced else config.num_stages)


def test_the_persistent_grid_is_bounded_by_tiles_and_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    config = choose_config("down", **{**LARGE, "num_rows": 8})
    assert config.programs_per_sm == 3
    monkeypatch.setattr(launch, "target_of", lambda device: launch.Target(architecture="sm_90", num_sms=132))
    device = torch.device("cuda")
    assert [launch.persistent_grid(device, tiles, config) for tiles in (0, 1, 396, 397)] == [
        (1,),
        (1,),
        (396,),
        (396,),
    ]
