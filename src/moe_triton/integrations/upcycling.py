"""`moe_triton.upcycle`: a dense model becomes a mixture of experts that computes the same (arXiv 2212.05055)."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe_triton.checks import check_int, check_number
from moe_triton.layers import FeedForward, MoE, Router
from moe_triton.reference import wide

ROUTER_STD = 0.02  # of a new router's weights, where the model's configuration does not say


class Upcycling(NamedTuple):
    """How dense blocks become experts.

    Expert i is shard i mod G of a block's G equal parts: rows of gate and up, columns of down. The router's rows are
    equal in runs of G, so that a token takes whole copies of the block (virtual groups, arXiv 2410.07524). With K
    choices whose weights sum to 1 each shard of a copy gets 1/G of the copy's weight: `scale` = G on the down
    projection makes up for it. It is not shared out between up and down: no power of it passes through silu.

    num_experts   E, a multiple of G
    granularity   G
    top_k         K, a multiple of G
    normalize     whether the chosen weights sum to 1. Else they are taken to be 1/E each, which they are only near
    reinitialize  the share of every expert's inner columns that is drawn anew, with their mean and deviation
                  (Drop-Upcycling, arXiv 2502.19261)
    """

    num_experts: int
    granularity: int
    top_k: int
    normalize: bool
    reinitialize: float

    @property
    def scale(self) -> float:
        return self.granularity if self.normalize else self.num_experts * self.granularity / self.top_k

    @property
    def is_exact(self) -> bool:
        return self.normalize and not self.reinitialize

    def gate_up(self, *projections: Tensor) -> Tensor:
        """gate and up [n, d] (or one, without a gate) -> [E, 2n/G, d]."""
        d = projections[0].shape[1]
        shards = torch.cat([projection.view(self.granularity, -1, d) for projection in projections], dim=1)
        return shards.repeat(self.num_experts // self.granularity, 1, 1)

    def gate_up_bias(self, *biases: Tensor) -> Tensor:
        """[n] each -> [E, 2n/G]."""
        return self.gate_up(*(bias[:, None] for bias in biases))[..., 0]

    def down(self, projection: Tensor) -> Tensor:
        """[d, n] -> [E, d, n/G], scaled."""
        shards = (projection * self.scale).view(projection.shape[0], self.granularity, -1).transpose(0, 1)
        return shards.repeat(self.num_experts // self.granularity, 1, 1)

    def router(self, like: Tensor, std: float) -> Tensor:
        """Weights [E, d] from torch's generator, equal in runs of G; dtype and device of `like` [n, d]."""
        rows = torch.empty(
            self.num_experts // self.granularity, like.shape[1], dtype=like.dtype, device=like.device
        ).normal_(std=std)
        return rows.repeat_interleave(self.granularity, dim=0)

    def redraw(self, gate_up: Tensor, down: Tensor, parts: int) -> None:
        """Draw a share of the inner columns of every expert anew, in place; `parts` projections are in gate_up."""
        count = round(self.reinitialize * down.shape[2])
        if not count:
            return
        for gate_up_e, down_e in zip(gate_up, down, strict=True):
            columns = torch.randperm(down.shape[2], device=down.device)[:count]
            for matrix in (*gate_up_e.chunk(parts), down_e.T):
                old = matrix[columns].to(wide(matrix.dtype))
                new = torch.randn_like(old) * old.std(correction=0) + old.mean()
                matrix[columns] = new.to(matrix.dtype)


@torch.no_grad()
def upcycle(
    dense_model: nn.Module,
    num_experts: int,
    granularity: int = 1,
    top_k: int | None = None,
    *,
    normalize: bool = True,
    reinitialize: float = 0.0,
) -> nn.Module:
    """Return a new mixture-of-experts model whose experts are copies, or shards of copies, of the dense blocks.

    Its logits are those of the dense model, up to rounding (relative error at most 1e-6 in float32). Where this cannot
    be, with `normalize=False` or `reinitialize`, the error is measured on 64 random tokens and given in a warning.

    Args:
        dense_model: a transformers model (Llama and Mistral become Mixtral, Qwen2 becomes Qwen2-MoE, Qwen3 Qwen3-MoE,
            OLMo2 FlexOlmo, Granite GraniteMoE; the ...ForCausalLM), or a `FeedForward`, which becomes a `MoE`. It stays
            as it is. Qwen2-MoE's shared expert begins with a down projection of zeros.
        num_experts: E, a multiple of the granularity; E / G copies of every block.
        granularity: G, how many experts share one copy; each has n / G of its inner columns.
        top_k: K, a multiple of the granularity, so that K / G copies work on a token. None: two copies, or one where
            there is only one. With K = 1 the router has no gradient but that of a balance loss.
        normalize: let the weights of a token's K choices sum to 1.
        reinitialize: share in [0, 1] of every expert's inner columns to draw anew (Drop-Upcycling), so that the copies
            differ.

    Random numbers (the router, drawn columns) come from torch's generator.

    Raises:
        TypeError: a model of another class. ValueError: a number that does not fit, or a part of the dense model that
        the other architecture has not (a bias of its MLP, say), by name.
    """
    check_int("granularity", granularity, low=1)
    check_int("num_experts", num_experts, low=1)
    _check_multiple("num_experts", num_experts, granularity)
    top_k = min(2 * granularity, num_experts) if top_k is None else top_k
    check_int("top_k", top_k, low=1, high=num_experts)
    _check_multiple("top_k", top_k, granularity)
    check_number("reinitialize", reinitialize, low=0)
    if reinitialize > 1:
        raise ValueError(f"reinitialize: got {reinitialize}, wanted 0 to 1")
    how = Upcycling(num_experts, granularity, top_k, normalize, reinitialize)
    if isinstance(dense_model, FeedForward):
        model: Any = _upcycled_layer(dense_model, how)
        inputs = torch.randn(64, model.hidden_size).to(dense_model.down_proj.weight)
    else:
        model = _upcycled_model(dense_model, how)
        inputs = torch.randint(0, model.config.vocab_size, (1, 64)).to(model.device)
    if not how.is_exact:
        expected, actual = _output(dense_model, inputs), _output(model, inputs)
        error = (actual - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        warnings.warn(
            f"upcycle: the outputs differ from the dense model's by {error.item():.2g} (relative RMS on 64 random "
            f"tokens), since normalize={normalize} and reinitialize={reinitialize:g}",
            stacklevel=3,
        )
    return model


def _check_multiple(name: str, value: int, granularity: int) -> None:
    if value % granularity:
        raise ValueError(f"{name}: got {value}, wanted a multiple of the granularity {granularity}")


def _output(model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits or hidden states, in evaluation mode."""
    was_training = model.training
    out = model.eval()(inputs)
    model.train(was_training)
    out = getattr(out, "logits", getattr(out, "output", out))
    return out.to(wide(out.dtype))


# Our own layer --------------------------------------------------------------------------------------------------------


def _upcycled_layer(dense: FeedForward, how: Upcycling) -> MoE:
    up, down = dense.gate_up_proj, dense.down_proj
    _check_multiple("dense_model: intermediate_size", down.in_features, how.granularity)
    where: dict[str, Any] = {"device": up.weight.device, "dtype": up.weight.dtype}
    router = Router(up.in_features, how.num_experts, how.top_k, normalize=how.normalize, **where)
    layer = MoE(
        up.in_features,
        down.in_features // how.granularity,
        how.num_experts,
        how.top_k,
        activation=dense.activation,
        bias=up.bias is not None,
        router=router,
        **where,
    )
    layer.train(dense.training)
    for name, value in upcycled_state(dense, how).items():
        layer.get_parameter(name).copy_(value)
    return layer


def upcycled_state(dense: FeedForward, how: Upcycling) -> dict[str, Tensor]:
    """The parameters of the `MoE` that `dense` becomes, by name."""
    up, down = dense.gate_up_proj, dense.down_proj
    parts = up.out_features // down.in_features
    state = {
        "router.weight": how.router(up.weight, ROUTER_STD),
        "experts.gate_up_proj": how.gate_up(*up.weight.chunk(parts)),
        "experts.down_proj": how.down(down.weight),
    }
    how.redraw(state["experts.gate_up_proj"], state["experts.down_proj"], parts)
    if up.bias is not None:
        state["experts.gate_up_proj_bias"] = how.gate_up_bias(*up.bias.chunk(parts))
        # the weights of all shards sum to 1 (or are taken to be 1/E), so that each adds its share of the whole bias
        state["experts.down_proj_bias"] = (down.bias * how.scale / how.granularity).expand(how.num_experts, -1)
    return state


# Models of transformers -----------------------------------------------------------------------------------------------


class Family(NamedTuple):
    """The mixture of experts that a dense architecture becomes; all else of the two has the same names.

    name         of its classes: <name>Config, <name>ForCausalLM
    num_experts  its configuration's names for E and for the inner size of an expert
    size
    block        its names for the MoE block of a layer, and for the router in it
    router
    chooses      whether `norm_topk_prob` says if weights are normalised; else they always are
    """

    name: str
    num_experts: str
    size: str
    block: str = "mlp"
    router: str = "gate"
    chooses: bool = True


_MIXTRAL = Family("Mixtral", "num_local_experts", "intermediate_size", chooses=False)
FAMILIES = {
    "LlamaForCausalLM": _MIXTRAL,
    "MistralForCausalLM": _MIXTRAL,
    "Qwen2ForCausalLM": Family("Qwen2Moe", "num_experts", "moe_intermediate_size"),
    "Qwen3ForCausalLM": Family("Qwen3Moe", "num_experts", "moe_intermediate_size"),
    "Olmo2ForCausalLM": Family("FlexOlmo", "num_experts", "intermediate_size"),
    "GraniteForCausalLM": Family(
        "GraniteMoe", "num_local_experts", "intermediate_size", "block_sparse_moe", "router", chooses=False
    ),
}

# What a configuration says of itself, not of the model.
_OWN = ("architectures", "model_type", "transformers_version")
# Values of the dense configuration that mean what the other architecture does anyway.
_NEUTRAL = {"pretraining_tp": (1,), "max_window_layers": None}


def _upcycled_model(dense: Any, how: Upcycling) -> nn.Module:
    family = FAMILIES.get(type(dense).__name__)
    if family is None:
        wanted = ", ".join(FAMILIES)
        raise TypeError(f"dense_model: got {type(dense).__name__}, wanted a FeedForward or one of {wanted}")
    import transformers

    if not family.chooses and not how.normalize:
        raise ValueError(f"normalize: got False, wanted True: {family.name} always normalises")
    _check_multiple("dense_model: intermediate_size", dense.config.intermediate_size, how.granularity)
    config = _config(dense.config, family, how)
    state = {}
    for name, value in dense.state_dict().items():
        layer, mlp, _ = name.partition(".mlp.")
        if not mlp:
            state[name] = value
        elif f"{layer}.{family.block}.{family.router}.weight" not in state:
            state |= {f"{layer}.{key}": part for key, part in _block(dense.get_submodule(f"{layer}.mlp"), family, how)}
    cls = getattr(transformers, f"{family.name}ForCausalLM")
    # from a state dict, since a constructor would first draw every weight
    model, report = cls.from_pretrained(
        None, config=config, state_dict=state, dtype=dense.dtype, output_loading_info=True
    )
    if faults := {key: sorted(map(str, names)) for key, names in report.items() if names}:
        raise ValueError(f"dense_model: its weights do not fit {family.name}'s: {faults}")
    model.generation_config = dense.generation_config
    return model.to(dense.device).train(dense.training)


def _config(dense: Any, family: Family, how: Upcycling) -> Any:
    import transformers

    cls = getattr(transformers, f"{family.name}Config")
    known = {*cls().to_dict(), "head_dim"} - set(_OWN)
    given = {name: value for name, value in dense.to_dict().items() if name not in _OWN}
    for name, value in given.items():
        neutral = _NEUTRAL.get(name, ())
        if name not in known and value and neutral is not None and value not in neutral:
            if name == "layer_types" and set(value) == {"full_attention"}:
                continue
            raise ValueError(f"dense_model: its configuration has {name}={value!r}, for which {family.name} has none")
    options = {name: value for name, value in given.items() if name in known}
    options |= {
        family.num_experts: how.num_experts,
        family.size: dense.intermediate_size // how.granularity,
        "num_experts_per_tok": how.top_k,
    }
    if family.chooses:
        options["norm_topk_prob"] = how.normalize
    if "shared_expert_intermediate_size" in known:
        options["shared_expert_intermediate_size"] = dense.intermediate_size // how.granularity
    return cls(**options)


def _block(mlp: Any, family: Family, how: Upcycling) -> list[tuple[str, Tensor]]:
    """The tensors of a layer's MoE block, from its dense MLP."""
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    gate_up, down_e = how.gate_up(gate, up), how.down(down)
    how.redraw(gate_up, down_e, 2)
    std = getattr(mlp.config, "initializer_range", ROUTER_STD)
    state = {
        f"{family.router}.weight": how.router(gate, std),
        "experts.gate_up_proj": gate_up,
        "experts.down_proj": down_e,
    }
    if family.name == "Qwen2Moe":  # it always has a shared expert: one that adds nothing, and can learn
        size = gate.shape[0] // how.granularity
        state |= {
            "shared_expert.gate_proj.weight": gate[:size],
            "shared_expert.up_proj.weight": up[:size],
            "shared_expert.down_proj.weight": torch.zeros_like(down[:, :size]),
            "shared_expert_gate.weight": torch.zeros_like(gate[:1]),
        }
    return [(f"{family.block}.{name}", value) for name, value in state.items()]
