"""Colossal-AI's experts seen as modules, copied, pickled, moved and loaded: values, gradients and marks."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from moe_triton.compat.colossalai.context import MOE_CONTEXT, moe_set_seed
from moe_triton.compat.colossalai.model_zoo.moe.models import VanillaFFN
from moe_triton.compat.colossalai.nn.layer.moe import (
    Experts,
    FFNExperts,
    MoeLayer,
    MoeModule,
    NormalNoiseGenerator,
    Top1Router,
    Top2Router,
    TPExperts,
)
from tests.helpers.colossalai_context import forget
from tests.helpers.colossalai_models import TanhExpert
from tests.helpers.compare import assert_close

D, F, E = 8, 12, 4


@pytest.fixture(autouse=True)
def clean():
    forget()
    moe_set_seed(7)
    yield
    forget()


def ffn() -> Experts:
    return Experts(VanillaFFN, E, d_model=D, d_ff=F)


def test_an_expert_as_a_module():
    experts = ffn()
    assert len(experts.experts) == E
    one = experts.experts[2]
    assert {name: tuple(p.shape) for name, p in one.named_parameters()} == {
        name: tuple(p.shape) for name, p in VanillaFFN(D, F).named_parameters()
    }
    assert torch.equal(one.ffn[0].weight, experts.ffn_0_weight[2])
    x = torch.randn(5, D)
    first, second = (experts.get_parameter(f"ffn_{i}_weight")[2] for i in (0, 3))
    hidden = nn.functional.gelu(x @ first.T + experts.ffn_0_bias[2])
    assert_close(one(x), hidden @ second.T + experts.ffn_3_bias[2])
    assert all(p.moe_info is experts.dist_info and p.moe_param == 1 for p in one.parameters())
    assert list(experts.state_dict()) == list(ffn().state_dict())  # seen, not added


def test_an_experts_values_are_views():
    experts = ffn()
    experts.experts[1].ffn[0].weight.data.fill_(3.0)
    assert (experts.ffn_0_weight[1] == 3).all()
    assert not (experts.ffn_0_weight[0] == 3).any()
    wanted = {name: torch.full_like(value, 2.0) for name, value in experts.experts[3].state_dict().items()}
    experts.experts[3].load_state_dict(wanted)
    assert all((p[3] == 2).all() for p in experts.parameters())


def test_an_experts_gradients():
    experts = ffn()
    layer = MoeLayer(D, E, Top2Router(None), experts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert experts.experts[0].ffn[0].weight.grad is None
        layer(torch.randn(20, D)).sum().backward()
        for number, one in enumerate(experts.experts):
            assert torch.equal(one.ffn[3].bias.grad, experts.ffn_3_bias.grad[number])
    experts.experts[1].ffn[0].weight.grad.zero_()
    assert not experts.ffn_0_weight.grad[1].any()
    assert experts.ffn_0_weight.grad[2].any()
    # a call's gradients reach the stacked parameters
    experts.zero_grad()
    experts.experts[1](torch.randn(5, D)).sum().backward()
    assert experts.ffn_0_weight.grad[1].any()
    assert not experts.ffn_0_weight.grad[[0, 2, 3]].any()


def test_frozen_and_tied_experts_as_modules():
    experts = Experts(TanhExpert, E, d_model=D)
    one = experts.experts[0]
    assert one.first.weight is one.second.weight
    experts.requires_grad_(False)
    assert not any(p.requires_grad for p in experts.experts[0].parameters())


class Named(nn.Module):
    """An expert with a parameter whose name the container has itself."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.ones(3))


def test_an_expert_with_a_name_of_the_container():
    with pytest.raises(ValueError, match="experts is taken"):
        Experts(Named, E)


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


MAKE = {
    "experts": lambda: MoeLayer(D, E, Top2Router(noisy_func=NormalNoiseGenerator(E)), ffn()),
    "module": lambda: MoeModule(
        D, E, 2, noisy_policy="Jitter", use_residual=True, expert_cls=VanillaFFN, d_model=D, d_ff=F
    ),
    "ffn": lambda: MoeLayer(D, E, Top2Router(), FFNExperts(E, D, F)),
    "slices": lambda: MoeLayer(D, E, Top1Router(select_policy="random"), TPExperts(E, D, F)),
}


def marks(model: nn.Module) -> list[object]:
    return [(p.moe_param, p.moe_info) for module in model.modules() if hasattr(module, "dist_info")
            for p in module.parameters(recurse=False)]  # fmt: skip


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("how", [copy.deepcopy, pickled, saved])
def test_copies(kind, how):
    model = MAKE[kind]().eval()
    x = torch.randn(20, D)
    before = model(x)
    other = how(model)
    assert torch.equal(other(x), before)
    assert marks(other) == marks(model) != []
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert torch.equal(model(x), before)


def test_marks_survive_what_makes_new_parameters():
    model = MAKE["experts"]()
    wanted = marks(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert marks(model) == wanted
    model.to("meta").to_empty(device="cpu")
    assert marks(model) == wanted


def test_an_unpickled_layer_wants_its_context():
    info = MOE_CONTEXT.get_info(E)[1]
    assert pickle.loads(pickle.dumps(info)) is info
    _, arguments = info.__reduce__()
    forget()
    assert pickle.loads(pickle.dumps(info)) is MOE_CONTEXT.get_info(E)[1]
    with pytest.raises(ValueError, match="ep_size: got 4, wanted a divisor of max_ep_size=1"):
        MOE_CONTEXT.info_of(4)
    assert arguments == (1, False)
