"""Starting the mixture of experts from a dense model that `moe-triton train --compare-dense` has trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from moe_triton.distributed import load_checkpoint, load_experts_from
from moe_triton.integrations.upcycling import Upcycling, upcycled_state
from moe_triton.layers import FeedForward, MoE
from moe_triton.training.checkpoint import Checkpoint, one_line, read_checkpoint
from moe_triton.training.config import TrainConfig
from moe_triton.training.errors import TrainingError
from moe_triton.training.loop import run_files
from moe_triton.training.model import LanguageModel, dense_width

SHARED = ("num_layers", "hidden_size", "num_heads")  # sizes that both models have


def read_dense(folder: Path) -> Checkpoint:
    """Return the checkpoint of the dense model of a run. Raises TrainingError where there is none."""
    found = read_checkpoint(run_files(folder, "dense").checkpoint)
    if found is None:
        raise TrainingError(f"--from-dense: {folder} holds no dense model; train one there with --compare-dense")
    return found


def sizes_from_dense(options: Mapping[str, Any], dense: Checkpoint) -> dict[str, Any]:
    """Return the options with the dense model's sizes; an expert is as wide as the dense block unless they say else."""
    sizes = {name: getattr(dense.config, name) for name in SHARED}
    for name, size in sizes.items():
        if options.get(name, size) != size:
            raise TrainingError(f"--{name.replace('_', '-')}: got {options[name]}, but the dense model has {size}")
    return {"intermediate_size": dense_width(dense.config), **options, **sizes}


def check_upcycling(config: TrainConfig, dense: Checkpoint) -> Upcycling:
    """Return how the dense blocks become experts. Raises TrainingError: sizes that do not divide."""
    width = dense_width(dense.config)
    if width % config.intermediate_size:
        raise TrainingError(
            f"--intermediate-size: got {config.intermediate_size}, wanted a divisor of the dense model's {width}"
        )
    granularity = width // config.intermediate_size
    for name in ("num_experts", "top_k"):
        if (value := getattr(config, name)) % granularity:
            raise TrainingError(
                f"--{name.replace('_', '-')}: got {value}, wanted a multiple of the {granularity} experts that share "
                "one copy of a dense block"
            )
    if config.top_k < 2:
        raise TrainingError("--top-k: got 1, wanted at least 2 with --from-dense: weights that sum to 1")
    return Upcycling(config.num_experts, granularity, config.top_k, normalize=True, reinitialize=0.0)


@torch.no_grad()
def upcycle_into(model: LanguageModel, dense: Checkpoint) -> None:
    """Give the model the dense one's weights, each block as experts, wherever these are; every process calls it.

    The routers' weights come from torch's generator. Raises TrainingError: files that are damaged or do not fit; a
    router whose weights do not sum to 1.
    """
    how = check_upcycling(model.config, dense)
    with torch.random.fork_rng(devices=()):
        source = LanguageModel(dense.config, "dense")
    with one_line():
        load_checkpoint(dense.path, source)
    source.to(next(model.parameters()).dtype)
    whole = {name: value for name, value in model.state_dict().items() if ".experts." not in name}
    whole |= {name: value for name, value in source.state_dict().items() if ".feed_forward." not in name}
    for index, (block, of_dense) in enumerate(zip(model.blocks, source.blocks, strict=True)):
        layer, feed_forward = block.feed_forward, of_dense.feed_forward
        assert isinstance(layer, MoE)
        assert isinstance(feed_forward, FeedForward)
        spec = getattr(layer.router, "spec", None)
        if spec is None or not spec.normalize or spec.scale != 1:
            raise TrainingError("--from-dense: wanted a router whose weights sum to 1")
        state = upcycled_state(feed_forward, how)
        whole |= {f"blocks.{index}.feed_forward.{name}": value for name, value in state.items()}
    load_experts_from(whole, model, only_experts=False)
