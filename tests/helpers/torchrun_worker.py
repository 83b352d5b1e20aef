"""A worker of torchrun that trains for ever; rank 2 is killed in its third step."""

import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist

from moe_triton.distributed import ExpertParallel, explain_termination, make_groups
from tests.helpers import faults

torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
explain_termination()
steps = 0


def listen(event: str) -> None:
    global steps
    steps += event == "weight gradients"
    if steps == 4 and event == "experts 0" and dist.get_rank() == 2:  # two layers: after two steps
        os.kill(os.getpid(), signal.SIGKILL)


model = faults.Model(ExpertParallel(make_groups(ep=4), listener=listen))
while True:
    faults.step(model)
