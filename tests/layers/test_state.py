"""What happens to a layer as a whole: moved, cast, copied, pickled, loaded, wrapped, counted."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_triton import Experts, FeedForward, LoadMonitor, MoE, Router
from moe_triton.distributed import ExpertParallel
from moe_triton.distributed.replicas.placement import build_placement
from tests.helpers.compare import assert_close

EVERYTHING = {"bias": True, "shared_intermediate_size": 6, "shared_gate": True, "residual": True}
LOSSES = {"aux_loss_weight": 0.1, "z_loss_weight": 0.01}


def balanced(**options) -> Router:
    return Router(8, 4, 2, score="sigmoid", bias=True, choice_bias=True, **options)


def replicated() -> ExpertParallel:
    """Two slots more than experts, all in this process."""
    return ExpertParallel(redundant_experts=2)


MAKERS = {
    "plain": lambda: MoE(8, 4, 4, 2, router=balanced(), **EVERYTHING, **LOSSES),
    "replicas": lambda: MoE(8, 4, 4, 2, router=balanced(), expert_parallel=replicated(), **EVERYTHING, **LOSSES),
}


# Tensors without values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_reset_parameters_gives_everything_a_value_after_to_empty(make):
    torch.manual_seed(0)
    wanted = make()
    with torch.device("meta"):
        layer = make()
    layer.to_empty(device="cpu")
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else -777)
    torch.manual_seed(0)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    state = layer.state_dict()
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(state[name], tensor), name
    x = torch.randn(20, 8)
    for _ in range(2):
        assert torch.equal(layer(x).output, wanted(x).output)
        for one in (layer, wanted):
            one.router.update_choice_bias(0.1)
    assert layer.router.choice_bias.abs().max() > 0
    assert torch.equal(layer.router.choice_bias, wanted.router.choice_bias)
    if wanted.experts.load is not None:
        assert wanted.experts.load.sum() == 80
        assert torch.equal(layer.experts.load, wanted.experts.load)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_layer_on_meta_takes_the_tensors_of_a_state_dict(make):
    with torch.device("meta"):
        layer = make()
    wanted = make()
    layer.load_state_dict(copy.deepcopy(wanted.state_dict()), assign=True)
    assert not [name for name, t in (*layer.named_parameters(), *layer.named_buffers()) if t.is_meta]
    layer.router.update_choice_bias()  # before anything was counted
    assert layer.router.choice_bias.abs().max() == 0
    x = torch.randn(20, 8)
    for one in (layer, wanted):
        one(x)
        one.router.update_choice_bias(0.1)
    assert layer.router.choice_bias.abs().max() > 0
    assert torch.equal(layer.router.choice_bias, wanted.router.choice_bias)
    assert layer.router.load.device == layer.router.weight.device


def test_reset_parameters_starts_balancing_anew():
    router = balanced()
    router(torch.randn(20, 8))
    router.update_choice_bias(0.1)
    router(torch.randn(20, 8))
    router.reset_parameters()
    assert router.choice_bias.abs().max() == 0
    assert router.load.sum() == 0


# The choice bias's dtype ----------------------------------------------------------------------------------------------


def cast_by_hand(model):
    for buffer in model.buffers():
        buffer.data = buffer.data.to(torch.bfloat16)
    return model


def load_rounded(model, assign):
    state = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    return model


CASTS = {
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "to_dtype": lambda model: model.to(torch.bfloat16),
    "to_device_and_dtype": lambda model: model.to("cpu", torch.float16),
    "type": lambda model: model.type(torch.bfloat16),
    "and_copied": lambda model: copy.deepcopy(model.bfloat16()),
    "and_pickled": lambda model: pickle.loads(pickle.dumps(model.bfloat16())),
    "and_emptied": lambda model: model.bfloat16().to_empty(device="cpu"),
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_a_cast_of_the_module_leaves_the_choice_bias_in_fp32(cast):
    layer = MoE(8, 4, 4, 2, router=balanced())
    exact = torch.tensor([0.1234567, -1.7654321, 1e-3, 0.5])
    layer.router.choice_bias.copy_(exact)
    moved = cast(nn.Sequential(layer))[0]
    assert moved.router.choice_bias.dtype == torch.float32
    assert moved.router.load.dtype == torch.int64
    assert moved.router.weight.dtype != torch.float32
    if cast is not CASTS["and_emptied"]:
        assert torch.equal(moved.router.choice_bias, exact)


ROUNDINGS = {
    "loaded": lambda model: load_rounded(model, False),
    "assigned": lambda model: load_rounded(model, True),
    "by_hand": cast_by_hand,
}


@pytest.mark.parametrize("cast", [*CASTS.values(), *ROUNDINGS.values()], ids=[*CASTS, *ROUNDINGS])
def test_small_steps_of_the_choice_bias_add_up_after_a_cast(cast):
    router = cast(balanced())
    router.reset_parameters()
    for _ in range(800):  # bf16 stops at 0.5
        router.load.copy_(torch.tensor([100, 0, 0, 0]))
        router.update_choice_bias(1e-3)
    assert_close(router.choice_bias, torch.tensor([-0.8, 0.8, 0.8, 0.8]))
    assert router.choice_bias.dtype == torch.float32


@pytest.mark.parametrize("assign", [False, True])
def test_a_choice_bias_loaded_in_bf16_becomes_fp32(assign):
    router = balanced()
    router.choice_bias.copy_(torch.tensor([0.5, -0.25, 0.125, 1.0]))
    load_rounded(router, assign)
    assert router.choice_bias.dtype == torch.float32
    assert router.choice_bias.tolist() == [0.5, -0.25, 0.125, 1.0]


# Copies and pickles ---------------------------------------------------------------------------------------------------


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_computes_the_same_and_counts_for_itself(duplicate):
    layer = MAKERS["plain"]()
    x = torch.randn(6, 8)
    layer(x).output.sum().backward()
    twin = duplicate(layer)
    assert torch.equal(twin.router.load, layer.router.load)
    assert torch.equal(twin(x).output, layer.eval()(x).output)
    assert twin.router.load.sum() == 2 * layer.router.load.sum() == 24
    for module in (FeedForward(8, 4), Router(8, 4), Experts(8, 4, 4)):
        again = duplicate(module)
        assert [name for name, _ in again.named_parameters()] == [name for name, _ in module.named_parameters()]


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_monitored_model_can_be_copied_and_its_copy_counts_elsewhere(duplicate):
    layer = MoE(8, 4, 4, 2)
    monitor = LoadMonitor(layer)
    layer(torch.randn(6, 8))
    duplicate(layer)(torch.randn(9, 8))
    assert monitor.read()["experts"].assignments == 12


def other_placement(layer: MoE) -> dict[str, torch.Tensor]:
    """The layer's state with the slots in reverse order: the same function under another placement."""
    state = copy.deepcopy(layer.state_dict())
    for name, tensor in state.items():
        if name.startswith("experts."):
            state[name] = tensor.flip(0)
    return state


@pytest.mark.parametrize("duplicate", [lambda layer: layer, copy.deepcopy], ids=["itself", "deepcopy"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_placement_is_loaded_into_the_module_that_loads(duplicate, assign):
    layer = MoE(8, 4, 4, 2, expert_parallel=replicated())
    experts = layer.experts
    x = torch.randn(16, 8)
    wanted, before = layer(x).output, layer.experts.placement.physical_to_logical.clone()
    state = other_placement(layer)
    twin = duplicate(layer)
    twin.load_state_dict(state, assign=assign)
    assert twin.experts.placement.physical_to_logical.tolist() == before.flip(0).tolist()
    assert_close(twin(x).output, wanted)
    if twin.experts is not experts:
        assert torch.equal(experts.placement.physical_to_logical, before)
        assert torch.equal(layer(x).output, wanted)


def test_a_placement_shares_no_memory_with_the_buffer():
    experts = MoE(8, 4, 4, 2, expert_parallel=replicated()).experts
    before = experts.placement.physical_to_logical.clone()
    experts.physical_to_logical.zero_()
    assert torch.equal(experts.placement.physical_to_logical, before)
    experts.set_placement(build_placement(before.flip(0), torch.ones(4), 1))
    experts.physical_to_logical.zero_()
    assert torch.equal(experts.placement.physical_to_logical, before.flip(0))


# Wrappers and foreign modules -----------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """As adapters wrap a module: only its forward can be reached."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("parallel", [lambda: None, ExpertParallel, replicated], ids=["none", "alone", "replicas"])
def test_every_part_of_a_layer_can_be_wrapped(parallel):
    layer = MoE(8, 4, 4, 2, router=balanced(), expert_parallel=parallel(), capacity_factor=1.0, **EVERYTHING, **LOSSES)
    x, mask = torch.randn(12, 8), torch.arange(12) % 5 > 0
    plain = layer(x, mask)
    for name, child in list(layer.named_children()):
        setattr(layer, name, Wrapper(child))
    wrapped = layer(x, mask)
    for a, b in zip(plain, wrapped, strict=True):
        assert torch.equal(a, b)


def test_the_parametrized_weights_of_the_experts_are_computed_once_a_forward():
    calls = []

    class Doubled(nn.Module):
        def forward(self, weight):
            calls.append(weight)
            return 2 * weight

    layer, twin = MoE(8, 4, 4, 2), MoE(8, 4, 4, 2)
    twin.load_state_dict(layer.state_dict())
    twin.experts.gate_up_proj.data *= 2
    torch.nn.utils.parametrize.register_parametrization(layer.experts, "gate_up_proj", Doubled())
    calls.clear()
    x = torch.randn(6, 8)
    assert torch.equal(layer(x).output, twin(x).output)
    assert len(calls) == 1


class Untyped(nn.Module):
    def forward(self, x, token_mask=None):
        return x


def test_a_router_must_fit_and_return_a_routing():
    with pytest.raises(ValueError, match=r"router: got one for hidden_size=6, .* wanted hidden_size=8, "):
        MoE(8, 4, 4, 2, router=Router(6, 4, 2))
    with pytest.raises(TypeError, match="router: returned Tensor, wanted a Routing"):
        MoE(8, 4, 4, 2, router=Untyped())(torch.randn(3, 8))
    with pytest.raises(ValueError, match=r"hidden_states: got shape \[3, 6\], wanted \[T, 8\]"):
        Router(8, 4, 2)(torch.randn(3, 6))


# What is counted ------------------------------------------------------------------------------------------------------


def test_the_load_of_replicated_experts_is_counted_in_training_once():
    layer = MoE(8, 4, 4, 2, expert_parallel=replicated())
    x = torch.randn(6, 8, requires_grad=True)
    checkpoint(lambda y: layer(y).output, x, use_reentrant=False).sum().backward()
    once = layer.experts.load.clone()
    assert once.sum() == 12
    assert torch.equal(layer(x).expert_counts, once)
    checkpoint(lambda y: layer(y).output, x, use_reentrant=True).sum().backward()
    layer.eval()
    layer(x)
    assert layer.experts.load.sum() == 36
