"""The heuristic behind the tables of configurations: tiles for an operation, its sizes and an architecture.

The tiles follow from arithmetic on registers, shared memory and latencies; none was chosen by a measurement.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from moe_triton_kernels.arithmetic import next_power_of_2
from moe_triton_kernels.compiler import triton_version
from moe_triton_kernels.launch import BLACKWELL, HOPPER, Config, shared_limit

DECODED = ("up_gated", "up", "down")  # the kernels of a forward pass
SHORT_K = {"down": 256, "d_hidden_gated": 768, "d_hidden": 768}  # up to which `two_programs` are ahead
BUCKETS = (16, 32, 64, 128)  # rows per expert: up to 16, up to 32, up to 64, more; also the rows of a tile

# format -> instructions that decode a number in the main loop, by what they compile to for Hopper
DECODING = {"mxfp4": 5, "nvfp4": 7, "fp8": 8, "int8": 7, "int4": 6}


def fit(block: int, size: int) -> int:
    """The block, no wider than the size needs (a power of two, 16 at least, as the matrix unit wants)."""
    return min(block, max(16, next_power_of_2(size)))


@lru_cache(maxsize=1024)
def heuristic(op: str, d: int, n: int, itemsize: int, architecture: str, bucket: int) -> Config:
    """Tiles as large as the accumulator registers allow without a spill; shorter ones where experts have few rows.

    Of an item of one byte: those of products of codes (see `fp8`).
    """
    if itemsize == 1:
        return fp8_tile(op, architecture, bucket)
    if architecture == "interpreter":
        return Config(block_m=16, block_n=16, block_k=16, num_warps=4, num_stages=1, group=2)
    width, contraction = (d, n) if op in ("down", "d_rows") else (n, d)
    if op == "d_weight":
        config = d_weight_tile(itemsize, architecture)
        config = replace(config, block_m=fit(config.block_m, min(d, n)), block_n=fit(config.block_n, max(d, n)))
    else:
        if itemsize == 4:
            config = fp32_tile(op, bucket)
        elif bucket == BUCKETS[-1] and architecture in HOPPER and contraction <= SHORT_K.get(op, 0):
            config = two_programs(op)[0]
        elif bucket == BUCKETS[-1]:
            config = large_tile(op, architecture)
        elif bucket == BUCKETS[0] and op in DECODED:
            config = decode_tile(op, contraction, architecture)
        else:
            config = small_tile(op, bucket)
        block_n = fit(config.block_n, width)
        parts = min(config.parts, block_n // 16)
        # d_hidden's loop over 32 rows is shorter with pointers (73 instructions and 88); no other loop is
        shorter = op not in ("d_hidden", "d_hidden_gated") or config.block_m != 32
        descriptors = itemsize == 2 and architecture in HOPPER + BLACKWELL and shorter
        block_k = fit(config.block_k, contraction)
        config = replace(config, block_n=block_n, block_k=block_k, parts=parts, descriptors=descriptors)
    columns = config.block_n * (2 if op == "up_gated" else 1)
    return fit_shared_memory(config, (config.block_m + columns) * config.block_k * itemsize, architecture)


def fit_shared_memory(config: Config, stage_bytes: int, architecture: str) -> Config:
    """As many stages, and resident programs, as the device's shared memory holds; AMD's pipelines have two stages."""
    if architecture.startswith("gfx"):
        return replace(config, num_stages=2)
    spare = 1024  # for barriers, and of every program for the system: a multiprocessor has that much beside the limit
    limit = shared_limit(architecture)
    # mma.sync multiplies registers: the stage that it has read is free for the next copy; wgmma reads the stage itself
    read = 0 if architecture in HOPPER + BLACKWELL and config.block_m >= 64 and config.num_stages > 1 else 1
    stages = max(1, min(config.num_stages, (limit - spare) // stage_bytes + read))
    programs = max(1, min(config.programs_per_sm, (limit + spare) // ((stages - read) * stage_bytes + spare)))
    return replace(config, num_stages=stages, programs_per_sm=programs)


def two_programs(op: str) -> list[Config]:
    """For Hopper: tiles of 128 rows of which two programs are resident, so that one multiplies while the other stores.

    They read a third more (d_hidden: half as much again) through the L2 cache than those of `large_tile`, which costs
    more than it saves where the contraction is long. On paper they are ahead in `down` up to 256 and in d_hidden up to
    768 even if that cache delivers no more than 6 TB/s; elsewhere it depends on that figure, and only `tune` tries
    them.
    """
    block_n = 64 if op in ("up_gated", "d_hidden", "d_hidden_gated") else 128
    config = Config(
        block_m=128, block_n=block_n, block_k=64, num_warps=4, num_stages=3, parts=4, programs_per_sm=2,
        descriptors=True,
    )  # fmt: skip
    narrow = replace(config, num_warps=8, maxnreg=128)
    if op in ("d_hidden", "d_hidden_gated"):
        return [replace(narrow, num_stages=4)]
    if op == "d_weight":
        return [replace(narrow, parts=1), replace(config, parts=1)]
    if op in ("down", "d_rows"):
        return [replace(config, parts=2), replace(narrow, parts=2)]
    return [config, narrow]


def fp32_tile(op: str, bucket: int) -> Config:
    """No matrix unit multiplies in full fp32: the tile is as large as one multiply-add per element keeps busy."""
    block_m = min(bucket, 64)
    block_n = 32 if op == "up_gated" else 64
    return Config(block_m=block_m, block_n=block_n, block_k=32, num_warps=block_m // 8, num_stages=2, parts=4)


def large_tile(op: str, architecture: str) -> Config:
    wide = architecture in HOPPER + BLACKWELL
    block_n = 256 if wide else 128
    if op == "up_gated":
        block_n //= 2
    elif op in ("d_hidden_gated", "d_hidden"):
        block_n = 128
    parts = 2 if op in ("down", "d_rows") else 4
    # Of N stages N - 1 are on the way, for at least N - 2 steps. Hopper multiplies 128x256x64 in 0.6 us, 128x128x64 in
    # half of that, and memory answers in about 0.8 us: 2 steps cover it, or 3 of the short ones.
    stages = (5 if block_n == 128 and op != "up_gated" else 4) if wide else 3
    return Config(block_m=128, block_n=block_n, block_k=64, num_warps=8, num_stages=stages, parts=parts)


def fp8_tile(op: str, architecture: str, bucket: int) -> Config:
    """For products of codes: 128 of the contraction a step, and a tile's columns within two blocks of scales.

    A partial sum has as many registers as the accumulator, which so is half as large as that of other products. The
    tile of up holds whole groups of its activation, and that of d_hidden, which makes codes, whole groups of rows as
    well. wgmma takes 64 rows at least; of two programs with so many, one multiplies while the other
    adds its partial sum.
    """
    if architecture == "interpreter":
        config = Config(block_m=32, block_n=128, block_k=128, num_warps=4, num_stages=1, group=2)
        return replace(config, block_m=128, parts=2) if op.startswith("d_hidden") else config
    whole = op == "d_weight" or op.startswith("d_hidden")
    short = op == "up_gated" or (not whole and bucket < BUCKETS[-1])
    hidden = 8 if triton_version() >= (3, 9) else 4  # with 4, its assembler for Hopper spills
    parts = {"down": 2, "d_rows": 2, "d_hidden": hidden, "d_hidden_gated": hidden}.get(op, 1)
    config = Config(
        block_m=64 if short else 128, block_n=128, block_k=128, num_warps=8, num_stages=6, parts=parts,
        descriptors=architecture in HOPPER + BLACKWELL,
    )  # fmt: skip
    if short and op != "up_gated":
        config = replace(config, num_warps=4, num_stages=4, programs_per_sm=2)
    columns = config.block_n * (2 if op == "up_gated" else 1)
    return fit_shared_memory(config, (config.block_m + columns) * config.block_k, architecture)


def hidden_beside_adapter(config: Config) -> Config:
    """The configuration of d_hidden by codes, where an adapter's steps follow them: with fewer parts it spills."""
    return replace(config, parts=8)


def small_tile(op: str, bucket: int) -> Config:
    warps = 8 if op in ("d_hidden_gated", "d_hidden") else 4  # its epilogue needs many registers
    block_n = 64 if op == "up_gated" else 128
    return Config(
        block_m=bucket, block_n=block_n, block_k=64, num_warps=warps, num_stages=4, parts=4, programs_per_sm=2
    )


def decode_tile(op: str, contraction: int, architecture: str) -> Config:
    """With a few rows per expert the time is that of reading each touched expert's weights once: a tile made for it.

    A GPU delivers its bandwidth to those who have about 4 MB on the way (4.3 TB/s times 0.9 us, both of an H200). One
    token touches K experts only; with 64 columns a tile, half as many as for more rows, their tiles still ask for that
    much in every layer of tools.models that has K > 1. Splitting the contraction would cost partial sums and a launch.
    """
    block_k, num_stages = (128, 4) if contraction % 128 == 0 else (64, 6)  # long runs, but no masked steps
    return Config(
        block_m=BUCKETS[0],
        block_n=32 if op == "up_gated" else 64,
        block_k=block_k,
        num_warps=4,
        num_stages=num_stages,
        programs_per_sm=3 if architecture in HOPPER + BLACKWELL else 2,
    )


def narrow_tile(size_k: int, rank: int, itemsize: int, architecture: str, bucket: int) -> Config:
    """Of `narrow`, whose time is that of reading the rows: all columns in one tile, and 100 KB of rows on the way."""
    if architecture == "interpreter":
        return Config(block_m=16, block_n=rank, block_k=16, num_warps=4, num_stages=1, group=2)
    if itemsize == 4:
        return Config(block_m=min(bucket, 64), block_n=rank, block_k=fit(32, size_k), num_warps=4, num_stages=2)
    stages = 2 if architecture.startswith("gfx") else 4
    return Config(
        block_m=bucket, block_n=rank, block_k=fit(64, size_k), num_warps=4, num_stages=stages, programs_per_sm=2
    )


def adapter_tile(size_i: int, size_j: int, itemsize: int, architecture: str) -> Config:
    """Of `d_weight` where one of the sizes is a rank: small tiles, of which a multiprocessor holds several."""
    if architecture == "interpreter":
        return Config(block_m=16, block_n=16, block_k=16, num_warps=4, num_stages=1, group=2)
    wide, rows, stages = (64, 32, 2) if itemsize == 4 else (128, 64, 4)
    if architecture.startswith("gfx"):
        rows, stages = 32, 2
    blocks = [fit(64 if size == min(size_i, size_j) else wide, size) for size in (size_i, size_j)]
    return Config(block_m=blocks[0], block_n=blocks[1], block_k=rows, num_warps=4, num_stages=stages, programs_per_sm=2)


def decodes_in_loop(
    format: str, rows_per_expert: float, itemsize: int, *, block: int = 1, half: int | None = None
) -> bool:
    """Whether a product by quantised matrices decodes them in its main loop, rather than into memory beforehand.

    In the loop every tile of 128 rows decodes its expert's numbers again, DECODING[format] instructions each. Of these
    an H200 issues 132 multiprocessors * 4 warps * 32 lanes * 1.755 GHz = 29.7e12 a second, here taken as seven tenths
    of it. Beforehand, a number of `itemsize` bytes is written and read once more, at 4.3 TB/s; the codes are read
    either way. For bf16 that is 0.93 ps, and 0.24 ps for mxfp4 in the loop: up to 3 tiles, or 384 rows, in the loop.

    block: columns that share a scale. half: columns of gate, where gate and up are the halves of a matrix: a block that
    reaches from one into the other is not decoded in the loop.
    """
    in_loop = max(1, -(-rows_per_expert // 128)) * DECODING[format] / (0.7 * 29.7e12)
    beforehand = 2 * itemsize / 4.3e12
    return in_loop <= beforehand and (half is None or half % block == 0)


def over_codes(op: str, config: Config) -> Config:
    """The configuration of the same product by codes: decoding takes registers, so a thread has fewer columns."""
    if config.block_m == 32 and config.num_warps == 4:
        return replace(config, num_warps=8)
    is_wide = config.block_n * (2 if op == "up_gated" else 1) == 256
    return replace(config, block_n=config.block_n // 2) if is_wide else config


def d_weight_tile(itemsize: int, architecture: str) -> Config:
    if itemsize == 4:
        return Config(block_m=64, block_n=64, block_k=32, num_warps=8, num_stages=2)
    if architecture in HOPPER + BLACKWELL:  # the load of the row index takes one stage more than the products need
        return Config(
            block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=4, descriptors=architecture in HOPPER
        )
    return Config(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=4)
