"""Who is measured: our layer and its peers, each as a whole MoE block over the very same weights."""

from __future__ import annotations

import torch

from moe_triton.benchmarking.cases import Case
from moe_triton.benchmarking.limits import SMALL_TOKENS
from moe_triton.benchmarking.providers import gpu_peers
from moe_triton.benchmarking.providers.baseline import grouped_mm
from moe_triton.benchmarking.providers.block import Provider
from moe_triton.benchmarking.providers.deepspeed_moe import deepspeed_moe
from moe_triton.benchmarking.providers.huggingface import transformers
from moe_triton.benchmarking.providers.ours import ours

PROVIDERS = {
    "auto": Provider(label="moe_triton (auto)", build=ours("auto"), is_ours=True),
    "triton": Provider(label="moe_triton (triton)", build=ours("triton"), is_ours=True),
    "torch": Provider(label="moe_triton (torch)", build=ours("torch"), is_ours=True),
    "grouped_mm": Provider(label="gather + F.grouped_mm", build=grouped_mm),
    "hf-eager": Provider(label="transformers eager", build=transformers("eager")),
    "hf-grouped_mm": Provider(label="transformers grouped_mm", build=transformers("grouped_mm")),
    "hf-batched_mm": Provider(label="transformers batched_mm", build=transformers("batched_mm")),
    "deepspeed": Provider(label="DeepSpeed MoE", build=deepspeed_moe, notes="pads every expert to the fullest one"),
    "scattermoe": Provider(label="ScatterMoE", build=gpu_peers.scattermoe, notes="router in plain torch"),
    "liger": Provider(label="Liger-Kernel", build=gpu_peers.liger, notes="router in plain torch"),
    "sonicmoe": Provider(label="SonicMoE", build=gpu_peers.sonicmoe),
    "megablocks": Provider(label="MegaBlocks dMoE", build=gpu_peers.megablocks),
    "triton_kernels": Provider(label="triton_kernels", build=gpu_peers.triton_kernels, notes="inference only"),
}


def default_names(case: Case, device: torch.device) -> list[str]:
    """What is measured when nobody says: our backends first, then every peer that suits the shape.

    Peers that are not installed are among them: their row says so.
    """
    own = ["triton", "torch"] if device.type == "cuda" else ["auto"]
    batched = ["hf-batched_mm"] if case.tokens <= SMALL_TOKENS else []
    kernels = ["scattermoe", "liger", "sonicmoe", "megablocks", "triton_kernels"]
    return [*own, "grouped_mm", "hf-eager", "hf-grouped_mm", *batched, "deepspeed", *kernels]
