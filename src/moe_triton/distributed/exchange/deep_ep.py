"""DeepEP's kernels as an exchange: `deep_ep.ElasticBuffer`, as version 2.1.0 documents it (deepseek-ai/DeepEP, MIT).

A token travels once to each rank that has some of its experts, over NVLink and RDMA; the receiver sums the choices of
its experts with their weights, and DeepEP's combine sums over the ranks. In backward the gradient of a combine is a
dispatch with the same handle, and that of a dispatch is a combine.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from moe_triton.distributed.exchange.fp8_rows import dequantize_rows, quantize_rows
from moe_triton.distributed.exchange.stages import ExchangeSpec, InnerStage, Saved


def deep_ep_problem() -> str | None:
    """Return why DeepEP cannot run here; None where it can."""
    if find_spec("deep_ep") is None:
        return "the package deep_ep is not installed"
    return None if torch.cuda.is_available() else "needs a CUDA GPU"


class DeepEP:
    """Moves rows by DeepEP's kernels: `ExpertParallel(groups, exchange=DeepEP(), max_tokens_per_rank=4096)`.

    Hidden states are bfloat16, and E is a multiple of the ranks. One host sync per call, for the sizes; the shared
    expert runs while rows travel. Takes `dispatch_dtype=torch.float8_e4m3fn`. A buffer is made at the first call of
    each hidden size, number of choices and group, and shared by all layers.

    Args:
        num_sms: SMs for the kernels; 0: DeepEP computes it.
        buffer_options: further arguments of `deep_ep.ElasticBuffer`. `deterministic` is True unless given.

    Raises:
        ImportError: without the package `deep_ep`.
    """

    def __init__(self, *, num_sms: int = 0, **buffer_options: Any) -> None:
        if find_spec("deep_ep") is None:
            raise ImportError("exchange: got DeepEP without the package deep_ep, wanted it installed")
        self.num_sms = num_sms
        self.buffer_options = {"deterministic": True, **buffer_options}
        self._buffers: dict[tuple[str, int, int, int], Any] = {}

    def __repr__(self) -> str:
        return f"DeepEP(num_sms={self.num_sms}, {self.buffer_options})"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_buffers": {}}

    def __call__(self, inner: InnerStage, spec: ExchangeSpec) -> DeepEPStage:
        """Return the stage of one call."""
        if spec.max_tokens is None:
            raise ValueError("max_tokens_per_rank: got None with DeepEP, wanted the most tokens that a rank passes")
        if spec.shape.num_experts % spec.group.size:
            raise ValueError(
                f"num_experts: got {spec.shape.num_experts} on {spec.group.size} ranks with DeepEP, wanted a multiple"
            )

        def buffer(hidden_size: int, top_k: int) -> Any:
            return self._buffer(spec, hidden_size, top_k)

        return DeepEPStage(buffer=buffer, inner=inner, spec=spec, num_sms=self.num_sms)

    def _buffer(self, spec: ExchangeSpec, hidden_size: int, top_k: int) -> Any:
        key = (spec.group.name, hidden_size, top_k, spec.max_tokens or 0)
        if key not in self._buffers:
            # sized for bf16 rows even where fp8 is dispatched: gradients are bf16
            self._buffers[key] = importlib.import_module("deep_ep").ElasticBuffer(
                spec.group.handle, num_max_tokens_per_rank=max(spec.max_tokens or 0, 1), hidden=hidden_size,
                num_topk=top_k, **self.buffer_options,
            )  # fmt: skip
        return self._buffers[key]


@dataclass(kw_only=True)
class DeepEPStage:
    """See `stages.Stage`. handles: of the forward calls."""

    buffer: Callable[[int, int], Any]
    inner: InnerStage
    spec: ExchangeSpec
    num_sms: int
    handles: list[Any] = field(default_factory=list)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, assignments: int, saved: Saved) -> Tensor:
        buffer, as_fp8 = self.buffer(x.shape[1], ids.shape[1]), self.spec.dispatch_dtype is not None
        with self.spec.channel.error_context("DeepEP dispatch"):
            rows, row_ids, row_weights, handle, event = buffer.dispatch(
                quantize_rows(x) if as_fp8 else x,
                topk_idx=ids.to(importlib.import_module("deep_ep").topk_idx_t),
                topk_weights=weights, num_experts=self.spec.shape.num_experts, num_sms=self.num_sms,
                async_with_compute_stream=True,
            )  # fmt: skip
        if self.spec.overlap_with is not None:
            self.spec.overlap_with.compute()
        event.current_stream_wait()
        if as_fp8:
            codes, scales = rows
            rows = dequantize_rows(codes, scales, x.dtype)
        arrived = sum(handle.num_recv_tokens_per_expert_list)
        y = self.inner.forward(rows, row_ids.int(), row_weights, arrived, saved)
        self.handles.append(handle)
        with self.spec.channel.error_context("DeepEP combine"):
            out, _, event = buffer.combine(y, handle, num_sms=self.num_sms, async_with_compute_stream=True)
        event.current_stream_wait()
        return out

    def start_backward(self, call: int, grad: Tensor, saved: Saved) -> Callable[[], tuple[Tensor, Tensor]]:
        handle = self.handles[call]
        buffer = self.buffer(grad.shape[1], handle.topk_idx.shape[1])
        options = {"handle": handle, "num_sms": self.num_sms, "async_with_compute_stream": True}
        with self.spec.channel.error_context("DeepEP dispatch of gradients"):
            rows, _, _, _, event = buffer.dispatch(grad, **options)
        event.current_stream_wait()
        grad_x, grad_weights = self.inner.start_backward(call, rows, saved)()
        with self.spec.channel.error_context("DeepEP combine of gradients"):
            out, out_weights, event = buffer.combine(grad_x, topk_weights=grad_weights, **options)

        def finish() -> tuple[Tensor, Tensor]:
            event.current_stream_wait()
            return out, out_weights

        return finish
