"""What is expected of torch's private names: each test fails where torch has changed or removed one."""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._common_utils import FSDP_WRAPPED_MODULE
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from moe_triton import torch_internals
from tests.helpers.compare import assert_close


@pytest.fixture
def world() -> Iterator[Any]:
    """A default process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=77))
    yield dist.group.WORLD
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_constant_while_compiling():
    calls = []

    @torch_internals.constant_while_compiling
    def three() -> int:
        calls.append(torch.compiler.is_compiling())
        return 3

    compiled = torch.compile(lambda x: x * three(), backend="eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 3.0))
    assert len(calls) == 1
    assert vars(three) == vars(torch.compiler.assume_constant_result(lambda: 3))


def test_a_function_that_is_never_compiled():
    compiling = []

    @torch_internals.never_compiled
    def double(x: torch.Tensor) -> torch.Tensor:
        compiling.append(torch.compiler.is_compiling())
        return 2 * x

    assert torch.equal(torch.compile(lambda x: double(x + 1), backend="eager")(torch.ones(2)), torch.full((2,), 4.0))
    assert compiling == [False]
    assert double._torchdynamo_disable is torch.compiler.disable(lambda: 0)._torchdynamo_disable is True


def test_the_names_that_wrappers_give():
    inner = nn.Linear(2, 2)
    compiled = torch.compile(inner)
    assert torch_internals.compiled_module(compiled) is inner
    assert torch_internals.compiled_module(inner) is None
    found = [list(dict(module.named_modules()))[1] for module in (compiled, checkpoint_wrapper(inner))]
    assert tuple(found) == torch_internals.WRAPPERS


def test_a_module_that_runs_as_it_is():
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(2 * x)

    plain, hooked, patched = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
    hooked.register_forward_pre_hook(lambda module, arguments: (2 * arguments[0],))
    patched.forward = lambda x: x
    runs = [torch_internals.runs_as_it_is(module, nn.Linear) for module in (plain, hooked, patched, Doubled(2, 2))]
    assert runs == [True, False, False, False]
    assert not torch_internals.runs_as_it_is(torch.compile(plain), nn.Linear)


def test_what_a_module_has_registered():
    class Gathering(dict):
        def __getitem__(self, name: str) -> Any:
            return super().__getitem__(name).detach() + 1

    module = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False))
    norm = torch_internals.submodule_of(module, "0")
    assert norm is module[0]
    assert torch_internals.parameter_of(norm, "weight") is norm.weight
    assert torch_internals.buffer_of(norm, "running_mean") is None
    norm.register_buffer("seen", torch.ones(2))
    assert torch_internals.buffer_of(norm, "seen") is norm.seen
    for read in (torch_internals.parameter_of, torch_internals.buffer_of, torch_internals.submodule_of):
        assert read(norm, "eps") == norm.eps
        with pytest.raises(AttributeError, match="absent"):
            read(norm, "absent")
    weight = norm.weight
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Tanh())
    assert torch.equal(torch_internals.parameter_of(norm, "weight"), weight.tanh())
    nn.utils.parametrize.remove_parametrizations(norm, "weight", leave_parametrized=False)
    norm._parameters = Gathering(norm._parameters)
    assert torch.equal(torch_internals.parameter_of(norm, "weight"), weight + 1)


def test_a_busy_gpu(monkeypatch):
    assert callable(torch.cuda._sleep)
    slept = []
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    torch_internals.keep_gpu_busy(7)
    assert slept == [7]


def test_symmetric_memory(world, monkeypatch):
    assert torch_internals.symmetric_memory_problem(torch.device("cpu")) == "needs a CUDA GPU"
    device, made = torch.device("cuda", 0), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(symmetric, "is_nvshmem_available", lambda: False)
    assert torch_internals.symmetric_memory_problem(device) == "needs NVSHMEM, which torch does not find"
    monkeypatch.setattr(symmetric, "is_nvshmem_available", lambda: True)
    monkeypatch.setattr(symmetric, "get_backend", lambda device: "CUDA")
    assert "torch's symmetric memory uses CUDA" in torch_internals.symmetric_memory_problem(device)
    monkeypatch.setattr(symmetric, "get_backend", lambda device: "NVSHMEM")
    assert torch_internals.symmetric_memory_problem(device) is None
    monkeypatch.setattr(symmetric, "empty", lambda *size, dtype, device: torch.zeros(size, dtype=dtype))
    monkeypatch.setattr(symmetric, "rendezvous", lambda tensor, group: made.append((tensor.shape, group)))
    torch_internals.symmetric_empty((2, 3), torch.uint8, device, world)
    assert made == [((2, 3), world)]
    operations = torch.ops.symm_mem.all_to_all_vdev_2d, torch.ops.symm_mem.all_to_all_vdev_2d_offset
    names = [[argument.name for argument in operation.default._schema.arguments] for operation in operations]
    assert names == [
        ["input", "out", "in_splits", "out_splits_offsets", "group_name", "major_align"],
        ["input", "out", "in_splits_offsets", "out_splits_offsets", "group_name"],
    ]


def test_recomputation():
    seen, errors = [], []

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_internals.recomputing())
        try:
            return x.sin().sin()
        except BaseException as error:
            errors.append(error)
            raise

    checkpoint(forward, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert seen == [False, True]
    assert [torch_internals.ends_recomputation(error) for error in (*errors, ValueError())] == [True, False]


def test_a_running_profiler():
    assert not torch_internals.is_profiling()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert torch_internals.is_profiling()
    assert not torch_internals.is_profiling()


def test_transforms():
    seen = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_internals.is_transforming())
        return x.sum()

    forward(torch.ones(2))
    torch.func.vmap(forward)(torch.ones(2, 2))
    torch.func.grad(forward)(torch.ones(2))
    with forward_ad.dual_level():
        forward(torch.ones(2))
    forward(torch.ones(2))
    assert seen == [False, True, True, True, False]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = 2 * factor
        return x * ctx.factor

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0] * ctx.factor, None


def test_an_applied_function():
    x = torch.randn(3, requires_grad=True)
    out = torch_internals.applied(Doubled, x, 3.0)
    assert torch.equal(out, 6 * x)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.full((3,), 6.0))
    assert torch_internals.applied(Doubled, x.detach(), 3.0).grad_fn is None
    for apply in (Doubled.apply, lambda *args: torch_internals.applied(Doubled, *args)):
        with pytest.raises(RuntimeError, match="setup_context"):
            torch.func.grad(lambda x, apply=apply: apply(x, 3.0).sum())(torch.ones(3))


def test_autocast_anywhere():
    assert not torch_internals.is_autocast_anywhere()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch_internals.is_autocast_anywhere()
        with torch.autocast("cpu", enabled=False):
            assert not torch_internals.is_autocast_anywhere()
    assert not torch_internals.is_autocast_anywhere()


def test_fake_and_real_tensors():
    assert torch_internals.has_no_data(torch.empty(2, device="meta"))
    assert not torch_internals.has_no_data(torch.ones(2))
    with FakeTensorMode():
        assert torch_internals.has_no_data(torch.ones(2))
        with torch_internals.real_tensors():
            assert torch.ones(2).tolist() == [1, 1]


def test_what_can_call_a_backend_as_it_is():
    x, seen = torch.ones(2), []
    assert not torch_internals.is_plain(x)
    with torch.no_grad():
        assert torch_internals.is_plain(x)
        assert not torch_internals.is_plain(x.to("meta"))
        with FakeTensorMode():
            assert not torch_internals.is_plain(torch.ones(2))
        torch.func.vmap(lambda row: seen.append(torch_internals.is_plain(row)) or row)(torch.ones(1, 2))
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch_internals.is_plain(x)
        with forward_ad.dual_level():
            assert not torch_internals.is_plain(x)
    assert seen == [False]


def test_a_comparison_of_tensors():
    x, weight = torch.ones(2, 6), torch.nn.Parameter(torch.ones(3))
    is_alike = torch_internals.comparison_with(x, weight)
    assert is_alike(torch.zeros(2, 6), torch.nn.Parameter(torch.zeros(3)))
    assert is_alike(torch.zeros(13)[1:].view(2, 6), weight)  # at another address
    for other in (x.half(), x[:1], x.T.contiguous().T, x.to("meta"), x.to_sparse(), torch.nn.Parameter(x)):
        assert not is_alike(other, weight)
    assert not is_alike(x, weight.data)
    assert not is_alike(x, torch.nn.Parameter(torch.ones(3), requires_grad=False))
    alive = weakref.ref(x)
    del x, other
    assert alive() is None


def test_onednn():
    linear = torch_internals.onednn_linear()
    if not torch.backends.mkldnn.is_available():
        assert linear is None
        return
    x, weight, bias = torch.randn(3, 5), torch.randn(4, 5), torch.randn(4)
    assert_close(linear(x, weight, bias, "none", [], ""), F.linear(x, weight, bias))


def test_a_function_on_all_of_torchs_threads():
    parallel = torch_internals.openmp_parallel()
    if parallel is None:
        assert sys.platform != "linux"
        return
    seen, before = [], torch.get_num_threads()

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def function(data):
        seen.append((data, threading.get_ident()))

    try:
        torch.set_num_threads(2)
        parallel(ctypes.cast(function, ctypes.c_void_p).value, 77, 2, 0)
    finally:
        torch.set_num_threads(before)
    assert [data for data, _ in seen] == [77, 77]
    assert len({thread for _, thread in seen}) == 2
    assert threading.get_ident() in [thread for _, thread in seen]


def test_process_groups(world):
    assert torch_internals.default_group() is world
    torch_internals.default_store().set("key", "value")
    assert torch_internals.default_store().get("key") == b"value"
    made = dist.new_group([0], timeout=timedelta(seconds=55))
    found = [torch_internals.timeout_of(group, torch.device("cpu")) for group in (world, made)]
    assert found == [timedelta(seconds=77), timedelta(seconds=55)]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_is_called_after_backward(use_reentrant):
    """Once, after all gradients of the backward pass in which it was asked for."""
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = checkpoint(lambda x: x.exp(), x, use_reentrant=use_reentrant)
    x.register_post_accumulate_grad_hook(lambda x: torch_internals.after_backward(lambda: seen.append(x.grad.clone())))
    y.sum().backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], x.grad)


def test_aborted_groups(world):
    torch_internals.abort_groups()
    assert not dist.is_initialized()
    torch_internals.abort_groups()


def test_meshes_and_sharded_tensors(world):
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("rows", "copies"))
    assert torch_internals.root_mesh(mesh["rows"]) == torch_internals.root_mesh(mesh) == mesh
    whole = torch.randn(3, 2)
    for tensor in (whole, distribute_tensor(whole, mesh, [Shard(0), Replicate()])):
        [(offset, part)] = torch_internals.shards(tensor)
        assert offset == (0, 0)
        assert torch.equal(part, whole)


def test_data_parallel_wrappers(world):
    seen = []
    model = nn.Linear(2, 2)
    model.register_forward_hook(lambda *_: seen.append(torch_internals.active_ddp()))
    torch_internals.ignore_in_ddp(model, ["bias"])
    wrapped = DistributedDataParallel(model)
    wrapped(torch.ones(1, 2)).sum().backward()
    assert seen == [wrapped]
    assert torch_internals.active_ddp() is None
    assert wrapped.parameters_to_ignore == {"bias"}


def test_fully_sharded_modules(world):
    module = nn.Linear(2, 2)
    assert torch_internals.inside_fsdp1(module) is module
    assert torch_internals.inside_fsdp1(nn.ModuleDict({FSDP_WRAPPED_MODULE: module})) is module
    assert not torch_internals.is_fsdp2_class(type(module))
    assert torch_internals.is_fsdp2_class(type(fully_shard(module, mesh=init_device_mesh("cpu", (1,)))))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_node_that_repeats_a_forward_was_made_before_or_after_it(use_reentrant):
    """Beside it, forwards that are not repeated: nodes of custom functions are numbered without gradients, too."""
    seen = []

    def step(x: torch.Tensor) -> torch.Tensor:
        if torch_internals.recomputing():
            seen.append(("again", *torch_internals.running_node()))
        else:
            seen.append(("first", torch_internals.nodes_made(), False))
        return x.exp().sin()

    x = torch.randn(3, requires_grad=True)
    outs = [checkpoint(step, x * k, use_reentrant=use_reentrant) for k in (1, 2)]
    outs[0].sum().backward()
    outs[1].sum().backward()
    (_, first, _), (_, second, _), *again = seen
    assert [is_reentrant for _, _, is_reentrant in again] == [use_reentrant] * 2
    numbers = [number for _, number, _ in again]
    if use_reentrant:
        assert numbers[0] < first <= numbers[1] < second
    else:
        assert first <= numbers[0] < second <= numbers[1]
