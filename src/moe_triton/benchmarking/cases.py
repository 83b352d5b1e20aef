"""What is measured: one shape and its routing, the presets, and the tensors that every provider shares.

Shapes: T tokens, d hidden size, n expert intermediate size, E experts, K choices per token, S = T*K assignments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moe_triton.checks import check_choice, check_int
from moe_triton.quantization import QuantizedWeight
from moe_triton.quantization.formats import FORMATS
from moe_triton.records import ACTIVATIONS, GATED, Dispatch, ExpertCall, ExpertParameters, ExpertSpec
from moe_triton_kernels.tools import models
from moe_triton_kernels.tools.floors import Shape
from moe_triton_kernels.tools.models import Layer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
PASSES = {"forward": 1, "backward": 2, "full": 3}  # of the experts' products: a backward has two
MODES = tuple(PASSES)
SKEWS = ("uniform", "zipf", "hot", "quarter-empty")
ZIPF_EXPONENT = 1.2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of a whole MoE block: router, experts, combine.

    Args:
        tokens, hidden, intermediate, experts, top_k: T, d, n, E and K.
        dtype: "float32", "bfloat16" or "float16".
        skew: how the tokens spread over the experts: "uniform"; "zipf", probabilities falling as rank**-1.2; "hot",
            expert 0 is chosen by half of the tokens and by no other; "quarter-empty", a quarter of the experts gets no
            token.
        activation, bias: of the experts, as in `moe_triton.MoE`.
        fp8: our experts' products are in fp8, as with `MoE(fp8=True)`.
        format: of quantised projections, as in `moe_triton.quantize`; None: they are in dtype. Only ours reads codes:
            the others work on the numbers that these stand for.
        name: of the model or preset it stands for.

    Raises:
        ValueError, TypeError: an argument out of range, by name.
    """

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    dtype: str = "float32"
    skew: str = "uniform"
    activation: str = "swiglu"
    bias: bool = False
    format: str | None = None
    fp8: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        for name in ("tokens", "hidden", "intermediate", "experts"):
            check_int(name, getattr(self, name), low=1)
        check_int("top_k", self.top_k, low=1, high=self.experts)
        check_choice("dtype", self.dtype, tuple(DTYPES))
        check_choice("skew", self.skew, SKEWS)
        check_choice("activation", self.activation, ACTIVATIONS)
        if self.format is not None:
            check_choice("format", self.format, tuple(FORMATS))
            if self.fp8:
                raise ValueError(f"fp8: got it with format {self.format!r}, wanted one or the other")
        if self.experts > self.hidden:
            raise ValueError(
                f"experts: got {self.experts}, wanted at most hidden = {self.hidden}: "
                "the hidden states are made so that the gate gives chosen logits"
            )
        if self.skew == "hot" and self.top_k == self.experts:
            raise ValueError("skew: got 'hot' with top_k = experts, where every token chooses every expert")
        if self.skew == "quarter-empty" and self.top_k > self.experts - self.num_empty:
            raise ValueError(
                f"skew: got 'quarter-empty' with top_k = {self.top_k}, "
                f"wanted top_k <= {self.experts - self.num_empty}, "
                f"the experts left when a quarter of {self.experts} is empty"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def num_empty(self) -> int:
        """Experts that "quarter-empty" leaves without a token: a quarter, at least one."""
        return max(1, self.experts // 4)

    @property
    def expert_rows(self) -> int:
        """Rows of an expert's up projection: 2n when gated, else n."""
        return 2 * self.intermediate if self.activation in GATED else self.intermediate

    @property
    def weight_elements(self) -> int:
        """Elements of one expert's two projections."""
        return (self.expert_rows + self.intermediate) * self.hidden

    def flops(self, mode: str) -> int:
        """Operations of the experts' products, backward being twice the forward; the gate is left out."""
        return PASSES[mode] * 2 * self.tokens * self.top_k * self.weight_elements

    @property
    def shape(self) -> Shape:
        """What floors are computed for."""
        return Shape(
            tokens=self.tokens, hidden=self.hidden, intermediate=self.intermediate, experts=self.experts,
            top_k=self.top_k, dtype=SHORT_NAMES[self.dtype], gated=self.activation in GATED,
            format=self.format,
        )  # fmt: skip

    def title(self) -> str:
        shape = f"T={self.tokens} d={self.hidden} n={self.intermediate} E={self.experts} K={self.top_k} {self.dtype}"
        extras = [] if self.skew == "uniform" else [self.skew]
        if self.activation != "swiglu":
            extras.append(self.activation)
        if self.bias:
            extras.append("bias")
        if self.format is not None:
            extras.append(self.format)
        if self.fp8:
            extras.append("products in fp8")
        return " ".join([f"{self.name}:" if self.name else "", shape, *extras]).strip()


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Shapes that are measured together. `needs_gpu`: too large, or meaningless, for a CPU."""

    about: str
    cases: tuple[Case, ...]
    needs_gpu: bool


def _case(name: str, tokens: int, layer: Layer, **more: Any) -> Case:
    return Case(name=name, tokens=tokens, **layer._asdict(), **{"dtype": "bfloat16", **more})


CPU_CASES = {
    "cpu-fine": _case("cpu-fine", 2048, Layer(512, 384, 64, 8)),
    "cpu-coarse": _case("cpu-coarse", 4096, Layer(512, 1024, 8, 2)),
    "cpu-decode": _case("cpu-decode", 64, Layer(512, 384, 64, 8)),
}
MODELS = (
    _case("OLMoE", 32768, models.MODELS["OLMoE"]),
    *(_case("Qwen3-30B-A3B", tokens, models.MODELS["Qwen3-30B-A3B"]) for tokens in (8192, 32768)),
    _case("Qwen3-235B-A22B", 32768, models.MODELS["Qwen3-235B-A22B"]),
    *(_case(name, 16384, models.MODELS[name]) for name in ("Mixtral-8x7B", "DeepSeek-V3")),
    _case("gpt-oss-20b", 16384, models.MODELS["gpt-oss-20b"], activation="gpt_oss", bias=True),
)
DECODE_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def both_dtypes(*cases: Case) -> tuple[Case, ...]:
    return tuple(replace(case, dtype=dtype) for case in cases for dtype in ("float32", "bfloat16"))


PRESETS = {
    **{
        name: Preset(about="one shape in float32 and bfloat16", cases=both_dtypes(case), needs_gpu=False)
        for name, case in CPU_CASES.items()
    },
    "cpu": Preset(
        about="the three CPU shapes in float32 and bfloat16", cases=both_dtypes(*CPU_CASES.values()), needs_gpu=False
    ),
    "sonic-12": Preset(
        about="the twelve shapes of the SonicMoE paper",
        cases=tuple(
            _case(f"{size} n={layer.intermediate}", tokens, layer)
            for size, (tokens, layers) in models.SONIC.items()
            for layer in layers
        ),
        needs_gpu=True,
    ),
    "models": Preset(about="the MoE layers of published models", cases=MODELS, needs_gpu=True),
    "scatter": Preset(
        about="granularity at constant active parameters: n = 8192/k, E = 8k",
        cases=tuple(_case(f"k={layer.top_k}", 16384, layer) for layer in models.GRANULARITY),
        needs_gpu=True,
    ),
    "decode": Preset(
        about="1 to 256 tokens through the models' layers",
        cases=tuple(replace(case, tokens=tokens) for case in (*MODELS[:1], *MODELS[2:]) for tokens in DECODE_TOKENS),
        needs_gpu=True,
    ),
    "skew": Preset(
        about="Qwen3-30B-A3B under every routing skew",
        cases=tuple(replace(MODELS[2], skew=skew) for skew in SKEWS),
        needs_gpu=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A case's tensors, all in its dtype and on one device; every provider works on these very weights.

    hidden, grad_out [T, d]; gate [E, d]; gate_up [E, 2n, d] ([E, n, d] when ungated), down [E, d, n] and their biases
    [E, 2n] ([E, n]) and [E, d], or None. packed: what gate_up and down are the numbers of, by their names; {} where the
    case has no format.
    """

    case: Case
    hidden: Tensor
    grad_out: Tensor
    gate: Tensor
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    packed: Mapping[str, QuantizedWeight] = field(default_factory=dict)

    @property
    def spec(self) -> ExpertSpec:
        return ExpertSpec(activation=self.case.activation, fp8=self.case.fp8)

    @property
    def parameters(self) -> ExpertParameters:
        return ExpertParameters(self.gate_up, self.down, self.gate_up_bias, self.down_bias)

    def call(self, weights: Tensor, dispatched: Dispatch) -> ExpertCall:
        """Our call of the experts for router weights [T, K] and a Dispatch of the tokens, over the codes if any."""
        packed: dict[str, Any] = dict(self.packed)
        parameters = self.parameters._replace(**packed)
        return ExpertCall(
            hidden=self.hidden, weights=weights, dispatched=dispatched, parameters=parameters, spec=self.spec
        )

    @property
    def experts(self) -> dict[str, Tensor]:
        """The experts' weights and biases by name; the ones that do not exist are left out."""
        return {name: tensor for name, tensor in self.parameters._asdict().items() if tensor is not None}


def wanted_logits(case: Case, generator: torch.Generator) -> Tensor:
    """Logits [T, E] in fp32 whose top-k has the case's skew.

    log p + Gumbel noise: its top-k is a draw of K experts without replacement with probabilities p (arXiv 1903.06059).
    """
    shape, device = (case.tokens, case.experts), generator.device
    uniform = torch.rand(shape, generator=generator, device=device).clamp(1e-6, 1 - 1e-6)
    logits = -torch.log(-torch.log(uniform))
    if case.skew == "zipf":
        rank = torch.arange(1, case.experts + 1, device=device)
        logits += torch.log_softmax(-ZIPF_EXPONENT * rank.log(), dim=0)
    elif case.skew == "hot":
        highest, lowest = logits.amax(1), logits.amin(1)
        chosen = torch.arange(case.tokens, device=device) % 2 == 0
        logits[:, 0] = torch.where(chosen, highest + 1, lowest - 1)
    elif case.skew == "quarter-empty":
        left = case.experts - case.num_empty
        logits[:, left:] = logits[:, :left].amin(1, keepdim=True) - 1
    return logits - logits.mean()


def make_workload(case: Case, device: torch.device, seed: int = 0) -> Workload:
    """Random tensors for a case, the same ones for the same seed and device.

    The gate's rows are orthonormal and the hidden states' part along them is set to the wanted logits, so an ordinary
    linear gate routes with the wanted skew. The experts start like `moe_triton.Experts`: uniform in +-1/sqrt(inputs).
    """
    generator = torch.Generator(device).manual_seed(seed)
    dtype = case.torch_dtype

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def parameter(inputs: int, *shape: int) -> Tensor:
        bound = 1 / math.sqrt(inputs)
        return torch.empty(shape, device=device, dtype=dtype).uniform_(-bound, bound, generator=generator)

    gate_dE = torch.linalg.qr(normal(case.hidden, case.experts)).Q
    hidden = normal(case.tokens, case.hidden)
    hidden += (wanted_logits(case, generator) - hidden @ gate_dE) @ gate_dE.T
    rows, inner = case.expert_rows, case.intermediate
    projections = {
        "gate_up": parameter(case.hidden, case.experts, rows, case.hidden),
        "down": parameter(inner, case.experts, case.hidden, inner),
    }
    packed = {}
    if case.format is not None:
        packed = {name: QuantizedWeight.quantize(weight, case.format) for name, weight in projections.items()}
        projections = {name: weight.dequantize(dtype) for name, weight in packed.items()}
    return Workload(
        case=case, hidden=hidden.to(dtype), grad_out=normal(case.tokens, case.hidden).to(dtype),
        gate=gate_dE.T.contiguous().to(dtype), **projections, packed=packed,
        gate_up_bias=parameter(case.hidden, case.experts, rows) if case.bias else None,
        down_bias=parameter(inner, case.experts, case.hidden) if case.bias else None,
    )  # fmt: skip
