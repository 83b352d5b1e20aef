"""Our layer inside DeepSpeed's own engine trains like DeepSpeed's, over one and two processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.helpers import deepspeed_parity as parity
from tests.helpers.deepspeed_parity import Case
from tests.helpers.ranks import Ranks, products, started


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Ranks]:
    with started(1) as ranks:
        yield ranks


def zero(stage: int) -> dict:
    # the default buckets have 5e8 elements, which every step would fill with NaN here
    buckets = {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}
    return {"zero_optimization": {"stage": stage, **buckets}} if stage else {}


def assert_equal(found: dict[object, list[float]], tolerance: float = 1e-4) -> None:
    """All the loss curves are the same, and the weights move them."""
    first, *others = found.values()
    assert abs(first[0] - first[-1]) > 50 * tolerance * first[0]
    for other in others:
        assert other == pytest.approx(first, rel=tolerance)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_one_process(one_rank, stage):
    case = Case({"k": 2, "use_residual": True}, config=zero(stage), tokens=[24])
    assert_equal(one_rank.run(parity.losses_of_both, case)[0])


@pytest.mark.parametrize(("ep_size", "stage"), products(ep_size=(1, 2), stage=(0, 1, 2)))
def test_two_processes(two_ranks, ep_size, stage):
    """The same seed draws the same lots and noise, so the default options agree: tokens dropped, experts sampled."""
    for found in two_ranks.run(parity.losses_of_both, Case({"ep_size": ep_size, "k": 2}, config=zero(stage))):
        assert_equal(found)


@pytest.mark.parametrize("stage", [0, 2])
def test_other_modules(two_ranks, stage):
    for found in two_ranks.run(parity.losses_of_both, Case({"ep_size": 2, "k": 1}, "Tanh", zero(stage))):
        assert_equal(found)


@pytest.mark.parametrize(
    "options", [{"k": 4}, {"k": 1, "drop_tokens": False}, {"k": 1, "noisy_gate_policy": "RSample"}]
)
def test_options(two_ranks, options):
    for found in two_ranks.run(parity.losses_of_both, Case({"ep_size": 2, **options})):
        assert_equal(found)


def test_bf16(two_ranks):
    """Rounding moves a choice now and then, and with it the loss."""
    for found in two_ranks.run(parity.losses_of_both, Case({"ep_size": 2, "k": 1}, dtype=torch.bfloat16, steps=2)):
        assert found["ours"] == pytest.approx(found["upstream"], rel=2e-2)


@pytest.mark.parametrize(
    ("mode", "expert"), [("capacity", "Mlp"), ("capacity", "linear"), ("bounded", "linear"), ("allgather", "linear")]
)
def test_other_exchanges(two_ranks, mode, expert):
    def losses(exchange: dict) -> list[list[float]]:
        case = Case({"ep_size": 2, "k": 2, "exchange": exchange}, expert)
        return two_ranks.run(parity.losses_of_ours, case)

    for found, expected in zip(losses({"mode": mode, "chunks": 2}), losses({}), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("stage", "by"), [(0, "group"), (0, "expert"), (1, "layer"), (1, "expert")])
def test_finer_optimizer_groups_train_the_same(two_ranks, stage, by):
    case = Case({"ep_size": 2, "k": 1}, "Mlp", zero(stage), by=by)
    for found in two_ranks.run(parity.losses_of_both, case):
        assert_equal(found)


@pytest.mark.parametrize(("ep_size", "stage"), products(ep_size=(1, 2), stage=(0, 1, 2)))
def test_checkpoints(two_ranks, tmp_path, ep_size, stage):
    """Each layer's engine continues from its own checkpoint and from the other's as if nothing had happened."""
    case = Case({"ep_size": ep_size, "k": 1}, config=zero(stage), steps=2)
    for found in two_ranks.run(parity.checkpoints, case, str(tmp_path)):
        assert_equal(found)


@pytest.mark.parametrize("expert", ["Gated", "Tanh"])
@pytest.mark.parametrize("tokens", [[24, 24], [31, 8], [20, 1]], ids=str)
def test_ep_size_changes_nothing(two_ranks, expert, tokens):
    """Not the update either (DeepSpeed #5259, #6546). Unequal batches and loads hang upstream (#6809, #5794, #7141).

    Every rank loads its own experts out of a full state dict; upstream loads the first ones everywhere (#6589).
    """
    options = {"k": 2, "drop_tokens": False, "top2_2nd_expert_sampling": False}
    # AdamW blows the rounding of tiny gradients up; and the engine clips by a norm that depends on ep_size (#8475)
    config = {"optimizer": {"type": "SGD", "params": {"lr": 0.05}}, "gradient_clipping": 0.0}
    case = Case(options, expert, config, tokens=tokens)
    for found in two_ranks.run(parity.losses_by_ep_size, case):
        assert_equal(found)


@pytest.mark.parametrize("expert", ["Mlp", "Tanh"])
@pytest.mark.parametrize(("ep_size", "splits"), products(ep_size=(1, 2), splits=(False, True)))
def test_tensor_parallelism(four_ranks, expert, ep_size, splits):
    """Ranks with the same tokens send a share each; experts that are split by themselves see all of them."""
    options = {"ep_size": ep_size, "k": 2, "enable_expert_tensor_parallelism": splits}
    four_ranks.run(parity.layers_under_tensor_parallelism, Case(options, expert))
