"""Colossal-AI's tutorial "Integrate Mixture-of-Experts Into Your Model": its snippets, but for the import root."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.colossalai_context import forget

ROOTS = {"model_zoo.moe.models": "colossalai.model_zoo.moe.models", "colossalai": "moe_triton.compat.colossalai"}

CONFIG = """
MOE_MODEL_PARALLEL_SIZE = ...
parallel = dict(
moe=dict(size=MOE_MODEL_PARALLEL_SIZE)
)
"""

ENVIRONMENT = """
from colossalai.global_variables import moe_env
"""

MODEL = """
from colossalai.context.random import moe_set_seed
from model_zoo.moe.models import Widenet

moe_set_seed(42)
model = Widenet(num_experts=4, capacity_factor=1.2)
"""

LAYER = """
from colossalai.nn.layer.moe import Experts, MoeLayer, Top2Router, NormalNoiseGenerator


noisy_func = NormalNoiseGenerator(num_experts)
shared_router = Top2Router(capacity_factor,
noisy_func=noisy_func)
shared_experts = Experts(expert=VanillaFFN,
num_experts=num_experts,
**moe_mlp_args(
d_model=d_model,
d_ff=d_ff,
drop_rate=drop_rate
))
ffn=MoeLayer(dim_model=d_model, num_experts=num_experts,
router=shared_router, experts=shared_experts)
"""

LOSS = """
criterion = MoeLoss(
aux_weight=0.01,
loss_fn=nn.CrossEntropyLoss,
label_smoothing=0.1
)
"""


def run(snippet: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the snippet defines, with the names that the tutorial takes for given."""
    for old, new in ROOTS.items():
        snippet = snippet.replace(f"from {old}", f"from {new}")
    found = dict(names or {})
    exec(snippet, found)
    return found


@pytest.fixture(autouse=True)
def clean():
    forget()
    yield
    forget()


def test_the_tutorial(tmp_path):
    from moe_triton.compat import colossalai
    from moe_triton.compat.colossalai.engine import MoeGradientHandler
    from moe_triton.compat.colossalai.model_zoo.moe.models import VanillaFFN, moe_mlp_args
    from moe_triton.compat.colossalai.nn.loss import MoeLoss

    (tmp_path / "config.py").write_text(CONFIG.replace("...", "1"))
    colossalai.launch_from_torch(config=tmp_path / "config.py", verbose=False)
    moe_env = run(ENVIRONMENT)["moe_env"]
    assert moe_env.is_initialized()
    assert (moe_env.model_parallel_size, moe_env.data_parallel_size) == (1, 1)

    assert run(MODEL)["model"].blocks[0].ffn.experts.num_experts == 4
    sizes = {"num_experts": 4, "capacity_factor": 1.2, "d_model": 16, "d_ff": 32, "drop_rate": 0.1}
    ffn = run(LAYER, {**sizes, "VanillaFFN": VanillaFFN, "moe_mlp_args": moe_mlp_args})["ffn"]
    assert ffn.router.generation == "v0.0.2"
    assert ffn.router.get_capacity((100, 4)) == 60
    criterion = run(LOSS, {"MoeLoss": MoeLoss, "nn": nn})["criterion"]

    # "Finally, just use trainer or engine in colossalai to do your training."
    model = nn.Sequential(ffn, nn.Linear(16, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    engine, *_ = colossalai.initialize(model, optimizer, criterion, verbose=False)
    assert [type(handler) for handler in engine.gradient_handlers] == [MoeGradientHandler]
    engine.train()
    x, y = torch.randn(64, 16), torch.randint(3, (64,))
    losses = []
    for _ in range(20):
        engine.zero_grad()
        loss = engine.criterion(engine(x), y)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_the_other_import_path():
    from moe_triton.compat.colossalai.nn import moe
    from moe_triton.compat.colossalai.nn.layer import moe as layers

    assert moe.MoeLayer is layers.MoeLayer
