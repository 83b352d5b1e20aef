"""The small frozen records that the operations pass to each other. Shapes: T tokens, K choices, E experts, S = T*K."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from moe_triton.kinds import UNASKED, kind_of
from moe_triton.quantization import QuantizedWeight
from moe_triton.torch_internals import record

GATED = ("swiglu", "geglu", "geglu_tanh", "reglu", "gpt_oss")
UNGATED = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
ACTIVATIONS = GATED + UNGATED
# Gates that are cut at a limit, with their own limit (None: not cut) and alpha, the slope of their sigmoid.
LIMITED: dict[str, tuple[float | None, float]] = {"swiglu": (None, 1.0), "gpt_oss": (7.0, 1.702)}
SCORES = ("softmax", "sigmoid", "topk_softmax", "sqrt_softplus")
EMPTY = -2  # the id of a choice that a rule leaves empty; -1 is one of a token that counts nowhere
GROUP_SCORES = ("max", "top2_sum")
PRIORITIES = ("position", "choice", "probability", "random")


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """How logits become choices and weights; the fields are documented at `moe_triton.route`."""

    top_k: int
    score: str = "softmax"
    normalize: bool = False
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    weightless: int = 0
    sequences: int = 1

    def __hash__(self) -> int:
        """Of a few fields that tell most routers apart: every call looks up what follows from its options."""
        return hash((self.top_k, self.score, self.normalize, self.scale))


@dataclass(frozen=True, kw_only=True)
class ExpertSpec:
    """What one expert computes and how its weights lie in memory.

    Default layout: gate_up_proj [E, 2n, d] ([E, n, d] when ungated), down_proj [E, d, n]. `is_transposed` swaps the
    last two dimensions of both. `is_concatenated=False` means that gate and up alternate: g0, u0, g1, u1, ...
    The scalings multiply the adapters' part of a product. With `batch_invariant` an output's bits depend on its own
    token alone (`moe_triton.batch_invariant`). With `fp8` the products with the projections and those for
    their gradients have operands in e4m3 (`moe_triton.reference.fp8`), with `microscaled` those of MXFP8.
    activation_limit and activation_alpha are those of `moe_triton.moe_mlp`; None stands for the activation's own.
    """

    activation: str = "swiglu"
    activation_limit: float | None = None
    activation_alpha: float | None = None
    is_transposed: bool = False
    is_concatenated: bool = True
    batch_invariant: bool = False
    fp8: bool = False
    microscaled: bool = False
    gate_up_scaling: float = 1.0
    down_scaling: float = 1.0

    def __hash__(self) -> int:
        """Of a few fields that tell most experts apart: every call looks up what follows from its options."""
        return hash((self.activation, self.activation_limit, self.activation_alpha))

    @property
    def is_gated(self) -> bool:
        return self.activation in GATED

    @property
    def fp8_mode(self) -> bool | str:
        """What `fp8=` was: False, True or "mxfp8"."""
        return "mxfp8" if self.microscaled else self.fp8

    @property
    def limit(self) -> float | None:
        """Where gate and up are cut; None for nowhere."""
        return LIMITED.get(self.activation, (None, 1.0))[0] if self.activation_limit is None else self.activation_limit

    @property
    def alpha(self) -> float:
        """The slope of the gate's sigmoid."""
        return LIMITED.get(self.activation, (None, 1.0))[1] if self.activation_alpha is None else self.activation_alpha


class SequenceSums(NamedTuple):
    """The counts [B, E], score sums [B, E] and numbers of tokens [B] of a Routing, for each sequence by itself."""

    counts: Tensor
    score_sums: Tensor
    num_tokens: Tensor


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Every token's choices, with the sums over tokens that the auxiliary losses need.

    experts     [T, K] int32; -1 for the tokens that `token_mask` leaves out, -2 for a choice that was left empty
    weights     [T, K] fp32 (fp64 for fp64 logits), differentiable; 0 where experts is negative
    counts      [E] int32, assignments wanted per expert, before any dropping
    score_sums  [E] sum over tokens of the normalised scores, differentiable
    z_sum       []  sum over tokens of logsumexp(logits)**2, differentiable
    num_tokens  []  number of tokens that count, on the device
    sequences   counts, score_sums and num_tokens of each sequence; None where `route` was not asked for several
    hidden      [T, d] what `Router` was given, for whoever takes it next: the gate then adds its gradient to theirs in
                one pass; None where there was no gate
    dispatched  what `dispatched_to` returns; None where routing made no Dispatch
    """

    experts: Tensor
    weights: Tensor
    counts: Tensor
    score_sums: Tensor
    z_sum: Tensor
    num_tokens: Tensor
    sequences: SequenceSums | None = None
    hidden: Tensor | None = None
    dispatched: TiledDispatch | None = None

    def dispatched_to(self, num_experts: int) -> TiledDispatch | None:
        """Return the Dispatch of these very choices to all of so many experts, where the backend made it with them."""
        found = self.dispatched
        if found is None or found.experts is not self.experts or found.counts.shape[0] != num_experts:
            return None
        return found

    @classmethod
    def unsummed(cls, sums: Callable[[], Sequence[Tensor]], **others: Any) -> Routing:
        """Make a Routing whose `SUMS` come from `sums`, called when the first of them is read: most often never."""
        return record(cls, _sums=sums, **others)

    def __getattr__(self, name: str) -> Any:  # of what is not there, or not yet
        sums = self.__dict__.get("_sums")
        if sums is None or name not in SUMS:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        self.__dict__.update(zip(SUMS, sums(), strict=True))
        return self.__dict__[name]


SUMS = ("counts", "score_sums", "z_sum", "num_tokens")


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """Which row goes where. All int32, all of static size, made on the device without a host sync.

    counts    [E]    assignments wanted, before dropping
    offsets   [E+1]  row range of each expert among the kept rows, which lie in expert order
    source    [S]    row -> token*K + choice; -1 past offsets[E]
    position  [T, K] choice -> row; -1 when dropped or skipped
    """

    counts: Tensor
    offsets: Tensor
    source: Tensor
    position: Tensor

    @property
    def num_experts(self) -> int:
        return self.counts.shape[0]

    @property
    def top_k(self) -> int:
        return self.position.shape[1]


@dataclass(frozen=True, kw_only=True)
class TiledDispatch(Dispatch):
    """A Dispatch with what its backend made along with it for its kernels.

    tiles    the `TileTables` of the triton backend; None where another backend made it
    experts  the choices that it was made of, where routing made it along with them; nothing is dropped
    """

    tiles: Any = None
    experts: Tensor | None = None


# All experts' tensors of one kind: stacked [E, ...], or one tensor per expert.
ExpertWeight = Tensor | Sequence[Tensor]
# A projection of all experts; a quantised one is frozen.
Projection = ExpertWeight | QuantizedWeight


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter of a projection of every expert: x (W + scaling * b a)^T (LoRA, arXiv 2106.09685).

    a        [E, r, in], any r >= 1
    b        [E, out, r]; out in the order of the projection's outputs, also where gate and up alternate
    scaling  alpha / r; alpha / sqrt(r) for rsLoRA (arXiv 2312.03732)

    `in` and `out` are those of the product: d and 2n for gate and up, n and d for down, also where the projections are
    stored transposed. Any strides.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0


class ExpertParameters(NamedTuple):
    """The experts' projections, biases and adapters; `ExpertSpec` says how the projections lie, and has the scalings.

    gate_up         [E, 2n, d]
    down            [E, d, n]
    gate_up_bias    [E, 2n] or None
    down_bias       [E, d] or None
    gate_up_lora_a  [E, r, d] or None
    gate_up_lora_b  [E, 2n, r] or None
    down_lora_a     [E, r, n] or None; this r may differ
    down_lora_b     [E, d, r] or None
    """

    gate_up: Projection
    down: Projection
    gate_up_bias: ExpertWeight | None = None
    down_bias: ExpertWeight | None = None
    gate_up_lora_a: Tensor | None = None
    gate_up_lora_b: Tensor | None = None
    down_lora_a: Tensor | None = None
    down_lora_b: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ExpertCall:
    """One call of the experts: out[t] = sum over t's kept choices k of weights[t, k] * expert_k(hidden[t]).

    hidden      [T, d]
    weights     [T, K], the router's
    dispatched  which row goes where
    is_part     the rows of several calls are joined for the gradients of the parameters: `RowGradients` are numbers
    """

    hidden: Tensor
    weights: Tensor
    dispatched: Dispatch
    parameters: ExpertParameters
    spec: ExpertSpec
    is_part: bool = False
    _kind: ClassVar[object] = UNASKED

    @property
    def kind(self) -> object | None:
        """What calls share that differ in values and addresses only (see `kinds`), or None."""
        found = self._kind
        if found is UNASKED:  # not a cached_property, which takes a lock up to Python 3.11
            rows = self.dispatched
            source = rows.source
            given = (rows.counts, source, rows.position, self.hidden, self.weights)
            found = kind_of((self.spec, self.is_part, source.numel()), given, self.parameters)
            object.__setattr__(self, "_kind", found)
        return found

    @property
    def num_experts(self) -> int:
        return self.dispatched.num_experts

    @property
    def num_rows(self) -> int:
        """S, the rows that the Dispatch has room for."""
        return self.dispatched.source.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.hidden.shape[1]

    @property
    def width(self) -> int:
        """Columns of the pre-activation: 2n, or n when ungated."""
        return matrix_shape(self.parameters.gate_up)[1 if self.spec.is_transposed else 0]

    @property
    def intermediate_size(self) -> int:
        return self.width // 2 if self.spec.is_gated else self.width

    @property
    def gate_up_lora(self) -> Lora | None:
        given = self.parameters
        if given.gate_up_lora_a is None or given.gate_up_lora_b is None:
            return None
        return Lora(given.gate_up_lora_a, given.gate_up_lora_b, self.spec.gate_up_scaling)

    @property
    def down_lora(self) -> Lora | None:
        given = self.parameters
        if given.down_lora_a is None or given.down_lora_b is None:
            return None
        return Lora(given.down_lora_a, given.down_lora_b, self.spec.down_scaling)


class GateWanted(NamedTuple):
    """Which gradients of the gate are wanted."""

    hidden: bool = True
    weight: bool = True
    bias: bool = True


class GateGradients(NamedTuple):
    """The gradients of the gate; None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Wanted(NamedTuple):
    """Which gradients of an ExpertCall are wanted."""

    hidden: bool = True
    weights: bool = True
    gate_up: bool = True
    down: bool = True
    gate_up_bias: bool = True
    down_bias: bool = True
    gate_up_lora_a: bool = True
    gate_up_lora_b: bool = True
    down_lora_a: bool = True
    down_lora_b: bool = True

    def of(self, parameters: ExpertParameters) -> Wanted:
        """Return what of it exists: an absent parameter and a quantised projection have no gradient."""
        exist = [not (p is None or isinstance(p, QuantizedWeight)) for p in parameters]
        return Wanted(*self[:2], *(want and here for want, here in zip(self[2:], exist, strict=True)))


class RowGradients(NamedTuple):
    """The gradients that belong to rows, the first half of the experts' backward.

    hidden         [T, d], None where not wanted
    weights        [T, K], None where not wanted
    preactivation  [S, 2n] or [S, n]; rows past offsets[E] are not defined. In the backend's own form, where the call is
                   no part of several
    weighted_a     [S, n], the activation times the router weight, which the gradient of `down` needs; as above
    gate_up_u, down_u
                   what the adapters' b makes of the products' gradients, in the backend's own form; None where the
                   second half is to compute it
    """

    hidden: Tensor | None
    weights: Tensor | None
    preactivation: Any
    weighted_a: Any
    gate_up_u: Tensor | None = None
    down_u: Tensor | None = None


class ParameterGradients(NamedTuple):
    """The gradients of `ExpertParameters`, in the form of each: stacked, or a list. None where not wanted."""

    gate_up: ExpertWeight | None = None
    down: ExpertWeight | None = None
    gate_up_bias: ExpertWeight | None = None
    down_bias: ExpertWeight | None = None
    gate_up_lora_a: ExpertWeight | None = None
    gate_up_lora_b: ExpertWeight | None = None
    down_lora_a: ExpertWeight | None = None
    down_lora_b: ExpertWeight | None = None


class ExpertGradients(NamedTuple):
    """The gradients of an ExpertCall; None where not wanted."""

    hidden: Tensor | None
    weights: Tensor | None
    gate_up: ExpertWeight | None
    down: ExpertWeight | None
    gate_up_bias: ExpertWeight | None
    down_bias: ExpertWeight | None
    gate_up_lora_a: ExpertWeight | None = None
    gate_up_lora_b: ExpertWeight | None = None
    down_lora_a: ExpertWeight | None = None
    down_lora_b: ExpertWeight | None = None


def matrix_shape(projection: Projection) -> tuple[int, int]:
    """The shape of one expert's matrix."""
    matrix = projection.shape[1:] if isinstance(projection, (Tensor, QuantizedWeight)) else projection[0].shape
    return matrix[0], matrix[1]


def as_given(parameter: Projection | None, gradient: Tensor | None) -> ExpertWeight | None:
    """A stacked gradient in the form of its parameter: stacked, or a list of one view per expert."""
    return gradient if gradient is None or isinstance(parameter, Tensor) else list(gradient.unbind(0))
