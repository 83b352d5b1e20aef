"""Which experts are recognised as MLPs, by what their forward computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from moe_triton.compat.mlps import MLP, recognise
from tests.helpers.deepspeed_modules import Gated, Mlp, Tanh, linear, sequential

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}


class Swapped(Gated):
    """up * act(gate): the factors in the other order."""

    def forward(self, x):
        return self.down_proj(self.up_proj(x) * F.gelu(self.gate_proj(x), approximate="tanh"))


class WithOptions(Mlp):
    """Further arguments that are not used, dropout without effect, a tuple."""

    def forward(self, x, bias=None, *args):
        return self.down(F.dropout(F.relu(self.up(x)), p=0.0, training=self.training)), bias


KNOWN = {
    "functions": (Mlp, MLP(("up",), "down", "gelu")),
    "sequential": (sequential, MLP(("0",), "2", "relu")),
    "no-ops": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Dropout(0.0), nn.Linear(8, 4), nn.Identity()),
        MLP(("0",), "3", "silu"),
    ),
    "options": (WithOptions, MLP(("up",), "down", "relu")),
    "gated": (Gated, MLP(("gate_proj", "up_proj"), "down_proj", "swiglu")),
    "gated, swapped": (Swapped, MLP(("gate_proj", "up_proj"), "down_proj", "geglu_tanh")),
    "llama": (lambda: LlamaMLP(LlamaConfig(**SIZES)), MLP(("gate_proj", "up_proj"), "down_proj", "swiglu")),
    "llama, gelu": (
        lambda: LlamaMLP(LlamaConfig(**SIZES, hidden_act="gelu", mlp_bias=True)),
        MLP(("gate_proj", "up_proj"), "down_proj", "geglu"),
    ),
    "phi3": (lambda: Phi3MLP(Phi3Config(**SIZES)), MLP(("gate_up_proj",), "down_proj", "swiglu")),
    "nested": (lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.GELU()), nn.Linear(8, 4)), None),
}
KNOWN["nested"] = (KNOWN["nested"][0], MLP(("0.0",), "1", "gelu"))


@pytest.mark.parametrize("name", KNOWN)
def test_known(name):
    make, expected = KNOWN[name]
    assert recognise(make()) == expected
    assert recognise(make().eval()) == expected


class DropoutInTraining(Mlp):
    def forward(self, x):
        x = F.gelu(self.up(x))
        return self.down(F.dropout(x, 0.1) if self.training else x)


class InPlace(Mlp):
    def forward(self, x):
        x.add_(1)
        return self.down(F.gelu(self.up(x)))


class Branch(Mlp):
    def forward(self, x):
        return self.down(F.gelu(self.up(x))) if x.sum() > 0 else x


class Residual(Mlp):
    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


class Beside(Mlp):
    """A parameter that the forward does not use would be left without a gradient of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


class OtherHalf(nn.Module):
    """The gate is the second half."""

    def __init__(self):
        super().__init__()
        self.both, self.down = nn.Linear(16, 48), nn.Linear(24, 16)

    def forward(self, x):
        up, gate = self.both(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Tied(Gated):
    def __init__(self):
        super().__init__()
        self.up_proj.weight = self.gate_proj.weight


class Subclass(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked() -> nn.Module:
    expert = Mlp()
    expert.up.register_forward_hook(lambda module, inputs, output: 2 * output)
    return expert


def parametrised() -> nn.Module:
    expert = Mlp()
    nn.utils.parametrizations.weight_norm(expert.up)
    return expert


def replaced() -> nn.Module:
    expert = Mlp()
    expert.down.forward = lambda x: x[..., :16]
    return expert


UNKNOWN = {
    "tanh": Tanh,
    "one linear": linear,
    "dropout": lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 4)),
    "dropout in training": DropoutInTraining,
    "in place": InPlace,
    "branch": Branch,
    "residual": Residual,
    "beside": Beside,
    "other half": OtherHalf,
    "tied": Tied,
    "hooked": hooked,
    "parametrised": parametrised,
    "replaced": replaced,
    "subclass": lambda: nn.Sequential(Subclass(4, 8), nn.ReLU(), nn.Linear(8, 4)),
    "elu": lambda: nn.Sequential(nn.Linear(4, 8), nn.ELU(), nn.Linear(8, 4)),
    "three": lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)),
    "no activation": lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)),
    "convolution": lambda: nn.Conv1d(4, 4, 1),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown(name):
    expert = UNKNOWN[name]()
    assert recognise(expert) is None
    assert recognise(expert.eval()) is None


def test_the_expert_is_not_disturbed():
    """The trial runs the forward on a copy, draws nothing and leaves the mode alone."""

    class Counting(Mlp):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    expert = Counting().train()
    state = torch.get_rng_state()
    assert recognise(expert) is not None
    assert expert.calls == 0
    assert expert.training
    assert expert.up.training
    assert torch.equal(torch.get_rng_state(), state)
