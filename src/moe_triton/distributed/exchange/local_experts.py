"""The experts of this rank, by a backend: the innermost stage of an exchange."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moe_triton import runtime
from moe_triton.autograd.flat import Form, flatten_gradients, split, unflatten
from moe_triton.backends.protocols import ExpertsBackend
from moe_triton.dispatch import chosen_experts, dispatch
from moe_triton.distributed.exchange.dispatched_rows import DispatchedRows, shortened
from moe_triton.distributed.exchange.stages import Saved
from moe_triton.records import Dispatch, ExpertCall, ExpertSpec, ExpertWeight, RowGradients, Wanted


@dataclass
class LocalCall:
    """One forward of the local experts: where its tensors are in Saved, and what backward leaves.

    dispatched  of the four tensors of its Dispatch
    """

    x: int
    weights: int
    preactivation: int
    dispatched: tuple[int, int, int, int]
    grad_out: Tensor | None = None
    gradients: RowGradients | None = None


@dataclass
class LocalExperts(DispatchedRows):
    """See `stages.InnermostStage`.

    form          of the flat parameters (`moe_triton.autograd.flat`)
    width         shape of one expert's gate_up, which has to be the same on all ranks
    adds_bias     whether the down bias is added here: of several ranks that hold slices of an expert only one does
    """

    num_experts: int
    backend: str
    form: Form
    spec: ExpertSpec
    width: tuple[int, ...]
    recompute: bool = False
    adds_bias: bool = True
    note: Callable[[str], None] = lambda event: None
    calls: list[LocalCall] = field(default_factory=list)

    def description(self) -> Mapping[str, object]:
        spec, has_adapters = self.spec, self.form[4:]  # a and b of both projections
        return {
            "activation": spec.activation, "activation_limit": spec.limit, "activation_alpha": spec.alpha,
            "fp8": spec.fp8_mode, "width": self.width, "has_adapters": has_adapters,
        }  # fmt: skip

    def compute(self, x: Tensor, weights: Tensor, dispatched: Dispatch, saved: Saved) -> Tensor:
        self.note(f"experts {len(self.calls)}")
        call, keep = self._call(x, weights, dispatched, saved), saved.is_training and not self.recompute
        out, preactivation = self._experts(x.device).experts_forward(call, keep)
        counts, offsets, source, position = map(
            saved.put, (dispatched.counts, dispatched.offsets, dispatched.source, dispatched.position)
        )
        places = (counts, offsets, source, position)
        self.calls.append(LocalCall(saved.put(x), saved.put(weights), saved.put(preactivation), places))
        return out

    def start_backward(self, call: int, grad: Tensor, saved: Saved) -> Callable[[], tuple[Tensor, Tensor]]:
        here = self.calls[call]
        self.note(f"row gradients {call}")
        done = self._call(saved[here.x], saved[here.weights], _dispatch_of(here, saved), saved)
        done = replace(done, is_part=len(self.calls) > 1)
        rows = self._experts(grad.device).experts_backward_rows(done, grad, saved[here.preactivation], Wanted())
        here.grad_out, here.gradients = grad, rows
        assert rows.hidden is not None
        assert rows.weights is not None
        found = rows.hidden, rows.weights
        return lambda: found

    def backward_weights(self, wanted: Sequence[bool], saved: Saved) -> Sequence[Tensor | None]:
        """Compute one ragged product over the rows of all calls."""
        self.note("weight gradients")
        call, grad_out, rows = self._all_calls(saved)
        groups = Wanted(False, False, *(any(group) for group in split(wanted, self.form)))
        found = self._experts(grad_out.device).experts_backward_weights(call, grad_out, rows, groups)
        return flatten_gradients(found, self.form)

    def _experts(self, device: torch.device) -> ExpertsBackend:
        return runtime.experts_backend(self.backend, device, fp8=self.spec.fp8)

    def _call(self, x: Tensor, weights: Tensor, dispatched: Dispatch, saved: Saved) -> ExpertCall:
        parameters = unflatten(saved.parameters, self.form)
        if not self.adds_bias and parameters.down_bias is not None:
            parameters = parameters._replace(down_bias=_zeros_like(parameters.down_bias))
        return ExpertCall(hidden=x, weights=weights, dispatched=dispatched, parameters=parameters, spec=self.spec)

    def _all_calls(self, saved: Saved) -> tuple[ExpertCall, Tensor, RowGradients]:
        """The operands of the weight gradients, with the calls' rows merged into one expert order."""
        grad_outs = [call.grad_out for call in self.calls if call.grad_out is not None]
        gradients = [call.gradients for call in self.calls if call.gradients is not None]
        if len(self.calls) == 1:
            only = self.calls[0]
            only_dispatched = _dispatch_of(only, saved)
            return self._call(saved[only.x], saved[only.weights], only_dispatched, saved), grad_outs[0], gradients[0]
        weights = torch.cat([saved[call.weights] for call in self.calls])
        parts = [_dispatch_of(call, saved) for call in self.calls]
        experts = torch.cat([chosen_experts(dispatched) for dispatched in parts])
        num_rows = sum(dispatched.source.shape[0] for dispatched in parts)
        whole = dispatch(experts, self.num_experts, backend=self.backend)
        merged = self._call(joined([saved[call.x] for call in self.calls]), weights, shortened(whole, num_rows), saved)
        return (
            merged,
            joined(grad_outs),
            RowGradients(
                hidden=None,
                weights=None,
                preactivation=_merged(parts, [g.preactivation for g in gradients], merged.dispatched, num_rows),
                weighted_a=_merged(parts, [g.weighted_a for g in gradients], merged.dispatched, num_rows),
            ),
        )


def _dispatch_of(call: LocalCall, saved: Saved) -> Dispatch:
    counts, offsets, source, position = (saved[place] for place in call.dispatched)
    return Dispatch(counts=counts, offsets=offsets, source=source, position=position)


def _merged(calls: Sequence[Dispatch], parts: Sequence[Tensor], whole: Dispatch, num_rows: int) -> Tensor:
    """The calls' rows in the order of their common Dispatch."""
    out = parts[0].new_empty(num_rows + 1, parts[0].shape[1])  # one more for the rows past a call's end
    first_slot = 0
    for dispatched, part in zip(calls, parts, strict=True):
        source = dispatched.source.long()
        if source.numel() > 0:
            row = whole.position.reshape(-1)[(first_slot + source).clamp_min(0)].long()
            out[torch.where(source >= 0, row, num_rows)] = part
        first_slot += dispatched.position.numel()
    return out[:num_rows]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Join rows that follow each other into one tensor: a view where they already are neighbours in one buffer."""
    first, width = parts[0], parts[0].stride(0)
    end = first.storage_offset()
    neighbours = True
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        neighbours = neighbours and same and part.is_contiguous() and part.storage_offset() == end
        end += part.shape[0] * width
    if not neighbours:
        return torch.cat(list(parts))
    return first.as_strided((sum(part.shape[0] for part in parts), first.shape[1]), first.stride())


def _zeros_like(bias: ExpertWeight) -> ExpertWeight:
    return torch.zeros_like(bias) if isinstance(bias, Tensor) else [torch.zeros_like(b) for b in bias]
