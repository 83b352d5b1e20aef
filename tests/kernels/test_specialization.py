"""A new number of tokens compiles nothing: Triton's own keys for every launch of a training step, with no GPU.

Launches are recorded instead of made, so the outputs hold whatever the memory held; nothing on the host looks at them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

RECORD = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from moe_triton import MoE, runtime
from moe_triton_kernels import launch

backend = make_backend(GPUTarget("cuda", 90, 32))
binders, seen = {}, []


def record(self, *args, grid, warmup, **kwargs):
    binder = binders.setdefault(self, create_function_from_signature(self.signature, self.params, backend))
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    specialization = binder(*args, **kwargs)[1]
    seen.append(f"{self.__name__} {specialization} {options}")


JITFunction.run = record
runtime._unfit_gpu = lambda device: None
target = launch.Target(architecture="sm_90", num_sms=132)
for module in list(sys.modules.values()):
    if getattr(module, "target_of", None) is launch.target_of and module is not launch:
        module.target_of = lambda device: target
launch.target_of = lambda device: target

layers = [
    MoE(64, 48, 8, 2, backend="triton", dtype=torch.bfloat16, aux_loss_weight=0.01),
    MoE(64, 48, 8, 2, backend="triton", dtype=torch.bfloat16, bias=True, capacity_factor=1.0, drop_policy="choice"),
    MoE(64, 48, 8, 2, backend="triton", dtype=torch.bfloat16, activation="relu2", recompute=True),
    MoE(64, 48, 8, 2, backend="triton", dtype=torch.bfloat16, fp8=True),
]


def step(layer, tokens):
    x = torch.randn(tokens, 64, dtype=torch.bfloat16, requires_grad=True)
    out = layer(x)
    (out.output.float().sum() + out.aux_loss).backward()


found = {"before": [], "after": []}
for layer in layers:
    seen.clear()
    for tokens in (32, 100, 200, 1000):  # 8, 25, 50 and 250 rows per expert: one of every bucket
        step(layer, tokens)
    before = set(seen)
    seen.clear()
    for tokens in (1, 2, 3, 16, 17, 31, 33, 64, 127, 128, 129, 255, 256, 257, *range(40, 1500, 41)):
        step(layer, tokens)
    found["before"].append(sorted(before))
    found["after"].append(sorted(set(seen) - before))
print(json.dumps(found))
"""


def test_fifty_numbers_of_tokens_specialise_nothing() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", RECORD], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for before in found["before"]:
        names = {line.split()[0] for line in before}
        assert {
            "topk_kernel",
            "place_kernel",
            "up_kernel",
            "down_kernel",
            "d_hidden_kernel",
        } <= names
        assert ("d_weight_kernel" in names) != ("fp8_d_weight_kernel" in names)
    makers = {f"quantize_{what}_kernel" for what in ("rows", "columns", "weight")}
    assert {"fp8_d_weight_kernel", "tile_offsets_kernel", *makers} <= names  # of the last one, in fp8
    assert found["after"] == [[], [], [], []]
