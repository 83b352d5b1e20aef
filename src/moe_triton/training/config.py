"""The settings of one training run."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from moe_triton.checks import check_choice, check_int, check_number, check_threads
from moe_triton.runtime import BACKENDS, check_usable
from moe_triton.training.routers import ROUTERS

KINDS = ("moe", "dense")  # of models
DTYPES = ("float32", "float64", "bfloat16")


def default_device() -> str:
    """Return "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that determines the loss curve; two runs with equal settings on one machine give the same bits.

    seed                 of the weights and of the batches
    steps                optimizer steps; the learning-rate schedule spans them
    batch_size, seq_len  sequences per step, and bytes per sequence
    lr, dense_lr         peak learning rates of the MoE model and of the dense one
    num_layers, hidden_size, num_heads, intermediate_size, num_experts, top_k
                         the model; `intermediate_size` is one expert's
    router               how experts are chosen and balanced: a name in `moe_triton.training.routers.ROUTERS`
    capacity_factor      each expert takes at most this multiple of its even share in training; 0: no limit.
                         Nothing is dropped in evaluation and generation
    capacity_groups      equal parts of a batch's sequences with a capacity each, for any number of processes: the
                         curve is the same on 1, 2 or 4 of them. A multiple of their number, and divides batch_size;
                         None: 4, or less where that does not divide it
    aux_loss_weight, z_loss_weight   factors of the load-balance and z losses (`moe_triton.losses`)
    weight_decay         of AdamW, on matrices only
    grad_clip            largest global gradient norm
    dtype                of the model: "float32", or "float64" to compare runs whose sums have another order; "bfloat16"
                         for float32 parameters and products in bf16 (autocast)
    fp8                  whether the experts' products are in fp8 (`moe_triton.moe_mlp`); not with float64
    backend, device      see `moe_triton.MoE`; any torch device, by default a GPU where there is one
    threads              of torch on the CPU. The default model is too small to gain much from a second one, and on a
                         busy machine threads wait for each other; their number also changes the last bits
    data                 path of the text; None: the source of the Python standard library

    Raises ValueError or TypeError that names the setting.
    """

    seed: int = 0
    steps: int = 1500
    batch_size: int = 24
    seq_len: int = 128
    lr: float = 1.6e-2
    dense_lr: float = 8e-3
    num_layers: int = 2
    hidden_size: int = 64
    num_heads: int = 2
    intermediate_size: int = 64
    num_experts: int = 16
    top_k: int = 2
    router: str = "softmax"
    capacity_factor: float = 2.0
    capacity_groups: int | None = None
    aux_loss_weight: float = 0.01
    z_loss_weight: float = 0.001
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    dtype: str = "float32"
    fp8: bool = False
    backend: str = "auto"
    device: str = dataclasses.field(default_factory=default_device)
    threads: int = 1
    data: str | None = None

    def __post_init__(self) -> None:
        check_int("seed", self.seed, low=0, high=2**63 - 1)
        sizes = ("num_layers", "hidden_size", "num_heads", "intermediate_size", "num_experts")
        for name in ("steps", "batch_size", "threads", *sizes):
            check_int(name, getattr(self, name), low=1)
        check_int("seq_len", self.seq_len, low=2)
        check_int("top_k", self.top_k, low=1, high=self.num_experts)
        for name in ("lr", "dense_lr", "grad_clip"):
            check_number(name, getattr(self, name), above=0)
        for name in ("capacity_factor", "aux_loss_weight", "z_loss_weight", "weight_decay"):
            check_number(name, getattr(self, name), low=0)
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size: got {self.hidden_size}, wanted a multiple of 2 * num_heads = {2 * self.num_heads}"
            )
        if self.capacity_groups is not None:
            check_int("capacity_groups", self.capacity_groups, low=1)
            if self.batch_size % self.capacity_groups:
                raise ValueError(
                    f"capacity_groups: got {self.capacity_groups}, wanted a divisor of the batch_size {self.batch_size}"
                )
        check_choice("router", self.router, tuple(ROUTERS))
        if self.router == "groups" and (self.num_experts % 4 or self.top_k > self.num_experts // 2):
            raise ValueError("router: got 'groups', wanted num_experts in 4 groups, with top_k experts in two of them")
        if self.router in ("quantile_bias", "token_rounding") and self.top_k == self.num_experts:
            raise ValueError(f"router: got {self.router!r} with top_k={self.top_k} of as many experts, wanted fewer")
        check_choice("dtype", self.dtype, DTYPES)
        if self.fp8 and self.dtype == "float64":
            raise ValueError("fp8: got True with dtype 'float64', wanted 'float32' or 'bfloat16'")
        check_choice("backend", self.backend, BACKENDS)

    @property
    def num_groups(self) -> int:
        """Return the number of capacity groups of a whole batch."""
        return math.gcd(4, self.batch_size) if self.capacity_groups is None else self.capacity_groups

    def peak_lr(self, kind: str) -> float:
        """Return the peak learning rate of the "moe" or the "dense" model."""
        return self.lr if kind == "moe" else self.dense_lr

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def check_device(name: str) -> None:
    """Raise ValueError unless torch can make tensors on this device here."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: got {name!r}, wanted one that torch can use here") from error


def check_machine(config: TrainConfig) -> None:
    """Raise ValueError or TypeError naming the setting that cannot be used here: threads, device or backend."""
    check_threads("threads", config.threads)
    check_device(config.device)
    try:
        check_usable(config.backend, torch.device(config.device), getattr(torch, config.dtype))
    except RuntimeError as error:
        raise ValueError(str(error)) from error
