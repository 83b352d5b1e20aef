"""Compositions of parallelism that users run, each against one process: a sample that covers every pair of choices.

Four ranks; two layers, which are two pipeline stages where pp is 2; one optimizer step's gradients, and their norm.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_triton import MoE
from moe_triton.distributed import ExpertParallel, ParallelGroups, clip_grad_norm_, make_groups, reduce_gradients
from tests.helpers.pairs import covering

WORLD, SEQUENCES, POSITIONS, HIDDEN, EXPERTS, VOCAB = 4, 8, 4, 16, 4, 32
# relative, in float64; transformers computes norms and the router in float32 whatever the dtype
TOLERANCE = {"MoE": 1e-12, "Qwen3-MoE": 1e-6}


@dataclass(frozen=True)
class Composition:
    """The choices; edp is what is left of the ranks, dp too."""

    ep: int
    etp: int
    tp: int
    pp: int
    wrapper: str
    accumulation: int
    checkpointing: str
    model: str

    @property
    def edp(self) -> int:
        return WORLD // (self.pp * self.ep * self.etp)

    @property
    def dp(self) -> int:
        return WORLD // (self.pp * self.tp)

    def sizes(self) -> dict[str, int]:
        replicas = 2 if self.wrapper == "HSDP" else 1
        return {"ep": self.ep, "etp": self.etp, "tp": self.tp, "pp": self.pp, "dp_replicate": replicas}

    def is_possible(self) -> bool:
        ranks = self.pp * self.ep * self.etp <= WORLD and self.pp * self.tp <= WORLD
        return ranks and (self.wrapper != "HSDP" or (self.edp % 2 == 0 and self.dp % 2 == 0))


CHOICES: dict[str, tuple[Any, ...]] = {
    "ep": (1, 2, 4),
    "etp": (1, 2),
    "tp": (1, 2),
    "pp": (1, 2),
    "wrapper": ("none", "DDP", "FSDP2", "HSDP"),
    "accumulation": (1, 2),
    "checkpointing": ("none", "non-reentrant", "reentrant"),
    "model": ("MoE", "Qwen3-MoE"),
}


def sample() -> list[Composition]:
    """Compositions in which every pair of choices occurs that can occur, found greedily; the same every time."""
    assert tuple(CHOICES) == tuple(field.name for field in fields(Composition))
    possible = [values for values in itertools.product(*CHOICES.values()) if Composition(*values).is_possible()]
    return [Composition(*values) for values in covering(possible)]


# The models, in two halves --------------------------------------------------------------------------------------------


class Front(nn.Module):
    """An embedding and a residual MoE layer: ids [B, P] -> [B, P, d]."""

    def __init__(self, parallel: ExpertParallel | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN, dtype=torch.float64)
        self.moe = MoE(HIDDEN, 8, EXPERTS, top_k=2, bias=True, expert_parallel=parallel, dtype=torch.float64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return x + self.moe(x).output


class Back(nn.Module):
    """A residual MoE layer with a shared expert, and a head: [B, P, d] -> logits [B, P, vocabulary]."""

    def __init__(self, parallel: ExpertParallel | None) -> None:
        super().__init__()
        self.moe = MoE(
            HIDDEN, 8, EXPERTS, top_k=2, shared_intermediate_size=8, expert_parallel=parallel, dtype=torch.float64
        )
        self.head = nn.Linear(HIDDEN, VOCAB, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.moe(x).output)


class QwenFront(nn.Module):
    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.inner = whole.model
        self.inner.layers, self.inner.norm = self.inner.layers[:1], nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(input_ids=ids, use_cache=False).last_hidden_state


class QwenBack(nn.Module):
    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.inner = whole
        self.inner.model.layers, self.inner.model.embed_tokens = self.inner.model.layers[1:], None

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(inputs_embeds=x, use_cache=False).logits


def halves(kind: str, parallel: ExpertParallel | None) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    if kind == "MoE":
        return Front(parallel), Back(parallel)
    import moe_triton
    from tests.helpers.families import tiny_model

    found = []
    for half in (QwenFront, QwenBack):
        whole = half(tiny_model("qwen3_moe", torch.float64))
        moe_triton.swap(whole, expert_parallel=parallel)
        found.append(whole)
    return found[0], found[1]


class Whole(nn.Module):
    """What is on a rank: both halves, or one of them."""

    def __init__(self, parts: list[nn.Module], checkpointing: str) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            if self.checkpointing == "none":
                x = part(x)
            else:  # a reentrant checkpoint of ids would have no gradient
                x = checkpoint(part, x, use_reentrant=self.checkpointing == "reentrant" and x.is_floating_point())
        return x


# A step ---------------------------------------------------------------------------------------------------------------


def batch() -> tuple[Tensor, Tensor]:
    """ids and targets [B, P] of the whole step."""
    draw = torch.Generator().manual_seed(7)
    return tuple(torch.randint(0, VOCAB, (SEQUENCES, POSITIONS), generator=draw) for _ in range(2))  # type: ignore[return-value]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[..., :VOCAB].flatten(0, 1), targets.flatten())


def in_one_process(kind: str) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The loss, the gradients by "half.name", and their norm."""
    front, back = halves(kind, None)
    ids, targets = batch()
    loss = loss_of(back(front(ids)), targets)
    loss.backward()
    named = {f"{i}.{name}": p for i, half in enumerate((front, back)) for name, p in half.named_parameters()}
    norm = nn.utils.clip_grad_norm_(named.values(), 1e9)
    return loss.detach(), {name: p.grad for name, p in named.items() if p.grad is not None}, norm


def step_of_stage(
    model: nn.Module, groups: ParallelGroups, micro: Iterator[tuple[Tensor, Tensor]], share: float
) -> Any:
    """The loss of this rank's share of the batch; activations and their gradients travel between stages."""
    total: Any = torch.zeros((), dtype=torch.float64)
    for ids, targets in micro:
        if groups.pp.size == 1:
            loss = loss_of(model(ids), targets)
            (loss * share).backward()
            total += loss.detach() * share
        elif groups.pp.rank == 0:
            out = model(ids)
            dist.send(out.detach(), groups.pp.ranks[1])
            grad = torch.empty_like(out)
            dist.recv(grad, groups.pp.ranks[1])
            out.backward(grad)
        else:
            hidden = HIDDEN if isinstance(model_inside(model).parts[0], Back) else 32
            x = torch.empty(*ids.shape, hidden, dtype=torch.float64)
            dist.recv(x, groups.pp.ranks[0])
            x.requires_grad_()
            loss = loss_of(model(x), targets)
            (loss * share).backward()
            total += loss.detach() * share
            assert x.grad is not None
            dist.send(x.grad, groups.pp.ranks[0])
    return total


def model_inside(model: Any) -> Whole:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def error_of(composition: Composition) -> float:
    """The largest relative error of loss, norm and gradients on this rank; every rank of four calls it."""
    from moe_triton.distributed import apply_fsdp2, wrap_ddp
    from moe_triton.distributed.checkpoint.global_tensors import as_global, model_tensors

    wanted_loss, wanted, wanted_norm = in_one_process(composition.model)
    groups = make_groups(**composition.sizes())
    here = range(2) if composition.pp == 1 else [groups.pp.rank]
    parts = halves(composition.model, ExpertParallel(groups))
    own = Whole([parts[i] for i in here], composition.checkpointing)
    called: Any = own
    if composition.wrapper == "DDP":
        called = wrap_ddp(own, groups)
    elif composition.wrapper != "none":
        called = apply_fsdp2(own, groups, blocks=own.parts)
    mine = [tensor.chunk(groups.dp.size)[groups.dp.rank] for tensor in batch()]
    micro = zip(*(tensor.chunk(composition.accumulation) for tensor in mine), strict=True)
    loss = step_of_stage(called, groups, micro, 1 / composition.accumulation)
    if composition.wrapper == "none":
        reduce_gradients(own, groups)
    norm = clip_grad_norm_(own, 1e9, groups)
    errors = [(norm / wanted_norm - 1).abs()]
    if groups.pp.rank == groups.pp.size - 1:
        dist.all_reduce(loss, group=groups.dp.handle)
        errors.append((loss / groups.dp.size / wanted_loss - 1).abs())
    for name, (live, layout, _) in model_tensors(own).items():
        _, number, short = name.split(".", 2)
        if not isinstance(live, nn.Parameter):
            continue
        whole = wanted[f"{here[int(number)]}.{short}"]
        for offset, box in as_global(live.grad, layout).boxes.items():
            spot = tuple(slice(low, low + size) for low, size in zip(offset, box.shape, strict=True))
            errors.append((box - whole[spot]).norm() / whole.norm())
    assert len(errors) > len(list(own.parameters())) / 2, "gradients were compared"
    return torch.stack(errors).max().item()  # NaN where one is


def rows(errors: dict[Composition, float]) -> list[str]:
    """The table of the page."""
    names = ("pp", "tp", "ep", "etp", "edp", "wrapper", "accumulation", "checkpointing", "model")
    lines = [f"| {' | '.join(names)} | error |", f"|{'--:|' * 5}{'---|' * 4}--:|"]
    for composition, error in errors.items():
        lines.append(f"| {' | '.join(str(getattr(composition, name)) for name in names)} | {error:.0e} |")
    return lines
