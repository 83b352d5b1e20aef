"""Every private name of torch that is in use here, each behind a function.

Private names change without notice. tests/test_torch_internals.py has a test of each; it passed on torch 2.11.0,
2.13.0, 2.14.1 and 2.15.0, on CPUs.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from datetime import timedelta
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import _StopRecomputationError

Function = TypeVar("Function", bound=Callable[..., Any])
Record = TypeVar("Record")

# The names under which torch.compile and activation checkpointing keep the module that they wrap.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")


# The compiler ---------------------------------------------------------------------------------------------------------


def constant_while_compiling(function: Function) -> Function:
    """Do what `torch.compiler.assume_constant_result` does, without importing the compiler, which takes seconds."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def never_compiled(function: Function) -> Function:
    """Do what `torch.compiler.disable` does, without importing the compiler where nothing is compiled."""

    @wraps(function)
    def call(*args: Any, **arguments: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **arguments)
        return _disabled(function)(*args, **arguments)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return cast(Function, call)


@cache
def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compiler.disable(function)


def compiled_module(module: nn.Module) -> nn.Module | None:
    """Return the module that torch.compile has wrapped in this one."""
    return module._modules.get("_orig_mod")


# Modules --------------------------------------------------------------------------------------------------------------


def runs_as_it_is(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Return whether a call of the module is `cls.forward` of the very arguments: no override, wrapper or pre-hook."""
    is_own = type(module).forward is cls.forward and "forward" not in module.__dict__
    return is_own and not module._forward_pre_hooks


def parameter_of(module: nn.Module, name: str) -> Any:
    """Return module.name, most often a parameter, in a fifth of the time, which torch spends on failing elsewhere.

    A parametrization, pruning and FSDP1 keep it as another attribute; what DeepSpeed registers gathers it when read.
    """
    found = module._parameters
    return found[name] if name in found else getattr(module, name)


def buffer_of(module: nn.Module, name: str) -> Any:
    """Return module.name, most often a buffer, as `parameter_of` does."""
    found = module._buffers
    return found[name] if name in found else getattr(module, name)


def submodule_of(module: nn.Module, name: str) -> Any:
    """Return module.name, most often a module, as `parameter_of` does."""
    found = module._modules
    return found[name] if name in found else getattr(module, name)


# Autograd, its transforms, and modes ----------------------------------------------------------------------------------


def recomputing() -> bool:
    """Return whether activation checkpointing runs a forward again inside backward: nothing is counted twice there."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """Return function.apply(*args), in half the time, which torch's spends on what torch.func transforms need."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


def nodes_made() -> int:
    """Return how many autograd nodes this thread has made: the sequence number of the next one."""
    return torch.autograd._get_sequence_nr()


def running_node() -> tuple[int, bool]:
    """Return the sequence number of the node that backward is running, and whether it is a reentrant checkpoint's.

    Such a node is made before the forward that it repeats, any other node in the course of it.
    """
    node = torch._C._current_autograd_node()
    return node._sequence_nr(), "CheckpointFunction" in node.name()


def ends_recomputation(error: object) -> bool:
    """Return whether this is the exception with which activation checkpointing ends a recomputation early."""
    return isinstance(error, _StopRecomputationError)


def after_backward(function: Callable[[], None]) -> None:
    """Call a function when the backward pass that is running has ended; inside a checkpoint's, when that one has."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def is_transforming() -> bool:
    """Return whether a torch.func transform or forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_autocast_anywhere() -> bool:
    """Return whether autocast is enabled for any kind of device."""
    return torch._C._is_any_autocast_enabled()


def is_profiling() -> bool:
    """Return whether a profiler of torch runs, so that ranges are recorded."""
    return torch.autograd._profiler_enabled()


def has_no_data(tensor: Tensor) -> bool:
    """Return whether a tensor has a shape and no values: on the meta device, or under FakeTensorMode."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def is_plain(tensor: Tensor) -> bool:
    """Return whether an operation on this tensor can call its backend as it is.

    That is: nothing is differentiated, compiled, transformed or under autocast, and the tensor has data, on the current
    GPU if on one. Asked once per operation, and in one function: its parts take as long as a launch.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    if forward_ad._current_level >= 0 or torch._C._is_any_autocast_enabled():
        return False
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        return False
    return not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device()


def record(cls: type[Record], **fields: Any) -> Record:
    """Make a frozen record of all its fields: its constructor takes twice the time, which sets them one by one."""
    if torch.compiler.is_dynamo_compiling():  # which follows the constructor only, in torch 2.11
        return cls(**fields)
    made = object.__new__(cls)
    made.__dict__.update(fields)
    return made


def comparison_with(*tensors: Tensor) -> Callable[..., bool]:
    """Return a function that says whether as many tensors are like these, in all but values and addresses.

    That is: their types, dtypes, devices, sizes, strides, and whether they need a gradient as things are. It keeps none
    of these, and takes a fraction of the time in which Python asks for as much: torch.compile guards its code by it.
    """
    guards = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    return cast(Callable[..., bool], guards.check)


def real_tensors() -> AbstractContextManager[Any]:
    """Leave all modes, so that new tensors have values also while torch.export traces with fake ones."""
    return _disable_current_modes()


# CUDA -----------------------------------------------------------------------------------------------------------------


def keep_gpu_busy(cycles: int) -> None:
    """Let the current GPU wait for about this many cycles of its clock, while the host goes on."""
    torch.cuda._sleep(cycles)


# oneDNN ---------------------------------------------------------------------------------------------------------------


def onednn_linear() -> Callable[..., Tensor] | None:
    """Return oneDNN's x @ w.T + bias, called as (x, w, bias, "none", [], ""); None where this torch has none.

    torch itself uses it for float32 in compiled graphs only.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return None
    return cast(Callable[..., Tensor], torch.ops.mkldnn._linear_pointwise.default)


# torch.distributed ----------------------------------------------------------------------------------------------------


@cache
def openmp_parallel() -> Callable[[int, int, int, int], None] | None:
    """Return GOMP_parallel(function, data, threads, flags) of the library whose threads torch's operations use.

    It calls function(data), addresses, in so many threads and returns when all have ended; 2 microseconds where the
    threads have just run one of torch's operations. None where torch uses no library with this function: LLVM's and
    Intel's have it on Linux, as GCC's does.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        found = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    found.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    found.restype = None
    return cast(Callable[[int, int, int, int], None], found)


def default_group() -> dist.ProcessGroup | None:
    """Return dist.group.WORLD, the default process group, in half the time."""
    return dist.distributed_c10d._world.default_pg


def default_store() -> dist.Store:
    """Return the store of the default process group, by a client of its own where its kind has such."""
    store = dist.distributed_c10d._get_default_store()
    try:
        return store.clone()  # type: ignore[attr-defined]
    except RuntimeError:  # that of the backend "fake"
        return store


def abort_groups() -> None:
    """Abort all process groups: on a GPU what waits for their collectives ends. There is no default group afterwards.

    Called by another thread than the one that waits. Does nothing where this torch cannot.
    """
    abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
    if abort is not None and dist.is_initialized():
        with suppress(RuntimeError, ValueError):  # a backend that cannot, or a group that is being destroyed
            abort()


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> timedelta | None:
    """Return the time-out of a group's collectives on a device; None where its backend has none, as "fake" has not."""
    options = group._get_backend(device).options
    return None if options is None else options._timeout


def root_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Return the mesh that this one was sliced from, or the mesh itself."""
    return mesh._get_root_mesh()


def shards(tensor: Tensor) -> list[tuple[tuple[int, ...], Tensor]]:
    """Return (offset, part) of what is here of a DTensor, by its protocol for checkpoints; a plain tensor is whole."""
    if not hasattr(tensor, "__create_chunk_list__"):
        return [((0,) * tensor.dim(), tensor)]
    chunks: list[Any] = tensor.__create_chunk_list__()
    return [(tuple(chunk.offsets), tensor.to_local()) for chunk in chunks]  # type: ignore[attr-defined]


def ignore_in_ddp(model: nn.Module, names: list[str]) -> None:
    """Make a DistributedDataParallel that is put around the model later leave these parameters alone."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def active_ddp() -> DistributedDataParallel | None:
    """Return the DistributedDataParallel whose forward pass is running."""
    return DistributedDataParallel._get_active_ddp_module()


def inside_fsdp1(module: nn.Module) -> nn.Module:
    """Return the module that FSDP1 has wrapped in this one, or the module itself."""
    return module._modules.get("_fsdp_wrapped_module") or module


def is_fsdp2_class(cls: type) -> bool:
    """Return whether FSDP2 has made this class, which it gives to the modules that it shards."""
    return hasattr(cls, "_get_fsdp_state")


def symmetric_memory_problem(device: torch.device) -> str | None:
    """Return why NVSHMEM's symmetric memory, which `all_to_all_vdev_2d` needs, cannot be used; None where it can."""
    import torch.distributed._symmetric_memory as symmetric

    if device.type != "cuda" or not torch.cuda.is_available():
        return "needs a CUDA GPU"
    if not symmetric.is_nvshmem_available():
        return "needs NVSHMEM, which torch does not find"
    if (backend := symmetric.get_backend(device)) != "NVSHMEM":
        return f"needs TORCH_SYMMMEM=NVSHMEM in the environment; torch's symmetric memory uses {backend}"
    return None


def symmetric_empty(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup | None
) -> Tensor:
    """Return symmetric memory of a group; every rank calls, with equal arguments."""
    import torch.distributed._symmetric_memory as symmetric

    assert group is not None
    memory = symmetric.empty(*shape, dtype=dtype, device=device)
    symmetric.rendezvous(memory, group)
    return memory


LANES = 64  # elements that torch's vectorised kernels take at a time, in 16 bits; half as many in fp32
SERIAL = (1 << 15) - 1  # the most elements that torch does not spread over threads


def by_full_vectors(function: Callable[[Tensor], Tensor], x_mn: Tensor) -> Tensor:
    """Apply a function of single elements such that a result's bits depend on its element alone, [m, n].

    On a CPU torch computes the last elements of a range, and of each thread's share, with other instructions than the
    others: exp then has another last bit. Here every element is one of a full vector.
    """
    if x_mn.device.type != "cpu":
        return function(x_mn)
    padded = F.pad(x_mn, (0, -x_mn.shape[1] % LANES)).contiguous()
    step = max(SERIAL // max(padded.shape[1], 1), 1)
    return torch.cat([function(rows) for rows in padded.split(step)])[:, : x_mn.shape[1]].contiguous()
