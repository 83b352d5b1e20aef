"""Experts modules of transformers' interface over ranks: every layout, gate and norm, against one process."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.helpers.compare import assert_close
from tests.helpers.ranks import products

MODULES = {
    "default": {},
    "transposed, biases": {"is_transposed": True, "has_bias": True},
    "alternating, biases": {"is_concatenated": False, "has_bias": True, "is_transposed": True},
    "ungated": {"has_gate": False, "act_fn": "relu2"},
    "called gate": {"gate": "called"},
    "called, transposed, biases": {"gate": "called", "is_transposed": True, "has_bias": True},
    "norm": {"post_expert_norm": "rms"},
}
FUSED = ("default", "transposed, biases", "alternating, biases", "ungated")
SIZES = {"ep=2": {"ep": 2}, "ep=2, etp=2": {"ep": 2, "etp": 2}, "ep=2, tp=2": {"ep": 2, "tp": 2}}


def called_gate(self: nn.Module, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.sin(gate) * up


def made(which: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    from tests.helpers.experts_modules import D, make_experts

    options = dict(MODULES[which])
    if "gate" in options:
        options["gate"] = called_gate
    if "post_expert_norm" in options:
        options["post_expert_norm"] = nn.RMSNorm(D)
    torch.manual_seed(0)
    return make_experts(**options, dtype=dtype)


def batch() -> list[torch.Tensor]:
    """Of all ranks: hidden states, ids of which one is skipped, router weights, and the output's gradient."""
    from tests.helpers.experts_modules import D, E, K, T

    torch.manual_seed(1)
    x, grad = (torch.randn(T, D, dtype=torch.float64) for _ in range(2))
    index = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    index[3, 1] = -1
    return [x, index, torch.rand(T, K, dtype=torch.float64), grad]


def against_one_process(which: str, sizes: dict, on_meta: bool) -> None:
    import moe_triton
    from moe_triton.distributed import ExpertParallel, make_groups, reduce_gradients
    from moe_triton.distributed.checkpoint.global_tensors import as_global, model_tensors

    groups = make_groups(**sizes)
    whole, model = made(which), nn.Module()
    model.experts = made(which).to("meta") if on_meta else made(which)
    kind = type(model.experts).__name__
    report = moe_triton.swap(model, expert_parallel=ExpertParallel(groups, loss_reduction="sum"))
    assert [(entry.name, entry.kind) for entry in report.swapped] == [("experts", kind)]
    if on_meta:
        model.to_empty(device="cpu")
        moe_triton.distributed.load_experts_from({f"experts.{n}": t for n, t in whole.state_dict().items()}, model)
    x, index, weights, grad = batch()
    here = slice(*(len(x) * rank // groups.dp.size for rank in (groups.dp.rank, groups.dp.rank + 1)))
    results = []
    for module, part in ((whole, slice(None)), (model.experts, here)):
        inputs = [tensor[part].clone().requires_grad_() for tensor in (x, weights)]
        out = module(inputs[0], index[part], inputs[1])
        out.backward(grad[part])
        results.append([out.detach(), *(tensor.grad for tensor in inputs)])
    for wanted, got in zip(*results, strict=True):  # output, gradients of the hidden states and the router weights
        assert_close(got, wanted[here])
    reduce_gradients(model, rule="sum")
    for name, (live, layout, _) in model_tensors(model).items():
        wanted = whole.get_parameter(name.removeprefix("experts.")).grad
        for offset, box in as_global(live.grad, layout).boxes.items():
            spot = tuple(slice(low, low + size) for low, size in zip(offset, box.shape, strict=True))
            assert_close(box, wanted[spot])


@pytest.mark.parametrize(("which", "sizes"), products(which=FUSED, sizes=tuple(SIZES)))
def test_fused_experts(four_ranks, which, sizes):
    four_ranks.run(against_one_process, which, SIZES[sizes], True)


@pytest.mark.parametrize("which", [which for which in MODULES if which not in FUSED])
def test_experts_whose_gate_or_norm_is_called(four_ranks, which):
    four_ranks.run(against_one_process, which, SIZES["ep=2"], False)


def refusals() -> None:
    import moe_triton
    from moe_triton.distributed import ExpertParallel, make_groups

    groups = make_groups(ep=2)
    parallel = ExpertParallel(groups)
    module = made("default")
    before = [parameter.shape for parameter in module.parameters()]
    for wrong, message in (
        (ExpertParallel(groups, mode="capacity"), "expert_parallel: got mode 'capacity'"),
        (ExpertParallel(groups, redundant_experts=2), "expert_parallel: got redundant_experts"),
        (ExpertParallel(make_groups(ep=4)), "num_experts: got 6 for 4 ranks in runs of 2"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            moe_triton.swap(module, expert_parallel=wrong)
    assert [parameter.shape for parameter in module.parameters()] == before
    with pytest.raises(ValueError, match="got 2 expert slices for Experts, whose gate or norm is called"):
        moe_triton.swap(made("called gate"), expert_parallel=ExpertParallel(make_groups(ep=2, etp=2)))
    with pytest.raises(TypeError, match="expert_parallel: got ParallelGroups, wanted an ExpertParallel"):
        moe_triton.swap(module, expert_parallel=groups)
    odd = made("alternating, biases")
    odd.gate_up_proj = nn.Parameter(odd.gate_up_proj[..., :6].clone())
    with pytest.raises(ValueError, match="gate_up_proj: got experts of 3 columns, wanted a multiple of the 2 slices"):
        moe_triton.swap(odd, expert_parallel=ExpertParallel(make_groups(ep=2, etp=2)))
    moe_triton.swap(module, expert_parallel=parallel)
    moe_triton.swap(module, backend="torch", expert_parallel=parallel)
    moe_triton.swap(module, backend="torch")
    assert (module.gate_up_proj.shape[0], module.num_experts, module.moe_triton_backend) == (3, 6, "torch")
    with pytest.raises(ValueError, match="got another one for Experts that is spread already"):
        moe_triton.swap(module, expert_parallel=ExpertParallel(groups))
    module.config._experts_implementation = "eager"
    x, index, weights, _ = batch()
    with pytest.raises(ValueError, match="experts_implementation: got 'eager' with experts over ranks"):
        module(x, index, weights)
    assert dist.get_world_size() == 4


def test_what_cannot_be_spread(four_ranks):
    four_ranks.run(refusals)


def compiled() -> None:
    """torch.compile breaks the graph around the exchange."""
    import moe_triton
    from moe_triton.distributed import ExpertParallel, make_groups

    module = made("default")
    moe_triton.swap(module, expert_parallel=ExpertParallel(make_groups(ep=2)))
    x, index, weights, grad = batch()
    results = []
    for run in (module, torch.compile(module, backend="aot_eager")):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, weights)]
        out = run(inputs[0], index, inputs[1])
        out.backward(grad)
        results.append([out.detach(), *(tensor.grad for tensor in inputs)])
    for eager, found in zip(*results, strict=True):
        assert_close(found, eager)


def test_torch_compile(four_ranks):
    four_ranks.run(compiled)
