"""Which backend runs an operation, and why.

"torch" and "triton" are packages in `moe_triton.backends`; "reference" is not: the definitions in
`moe_triton.reference` run under autograd as they stand. (This is not in backends/__init__.py because torch.compile
refuses to trace files whose path holds "triton/backends".)
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
from functools import cache
from typing import Any, NamedTuple

import torch

from moe_triton.backends.protocols import DispatchBackend, ExpertsBackend, GateBackend, RoutingBackend
from moe_triton.checks import check_choice
from moe_triton.torch_internals import constant_while_compiling, is_autocast_anywhere, is_plain

BACKENDS = ("auto", "triton", "torch", "reference")
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
NOTHING = contextlib.nullcontext()
OLDEST_CAPABILITY = (8, 0)  # asynchronous copies and bf16 matrix instructions


class Choice(NamedTuple):
    """The backend that runs, and the reason in words."""

    name: str
    reason: str


ASKED_FOR = {name: Choice(name, "asked for") for name in BACKENDS}


def installed_version(package: str) -> str | None:
    """Return the installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_matplotlib() -> None:
    """Raise ImportError, with the command that installs it, where matplotlib is missing: only charts need it."""
    if installed_version("matplotlib") is None:
        raise ImportError("charts need matplotlib, which is not installed: pip install 'moe-triton[plot]'")


def interpreting() -> bool:
    """Return whether Triton runs its kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


@cache
def _not_a_gpu(type_: str) -> str:
    return f"the Triton kernels need a CUDA or ROCm GPU; the tensors are on {type_}"


@constant_while_compiling
def _unfit_gpu(device: torch.device) -> str | None:
    """Return why the kernels cannot run on this device; None when they can."""
    if device.type != "cuda":
        return _not_a_gpu(device.type)
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    return _unfit_capability(device)


@cache
def _unfit_capability(device: torch.device) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"the Triton kernels need compute capability 8.0; the GPU has {major}.{minor}"
    return None


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """Resolve `backend` for tensors of this device and dtype.

    Raises ValueError for an unknown name, TypeError for "triton" with float64, RuntimeError for "triton" where the
    kernels cannot run (no supported GPU and no interpreter) and for "reference" on the meta device.
    """
    if backend not in BACKENDS:
        check_choice("backend", backend, BACKENDS)
    if backend == "reference" and device.type == "meta":
        raise RuntimeError("backend: got 'reference' for tensors on the meta device, wanted 'torch'")
    if backend in ("torch", "reference"):
        return ASKED_FOR[backend]
    if backend == "auto" and dtype == torch.float64:
        return Choice("torch", "float64: the Triton kernels compute in float32")
    if backend == "triton" and dtype == torch.float64:
        raise TypeError("backend: got 'triton' for torch.float64, wanted 'torch' or 'reference'")
    unfit = _unfit_gpu(device)
    if unfit is None:
        return ASKED_FOR["triton"] if backend == "triton" else Choice("triton", "a supported GPU")
    if backend == "auto":
        return Choice("torch", unfit)
    if device.type == "cpu" and TRITON_INSTALLED and interpreting():
        return Choice("triton", "asked for, in Triton's interpreter")
    hint = (
        "; TRITON_INTERPRET=1, set before triton is imported, runs them on CPU tensors" if device.type == "cpu" else ""
    )
    raise RuntimeError(f"backend: got 'triton', but {unfit}{hint}")


def check_usable(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise what `choose` raises, and ValueError where the table that the kernels read their configurations from is
    broken: before anything is run."""
    if choose(backend, device, dtype).name == "triton":
        check_table()


def check_table() -> None:
    """Raise ValueError, naming the file, where the user's table of kernel configurations is broken."""
    if TRITON_INSTALLED:
        from moe_triton_kernels.configs import user_table  # needs Triton

        user_table()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast computes with on this device; None where it is off, or does not exist (meta)."""
    if not (torch.compiler.is_compiling() or is_autocast_anywhere()):
        return None
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return `torch.autocast(enabled=False)`; where it is off already, or the device is meta, what does nothing."""
    is_off = autocast_dtype(device) is None
    return NOTHING if is_off else torch.autocast(device.type, enabled=False)


def plain_maths(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Return what an implementation runs under: no autograd, no autocast, and the tensor's GPU as the current one.

    Where all of that is so already, it is what does nothing.
    """
    return NOTHING if is_plain(tensor) else _PlainMaths(tensor)


class _PlainMaths:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.parts: list[contextlib.AbstractContextManager[Any]] = [torch.no_grad()]
        if is_autocast_anywhere():
            self.parts.append(without_autocast(tensor.device))
        if tensor.device.type == "cuda":
            self.parts.append(torch.cuda.device_of(tensor))

    def __enter__(self) -> None:
        for part in self.parts:
            part.__enter__()

    def __exit__(self, *error: Any) -> None:
        for part in reversed(self.parts):
            part.__exit__(*error)


@cache
def gate_backend(name: str) -> GateBackend:
    """Return the implementation of the gate by backend "torch" or "triton"."""
    return _module(f"{name}.gate")


class batch_invariant(contextlib.ContextDecorator):
    """Make the bits of each token's output depend on this token alone, in every MoE forward inside the context.

    Not on the number of tokens, on the other tokens, on their order, or on the number of ranks that hold the experts
    (the term is Thinking Machines', "Defeating Nondeterminism in LLM Inference"). It holds in training and in inference
    on the backends "torch" and "triton", for one kind of processor or GPU, one version of torch and one number of
    threads. Gradients are outside it, and so is what mixes tokens by definition: a capacity, noise. For the whole
    process, as `torch.use_deterministic_algorithms`; contexts nest. `MoE(batch_invariant=True)` does it for one layer.
    """

    def __enter__(self) -> None:
        global _invariant_contexts
        _invariant_contexts += 1

    def __exit__(self, *error: object) -> None:
        global _invariant_contexts
        _invariant_contexts -= 1


_invariant_contexts = 0


def is_batch_invariant() -> bool:
    """Return whether the call is inside `batch_invariant`."""
    return _invariant_contexts > 0


def refuse_reference(name: str) -> None:
    """Raise ValueError for the backend "reference" inside `batch_invariant`: it computes an expert's rows at once."""
    if name == "reference":
        raise ValueError("batch_invariant: got True with backend 'reference', wanted 'auto', 'triton' or 'torch'")


@cache
def routing_backend(name: str) -> RoutingBackend:
    """Return the implementation of routing by backend "torch" or "triton"."""
    return _module(f"{name}.routing")


@cache
def dispatch_backend(name: str) -> DispatchBackend:
    """Return the implementation of dispatch by backend "torch" or "triton"."""
    return _module(f"{name}.dispatch")


@cache
def experts_backend(name: str, device: torch.device, *, fp8: bool = False) -> ExpertsBackend:
    """Return the implementation of the experts by backend "torch" or "triton" on a device; with fp8 products or not."""
    if fp8:
        return _module(f"{name}.experts_fp8")
    if name == "torch":
        return _module("torch.experts_cpu" if device.type == "cpu" else "torch.experts_device")
    return _module(f"{name}.experts")


def _module(path: str) -> Any:
    return importlib.import_module(f"moe_triton.backends.{path}")
