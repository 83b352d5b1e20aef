"""transformers' Trainer around a model whose experts are spread over ranks: the steps of one process."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.helpers.families import VOCAB

STEPS, BATCH = 3, 4


def as_torchrun_does() -> None:
    """Set what accelerate looks for; the process group is there already."""
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def dataset() -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(0, VOCAB, (STEPS * BATCH, 8), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in rows]


def trained(model: nn.Module, folder: Path, ranks: int, callbacks: list, **more: object) -> list[float]:
    """Train in the order of the rows; return the logged losses."""
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: object) -> torch.utils.data.Sampler:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    options = {
        "per_device_train_batch_size": BATCH // ranks, "max_steps": STEPS, "logging_steps": 1, "learning_rate": 0.01,
        "lr_scheduler_type": "constant", "report_to": [], "use_cpu": True, "save_strategy": "no", "optim": "sgd",
        "disable_tqdm": True, **more,
    }  # fmt: skip
    trainer = InOrder(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **options),
        train_dataset=dataset(),
        callbacks=callbacks,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def in_the_trainer(folder: Path) -> dict:
    from torch.nn.parallel import DistributedDataParallel

    import moe_triton
    from moe_triton.distributed import ExpertParallel, make_groups
    from moe_triton.distributed.checkpoint.global_tensors import model_tensors
    from moe_triton.integrations.trainer import ExpertParallelCallback
    from tests.helpers.spread_models import spread_model

    as_torchrun_does()
    model = moe_triton.load_pretrained(spread_model(folder, ExpertParallel(make_groups(ep=2))), folder)
    wrapped = []
    original = DistributedDataParallel.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            DistributedDataParallel, "__init__", lambda self, *a, **k: wrapped.append(1) or original(self, *a, **k)
        )
        losses = trained(model, folder / "run", 2, [ExpertParallelCallback(max_grad_norm=0.1)], max_grad_norm=0.0)
    assert wrapped, "Trainer is expected to wrap the model"
    parts = {
        name: [(offset, box) for offset, box in tensor.as_global().boxes.items()]
        for name, tensor in model_tensors(model).items()
    }
    return {"losses": losses, "parts": parts}


def test_the_steps_of_one_process(two_ranks, tmp_path):
    from transformers import AutoModelForCausalLM

    from tests.helpers.families import tiny_model

    tiny_model("qwen3_moe", torch.float64).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, experts_implementation="eager")
    losses = trained(model, tmp_path / "alone", 1, [], max_grad_norm=0.1)
    whole = model.state_dict()
    start = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, experts_implementation="eager"
    ).state_dict()
    assert all((whole[name] != start[name]).any() for name in whole if "experts" in name)
    for found in two_ranks.run(in_the_trainer, tmp_path):
        assert found["losses"] == pytest.approx(losses, abs=2e-4)  # Trainer rounds them
        for name, boxes in found["parts"].items():
            for offset, box in boxes:
                wanted = whole[name][tuple(slice(a, a + n) for a, n in zip(offset, box.shape, strict=True))]
                assert (box - wanted).norm() <= 1e-6 * wanted.norm().clamp_min(1.0), name


def with_accelerate(folder: Path) -> None:
    """The lines of docs/transformers.md."""
    from accelerate import Accelerator

    import moe_triton
    from moe_triton.distributed import ExpertParallel, clip_grad_norm_, make_groups, reduce_gradients
    from moe_triton.distributed.checkpoint.global_tensors import as_global, model_tensors
    from tests.helpers.spread_models import batch_of, spread_model

    as_torchrun_does()
    groups, expected = make_groups(ep=2), torch.load(folder / "expected.pt")
    model = moe_triton.load_pretrained(spread_model(folder, ExpertParallel(groups)), folder)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.5))
    ids = batch_of(groups.dp)
    accelerator.backward(model(input_ids=ids, labels=ids).loss)
    reduce_gradients(model)
    norm = clip_grad_norm_(model, 0.1)
    optimizer.step()
    factor = 0.5 * 0.1 / norm
    for name, (live, layout, _) in model_tensors(model).items():
        if not isinstance(live, nn.Parameter):
            continue
        for offset, box in as_global((before[name] - live) / factor, layout).boxes.items():
            wanted = expected[name][tuple(slice(a, a + n) for a, n in zip(offset, box.shape, strict=True))]
            assert (box - wanted).norm() <= 1e-5 * expected[name].norm(), name


def test_accelerate(two_ranks, tmp_path):
    from tests.helpers.spread_models import save_with_expectations

    two_ranks.run(with_accelerate, save_with_expectations(tmp_path, "qwen3_moe"))


def arguments(**changed: object) -> SimpleNamespace:
    return SimpleNamespace(**{"max_grad_norm": 0.0, "save_strategy": "no", "fsdp": None, "deepspeed": None, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_grad_norm": 1.0}, "max_grad_norm: got 1.0 with experts over ranks, wanted 0.0"),
        ({"save_strategy": "steps"}, "save_strategy: got 'steps' with experts over ranks, wanted 'no'"),
        ({"fsdp": "full_shard"}, "fsdp: got 'full_shard', wanted None"),
        ({"deepspeed": "zero.json"}, "deepspeed: got 'zero.json', wanted None"),
    ],
)
def test_what_the_trainer_must_not_do(changed, message):
    from moe_triton.integrations.trainer import ExpertParallelCallback

    with pytest.raises(ValueError, match=message):
        ExpertParallelCallback().on_init_end(arguments(**changed), None, None)


def test_a_scaler_that_knows_one_rank_only():
    from moe_triton.distributed import GradScaler
    from moe_triton.integrations.trainer import ExpertParallelCallback

    callback = ExpertParallelCallback()
    with pytest.raises(ValueError, match=r"accelerator\.scaler: got GradScaler, wanted moe_triton"):
        callback.on_train_begin(None, None, None, optimizer=SimpleNamespace(scaler=torch.amp.GradScaler("cpu")))
    callback.on_train_begin(None, None, None, optimizer=SimpleNamespace(scaler=GradScaler("cpu")))

    model = nn.Linear(2, 2)
    optimizer, scaler = torch.optim.SGD(model.parameters()), GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    given = SimpleNamespace(scaler=scaler, optimizer=optimizer)
    callback.on_pre_optimizer_step(SimpleNamespace(world_size=1), None, None, model=model, optimizer=given)
    assert callback.grad_norm == pytest.approx(6**0.5), "of the unscaled gradients"
    with pytest.raises(ValueError, match="max_grad_norm: got 0"):
        ExpertParallelCallback(max_grad_norm=0)
