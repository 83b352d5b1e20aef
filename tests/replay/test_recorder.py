"""`RoutingRecorder` on our layers and on whole transformers models: what is recorded, replayed, and repeated."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe_triton
from moe_triton import MoE, Router, RoutingRecorder
from moe_triton.integrations.transformers_routers import routed_layers
from moe_triton.replay import layer_index
from tests.helpers.families import FAMILIES, VOCAB, tiny_model

D, E, K = 8, 6, 2


class Layered(nn.Module):
    """A dense layer 0 and MoE layers 1 and 2, each under activation checkpointing of a kind, or of none."""

    def __init__(self, use_reentrant=None, keep_noise=True, **options):
        super().__init__()
        moe = [MoE(D, 4, E, K, router=Router(D, E, K, **options)) for _ in range(2)]
        self.layers = nn.ModuleList([nn.Linear(D, D), *moe])
        self.use_reentrant, self.keep_noise = use_reentrant, keep_noise

    def forward(self, x):
        first, *rest = self.layers
        x = first(x)
        for step in (partial(self.block, layer) for layer in rest):
            if self.use_reentrant is None:
                x = step(x)
            else:
                x = checkpoint(step, x, use_reentrant=self.use_reentrant, preserve_rng_state=self.keep_noise)
        return {"out": x}

    @staticmethod
    def block(layer, x):
        return x + layer(x).output


def twin_of(model, **changes):
    twin = Layered(**changes)
    twin.load_state_dict(model.state_dict())
    return twin


def gradients(model):
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return found


def same(found, wanted):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def distinct_ids(tokens, layers=3, choices=K, experts=E):
    return torch.rand(tokens, layers, experts).argsort(-1)[..., :choices].int()


# What is recorded and replayed ----------------------------------------------------------------------------------------


def test_layers_are_keyed_by_their_index_in_the_model():
    model, x = Layered(), torch.randn(5, D)
    recorder = RoutingRecorder(model)
    assert recorder.layers == {"layers.1.router": 1, "layers.2.router": 2}
    with recorder.record():
        model(x)
        model(x[:2])
    data = recorder.data
    assert (data.shape, data.dtype) == ((7, 3, K), torch.int32)
    assert (data[:, 0] == -1).all()
    hidden = model.layers[0](x)
    assert torch.equal(data[:5, 1], model.layers[1].router(hidden).experts)
    assert torch.equal(data[5:], data[:2])
    with recorder.record():  # starts anew
        model(x[:1])
    assert torch.equal(recorder.data, data[:1])


def test_recorded_choices_give_the_same_bits_and_other_choices_are_made():
    model, x = Layered(), torch.randn(9, D)
    model(x)["out"].square().sum().backward()
    wanted = gradients(model)
    recorder = RoutingRecorder(model)
    with recorder.record():
        out = model(x)["out"]
    with recorder.replay(recorder.data.long()):
        again = model(x)["out"]
    assert torch.equal(again, out)
    again.square().sum().backward()
    assert same(gradients(model), wanted)
    other = distinct_ids(9)
    seen = []
    for layer in model.layers[1:]:
        layer.router.register_forward_hook(lambda _, args, routing: seen.append(routing))
    with recorder.replay(other):
        assert not torch.equal(model(x)["out"], out)
    for index, routing in enumerate(seen, 1):
        assert torch.equal(routing.experts, other[:, index])
        assert routing.weights.requires_grad
    recorder.close()
    assert torch.equal(model(x)["out"], out)
    assert all("forward" not in vars(layer.router) for layer in model.layers[1:])


def test_rows_without_data_and_rows_that_are_wrong_are_chosen_from_the_logits():
    model, x = Layered(), torch.randn(6, D)
    recorder = RoutingRecorder(model)
    with recorder.record():
        model(x)
    live, data = recorder.data, distinct_ids(6)
    data[0, :, 0] = E
    data[1, :, 1] = data[1, :, 0]
    data[2] = -1
    data[3, :, 0] = -(2**31)
    mask = torch.tensor([1, 1, 1, 1, 1, 0])
    with recorder.replay(data, mask):
        first = model(x)["out"]
    assert recorder.invalid == 3 * 2  # rows 0, 1 and 3, in two layers
    expected = live.clone()
    expected[4] = data[4]
    # the first routed layer sees the same input as when it was recorded; the second one's differs in row 4
    with recorder.replay(expected):
        assert torch.equal(model(x)["out"][[0, 1, 2, 3, 5]], first[[0, 1, 2, 3, 5]])
    with recorder.replay(data, mask.bool()):
        assert torch.equal(model(x)["out"], first)


def test_several_forward_passes_take_the_rows_in_turn():
    model, x, data = Layered(), torch.randn(7, D), distinct_ids(7)
    recorder = RoutingRecorder(model)
    with recorder.replay(data):
        whole = model(x)["out"]
    with recorder.replay(data, torch.ones(7).bool()):
        parts = [model(part)["out"] for part in x.split([3, 4])]
        with pytest.raises(ValueError, match=r"data: got 7 tokens, wanted at least 8 for layers\.1\.router"):
            model(x[:1])
    torch.testing.assert_close(torch.cat(parts), whole)
    with recorder.replay(data[:3]):
        assert torch.equal(model(x[:3])["out"], parts[0])


# Activation checkpointing ---------------------------------------------------------------------------------------------


def steps(order, model, recorder, micro_batches):
    """Two micro-batches with choices of their own; their backward passes are inside of the contexts, or after both."""
    losses = []
    for x, data in micro_batches:
        with recorder.replay(data):
            losses.append(model(x)["out"].square().sum())
            if order == "inside":
                losses.pop().backward()
    if order == "together":
        sum(losses).backward()
    for loss in losses if order == "first first" else losses[::-1] if order == "last first" else ():
        loss.backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("order", ["inside", "together", "first first", "last first"])
def test_a_repeated_forward_makes_the_choices_of_its_own_pass(use_reentrant, order):
    model = Layered()
    micro_batches = [(torch.randn(9, D), distinct_ids(9)) for _ in range(2)]
    steps(order, model, RoutingRecorder(model), micro_batches)
    wanted = gradients(model)
    twin = twin_of(model, use_reentrant=use_reentrant)
    recorder = RoutingRecorder(twin)
    steps(order, twin, recorder, micro_batches)
    assert same(gradients(twin), wanted)
    recorder._passes.repeated = lambda router: None  # shown to matter
    if use_reentrant:  # the other kind notices itself that not the same tensors are saved, where it can
        steps(order, twin, recorder, micro_batches)
        assert not same(gradients(twin), wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_passes_with_and_without_given_choices_are_told_apart(use_reentrant):
    model, x, data = Layered(), torch.randn(9, D), distinct_ids(9)

    def losses(model, recorder):
        before = model(x)["out"].square().sum()
        with recorder.replay(data):
            given = model(x)["out"].square().sum()
        with torch.no_grad(), recorder.replay(data.flip(0)):  # an evaluation between forward and backward
            model(x)
        after = model(2 * x)["out"].square().sum()
        (before + 2 * given + 3 * after).backward()
        return gradients(model)

    wanted = losses(model, RoutingRecorder(model))
    twin = twin_of(model, use_reentrant=use_reentrant)
    assert same(losses(twin, RoutingRecorder(twin)), wanted)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recorded_pass_is_repeated_with_what_was_recorded(use_reentrant):
    """Noise that the repetition does not repeat would choose other experts."""
    model = Layered(use_reentrant, keep_noise=False, gumbel=True).train()
    recorder, x = RoutingRecorder(model), torch.randn(40, D)
    with recorder.record():
        out = model(x)["out"]
    out.square().sum().backward()
    found = gradients(model)
    plain = twin_of(model, gumbel=True)
    with RoutingRecorder(plain).replay(recorder.data):
        plain(x)["out"].square().sum().backward()
    assert same(found, gradients(plain))
    # so are the rows without data of a replayed pass
    seen = []
    for layer in model.layers[1:]:
        layer.experts.register_forward_pre_hook(lambda _, args: seen.append(args[2].position))
    with recorder.replay(distinct_ids(40), torch.zeros(40).bool()):
        out = model(x)["out"]
    out.square().sum().backward()
    assert torch.equal(seen[0], seen[3])
    assert torch.equal(seen[1], seen[2])


def test_a_checkpoint_around_the_whole_model():
    model, x, data = Layered(), torch.randn(9, D), distinct_ids(9)
    recorder = RoutingRecorder(model)
    found = []
    for kind in (None, False, True):
        with recorder.replay(data):
            leaf = x.clone().requires_grad_()
            whole = partial(checkpoint, use_reentrant=kind) if kind is not None else lambda step, x: step(x)
            out = whole(lambda x: model(x)["out"], leaf)
        out.square().sum().backward()
        found.append([leaf.grad, *gradients(model)])
    assert same(found[1], found[0])
    assert same(found[2], found[0])


def test_passes_are_forgotten_with_their_graphs():
    model, x = Layered(use_reentrant=True), torch.randn(9, D)
    recorder = RoutingRecorder(model)
    for _ in range(3):
        with recorder.replay(distinct_ids(9)):
            loss = model(x)["out"].square().sum()
        loss.backward()
    del loss
    gc.collect()
    model(x)
    alive = [found for found in (ref() for ref in recorder._passes.known) if found is not None]
    assert alive == [recorder._passes.latest]


# transformers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_trains_with_another_ones_choices(family):
    """In fp32, from transformers' eager path to ours, with weights that have moved since."""
    rollout, model = tiny_model(family), tiny_model(family)
    moe_triton.swap(model)
    with torch.no_grad():
        for layer in routed_layers(model):
            for parameter in layer.router.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    tokens = torch.randint(2, VOCAB, (2, 5))
    recorder = RoutingRecorder(rollout)
    with recorder.record(), torch.inference_mode():
        rollout.eval()(tokens)
    data = recorder.data
    layers = routed_layers(model)
    routed = [layer_index(layer.name) for layer in layers]
    assert data.shape == (10, 2, layers[0].top_k)
    assert all((data[:, index] >= 0).all() == (index in routed) for index in range(2))

    seen = []
    for layer in layers:
        layer.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1].int()))
    model.train()
    monitor = moe_triton.LoadMonitor(model)
    model(tokens)
    readings = monitor.read(mode="train")
    assert list(readings) == [layer.name for layer in layers] == [found.name for found in moe_triton.explain(model)]
    for reading, layer in zip(readings.values(), layers, strict=True):
        assert reading.assignments == 10 * layer.top_k
        assert (reading.dropped, len(reading.loads)) == (0.0, layer.num_experts)
        assert reading.balance > 0
    assert not all(torch.equal(ids, data[:, index]) for ids, index in zip(seen, routed, strict=True))
    seen.clear()
    with RoutingRecorder(model).replay(data):
        loss = model(tokens, labels=tokens).loss
    loss.backward()
    assert all(torch.equal(ids, data[:, index]) for ids, index in zip(seen, routed, strict=True))
    for layer in layers:
        assert any(parameter.grad.abs().sum() > 0 for parameter in layer.router.parameters())


@pytest.mark.parametrize(("family", "use_reentrant"), [("deepseek_v3", False), ("phimoe", False), ("phimoe", True)])
def test_a_whole_model_under_checkpointing(family, use_reentrant):
    model = tiny_model(family).train()
    batches = [torch.randint(2, VOCAB, (1, 5)) for _ in range(2)]
    top_k, size = routed_layers(model)[0].top_k, routed_layers(model)[0].num_experts
    data = [distinct_ids(5, 2, top_k, size) for _ in batches]

    def run():
        recorder, losses = RoutingRecorder(model), []
        torch.manual_seed(2)
        for tokens, ids in zip(batches, data, strict=True):
            with recorder.replay(ids):
                losses.append(model(tokens, labels=tokens).loss)
        with recorder.record():
            losses.append(model(batches[0], labels=batches[0]).loss)
        sum(losses).backward()
        recorder.close()
        return gradients(model)

    wanted = run()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    found = run()
    assert same(found, wanted)


def test_generated_tokens_by_sequence():
    model = tiny_model("deepseek_v3").eval()
    recorder, prompt = RoutingRecorder(model), torch.randint(2, VOCAB, (3, 4))
    with recorder.record():
        tokens = model.generate(prompt, max_new_tokens=3, do_sample=False)
    data = recorder.by_sequence(3)
    assert data.shape == (3, 6, 2, 3)  # the last of 7 tokens has been seen by no router
    with recorder.record(), torch.no_grad():
        model(tokens[:, :-1])
    assert torch.equal(recorder.data.view(3, 6, 2, 3), data)
    with pytest.raises(ValueError, match="batch_size: got 4, wanted a divisor of a pass's 18 tokens"):
        recorder.by_sequence(4)


def test_groups_of_given_experts_are_kept():
    """DeepSeek-V2's weights are scores that are 0 outside of the best groups; one family of its kind is enough."""
    config = transformers.DeepseekV2Config(
        hidden_size=D, num_attention_heads=4, num_hidden_layers=1, n_routed_experts=8, num_experts_per_tok=2,
        n_group=4, topk_group=2, topk_method="group_limited_greedy", moe_intermediate_size=4, routed_scaling_factor=1.0,
    )  # fmt: skip
    block = transformers.models.deepseek_v2.modeling_deepseek_v2.DeepseekV2Moe(config)
    nn.init.normal_(block.gate.weight)
    x, seen = torch.randn(1, 4, D), []
    block.experts.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    worst = block.gate(x)[0].argsort(-1)[:, :2].int()
    with torch.no_grad(), RoutingRecorder(block).replay(worst[:, None]):
        for parameter in block.experts.parameters():
            parameter.normal_()
        block(x)
    expected = block.gate(x)[0].softmax(-1).gather(1, worst.long())
    torch.testing.assert_close(seen[0], expected)


# Compiled, and wrong --------------------------------------------------------------------------------------------------


def test_a_compiled_model_records_and_replays():
    model, x, data = Layered(), torch.randn(5, D), distinct_ids(5)
    recorder = RoutingRecorder(model)
    with recorder.replay(data):
        wanted = model(x)["out"]
    compiled = torch.compile(model, backend="eager")
    with recorder.replay(data):
        assert torch.equal(compiled(x)["out"], wanted)
    with recorder.record():
        compiled(x)
    assert recorder.data.shape == (5, 3, K)


class Odd(nn.Module):
    """Chooses by a sort, which nothing here knows."""

    top_k, num_experts = K, E

    def forward(self, x):
        logits = x[:, :E]
        ids = logits.argsort(-1)[:, :K]
        return logits, logits.gather(1, ids), ids


def test_a_router_that_chooses_in_another_way_is_refused():
    block = tiny_model("mixtral").model.layers[0].mlp
    block.gate = Odd()
    with (
        RoutingRecorder(block).record(),
        pytest.raises(RuntimeError, match="gate: got Odd, which chooses in a way that"),
    ):
        block(torch.randn(1, 3, 32))
    del block.gate
    with pytest.raises(ValueError, match=r"experts: got a layer whose router is not known, wanted"):
        RoutingRecorder(block)
    own = MoE(D, 4, E, K, router=Odd())
    with pytest.raises(ValueError, match=r"model: got a layer whose router is not known, wanted"):
        RoutingRecorder(own)
    block.gate = Odd()
    del Odd.top_k
    with pytest.raises(ValueError, match="gate: got a router without top_k or top_k_experts"):
        RoutingRecorder(block)


@pytest.mark.parametrize(
    ("data", "mask", "error", "message"),
    [
        (torch.zeros(4, 3).int(), None, ValueError, r"data: got shape \[4, 3\], wanted \[tokens, layers, K\]"),
        (torch.zeros(4, 2, 2).int(), None, ValueError, r"data: got shape \[4, 2, 2\], wanted \[tokens, at least 3"),
        (torch.zeros(4, 3, 1).int(), None, ValueError, r"data: got shape \[4, 3, 1\], wanted .*at least 2\]"),
        (torch.zeros(4, 3, 2), None, TypeError, "data: got dtype torch.float32"),
        (torch.zeros(4, 3, 2).int(), torch.ones(3).bool(), ValueError, r"mask: got shape \[3\], wanted \[4\]"),
        (torch.zeros(4, 3, 2).int(), torch.ones(4), TypeError, "mask: got dtype torch.float32"),
    ],
)
def test_wrong_data_is_named(data, mask, error, message):
    recorder = RoutingRecorder(Layered())
    with pytest.raises(error, match=message), recorder.replay(data, mask):
        pass


def test_wrong_models_and_wrong_use():
    with pytest.raises(TypeError, match="model: got int, wanted a Module"):
        RoutingRecorder(3)
    with pytest.raises(ValueError, match=r"model: got one without a router .* wanted a moe_triton\.Router"):
        RoutingRecorder(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"layers: got index 0 for 0\.router and for 1\.router, wanted"):
        RoutingRecorder(nn.Sequential(MoE(D, 4, E), MoE(D, 4, E)), layers=lambda name: 0)
    model = Layered()
    stage = RoutingRecorder(model, layers=lambda name: 24 + layer_index(name) if "2" in name else None)
    assert stage.layers == {"layers.2.router": 26}
    with pytest.raises(ValueError, match="data: got no forward pass inside"):
        _ = stage.data
    with stage.record():
        with pytest.raises(RuntimeError, match="replay: got a recorder that records or replays already"):
            stage.replay(distinct_ids(3, 27)).__enter__()
        model(torch.randn(3, D))
    assert stage.data.shape == (3, 27, K)
