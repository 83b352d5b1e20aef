"""Expert-parallel layers under activation checkpointing, autocast and torch.compile."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_triton import MoE
from moe_triton.distributed import ExpertParallel
from moe_triton.distributed.exchange import stages
from moe_triton.distributed.exchange.failure_board import failure_board
from moe_triton.layers.router import Router
from tests.helpers import parity
from tests.helpers.compare import assert_close, relative_rms
from tests.helpers.faults import fresh_groups
from tests.helpers.parity import HIDDEN, Case

MODES = ("dropless", "capacity", "bounded", "allgather")


def gradients(layer: MoE, x: torch.Tensor, *, checkpointed: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(output and gradients, the choices of every forward); the same noise in every call."""
    choices = []
    hook = layer.router.register_forward_hook(lambda module, args, routing: choices.append(routing.experts.clone()))
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    call = (lambda x: checkpoint(layer, x, use_reentrant=False)) if checkpointed else layer
    out = call(x)
    (out.output.square().sum() + out.aux_loss).backward()
    hook.remove()
    found = [out.output.detach(), x.grad, *(parameter.grad.clone() for parameter in layer.parameters())]
    layer.zero_grad()
    return found, choices


def checkpointed(mode: str) -> None:
    router = Router(HIDDEN, parity.EXPERTS, parity.TOP_K, jitter=0.3, choice_bias=True, dtype=torch.float64)
    case = Case([5] * 4, layer={"capacity_factor": 1.0, "aux_loss_weight": 0.1, "router": router})
    layer = parity.make_layer(case, ExpertParallel(fresh_groups(ep=4), mode=mode, chunks=2))
    x = torch.randn(5, HIDDEN, dtype=torch.float64)
    wanted, _ = gradients(layer, x, checkpointed=False)
    load, reported = layer.router.load.clone(), failure_board().store.add("moe_triton/failures", 0)
    got, choices = gradients(layer, x, checkpointed=True)
    assert len(choices) == 2
    assert torch.equal(*choices), "the recomputation routes the same way"
    assert torch.equal(layer.router.load, 2 * load), "and is not counted"
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)
    assert failure_board().store.add("moe_triton/failures", 0) == reported, "the end of a recomputation is no failure"


def freed() -> None:
    """Whatever the exchange keeps for backward goes through autograd's hooks, and nothing else holds it."""
    case = Case([5] * 4)
    layer = parity.make_layer(case, ExpertParallel(fresh_groups(ep=4), chunks=2))
    kept: list[weakref.ref] = []
    original = stages.Saved.put

    def put(self, *tensors):
        kept.extend(map(weakref.ref, tensors))
        return original(self, *tensors)

    def alive(*, checkpointed: bool) -> int:
        kept.clear()
        x = torch.randn(5, HIDDEN, dtype=torch.float64, requires_grad=True)
        out = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        gc.collect()
        count = sum(reference() is not None for reference in kept)
        out.output.sum().backward()
        gc.collect()
        assert all(reference() is None for reference in kept), "backward frees what was kept"
        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.Saved, "put", put)
        assert alive(checkpointed=True) == 0
        packed = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: packed.append(tensor) or tensor, lambda t: t):
            layer(torch.randn(5, HIDDEN, dtype=torch.float64))
        held = {tensor.untyped_storage().data_ptr() for tensor in packed}
        assert kept
        assert all(reference().untyped_storage().data_ptr() in held for reference in kept if reference() is not None)


def autocast() -> None:
    """fp32 parameters, products in bf16, the result of one process under autocast."""
    case = Case([5, 0, 7, 4], dtype=torch.float32, layer={"aux_loss_weight": 0.1, "shared_intermediate_size": 8})
    groups = fresh_groups(ep=4)
    parallel = ExpertParallel(groups, chunks=2, loss_reduction="sum")
    local, whole = (parity.make_layer(case, p) for p in (parallel, None))
    x_all, grad_all = parity.global_batch(case)
    start = sum(case.tokens[: groups.ep.rank])
    here, mine = slice(start, start + case.tokens[groups.ep.rank]), local.experts.local_experts

    def run(layer: MoE, part: slice, *, on: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        x = x_all[part].clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            out = layer(x)
        assert out.output.dtype == torch.float32
        ((out.output * grad_all[part]).sum() + out.aux_loss).backward()
        return out.output.detach(), x.grad

    exact, _ = run(whole, slice(None), on=False)
    whole.zero_grad()
    shared: list[tuple[torch.dtype, bool]] = []
    local.shared_expert.register_forward_hook(lambda module, args, out: shared.append((out.dtype, out.requires_grad)))
    expected, got = run(whole, slice(None)), run(local, here)
    assert shared == [(torch.bfloat16, True)], "while rows travel, in the caller's modes"
    assert relative_rms(expected[0], exact) > 1e-4, "bf16 makes a difference"
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b[here], tolerance=1.2e-2)
    for name, parameter in local.experts.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert_close(parameter.grad, getattr(whole.experts, name).grad[mine.start : mine.stop], tolerance=1.2e-2)


class Block(torch.nn.Module):
    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.first = torch.nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64)
        self.moe = moe

    def forward(self, x):
        out = self.moe(torch.nn.functional.silu(self.first(x)))
        return x + out.output, out.aux_loss


def compiled() -> None:
    case = Case([5] * 4, layer={"aux_loss_weight": 0.1, "shared_intermediate_size": 8})
    torch.manual_seed(2)
    block = Block(parity.make_layer(case, ExpertParallel(fresh_groups(ep=4), chunks=2)))
    x = torch.randn(5, HIDDEN, dtype=torch.float64)

    def run(call) -> list[torch.Tensor]:
        block.zero_grad()
        out, loss = call(x)
        (out.square().sum() + loss).backward()
        return [out.detach(), *(parameter.grad.clone() for parameter in block.parameters())]

    wanted = run(block)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    fast = torch.compile(block, backend=backend)
    for _ in range(2):
        for a, b in zip(run(fast), wanted, strict=True):
            assert torch.equal(a, b)
    operations = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert any("silu" in operation for operation in operations), "what is around the layer is compiled"


@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_gives_the_same_gradients(four_ranks, mode):
    four_ranks.run(checkpointed, mode)


def test_checkpointing_frees_what_the_exchange_keeps(four_ranks):
    four_ranks.run(freed)


def test_autocast(four_ranks):
    four_ranks.run(autocast)


def test_a_compiled_model(four_ranks):
    four_ranks.run(compiled)
