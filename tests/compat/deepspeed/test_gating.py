"""DeepSpeed's gating: the numbers that it gives on small cases, and random parity with the installed package."""

from __future__ import annotations

import pytest
import torch
from deepspeed.moe import sharded_moe as upstream
from torch import Tensor

from moe_triton.compat.deepspeed.gating import Gating, TopKGate, capacity, top_k_gating
from tests.helpers.compare import assert_close

L = torch.tensor([[2.0, 1, 0], [2, 0, 1], [3, 0, 0], [0, 2, 1]])
T = torch.tensor([[2.0, 1, 0, -1], [1, 2, 0, -1], [3, 2, 1, 0], [-1, -2, -3, -4]])


def gate(logits: Tensor, k: int, **options) -> Gating:
    return top_k_gating(logits, k, **{"min_capacity": 0, "use_rts": False, **options})


def slots(gating: Gating) -> list[tuple[int, int, int]]:
    """(token, expert, slot within the expert) of every surviving choice, as DeepSpeed's masks have them."""
    offsets = gating.dispatched.offsets.tolist()
    found = []
    for token, (experts, rows) in enumerate(
        zip(gating.experts.tolist(), gating.dispatched.position.tolist(), strict=True)
    ):
        found += [(token, e, row - offsets[e]) for e, row in zip(experts, rows, strict=True) if row >= 0]
    return sorted(found)


def combine_weights(gating: Gating, num_experts: int) -> Tensor:
    """Weight of every surviving choice by token and expert, [S, E]."""
    kept = torch.where(gating.dispatched.position >= 0, gating.weights, 0)
    return torch.zeros(kept.shape[0], num_experts).scatter_add(1, gating.experts.long().clamp_min(0), kept)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "factor", "low", "expected"),
    [(10, 4, 1, 0, 3), (10, 4, 1.25, 0, 4), (10, 4, 1, 4, 4), (7, 3, 1.1, 0, 3), (1000, 8, 1.1, 0, 138),
     (20, 3, 1.05, 0, 7), (10, 3, 2.1, 0, 7), (180, 4, 2.2, 0, 99)],  # in double one more each
)  # fmt: skip
def test_capacity(num_tokens, num_experts, factor, low, expected):
    assert capacity(num_tokens, num_experts, factor, low) == expected


def test_capacity_rounds_as_deepspeed_does():
    generator = torch.Generator().manual_seed(3)
    for _ in range(2000):
        num_tokens, num_experts = (int(torch.randint(1, n, (), generator=generator)) for n in (5000, 300))
        factor = float(torch.randint(1, 80, (), generator=generator)) / 20
        theirs = upstream._capacity(
            torch.empty(num_tokens, num_experts, device="meta"), torch.tensor(factor), torch.tensor(4)
        )
        assert capacity(num_tokens, num_experts, factor, 4) == int(theirs)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_gates_capacity_rounds_as_deepspeed_does(k):
    """What an expert-parallel exchange asks of the gate, where double would give one place more."""
    layer = TopKGate(8, 3, k, capacity_factor=2.1 / k, eval_capacity_factor=1.05 / k, min_capacity=0)
    for num_tokens in (10, 20, 40, 50, 80, 100):
        for training, factor in ((True, 2.1 / k), (False, 1.05 / k)):
            theirs = upstream._capacity(
                torch.empty(num_tokens, 3, device="meta"), torch.tensor(factor * k), torch.tensor(0)
            )
            assert layer.train(training).capacity(num_tokens) == int(theirs)
    assert layer.train().capacity(10) == 7


def test_top1():
    gating = gate(L, 1)
    assert gating.exp_counts.tolist() == [3, 1, 0]
    assert gating.exp_counts.dtype == torch.int64
    assert gating.l_aux.item() == pytest.approx(1.5065897, rel=1e-6)
    assert_close(gating.weights[:, 0], torch.tensor([0.665241, 0.665241, 0.909443, 0.665241]))
    assert slots(gating) == [(0, 0, 0), (1, 0, 1), (3, 1, 0)]  # the earliest survive
    rts = gate(L, 1, use_rts=True)
    assert (rts.dispatched.position[:3] >= 0).sum() == 2
    assert rts.dispatched.position[3] >= 0


def test_top1_without_drops():
    assert slots(gate(L, 1, drop_tokens=False)) == [(0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 1, 0)]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool])
def test_used_token(dtype):
    gating = gate(L, 1, used_token=torch.tensor([1, 1, 0, 1], dtype=dtype))
    assert gating.exp_counts.tolist() == [2, 1, 0]
    assert gating.l_aux.item() == pytest.approx(1.0697231, rel=1e-6)
    assert [token for token, _, _ in slots(gating)] == [0, 1, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_used_token_as_floats(dtype):
    """A 0/1 mask, as deepspeed's own layer takes it."""
    used = torch.tensor([1, 1, 0, 1], dtype=dtype)
    l_aux, _, _, indices, _, weights, counts = upstream.top1gating(
        L.clone(), 1.0, 0, used_token=used, use_rts=False, sparse_routes=True
    )
    gating = gate(L, 1, used_token=used)
    assert gating.exp_counts.tolist() == counts.tolist() == [2, 1, 0]
    assert gating.l_aux.item() == pytest.approx(l_aux.item(), rel=1e-6)
    assert torch.equal(torch.where(gating.dispatched.position >= 0, gating.experts, -1)[:, 0], indices[0])
    assert_close(combine_weights(gating, 3).sum(1), weights[0].float())


@pytest.mark.parametrize("k", [1, 2, 3])
def test_an_additive_mask_uses_no_token(k):
    """0 and -inf is another kind of mask: read as one of 0 and 1 it must not use what it leaves out."""
    gating = gate(L, k, used_token=torch.tensor([0.0, float("-inf"), 0.0, float("nan")]))
    assert gating.exp_counts.sum() == 0
    assert slots(gating) == []


@pytest.mark.parametrize("k", [2, 3])
def test_used_token_for_every_k(k):
    """Upstream ignores it: here a token that is not used gets no expert, and its choices count nowhere."""
    used = torch.tensor([1, 1, 0, 1])
    gating, without = gate(L, k, used_token=used), gate(L[used.bool()], k)
    assert gating.exp_counts.tolist() == without.exp_counts.tolist()
    assert 2 not in {token for token, _, _ in slots(gating)}
    assert gating.weights[2].tolist() == [0.0] * k


def test_min_capacity_larger_than_the_batch():
    with pytest.raises(ValueError, match=r"min_capacity: got 5 for 4 tokens"):
        gate(L, 1, min_capacity=5)
    assert len(slots(gate(L, 2, min_capacity=5))) == 8
    assert len(slots(gate(L, 1, min_capacity=5, drop_tokens=False))) == 4


@pytest.mark.parametrize("k", [1, 2, 3])
def test_l_aux_of_even_gates_is_one(k):
    assert gate(torch.zeros(6, 4), k).l_aux.item() == pytest.approx(1.0, rel=1e-6)


def test_all_tokens_to_one_expert():
    gating = gate(torch.tensor([1.0, 0]).expand(8, 2), 1, use_rts=True)
    assert gating.exp_counts.tolist() == [8, 0]
    assert gating.l_aux.item() == pytest.approx(1.4621172, rel=1e-6)
    assert len(slots(gating)) == 4


def test_top2():
    gating = gate(L, 2)
    assert gating.exp_counts.tolist() == [3, 3, 2]
    assert gating.l_aux.item() == pytest.approx(1.5065897, rel=1e-6)
    expected = torch.tensor([[0.731059, 0.268941]] * 4)
    expected[2] = torch.tensor([0.952574, 0.047426])
    assert_close(gating.weights, expected)
    kept = [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 2, 0), (2, 0, 2), (2, 1, 2), (3, 1, 0), (3, 2, 1)]
    # the same choices; a slot within an expert is in token order here, and first choices first upstream
    assert [(t, e) for t, e, _ in slots(gating)] == [(t, e) for t, e, _ in kept]


def test_top2_drops_the_latest():
    gating = gate(L[:1].expand(4, 3), 2, capacity_factor=0.5)
    assert slots(gating) == [(0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 1, 1)]
    assert gating.exp_counts.tolist() == [4, 4, 0]
    assert gating.l_aux.item() == pytest.approx(1.9957228, rel=1e-6)
    assert gating.weights[2:].tolist() == [[0, 0], [0, 0]]


def test_top2_first_choices_come_before_second_ones():
    logits = torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 2.0]])  # second choice of token 0 meets two first choices
    gating = gate(logits, 2, capacity_factor=2 / 3)  # C = 2
    assert [(t, e) for t, e, _ in slots(gating)] == [(0, 0), (1, 0), (1, 1), (2, 1)]


def test_top3_by_position():
    gating = gate(T, 3, capacity_factor=0.5, drop_policy="position")
    assert gating.exp_counts.tolist() == [4, 4, 4, 0]
    assert gating.l_aux.item() == pytest.approx(1.2905885, rel=1e-6)
    expected = torch.tensor([[0.665241, 0.244728, 0.090031, 0], [0.244728, 0.665241, 0.090031, 0], [0] * 4, [0] * 4])
    assert_close(combine_weights(gating, 4), expected)


def test_top3_by_probability():
    """Tokens 0, 2 and 3 tie everywhere. Upstream keeps 2 and 3, and calls it arbitrary; here the earlier ones win."""
    weights = combine_weights(gate(T, 3, capacity_factor=0.5), 4)
    assert_close(weights[0], torch.tensor([0.665241, 0.244728, 0.090031, 0]))
    assert_close(weights[1], torch.tensor([0.0, 0.880797, 0.119203, 0]))
    assert_close(weights[2], torch.tensor([1.0, 0, 0, 0]))
    assert weights[3].tolist() == [0, 0, 0, 0]
    later = torch.tensor([[0.0], [0.0], [0.1], [0.2]]) * torch.tensor([1.0, 1, 1, 0])  # now 3, then 2, come first
    weights = combine_weights(gate(T + later, 3, capacity_factor=0.5), 4)
    assert [row.nonzero()[:, 0].tolist() for row in weights] == [[], [1], [0, 2], [0, 1, 2]]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_loss_and_counts_do_not_depend_on_the_capacity(k):
    tight, wide = gate(T, k, capacity_factor=0.25), gate(T, k, capacity_factor=4.0)
    assert torch.equal(tight.l_aux, wide.l_aux)
    assert torch.equal(tight.exp_counts, wide.exp_counts)
    assert len(slots(tight)) < len(slots(wide))


def upstream_gating(logits: Tensor, k: int, **options) -> tuple[Tensor, Tensor, Tensor]:
    """(l_aux, combine weights [S, E], exp_counts) of the installed package's dense form."""
    factor, low = options["capacity_factor"], options["min_capacity"]
    if k == 1:
        l_aux, weights_SEC, _, counts = upstream.top1gating(
            logits, factor, low, options["used_token"], "RSample" if options["rsample"] else None,
            options["drop_tokens"], options["use_rts"],
        )  # fmt: skip
    elif k == 2:
        l_aux, weights_SEC, _, counts = upstream.top2gating(
            logits, factor, low, options["drop_tokens"], None, options["top2_2nd_expert_sampling"]
        )
    else:
        l_aux, weights_SEC, _, counts = upstream.topkgating(
            logits, k, factor, low, options["drop_tokens"], None, options["drop_policy"]
        )
    return l_aux, weights_SEC.sum(2), counts


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("k", "options"),
    [
        (1, {"use_rts": True}),
        (1, {"use_rts": True, "rsample": True}),
        (1, {"use_rts": True, "used": True}),
        (1, {"use_rts": False, "drop_tokens": False}),
        (2, {"top2_2nd_expert_sampling": False}),
        (2, {"top2_2nd_expert_sampling": True}),
        (2, {"drop_tokens": False}),
        (4, {}),
        (4, {"drop_policy": "position"}),
        (4, {"drop_tokens": False}),
    ],
    ids=str,
)
def test_random_parity(seed, k, options):
    """The same seed draws the same noise and the same lots, so even the random policies agree choice by choice."""
    torch.manual_seed(seed)
    num_tokens, num_experts = int(torch.randint(12, 90, ())), int(torch.randint(5, 20, ()))
    logits = torch.randn(num_tokens, num_experts)
    options = {
        "capacity_factor": (0.4, 1.0, 1.3)[seed % 3], "min_capacity": 2, "drop_tokens": True, "use_rts": True,
        "rsample": False, "top2_2nd_expert_sampling": False, "drop_policy": "probs", "used_token": None, **options,
    }  # fmt: skip
    if options.pop("used", False):
        options["used_token"] = torch.randint(0, 2, (num_tokens,))
    ours_logits, theirs_logits = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    torch.manual_seed(seed)
    l_aux, weights_SE, counts = upstream_gating(theirs_logits * 1, k, **options)  # it adds noise in place
    theirs_next = torch.rand(3)
    torch.manual_seed(seed)
    ours = top_k_gating(ours_logits, k, **options)
    assert torch.equal(torch.rand(3), theirs_next)
    assert torch.equal(ours.exp_counts, counts)
    assert_close(ours.l_aux, l_aux)
    found_SE = combine_weights(ours, num_experts)
    assert torch.equal(found_SE > 0, weights_SE > 0)
    assert_close(found_SE, weights_SE)
    torch.manual_seed(seed)
    target = torch.randn(num_tokens, num_experts)
    for total in ((found_SE * target).sum() + ours.l_aux, (weights_SE * target).sum() + l_aux):
        total.backward()
    assert_close(ours_logits.grad, theirs_logits.grad)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_capacity_larger_than_the_batch(k):
    """Upstream's topk crashed on it (DeepSpeed #5353, #8155)."""
    assert len(slots(gate(torch.randn(5, 6), k, capacity_factor=40.0))) == 5 * k


def test_use_rts_false_keeps_to_the_capacity():
    """Upstream once ignored it (DeepSpeed #1658)."""
    gating = gate(torch.tensor([1.0, 0]).expand(8, 2), 1, use_rts=False)
    assert slots(gating) == [(t, 0, t) for t in range(4)]


def test_many_choices_without_drops():
    """k > 2 with drop_tokens=False crashed upstream (DeepSpeed #6913)."""
    assert len(slots(gate(torch.randn(9, 6), 4, drop_tokens=False))) == 36


def test_no_tokens():
    for k in (1, 2, 3):
        gating = gate(torch.zeros(0, 4, requires_grad=True), k)
        assert gating.exp_counts.tolist() == [0, 0, 0, 0]
        assert gating.l_aux.item() == 0.0


def test_float64_and_gradients():
    logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)

    def outputs(x: Tensor) -> tuple[Tensor, Tensor]:
        gating = gate(x, 2, capacity_factor=0.7)
        return gating.l_aux, gating.weights

    assert torch.autograd.gradcheck(outputs, (logits,))


@pytest.mark.parametrize("k", [1, 2])
def test_noise_is_for_training_only(k):
    """Upstream samples the second expert in eval too (DeepSpeed #8620)."""
    policy = "RSample" if k == 1 else None
    layer = TopKGate(8, 6, k, noisy_gate_policy=policy, use_rts=False, drop_tokens=False)
    x = torch.randn(64, 8)
    layer.eval()
    assert all(torch.equal(layer(x).experts, layer(x).experts) for _ in range(3))
    clean = layer.logits(x).topk(k).indices
    assert torch.equal(layer(x).experts.long(), clean)
    layer.train()
    assert not torch.equal(layer(x).experts.long(), clean)


def test_jitter_moves_the_gate_only_in_training():
    layer = TopKGate(8, 6, 1, noisy_gate_policy="Jitter")
    x = torch.randn(64, 8)
    noisy = layer.logits(x)
    clean = layer.eval().logits(x)
    assert torch.equal(clean, x @ layer.wg.weight.T)
    bound = 0.0101 * (x.abs() @ layer.wg.weight.abs().T)
    assert ((noisy - clean).abs() > 0).all()
    assert ((noisy - clean).abs() <= bound).all()


def test_train_and_eval_capacity():
    layer = TopKGate(8, 4, 1, capacity_factor=0.5, eval_capacity_factor=1.0, min_capacity=0)
    torch.nn.init.zeros_(layer.wg.weight)
    x = torch.randn(16, 8)
    assert (layer(x).dispatched.position >= 0).sum() == 2
    assert (layer.eval()(x).dispatched.position >= 0).sum() == 4


def test_the_gate_computes_in_fp32():
    """In a bf16 model the logits are the fp32 linear of the upcast values, also under autocast."""
    layer = TopKGate(8, 6, 1).to(torch.bfloat16)
    x = torch.randn(5, 8).bfloat16()
    expected = torch.nn.functional.linear(x.float(), layer.wg.weight.float())
    assert torch.equal(layer.logits(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.logits(x), expected)


def test_memory_does_not_grow_with_the_capacity():
    """Every tensor of a gating is far smaller than [S, E, C]."""
    gating = gate(torch.randn(512, 64), 2)
    tensors = [
        *gating[:4],
        gating.dispatched.counts,
        gating.dispatched.offsets,
        gating.dispatched.source,
        gating.dispatched.position,
    ]
    assert max(tensor.numel() for tensor in tensors) <= 512 * 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 4}, ValueError, "k: got 4"),
        ({"k": 0}, ValueError, "k: got 0"),
        ({"drop_policy": "choice"}, ValueError, "drop_policy: got 'choice'"),
        ({"used_token": torch.ones(3)}, ValueError, r"used_token: got shape \[3\], wanted \[4\]"),
        ({"logits": torch.zeros(4)}, ValueError, r"logits: got shape \[4\]"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, message):
    arguments = {"logits": L, "k": 1, **arguments}
    with pytest.raises(error, match=message):
        top_k_gating(arguments.pop("logits"), arguments.pop("k"), **arguments)


def test_bad_policy():
    with pytest.raises(ValueError, match=r"noisy_gate_policy: got 'Gauss', wanted one of None, None, Jitter, RSample"):
        TopKGate(8, 4, noisy_gate_policy="Gauss")
