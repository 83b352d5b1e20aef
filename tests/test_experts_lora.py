"""LoRA adapters of the experts on every backend: against the float64 reference, what they cost, and their errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_triton import Lora, dispatch, moe_experts, moe_mlp
from moe_triton.records import ExpertSpec
from tests.helpers.compare import assert_close
from tests.helpers.problems import make_problem, random_choices

BACKENDS = ["reference", "torch", "triton"]
TOKENS, EXPERTS = 13, 4


def make(ranks=(3, 2), **options):
    choices = random_choices(TOKENS, 2, EXPERTS)
    return choices, make_problem(choices, EXPERTS, ranks=ranks, device="cpu", **options)


def loras_of(problem):
    """The problem's adapters as arguments of moe_mlp."""
    call = problem.call
    return {"gate_up_lora": call.gate_up_lora, "down_lora": call.down_lora}


def arguments_of(problem):
    call, given = problem.call, problem.call.parameters
    return {
        "hidden_states": call.hidden, "top_k_weights": call.weights,
        "gate_up_proj": given.gate_up, "down_proj": given.down,
        "gate_up_bias": given.gate_up_bias, "down_bias": given.down_bias,
        "activation": call.spec.activation, "is_transposed": call.spec.is_transposed,
        "is_concatenated": call.spec.is_concatenated,
    }  # fmt: skip


def as_leaves(lora):
    return Lora(lora.a.detach().clone().requires_grad_(), lora.b.detach().clone().requires_grad_(), lora.scaling)


def check_gradients(out, problem, loras, x=None):
    """The output, and the gradients of the adapters by their argument's name and of x."""
    assert_close(out, problem.expected["out"])
    out.backward(problem.grad_out)
    for name, lora in loras.items():
        assert_close(lora.a.grad, problem.expected[f"{name}_a"])
        assert_close(lora.b.grad, problem.expected[f"{name}_b"])
    if x is not None:
        assert_close(x.grad, problem.expected["hidden"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("is_concatenated", [False, True])
def test_gradients_of_adapters_over_a_frozen_base(backend, is_transposed, is_concatenated):
    spec = ExpertSpec(activation="gpt_oss", is_transposed=is_transposed, is_concatenated=is_concatenated)
    choices, problem = make(spec=spec)
    loras = {name: as_leaves(lora) for name, lora in loras_of(problem).items()}
    given = arguments_of(problem)
    x = given["hidden_states"].requires_grad_()
    out = moe_mlp(top_k_index=choices, backend=backend, recompute=is_transposed, **given, **loras)
    check_gradients(out, problem, loras, x)
    assert given["gate_up_proj"].grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_dispatch_and_experts_apart(backend):
    choices, problem = make()
    loras = {name: as_leaves(lora) for name, lora in loras_of(problem).items()}
    given = arguments_of(problem)
    given["weights"] = given.pop("top_k_weights")
    out = moe_experts(dispatched=dispatch(choices, EXPERTS), backend=backend, **given, **loras)
    check_gradients(out, problem, loras)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_adapters_are_summed_and_each_has_its_gradients(backend):
    choices, problem = make(ranks=(5, 4))
    both = {}
    for name, whole in loras_of(problem).items():
        parts = zip(
            whole.a.split((2, whole.a.shape[1] - 2), 1), whole.b.split((2, whole.a.shape[1] - 2), 2), strict=True
        )
        (a, b), (c, e) = parts
        both[name] = [as_leaves(Lora(a, b / 4, 4 * whole.scaling)), as_leaves(Lora(c.double(), e, whole.scaling))]
    out = moe_mlp(top_k_index=choices, backend=backend, **arguments_of(problem), **both)
    assert_close(out, problem.expected["out"])
    out.backward(problem.grad_out)
    for name, (first, second) in both.items():
        assert second.a.grad.dtype == torch.float64
        assert_close(torch.cat([first.a.grad, second.a.grad.float()], 1), problem.expected[f"{name}_a"])
        assert_close(torch.cat([first.b.grad / 4, second.b.grad], 2), problem.expected[f"{name}_b"])
    nothing = moe_mlp(top_k_index=choices, backend=backend, **arguments_of(problem), gate_up_lora=[], down_lora=None)
    assert torch.equal(nothing, moe_mlp(top_k_index=choices, backend=backend, **arguments_of(problem)))


def test_a_trainable_base_and_one_tensor_per_expert():
    choices, problem = make()
    given, loras = arguments_of(problem), loras_of(problem)
    given["gate_up_proj"] = [w.clone().requires_grad_() for w in given["gate_up_proj"]]
    given["down_proj"].requires_grad_()
    moe_mlp(top_k_index=choices, backend="torch", **given, **loras).backward(problem.grad_out)
    assert_close(torch.stack([w.grad for w in given["gate_up_proj"]]), problem.expected["gate_up"])
    assert_close(given["down_proj"].grad, problem.expected["down"])


@pytest.mark.parametrize("autocast", [False, True])
def test_fp32_adapters_over_a_bf16_base(autocast):
    choices, problem = make(ranks=(8, 8), d=48, n=40, dtype=torch.bfloat16)
    loras = {
        name: as_leaves(replace(lora, a=lora.a.float(), b=lora.b.float())) for name, lora in loras_of(problem).items()
    }
    given = arguments_of(problem)
    if autocast:
        given["hidden_states"] = given["hidden_states"].float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = moe_mlp(top_k_index=choices, backend="torch", **given, **loras)
    assert out.dtype == given["hidden_states"].dtype
    out.backward(problem.grad_out.to(out.dtype))
    assert_close(out.bfloat16(), problem.expected["out"])
    for name, lora in loras.items():
        assert lora.a.grad.dtype == lora.b.grad.dtype == torch.float32
        assert_close(lora.a.grad, problem.expected[f"{name}_a"], tolerance=1.2e-2)
        assert_close(lora.b.grad, problem.expected[f"{name}_b"], tolerance=1.2e-2)


def storages(tensors):
    return {t.untyped_storage().data_ptr() for t in tensors}


class Largest(TorchDispatchMode):
    """The most elements of a tensor that any operation makes, besides views of `own` storages."""

    def __init__(self, own):
        super().__init__()
        self.own, self.numel = own, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and not storages([t]) & self.own]
        self.numel = max([self.numel, *(t.untyped_storage().nbytes() // t.element_size() for t in made)])
        return out


def test_nothing_of_the_size_of_a_frozen_projection_is_made_or_kept():
    """Forward, backward, and what is kept between them besides the inputs: the pre-activation."""
    choices, problem = make(d=64, n=80, bias=False)
    loras = {name: as_leaves(lora) for name, lora in loras_of(problem).items()}
    given, kept = arguments_of(problem), []
    given["hidden_states"].requires_grad_()
    given["top_k_weights"].requires_grad_()
    own = storages(t for t in given.values() if isinstance(t, torch.Tensor))
    own |= storages(t for lora in loras.values() for t in (lora.a, lora.b))
    with Largest(own) as largest:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            out = moe_mlp(top_k_index=choices, backend="torch", **given, **loras)
        out.backward(problem.grad_out)
    size_of_h = 2 * TOKENS * 2 * 80
    assert size_of_h <= largest.numel < given["down_proj"].numel()
    assert [t.numel() for t in kept if t.is_floating_point() and not storages([t]) & own] == [size_of_h]


def test_per_sample_gradients_and_vmap():
    choices, problem = make()
    given, loras = arguments_of(problem), loras_of(problem)

    def loss(a, b, x):
        adapted = loras | {"gate_up_lora": Lora(a, b, 0.75)}
        arguments = given | {"hidden_states": x}
        return moe_mlp(top_k_index=choices, backend="torch", **arguments, **adapted).square().sum()

    first = loras["gate_up_lora"]
    batch = torch.stack([given["hidden_states"], 2 * given["hidden_states"]])
    got = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(first.a, first.b, batch)
    for sample, x in enumerate(batch):
        a, b = first.a.clone().requires_grad_(), first.b.clone().requires_grad_()
        expected = torch.autograd.grad(loss(a, b, x), (a, b))
        assert all(torch.equal(g[sample], e) for g, e in zip(got, expected, strict=True))


def test_compiled_with_the_same_bits_for_every_scaling():
    choices, problem = make()
    given, loras = arguments_of(problem), loras_of(problem)

    def run(a, b, scaling):
        adapted = loras | {
            "down_lora": [Lora(a, b, scaling), loras["down_lora"]] if scaling < 0 else Lora(a, b, scaling)
        }
        return moe_mlp(top_k_index=choices, backend="torch", **given, **adapted)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for scaling in (1.5, 2.0, 0.3, -1.0):
        a, b = (t.clone().requires_grad_() for t in (loras["down_lora"].a, loras["down_lora"].b))
        results = []
        for function in (run, compiled):
            out = function(a, b, scaling)
            results.append([out, *torch.autograd.grad(out, (a, b), problem.grad_out)])
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


A, B = torch.zeros(3, 2, 6), torch.zeros(3, 10, 2)


@pytest.mark.parametrize(
    ("lora", "error", "message"),
    [
        ((A, B), TypeError, r"gate_up_lora\[0\]: got Tensor, wanted a Lora"),
        (A, TypeError, "gate_up_lora: got Tensor, wanted a Lora or a sequence of them"),
        (Lora(A[:2], B), ValueError, r"gate_up_lora\.a: got shape \[2, 2, 6\], wanted \[3, r, 6\]"),
        (Lora(A.mT, B), ValueError, r"gate_up_lora\.a: got shape \[3, 6, 2\], wanted \[3, r, 6\]"),
        (Lora(A, B[:, :, :1]), ValueError, r"gate_up_lora\.b: got shape \[3, 10, 1\], wanted \[3, 10, 2\]"),
        (Lora(A[:, :0], B[:, :, :0]), ValueError, r"gate_up_lora\.a: got rank 0, wanted at least 1"),
        ([Lora(A, B), Lora(A, B.int())], TypeError, r"gate_up_lora\[1\]\.b: got dtype torch.int32"),
        (Lora(A, B.to("meta")), ValueError, r"gate_up_lora\.b: got device meta, wanted cpu"),
        (Lora(A, None), TypeError, r"gate_up_lora\.b: got NoneType, wanted a Tensor"),
        (Lora(A, B, float("nan")), ValueError, r"gate_up_lora\.scaling: got nan"),
        (Lora(A, B, "1"), TypeError, r"gate_up_lora\.scaling: got '1', wanted a number"),
    ],
)
def test_bad_adapters_are_named(lora, error, message):
    plan = dispatch(torch.zeros(4, 2, dtype=torch.int32), 3)
    arguments = {"gate_up_proj": torch.zeros(3, 10, 6), "down_proj": torch.zeros(3, 6, 5)}
    x, weights = torch.zeros(4, 6), torch.zeros(4, 2)
    moe_experts(
        x, weights, plan, **arguments, gate_up_lora=Lora(A, B), down_lora=Lora(torch.zeros(3, 1, 5), B[:, :6, :1])
    )
    with pytest.raises(error, match=message):
        moe_experts(x, weights, plan, **arguments, gate_up_lora=lora)
    with pytest.raises(error, match=message):
        moe_mlp(x, torch.zeros(4, 2, dtype=torch.int32), weights, **arguments, gate_up_lora=lora)
