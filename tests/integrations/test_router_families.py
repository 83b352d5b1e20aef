"""The routers of transformers' models that choose by more than a top-k, against ours with the same weights."""

from __future__ import annotations

import torch
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as deepseek_v4
from transformers.models.longcat_flash import modeling_longcat_flash as longcat

from moe_triton import MoE, Router
from tests.helpers.compare import assert_close

D, N, E, K, VOCAB = 16, 12, 6, 3, 20


def by_id(weights, ids):
    """[T, E + Z]: the weight of each expert, whatever the order of the choices."""
    return torch.zeros(ids.shape[0], 16).scatter(1, ids.long(), weights.float())


def deepseek_config(**more):
    return deepseek_v4.DeepseekV4Config(
        hidden_size=D,
        moe_intermediate_size=N,
        n_routed_experts=E,
        num_experts_per_tok=K,
        vocab_size=VOCAB,
        routed_scaling_factor=1.5,
        num_hidden_layers=1,
        **more,
    )


def test_deepseek_v4s_top_k_router():
    theirs = deepseek_v4.DeepseekV4TopKRouter(deepseek_config())
    torch.nn.init.normal_(theirs.weight)
    theirs.e_score_correction_bias.copy_(torch.randn(E) / 2)
    ours = Router(D, E, K, score="sqrt_softplus", normalize=True, scale=1.5, choice_bias=True)
    ours.weight.data.copy_(theirs.weight)
    ours.choice_bias.copy_(theirs.e_score_correction_bias)
    x = torch.randn(50, D)
    _, weights, ids = theirs(x)
    routing = ours(x)
    assert_close(by_id(routing.weights, routing.experts), by_id(weights, ids))
    plain = Router(D, E, K, score="sqrt_softplus", normalize=True, scale=1.5)
    plain.weight.data.copy_(theirs.weight)
    assert not torch.equal(plain(x).counts, routing.counts)  # the bias matters


def test_deepseek_v4s_hash_router():
    theirs = deepseek_v4.DeepseekV4HashRouter(deepseek_config())
    torch.nn.init.normal_(theirs.weight)
    theirs.tid2eid.copy_(torch.rand(VOCAB, E).argsort(1)[:, :K])
    ours = Router(D, E, K, score="sqrt_softplus", normalize=True, scale=1.5, hash_table=theirs.tid2eid)
    ours.weight.data.copy_(theirs.weight)
    x, token_ids = torch.randn(50, D), torch.randint(0, VOCAB, (50,))
    _, weights, ids = theirs(x, token_ids)
    routing = ours(x, token_ids=token_ids)
    assert torch.equal(routing.experts.long(), ids)
    assert_close(routing.weights, weights)


def test_longcats_layer_with_zero_computation_experts():
    config = longcat.LongcatFlashConfig(
        hidden_size=D,
        expert_ffn_hidden_size=N,
        n_routed_experts=E,
        zero_expert_num=4,
        moe_topk=K,
        routed_scaling_factor=2.0,
        num_layers=1,
    )
    theirs = longcat.LongcatFlashMoE(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.router.e_score_correction_bias.copy_(torch.randn(E + 4) / 10)
    top_k = theirs.router.top_k
    router = Router(D, E, top_k, normalize=False, scale=2.0, null_experts=4, choice_bias=True)
    router.weight.data.copy_(theirs.router.classifier.weight)
    router.choice_bias.copy_(theirs.router.e_score_correction_bias)
    ours = MoE(D, N, E, top_k, router=router)
    ours.experts.gate_up_proj.data.copy_(theirs.experts.gate_up_proj[:E])
    ours.experts.down_proj.data.copy_(theirs.experts.down_proj)
    x = torch.randn(2, 30, D)
    out = ours(x)
    assert_close(out.output, theirs(x))
    assert 0 < out.expert_counts.sum() < 60 * top_k  # some choices are null
