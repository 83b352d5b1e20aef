"""The user's table before the shipped one, and the neighbours of a configuration."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from moe_triton.kernel_stages import chosen_configs
from moe_triton_kernels import configs
from moe_triton_kernels.compiler import compiler_versions
from moe_triton_kernels.configs import KEYS, OPS, Config, choose_config, find_config, user_table_path
from moe_triton_kernels.gluon.schedules import OPS as GLUON_OPS
from moe_triton_kernels.gluon.schedules import SCHEDULES, available
from moe_triton_kernels.heuristics import over_codes
from moe_triton_kernels.tools.search import (
    LADDERS,
    SWITCH,
    candidate_case,
    is_sound,
    neighbours,
    seeds,
    warp_specialized,
)

SIZES = {"d": 2048, "n": 768, "dtype": torch.bfloat16, "num_rows": 128, "num_experts": 1, "architecture": "sm_90"}
MINE = Config(block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=5)


@pytest.fixture
def tables(monkeypatch):
    """Tables are read once: anew for each test, and after it."""
    configs.user_table.cache_clear()
    yield monkeypatch
    configs.user_table.cache_clear()


def write(path, **change):
    entry = {**dict(zip(KEYS, ("down", 2048, 768, "bfloat16", "sm_90", 128), strict=True)), "config": asdict(MINE)}
    path.write_text(json.dumps([{**entry, "measured": {"time_over_incumbent": 0.9}, **change}]))


def test_the_users_table_goes_first(tmp_path, tables):
    path = tmp_path / "mine.json"
    write(path)
    tables.setenv("MOE_TRITON_TABLE", str(path))
    assert find_config("down", **SIZES) == (MINE, "user table", {})
    assert choose_config("down", **SIZES) == MINE
    assert find_config("d_rows", **SIZES)[1] == "heuristic"
    assert find_config("down", **{**SIZES, "n": 512})[1] == "heuristic"
    assert find_config("down", **{**SIZES, "num_rows": 64})[1] == "heuristic"  # another bucket


def test_entries_for_codes_are_their_own(tmp_path, tables):
    path = tmp_path / "mine.json"
    write(path, dtype="bfloat16 mxfp4")
    tables.setenv("MOE_TRITON_TABLE", str(path))
    assert find_config("down", **SIZES, format="mxfp4") == (MINE, "user table", {})
    assert find_config("down", **SIZES)[1] == "heuristic"
    config, origin, _ = find_config("down", **SIZES, format="int4")
    assert (config, origin) == (over_codes("down", choose_config("down", **SIZES)), "heuristic")
    write(path)  # without codes: a configuration that codes change
    configs.user_table.cache_clear()
    assert find_config("down", **SIZES, format="mxfp4") == (over_codes("down", MINE), "user table", {})


def test_a_table_that_was_tuned_under_another_compiler(tmp_path, tables):
    path = tmp_path / "mine.json"
    tables.setenv("MOE_TRITON_TABLE", str(path))
    here = compiler_versions("sm_90")
    assert set(here) == {"triton", "ptxas"}
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in here.values())
    assert compiler_versions("gfx942") == {"triton": here["triton"], "ptxas": None}
    for versions, words in (
        (here, ""),
        ({"triton": here["triton"]}, ""),  # written by an older `tune`
        ({**here, "triton": "3.1.0"}, f"tuned under triton 3.1.0, here triton {here['triton']}"),
        ({**here, "ptxas": "12.0.1"}, f"tuned under ptxas 12.0.1, here ptxas {here['ptxas']}"),
    ):
        write(path, measured={"versions": {**versions, "torch": "2.11.0"}})
        configs.user_table.cache_clear()
        assert find_config("down", **SIZES).stale("sm_90") == words
        found = chosen_configs(**{**SIZES, "is_gated": True})
        (down,) = (entry["from"] for entry in found if entry["op"] == "down")
        assert down == ", ".join(filter(None, ("user table", words)))


def test_the_default_place(tmp_path, tables):
    tables.delenv("MOE_TRITON_TABLE", raising=False)
    tables.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = tmp_path / "moe_triton" / "configs.json"
    assert user_table_path() == path
    assert find_config("down", **SIZES)[1] == "heuristic"
    path.parent.mkdir()
    write(path)
    configs.user_table.cache_clear()
    assert find_config("down", **SIZES)[1] == "user table"
    tables.setenv("MOE_TRITON_TABLE", "")
    configs.user_table.cache_clear()
    assert user_table_path() is None
    assert find_config("down", **SIZES)[1] == "heuristic"


@pytest.mark.parametrize("text", ["{", "[1]", '[{"op": "down"}]', None])
def test_a_broken_or_missing_table_is_named(tmp_path, tables, text):
    path = tmp_path / "broken.json"
    if text is not None:
        path.write_text(text)
    tables.setenv("MOE_TRITON_TABLE", str(path))
    with pytest.raises(ValueError, match=r"table .*broken\.json"):
        choose_config("down", **SIZES)


@pytest.mark.parametrize("op", OPS)
def test_neighbours_are_one_step_away_and_sound(op):
    config = choose_config(op, **SIZES)
    found = list(neighbours(config, op, 2048, 768))
    assert len(found) == len(set(found)) >= 8
    for other in found:
        changed = [name for name in asdict(config) if getattr(config, name) != getattr(other, name)]
        assert len(changed) == 1
        assert is_sound(other, op, 2048, 768)
        (name,) = changed
        ladder = LADDERS.get(name, SWITCH)
        assert abs(ladder.index(getattr(other, name)) - ladder.index(getattr(config, name))) == 1


@pytest.mark.parametrize("op", OPS)
def test_a_schedule_has_neighbours_in_what_it_reads(op):
    config = replace(choose_config(op, **SIZES), gluon="ping_pong")
    for other in neighbours(config, op, 2048, 768):
        assert replace(other, group=config.group) == config
    found = warp_specialized(config, op, torch.bfloat16, "sm_90")
    assert [other.gluon for other in found] == (available() if op in GLUON_OPS else [])
    assert warp_specialized(config, op, torch.float32, "sm_90") == []
    assert warp_specialized(config, op, torch.bfloat16, "gfx942") == []
    for other in found:  # each has an offline case
        case = candidate_case(op, torch.bfloat16, other, "sm_90")
        assert (case.constants["PING_PONG"], case.num_ctas) == (
            SCHEDULES[other.gluon].ping_pong,
            SCHEDULES[other.gluon].ctas,
        )
        assert case.name.startswith(f"{op}_bf16_{SCHEDULES[other.gluon].block_m}x")


@pytest.mark.parametrize("op", OPS)
def test_seeds_are_more_than_a_step_away(op):
    """Two programs a processor: no climb reaches them, for each step towards them is slower or breaks a gate."""
    found = seeds(op, 2048, 768, "sm_90")
    assert found
    config = choose_config(op, **SIZES)
    for seed in found:
        assert seed.programs_per_sm == 2
        assert seed.num_stages * (seed.block_m + seed.block_n * (2 if op == "up_gated" else 1)) * 128 <= 113 * 1024
        assert sum(getattr(config, name) != getattr(seed, name) for name in asdict(config)) > 1
    assert seeds(op, 2048, 768, "sm_80") == []
    assert seeds(op, 16, 16, "sm_90") == []


def test_what_is_not_sound():
    assert not is_sound(replace(MINE, block_m=128, block_n=256, num_warps=4), "down", 2048, 768)  # would spill
    assert not is_sound(replace(MINE, block_n=64, parts=8), "down", 2048, 768)  # parts narrower than 16 columns
    assert not is_sound(replace(MINE, block_n=256, num_warps=8), "down", 64, 768)  # wider than the output
    assert is_sound(replace(MINE, block_n=64), "down", 64, 768)
    assert not is_sound(replace(MINE, block_m=128, block_n=128, num_warps=4, maxnreg=128), "down", 2048, 768)


def test_candidates_compile_with_no_gpu():
    program = """
import json, sys, torch
from dataclasses import asdict
from moe_triton_kernels.tools.search import main
sys.exit(main(["--arch", "sm_90"]))
"""
    good = {"op": "down", "dtype": "bfloat16", "format": None, "config": asdict(MINE)}
    large = {**good, "config": {**asdict(MINE), "block_k": 128, "num_stages": 6, "block_n": 256, "num_warps": 8}}
    broken = {**good, "config": {**asdict(MINE), "block_k": 24}}
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps([good, large, broken, {**good, "format": "mxfp4"}]),
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    first, second, third, codes = (json.loads(line) for line in done.stdout.splitlines())
    assert (first["broken"], first["error"]) == ([], "")
    assert first["report"]["wgmma"] > 0
    assert "shared_bytes" in second["broken"][0]
    assert third["report"] is None
    assert third["error"]
    assert (codes["broken"], codes["error"]) == ([], "")
    assert codes["report"]["wgmma"] > 0
    assert codes["report"] != first["report"]


def test_a_candidates_case_carries_its_configuration():
    case = candidate_case("up_gated", torch.float16, MINE, "sm_90")
    assert (case.constants["BLOCK_M"], case.constants["BLOCK_K"], case.num_warps) == (64, 32, 4)
    assert case.name.startswith("up_gated_bf16_64x64x32_")
    assert "wgmma" in case.wants
