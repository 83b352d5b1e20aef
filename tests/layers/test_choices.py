"""The router's rules of choice, each against loops over tokens and experts; what every rule has to do in a layer."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_triton import MoE, Router, reference
from moe_triton.records import EMPTY
from moe_triton.reference import choices
from tests.helpers.compare import assert_close

D, E, K = 8, 6, 2
TABLE = torch.rand(20, E).argsort(1)[:, :K]
RULES = {
    "expert_choice": {"expert_choice": 1.5},
    "hash_table": {"hash_table": TABLE},
    "sinkhorn": {"sinkhorn": 5},
    "top_p": {"top_p": 0.5, "choice_bias": True},
    "token_rounding": {"token_rounding": 4, "gumbel": True},
    "forced_balance": {"forced_balance": True},
    "identity": {"null_experts": 3, "score": "sqrt_softplus"},
    "zero": {"null_experts": 3, "null_output": "zero", "choice_bias": True},
    "quantile": {"choice_bias": True, "bias_update": "quantile"},
}


def make(rule, seed=0, **options):
    """A layer whose router has a rule, and the arguments that its forward needs beside the hidden states."""
    torch.manual_seed(seed)
    router = Router(D, E, K, **RULES[rule], **options)
    layer = MoE(D, 4, E, K, router=router, aux_loss_weight=0.1, z_loss_weight=0.01, sequence_loss_weight=0.1)
    return layer, ({"token_ids": torch.randint(0, 20, (3, 10))} if rule == "hash_table" else {})


def test_expert_choice_takes_each_experts_best_tokens():
    scores = torch.rand(2, 9, E).round(decimals=1)  # with ties
    scores[0, 4] = float("-inf")  # does not count
    for top_k in (E, 2):
        got = choices.expert_choice(scores, 3, top_k)
        for g in range(2):
            takers = [[] for _ in range(9)]
            for e in range(E):
                best = sorted(range(9), key=lambda t: (-scores[g, t, e].item(), t))[:3]
                for t in best:
                    takers[t] += [e] if scores[g, t, e] > float("-inf") else []
            for t in range(9):
                kept = sorted(takers[t], key=lambda e: (-scores[g, t, e].item(), e))[:top_k]
                assert got[g, t].tolist() == kept + [EMPTY] * (top_k - len(kept))


def test_expert_choice_evens_out_the_load():
    router = Router(D, E, E, expert_choice=2.0)
    mask = torch.arange(30) % 5 != 0
    routing = router(torch.randn(30, D) + 1, mask)
    assert routing.counts.tolist() == [10] * E  # ceil(2 * 30 / 6)
    assert (routing.experts[~mask] == -1).all()
    assert len(set((routing.experts >= 0).sum(1).tolist())) > 2  # experts per token vary


def test_hash_routing_looks_the_experts_up_and_weights_them():
    router = Router(D, E, K, score="sqrt_softplus", normalize=True, hash_table=TABLE)
    x, ids = torch.randn(4, D), torch.tensor([3, 19, -1, 20])
    routing = router(x, token_ids=ids)
    assert routing.experts[:2].tolist() == TABLE[ids[:2]].tolist()
    assert routing.experts[2:].tolist() == [[EMPTY] * K] * 2
    scores = torch.nn.functional.softplus(router.gate(x)[:2]).sqrt().gather(1, TABLE[ids[:2]])
    assert_close(routing.weights[:2], scores / scores.sum(1, keepdim=True))
    assert (routing.weights[2:] == 0).all()
    assert "hash_table" in router.state_dict()
    with pytest.raises(ValueError, match=r"token_ids: got None, wanted \[4\] for a router with a hash_table"):
        router(x)
    with pytest.raises(ValueError, match=r"token_ids: got shape \[3\], wanted \[4\]"):
        router(x, token_ids=ids[:3])
    with pytest.raises(ValueError, match=r"token_ids: got shape \[2, 9\], wanted \[2, 10\]"):
        MoE(D, 4, E, K, router=router)(torch.randn(2, 10, D), token_ids=torch.zeros(2, 9).long())


def test_sinkhorn_is_the_scaling_of_rows_and_columns():
    logits = 2 * torch.randn(40, E, dtype=torch.float64) + torch.arange(E)
    cost = logits.exp()
    rows, columns = torch.ones(40, dtype=torch.float64), torch.ones(E, dtype=torch.float64)
    for _ in range(7):  # Megatron-Core's loop, with a number of rounds in place of its tolerance
        rows = 1 / (40 * (columns * cost).sum(1))
        columns = 1 / (E * (rows[:, None] * cost).sum(0))
    matrix = rows[:, None] * cost * columns
    padded = torch.cat([logits, torch.full((3, E), float("-inf"), dtype=torch.float64)])  # tokens that do not count
    offsets = choices.sinkhorn_offsets(padded[None], 7)[0, 0]
    mine = (logits + offsets).softmax(1)
    assert_close(mine, matrix / matrix.sum(1, keepdim=True))
    assert torch.equal((logits + offsets).topk(2).indices, matrix.topk(2).indices)
    plain, even = logits.topk(2).indices.flatten().bincount(), (logits + offsets).topk(2).indices.flatten().bincount()
    assert even.max() < plain.max()
    strange = torch.tensor([[float("nan"), float("inf"), 0.0], [1e38, -1e38, 0.0]])
    assert torch.isfinite(choices.sinkhorn_offsets(strange[None], 3)).all()


def test_top_p_takes_experts_until_the_mass_is_reached():
    router = Router(D, E, 4, top_p=0.7, normalize=False)
    x = 2 * torch.randn(50, D)
    probabilities = router.gate(x).softmax(1)
    routing = router(x)
    sizes = set()
    for token, row in zip(probabilities, routing.experts.tolist(), strict=True):
        order, mass, wanted = token.argsort(descending=True).tolist(), 0.0, []
        for e in order[:4]:
            if mass >= 0.7:
                break
            wanted.append(e)
            mass += token[e].item()
        assert row == wanted + [EMPTY] * (4 - len(wanted))
        sizes.add(len(wanted))
    assert len(sizes) > 2
    chosen = routing.experts >= 0
    assert_close(routing.weights[chosen], probabilities.gather(1, routing.experts.long().clamp_min(0))[chosen])


def sonic_rounding(scores, top_k, tile):
    """The paper's algorithm: own choices before all others, each sorted by score within an expert; [T, E] bool."""
    num_tokens, num_experts = scores.shape
    own = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(top_k).indices, True)
    rounded = (own.sum(0) / tile).round().long() * tile
    kept = torch.zeros_like(own)
    for e in range(num_experts):
        order = sorted(range(num_tokens), key=lambda t: -(scores[t, e].item() - (0.0 if own[t, e] else 1.0)))
        kept[order[: rounded[e]], e] = True
    return kept


@pytest.mark.parametrize("tile", [1, 4, 7, 16])
def test_token_rounding_is_sonic_moes_where_all_are_offered(tile):
    router = Router(D, E, K, token_rounding=tile, rounding_extra=E - K)
    x = torch.randn(60, D) + 0.3
    routing = router(x)
    kept = sonic_rounding(router.gate(x).softmax(1), K, tile)
    mine = torch.zeros(60, E + 1, dtype=torch.bool).scatter(1, routing.experts.long().clamp_min(-1) % (E + 1), True)
    assert torch.equal(mine[:, :E], kept)
    assert (routing.counts % tile == 0).all()


def test_token_rounding_saves_tiles_and_drops_the_least_certain():
    tile, x = 16, torch.randn(400, D)
    torch.manual_seed(0)
    router = Router(D, E, K, token_rounding=tile)
    plain = router.eval()(x)
    rounded = router.train()(x)
    assert plain.experts.shape == (400, K)
    assert rounded.experts.shape == (400, K + 1)
    assert (rounded.counts % tile == 0).all()

    def tiles(counts):
        return ((counts + tile - 1) // tile).sum().item()

    assert tiles(rounded.counts) < tiles(plain.counts)
    assert (rounded.counts - plain.counts).abs().max() <= tile // 2
    probabilities = router.gate(x).softmax(1)
    for e in range(E):
        before, after = ((r.experts == e).any(1) for r in (plain, rounded))
        dropped, added = before & ~after, after & ~before
        assert not (dropped.any() and added.any())
        if dropped.any():
            assert probabilities[dropped, e].max() <= probabilities[before & after, e].min()


def test_rounding_goes_down_where_too_few_tokens_are_left():
    ids = torch.tensor([[[0, 1], [0, 1], [0, -1]]], dtype=torch.int32)
    scores = torch.tensor([[[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]])
    # three choices of a tile of four, and nobody whose later choice expert 0 is
    assert choices.token_rounding(scores, ids, 2, 1, 4, 1).tolist() == [[[-2, -2], [-2, -2], [-2, -2]]]
    ids = torch.tensor([[[0, 1], [0, 1], [0, 1], [1, 0]]], dtype=torch.int32)
    got = choices.token_rounding(torch.rand(1, 4, 2), ids, 2, 1, 4, 1)
    assert got.tolist() == [[[0, -2], [0, -2], [0, -2], [-2, 0]]]


def test_a_half_is_rounded_to_the_even_multiple():
    ids = torch.tensor([[[0, 1], [0, 1], [0, 1], [1, 0], [1, 0], [1, 0], [2, 0]]], dtype=torch.int32)
    scores = torch.tensor([[[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.9, 0.1]]])
    got = choices.token_rounding(scores, ids, 3, 1, 2, 1)
    # three of two to four, with the token of the highest score; one of two to none
    assert got.tolist() == [[[0, -2], [0, -2], [0, 1], [1, -2], [1, -2], [1, 0], [-2, -2]]]


def test_an_expert_that_a_token_refuses_asks_the_next():
    ids = torch.tensor([[[0, 1, 2], [0, 1, 2], [0, 2, 1], [1, 2, 0], [1, 0, 2], [1, 0, 2], [2, 0, 1], [2, 1, 0]]])
    scores = torch.full((1, 8, 3), 0.1)
    scores[0, :, 0] = 0.5
    scores[0, 6] = torch.tensor([0.4, 0.35, 0.25])  # experts 0 and 1, with three tokens of a tile of four, like it best
    one, two = (choices.token_rounding(scores, ids.int(), 3, 1, 4, extra)[0] for extra in (1, 2))
    for got in (one, two):
        assert [(got == e).sum() for e in range(3)] == [4, 4, 0]
    assert one[6].tolist() == [-2, 0]  # the one that it scores higher
    assert two[6].tolist() == [-2, 0, 1]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_null_experts_return_the_token_or_nothing(backend, score):
    """LongCat-Flash: sum over real experts of w_e E_e(x), plus the sum of the null choices' weights times x."""
    torch.manual_seed(1)
    x = torch.randn(40, D)
    outputs = {}
    for null_output in ("identity", "zero"):
        torch.manual_seed(0)
        router = Router(D, E, 3, score=score, normalize=True, null_experts=4, null_output=null_output, backend=backend)
        layer = MoE(D, 5, E, 3, router=router, backend=backend)
        out, routing = layer(x), router(x)
        scores = reference.router_scores(router.gate(x).double(), score)
        ids = scores.topk(3).indices
        assert torch.equal(routing.experts.long(), ids)
        is_real = ids < E
        assert len(set(is_real.sum(1).tolist())) == 4  # none to three real experts
        counted = scores.gather(1, ids) * (is_real if null_output == "zero" else 1)
        weights = counted / (counted.sum(1, keepdim=True) + reference.EPS)
        assert_close(routing.weights, weights)
        wanted = torch.zeros(40, D, dtype=torch.float64)
        for t in range(40):
            for k in range(3):
                e = ids[t, k].item()
                if e < E:
                    h = layer.experts.gate_up_proj[e].double() @ x[t].double()
                    a = torch.nn.functional.silu(h[:5]) * h[5:]
                    wanted[t] += weights[t, k] * (layer.experts.down_proj[e].double() @ a)
                elif null_output == "identity":
                    wanted[t] += weights[t, k] * x[t].double()
        assert_close(out.output, wanted)
        assert out.expert_counts.tolist() == ids.flatten().bincount(minlength=E)[:E].tolist()
        assert routing.counts.shape == (E + 4,)
        outputs[null_output] = out.output
    assert not torch.equal(*outputs.values())


def test_forced_balance_deals_the_experts_out():
    router = Router(D, E, 4, forced_balance=True, score="sigmoid", normalize=False)
    x = torch.randn(9, D)
    routing = router.eval()(x)
    assert routing.counts.tolist() == [6] * E
    assert routing.experts[:2].tolist() == [[0, 1, 2, 3], [4, 5, 0, 1]]
    assert_close(routing.weights, router.gate(x).sigmoid().gather(1, routing.experts.long()))


def test_quantile_update_balances_and_is_the_quantile():
    torch.manual_seed(0)
    router = Router(D, E, K, score="sigmoid", choice_bias=True, bias_update="quantile")
    x = torch.randn(600, D) + 1
    mask = torch.arange(600) % 6 != 0
    before = router(x[:300], mask[:300]).counts + router(x[300:], mask[300:]).counts
    scores = router.gate(x)[mask].sigmoid().double()
    wanted = choices.quantile_bias(scores, torch.zeros(E, dtype=torch.float64), K)
    router.update_choice_bias()
    assert (router.choice_bias - wanted).abs().max() < 2 * 2 / 1000  # two bins, of which the mean takes one
    assert router.choice_bias.dtype == torch.float32
    assert router.load.sum() == 0
    for _ in range(4):
        after = router(x, mask).counts
        router.update_choice_bias()
    assert after.max() / after.float().mean() < 1.1 < 1.5 < before.max() / before.float().mean()
    kept = router.choice_bias.clone()
    router.load.zero_()
    router.update_choice_bias()
    assert torch.equal(router.choice_bias, kept)  # nothing was counted


def loss(out):
    return out.output.square().sum() + out.aux_loss


@pytest.mark.parametrize("rule", RULES)
def test_a_masked_token_counts_nowhere(rule):
    """The same as a batch without it, and NaN in it reaches nothing."""
    layer, more = make(rule)
    layer.router.gumbel = False
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[:, 7:] = False
    x = torch.randn(3, 10, D)
    x[:, 7:] = float("nan")
    x.requires_grad_()
    out = layer(x, mask, **more)
    loss(out).backward()
    got = [x.grad[:, :7].clone(), *(p.grad.clone() for p in layer.parameters())]
    assert (x.grad[:, 7:] == 0).all()
    if rule in ("forced_balance", "expert_choice"):  # by position, and by the number of tokens, masked ones included
        return
    layer.zero_grad()
    alone = x.detach()[:, :7].requires_grad_()
    expected = layer(alone, **{name: ids[:, :7] for name, ids in more.items()})
    loss(expected).backward()
    assert_close(out.output[:, :7], expected.output)
    assert_close(out.aux_loss, expected.aux_loss)
    for a, b in zip(got, [alone.grad, *(p.grad for p in layer.parameters())], strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("rule", RULES)
def test_recomputation_and_autocast(rule):
    """Recomputed, the same bits and nothing counted twice; under autocast, the same choices."""
    layer, more = make(rule)
    x = torch.randn(3, 10, D, requires_grad=True)
    found = []
    for recomputed in (False, True):
        layer.zero_grad()
        x.grad = None
        torch.manual_seed(3)
        out = checkpoint(layer, x, use_reentrant=False, **more) if recomputed else layer(x, **more)
        loss(out).backward()
        found.append([out.output, x.grad, *(p.grad.clone() for p in layer.parameters())])
        if layer.router.load is not None:
            found[-1].append(layer.router.load.clone())
            layer.router.load.zero_()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer(x, **more)
    assert torch.equal(cast.expert_counts, out.expert_counts)
    assert torch.equal(cast.aux_loss, out.aux_loss)


@pytest.mark.parametrize("rule", RULES)
def test_the_kernels_agree_and_a_choice_can_be_replayed(rule):
    """The triton backend and torch's, and the choice that is given back."""
    found = []
    for backend in ("torch", "triton"):
        layer, more = make(rule, backend=backend)
        ids = {name: value.flatten() for name, value in more.items()}
        x = torch.randn(30, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(2)
        routing = layer.router(x, **ids, sequences=3)
        (routing.weights.square().sum() + routing.sequences.score_sums.square().sum() + routing.z_sum).backward()
        found.append((routing, x.grad, layer.router.weight.grad))
        again = layer.router(x, None, routing.experts, **ids)
        assert torch.equal(again.experts, routing.experts)
        assert torch.equal(again.weights, routing.weights)
        assert torch.equal(again.counts, routing.counts)
    (a, *grads), (b, *others) = found
    assert torch.equal(a.experts, b.experts)
    assert torch.equal(a.sequences.counts, b.sequences.counts)
    for x, y in ((a.weights, b.weights), (a.score_sums, b.score_sums), *zip(grads, others, strict=True)):
        assert_close(x, y.double())


@pytest.mark.parametrize("rule", ["expert_choice", "sinkhorn", "token_rounding"])
def test_choice_groups_are_batches_of_their_own(rule):
    whole, _ = make(rule, choice_groups=3)
    part, _ = make(rule)
    whole.router.gumbel = part.router.gumbel = False
    x = torch.randn(30, D)
    got = whole.router(x)
    parts = [part.router(piece) for piece in x.split(10)]
    assert torch.equal(got.experts, torch.cat([p.experts for p in parts]))
    with pytest.raises(ValueError, match="choice_groups: got 3, wanted a divisor of the 31 tokens"):
        whole.router(torch.randn(31, D))


@pytest.mark.parametrize("rule", ["expert_choice", "sinkhorn", "top_p", "token_rounding"])
def test_no_tokens_and_strange_numbers(rule):
    layer, _ = make(rule)
    assert layer(torch.randn(0, D)).output.shape == (0, D)
    strange = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0])[torch.randint(0, 4, (12, D))]
    ids = layer.router(strange).experts
    assert ((ids >= -2) & (ids < E)).all()
    for row in ids.tolist():
        real = [e for e in row if e >= 0]
        assert len(set(real)) == len(real)


def test_capacity_drops_among_what_a_rule_chose():
    layer, _ = make("token_rounding")
    layer.capacity_factor, layer.min_capacity = 0.5, 0
    out = layer(torch.randn(3, 10, D))
    loss(out).backward()
    assert (out.expert_counts % 4 == 0).all()
    assert torch.isfinite(layer.router.weight.grad).all()


def test_given_experts_take_the_place_of_the_rule():
    layer, _ = make("token_rounding")
    x, ids = torch.randn(30, D), torch.rand(30, E).argsort(1)[:, : K + 1].int()
    assert torch.equal(layer.router(x, None, ids).experts, ids)
    assert torch.equal(layer.router(x, None, ids[:, :K]).experts, ids[:, :K])
    with pytest.raises(ValueError, match=r"experts: got shape \[30, 1\], wanted \[30, 2\]"):
        layer.router(x, None, ids[:, :1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expert_choice": 1.0, "top_p": 0.5}, "expert_choice, top_p: got 2 rules of choice, wanted at most one"),
        ({"expert_choice": 0}, "expert_choice: got 0, wanted a number > 0"),
        ({"top_p": -0.1}, "top_p: got -0.1, wanted a number > 0"),
        ({"sinkhorn": 0}, "sinkhorn: got 0, wanted at least 1"),
        ({"token_rounding": 0}, "token_rounding: got 0, wanted at least 1"),
        ({"token_rounding": 8, "rounding_extra": 5}, "rounding_extra: got 5, wanted at most 4"),
        ({"choice_groups": 0}, "choice_groups: got 0, wanted at least 1"),
        ({"hash_table": TABLE[:, :1]}, r"hash_table: got shape \[20, 1\], wanted \[V, 2\]"),
        ({"hash_table": TABLE, "choice_bias": True}, r"choice_bias: got True with HashRouting\(\), wanted False"),
        ({"forced_balance": True, "gumbel": True}, r"gumbel: got True with ForcedBalance\(\), wanted False"),
        ({"expert_choice": 1.0, "num_groups": 3}, r"num_groups: got 3 with ExpertChoice\(.*\), wanted 1"),
        ({"top_p": 0.5, "choice_groups": 2}, "choice_groups: got 2 without a rule that looks at a batch"),
        ({"null_experts": -1}, "null_experts: got -1, wanted at least 0"),
        ({"null_output": "one"}, "null_output: got 'one', wanted one of identity, zero"),
        ({"bias_update": "mean"}, "bias_update: got 'mean', wanted one of sign, quantile"),
        ({"bias_update": "quantile"}, "bias_update: got 'quantile' with choice_bias=False"),
        ({"bias_update": "quantile", "choice_bias": True, "score": "sqrt_softplus"}, "score: got 'sqrt_softplus' with"),
        ({"bias_update": "quantile", "choice_bias": True, "num_groups": 3}, "num_groups: got 3 with bias_update"),
        ({"bias_update": "quantile", "choice_bias": True, "top_k": E}, "top_k: got 6 with bias_update"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Router(**({"hidden_size": D, "num_experts": E, "top_k": K} | arguments))


def test_identity_experts_and_renormalisation_exclude_each_other():
    router = Router(D, E, K, null_experts=2)
    with pytest.raises(ValueError, match="renormalize: got True with null experts that return the token"):
        MoE(D, 4, E, K, router=router, renormalize=True)
