"""The router: a linear gate and `moe_triton.route`, with noise and the loss-free balancing bias."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from moe_triton.autograd.linear import linear
from moe_triton.checks import FLOATS, MASKS, check_int, check_number, check_tensor
from moe_triton.layers.load import CountsLoad
from moe_triton.records import Routing
from moe_triton.reference import wide
from moe_triton.routing import route_by_spec, router_spec
from moe_triton.runtime import without_autocast


class Router(CountsLoad):
    """Scores every expert for every token and chooses K of them.

    Args:
        hidden_size: d.
        num_experts: E.
        top_k: K, 1 to E.
        score, normalize, scale, num_groups, top_groups, group_score: see `moe_triton.route`.
        bias: give the gate a bias.
        choice_bias: balance the load without a loss: a buffer [E], added to the scores for the choice only and moved by
            `update_choice_bias` once per optimizer step (arXiv 2408.15664). It stays fp32 whatever casts the module:
            its small steps would be lost in bf16.
        jitter: in training, multiply the gate's input by U(1 - jitter, 1 + jitter) (Switch Transformer).
        gumbel: in training, choose by logits + Gumbel noise (DeepSpeed's RSample); the weights stay noise-free.
        backend: "auto", "triton", "torch" or "reference".
        device, dtype: of the parameters.

    The gate computes in fp32 whatever the parameters' dtype (fp64 for fp64 parameters), also under autocast.
    """

    choice_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        score: str = "softmax",
        normalize: bool | None = None,
        scale: float = 1.0,
        num_groups: int = 1,
        top_groups: int | None = None,
        group_score: str = "max",
        bias: bool = False,
        choice_bias: bool = False,
        jitter: float = 0.0,
        gumbel: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_int("hidden_size", hidden_size, low=1)
        check_int("num_experts", num_experts, low=1)
        check_number("jitter", jitter, low=0)
        self.spec = router_spec(
            num_experts,
            top_k,
            score=score,
            normalize=normalize,
            scale=scale,
            num_groups=num_groups,
            top_groups=top_groups,
            group_score=group_score,
        )
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.jitter = jitter
        self.gumbel = gumbel
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        bias_buffer = torch.zeros(num_experts, device=device, dtype=torch.float32) if choice_bias else None
        self.register_buffer("choice_bias", bias_buffer)
        self.load = torch.zeros(num_experts, device=device, dtype=torch.int64) if choice_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from torch's generator; the biases and the load become zeros."""
        bound = 1 / math.sqrt(self.hidden_size)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.choice_bias is not None and self.load is not None:
            self._keep_choice_bias_wide(self.choice_bias)
            nn.init.zeros_(self.choice_bias)
            self.load_on(self.choice_bias.device).zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.choice_bias
        super()._apply(fn, recurse)
        self._keep_choice_bias_wide(exact)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._keep_choice_bias_wide(self.choice_bias)  # assign=True takes the tensor as it is

    def _keep_choice_bias_wide(self, exact: Tensor | None) -> None:
        """Undo a cast of the choice bias, with the values `exact` that it had before."""
        if exact is not None and self.choice_bias is not None and self.choice_bias.dtype != torch.float32:
            self.choice_bias = exact.to(device=self.choice_bias.device, dtype=torch.float32)

    @property
    def top_k(self) -> int:
        return self.spec.top_k

    def gate(self, hidden_states: Tensor) -> Tensor:
        """[T, d] -> logits [T, E] in fp32 (fp64 for fp64 parameters)."""
        dtype = wide(self.weight.dtype)
        with without_autocast(hidden_states.device):
            x = hidden_states.to(dtype)
            if self.training and self.jitter > 0:
                x = x * (1 + self.jitter * (2 * torch.rand_like(x) - 1))
            bias = None if self.bias is None else self.bias.to(dtype)
            return linear(x, self.weight.to(dtype), bias, self.backend)

    def forward(self, hidden_states: Tensor, token_mask: Tensor | None = None) -> Routing:
        """hidden_states [T, d], token_mask [T] or None -> Routing."""
        check_tensor("hidden_states", hidden_states, shape=("T", self.hidden_size), dtypes=FLOATS)
        if token_mask is not None:
            shape, device = hidden_states.shape[:-1], hidden_states.device
            check_tensor("token_mask", token_mask, shape=shape, dtypes=MASKS, device=device)
            hidden_states = hidden_states.masked_fill(token_mask.logical_not()[:, None], 0)  # 0 * NaN would be NaN
        routing = route_by_spec(
            self.gate(hidden_states),
            self.spec,
            choice_bias=self.choice_bias,
            noise="gumbel" if self.gumbel and self.training else None,
            token_mask=token_mask,
            backend=self.backend,
        )
        self.count_load(routing.counts)
        return routing

    @torch.no_grad()
    def update_choice_bias(self, rate: float = 1e-3, group: torch.distributed.ProcessGroup | None = None) -> None:
        """Move the choice bias by `rate` towards the experts with less than the mean load, and start counting anew.

        bias += rate * sign(mean(load) - load), with the load counted since the last call and summed over `group`
        (None: torch.distributed's default group, when there is one). Call it once per optimizer step on every rank.
        """
        if self.choice_bias is None or self.load is None:
            raise ValueError("update_choice_bias: this router was made with choice_bias=False")
        self._keep_choice_bias_wide(self.choice_bias)  # code that casts buffers by hand
        load = self.load_on(self.choice_bias.device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(load, group=group)
        wide_load = load.float()
        self.choice_bias += rate * torch.sign(wide_load.mean() - wide_load)
        load.zero_()

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, {self.spec}"


def update_choice_biases(
    model: nn.Module, rate: float = 1e-3, group: torch.distributed.ProcessGroup | None = None
) -> None:
    """Call `Router.update_choice_bias` for every router of the model that has a choice bias.

    group: the ranks that hold the same layers; with pipeline parallelism these are not all (None).
    """
    for module in model.modules():
        if isinstance(module, Router) and module.choice_bias is not None:
            module.update_choice_bias(rate, group)
