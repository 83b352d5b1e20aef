"""Colossal-AI's routers over `moe_triton.route` and `dispatch`: the decisions of both generations, without [S, E, C].

Shapes: S tokens of this rank, E experts, K = 1 or 2 choices, C an expert's places.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from moe_triton.checks import FLOATS, check_choice, check_int, check_number, check_tensor
from moe_triton.compat.colossalai.context.moe_context import GENERATIONS
from moe_triton.compat.colossalai.context.parallel_mode import ParallelMode
from moe_triton.compat.colossalai.context.random import seed
from moe_triton.dispatch import dispatch, expert_capacity
from moe_triton.records import Dispatch, Routing
from moe_triton.reference import wide
from moe_triton.routing import route

NoisyFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Routed:
    """A router's decisions.

    routing     the choices before dropping: experts [S, K] int32, weights [S, K], and the sums for the auxiliary loss
    dispatched  which of them survive, and the row of each
    """

    routing: Routing
    dispatched: Dispatch


class MoeRouter(nn.Module):
    """Logits [S, E] -> each token's K experts, by the largest softmax probabilities, which are the weights as they are.

    C is, by generation:
        v0.0.2: ceil(K * factor * S / E), at least min_capacity, with one factor for training and eval
        v0.1.6: floor(factor * S / E), one more if that is odd, at least min_capacity
    in exact arithmetic on the decimals that were written.

    Args:
        top_k: K.
        capacity_factor_train, capacity_factor_eval: the factors; None drops nothing.
        min_capacity: floor of C.
        priority: who survives, of `moe_triton.dispatch`.
        noisy_func: [S, E] -> [S, E], see `noise`.
        noise_on: "logits": choices and weights come from the noisy logits. "choice": the choices only do.
        noise_in_eval: apply the noise in eval too, as v0.0.2 does.
        drop_tks: False drops nothing in eval. In training the capacity always holds.
        generation: "v0.0.2" or "v0.1.6".
        capacity_groups: G equal runs of tokens with a capacity each, which reproduces G ranks on one process.
        backend: "auto", "triton", "torch" or "reference".
    """

    def __init__(
        self,
        *,
        top_k: int,
        capacity_factor_train: float | None,
        capacity_factor_eval: float | None,
        min_capacity: int,
        priority: str,
        noisy_func: NoisyFunction | None,
        noise_on: str,
        noise_in_eval: bool,
        drop_tks: bool,
        generation: str,
        capacity_groups: int,
        backend: str,
    ) -> None:
        super().__init__()
        for name, factor in (("train", capacity_factor_train), ("eval", capacity_factor_eval)):
            if factor is not None:
                check_number(f"capacity_factor_{name}", factor, above=0)
        check_int("min_capacity", min_capacity, low=0)
        check_int("capacity_groups", capacity_groups, low=1)
        if noisy_func is not None and not callable(noisy_func):
            raise TypeError(f"noisy_func: got {type(noisy_func).__name__}, wanted a function of the logits, or None")
        self.top_k = top_k
        self.capacity_factor_train = capacity_factor_train
        self.capacity_factor_eval = capacity_factor_eval
        self.min_capacity = min_capacity
        self.priority = priority
        self.noisy_func = noisy_func
        self.noise_on = noise_on
        self.noise_in_eval = noise_in_eval
        self.drop_tks = drop_tks
        self.generation = generation
        self.capacity_groups = capacity_groups
        self.backend = backend

    def get_capacity(self, logits_shape: Sequence[int]) -> int | None:
        """Return C for logits of the shape [..., S, E] in the present mode; None when nothing is dropped."""
        num_tokens, num_experts = logits_shape[-2:]
        factor = self.capacity_factor_train if self.training else self.capacity_factor_eval
        if factor is None or not (self.training or self.drop_tks):
            return None
        if self.generation == "v0.0.2":
            return expert_capacity(num_tokens, num_experts, self.top_k, factor, self.min_capacity)
        exact = Fraction(str(float(factor))) * num_tokens / num_experts
        places = exact.numerator // exact.denominator
        return max(places + places % 2, self.min_capacity)

    def forward(self, inputs: Tensor) -> Routed:
        """Logits [S, E], any float dtype; the maths runs in fp32 (fp64 for fp64 logits)."""
        num_tokens, num_experts = check_tensor("inputs", inputs, shape=("S", "E"), dtypes=FLOATS).shape
        logits, noise = inputs.to(wide(inputs.dtype)), None
        if self.noisy_func is not None and (self.training or self.noise_in_eval):
            noisy = self.noisy_func(logits)
            if self.noise_on == "choice":
                noise = (noisy - logits).detach()
            else:
                logits = noisy
        routing = route(logits, self.top_k, normalize=False, noise=noise, backend=self.backend)
        if num_tokens % self.capacity_groups:
            raise ValueError(
                f"capacity_groups: got {self.capacity_groups}, wanted a divisor of the {num_tokens} tokens"
            )
        with seed(ParallelMode.TOKENS):  # ranks with the same tokens draw the same keys
            dispatched = dispatch(
                routing.experts,
                num_experts,
                capacity=self.get_capacity((num_tokens // self.capacity_groups, num_experts)),
                capacity_groups=self.capacity_groups,
                priority=self.priority,
                backend=self.backend,
            )
        return Routed(routing=routing, dispatched=dispatched)

    def extra_repr(self) -> str:
        factors = f"{self.capacity_factor_train}, eval {self.capacity_factor_eval}"
        return f"{self.generation}, capacity factor {factors}, min_capacity={self.min_capacity}"


class Top1Router(MoeRouter):
    """One expert per token (Switch Transformer, arXiv 2101.03961), with the arguments of either generation.

        v0.0.2: Top1Router(capacity_factor, min_capacity, noisy_func=None)
        v0.1.6: Top1Router(capacity_factor_train=1.25, capacity_factor_eval=2.0, min_capacity=4, select_policy="first",
                           noisy_func=None, drop_tks=True)

    v0.0.2 samples the surviving tokens at random, and its noise changes the choice only. v0.1.6 keeps the earliest, or
    samples with select_policy="random". Further keywords of both: generation, noise_in_eval=False, capacity_groups=1,
    backend="auto". Without `generation` it is v0.0.2 when `capacity_factor` is named, or when v0.0.2's signature takes
    the arguments and an int is where it has min_capacity; else v0.1.6.

    Raises:
        ValueError, TypeError: an argument out of range, of the wrong kind, or of the other generation, by name.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(top_k=1, **_arguments(_top1_v002, _top1_v016, args, options))

    @property
    def select_policy(self) -> str:
        """Return which tokens survive the capacity: "first", the earliest, or "random"."""
        return "random" if self.priority == "random" else "first"


class Top2Router(MoeRouter):
    """Two experts per token (GShard, arXiv 2006.16668), with the arguments of either generation.

        v0.0.2: Top2Router(capacity_factor, noisy_func=None)
        v0.1.6: Top2Router(capacity_factor_train=1.25, capacity_factor_eval=2.0, min_capacity=4, noisy_func=None,
                           drop_tks=True)

    All first choices have precedence over second ones; then earlier tokens have. The weights are not renormalised.
    Further keywords as for `Top1Router`. Without `generation` it is v0.0.2 when `capacity_factor` is named, or when one
    factor is given by position and at most `noisy_func` beside it; else v0.1.6.

    Raises:
        ValueError, TypeError: an argument out of range, of the wrong kind, or of the other generation, by name.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(top_k=2, **_arguments(_top2_v002, _top2_v016, args, options))


# The signatures of both generations: their arguments -> those of `MoeRouter`.


def _top1_v002(capacity_factor: Any, min_capacity: Any, noisy_func: Any = None) -> dict[str, Any]:
    options = _top2_v002(capacity_factor, noisy_func)
    return {**options, "min_capacity": min_capacity, "priority": "random", "noise_on": "choice"}


def _top2_v002(capacity_factor: Any, noisy_func: Any = None) -> dict[str, Any]:
    return _top2_v016(capacity_factor, capacity_factor, 0, noisy_func)


def _top1_v016(
    capacity_factor_train: Any = 1.25,
    capacity_factor_eval: Any = 2.0,
    min_capacity: Any = 4,
    select_policy: Any = "first",
    noisy_func: Any = None,
    drop_tks: Any = True,
) -> dict[str, Any]:
    check_choice("select_policy", select_policy, ("first", "random"))
    options = _top2_v016(capacity_factor_train, capacity_factor_eval, min_capacity, noisy_func, drop_tks)
    return {**options, "priority": "position" if select_policy == "first" else "random"}


def _top2_v016(
    capacity_factor_train: Any = 1.25,
    capacity_factor_eval: Any = 2.0,
    min_capacity: Any = 4,
    noisy_func: Any = None,
    drop_tks: Any = True,
) -> dict[str, Any]:
    return {
        "capacity_factor_train": capacity_factor_train,
        "capacity_factor_eval": capacity_factor_eval,
        "min_capacity": min_capacity,
        "noisy_func": noisy_func,
        "drop_tks": bool(drop_tks),
        "priority": "choice",
        "noise_on": "logits",
    }


def _is_first_generation(
    first: Callable[..., dict[str, Any]], args: tuple[Any, ...], options: dict[str, Any], asked: str | None
) -> bool:
    """Return whether these are the arguments of v0.0.2, whose signature is `first`."""
    if asked is not None:
        check_choice("generation", asked, GENERATIONS)
        return asked == GENERATIONS[0]
    if "capacity_factor" in options:
        return True
    try:
        given = inspect.signature(first).bind(*args, **options).arguments
    except TypeError:
        return False
    # v0.1.6's second positional argument is a float, which neither of these may be
    noise_fits = given.get("noisy_func") is None or callable(given["noisy_func"])
    return noise_fits and isinstance(given.get("min_capacity", 0), int)


def _arguments(
    first: Callable[..., dict[str, Any]],
    second: Callable[..., dict[str, Any]],
    args: tuple[Any, ...],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Return `MoeRouter`'s arguments from those of either generation, whose signatures are `first` and `second`."""
    defaults = {"generation": None, "noise_in_eval": False, "capacity_groups": 1, "backend": "auto"}
    common = {name: options.pop(name, value) for name, value in defaults.items()}
    is_first = _is_first_generation(first, args, options, common["generation"])
    signature = first if is_first else second
    wanted = inspect.signature(signature)
    try:
        wanted.bind(*args, **options)
    except TypeError as error:
        raise TypeError(
            f"router: {error}; wanted the arguments of one generation, {tuple(wanted.parameters)}"
        ) from None
    return {**common, "generation": GENERATIONS[0 if is_first else 1], **signature(*args, **options)}
