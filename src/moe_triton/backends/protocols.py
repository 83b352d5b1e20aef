"""What a backend implements: four operations, each a module with these functions over plain tensors and records.

Tensors are on one device and may have any strides; nothing is differentiated. Definitions: `moe_triton.reference`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from moe_triton.records import (
    Dispatch,
    ExpertCall,
    ExpertGradients,
    GateGradients,
    GateWanted,
    ParameterGradients,
    RouterSpec,
    RowGradients,
    TiledDispatch,
    Wanted,
)


class GateBackend(Protocol):
    """Module `gate`, for 16-bit hidden states."""

    def gate_forward(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the logits [T, E] in fp32."""

    def gate_backward(
        self, grad_logits: Tensor, grad_hidden: Tensor | None, hidden: Tensor, weight: Tensor, wanted: GateWanted
    ) -> GateGradients:
        """Return the gradients that are wanted, `grad_hidden` [T, d] added to that of hidden; that of bias in fp32."""


class RoutingBackend(Protocol):
    """Module `routing`."""

    def route_forward(
        self,
        logits: Tensor,
        spec: RouterSpec,
        choice_bias: Tensor | None,
        noise: Tensor | None,
        token_mask: Tensor | None,
        given: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return (experts [T, K] int32, weights [T, K], counts [E] int32, score_sums [E], z_sum []).

        Counts and score sums are [B, E] where B = `spec.sequences` > 1. given: what `reference.given_choices` returned.
        """

    def route_and_dispatch(
        self,
        logits: Tensor,
        spec: RouterSpec,
        choice_bias: Tensor | None,
        noise: Tensor | None,
        token_mask: Tensor | None,
        given: Tensor | None = None,
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], TiledDispatch | None] | None:
        """Return what `route_forward` does, and a Dispatch without a capacity where it costs no launch of its own.

        Of one sequence. None where `route_unsummed` does less.
        """

    def route_unsummed(
        self,
        logits: Tensor,
        spec: RouterSpec,
        choice_bias: Tensor | None,
        noise: Tensor | None,
        token_mask: Tensor | None,
        given: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Callable[[], tuple[Tensor, Tensor, Tensor]]] | None:
        """Return experts, weights, and what computes counts and sums, if ever; None where all of it is made at once."""

    def route_backward(
        self,
        grad_weights: Tensor,
        grad_score_sums: Tensor | None,
        grad_z_sum: Tensor | None,
        logits: Tensor,
        experts: Tensor,
        spec: RouterSpec,
        *,
        all_real: bool = False,
    ) -> Tensor:
        """Return the gradient of the logits [T, E], from those of the three differentiable outputs; None: zeros.

        all_real: every choice is of an expert that has a weight, so that there is nothing to mask.
        """


class DispatchBackend(Protocol):
    """Module `dispatch`."""

    def build_dispatch(
        self,
        experts: Tensor,
        num_experts: int,
        capacity: int | None,
        capacity_groups: int,
        by_choice: bool,
        keys: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the fields of a Dispatch: counts [E], offsets [E+1], source [S], position [T, K], all int32."""

    def build_small_dispatch(self, experts: Tensor, num_experts: int) -> Dispatch | None:
        """Return the same without a capacity, made in one launch; None where there are too many, or no such way."""


class ExpertsBackend(Protocol):
    """Module `experts`, in the torch backend `experts_cpu` and `experts_device`; `experts_fp8` for fp8 products."""

    def experts_forward(self, call: ExpertCall, keep_preactivation: bool) -> tuple[Tensor, Tensor]:
        """Return (out [T, d], pre-activation [S, 2n] or [S, n]) in hidden's dtype; the second empty [0] if not kept."""

    def experts_backward(
        self, call: ExpertCall, grad_out: Tensor, preactivation: Tensor, wanted: Wanted
    ) -> ExpertGradients:
        """Return the gradients that are wanted; an empty pre-activation is computed again."""

    def experts_backward_rows(
        self, call: ExpertCall, grad_out: Tensor, preactivation: Tensor, wanted: Wanted
    ) -> RowGradients:
        """Compute the first half of `experts_backward`: what a sender waits for, and what the second half needs."""

    def experts_backward_weights(
        self, call: ExpertCall, grad_out: Tensor, row_grads: RowGradients, wanted: Wanted
    ) -> ParameterGradients:
        """Compute the second half of `experts_backward`."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute x [m, in] @ weight [out, in]^T + bias [out]: a row's bits depend on this row alone."""

    def combine_rows(self, rows: Tensor, position: Tensor) -> Tensor:
        """Sum each token's rows [R, d] in the order of position [T, J], where -1 adds nothing: [T, d]."""


if TYPE_CHECKING:  # mypy holds the modules against the protocols
    from moe_triton.backends.torch import dispatch as torch_dispatch
    from moe_triton.backends.torch import experts_cpu, experts_device
    from moe_triton.backends.torch import experts_fp8 as torch_fp8
    from moe_triton.backends.torch import gate as torch_gate
    from moe_triton.backends.torch import routing as torch_routing
    from moe_triton.backends.triton import dispatch as triton_dispatch
    from moe_triton.backends.triton import experts as triton_experts
    from moe_triton.backends.triton import experts_fp8 as triton_fp8
    from moe_triton.backends.triton import gate as triton_gate
    from moe_triton.backends.triton import routing as triton_routing

    GATE: tuple[GateBackend, ...] = (torch_gate, triton_gate)
    ROUTING: tuple[RoutingBackend, ...] = (torch_routing, triton_routing)
    DISPATCH: tuple[DispatchBackend, ...] = (torch_dispatch, triton_dispatch)
    EXPERTS: tuple[ExpertsBackend, ...] = (experts_cpu, experts_device, triton_experts, torch_fp8, triton_fp8)
