"""Colossal-AI's config, launch, engine and trainer on one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moe_triton.compat import colossalai
from moe_triton.compat.colossalai.config import read_config, settings_of
from moe_triton.compat.colossalai.context import MOE_CONTEXT, ParallelMode, global_context, moe_set_seed
from moe_triton.compat.colossalai.context.random import add_seed, get_current_mode, seed, with_seed
from moe_triton.compat.colossalai.engine import Engine, MoeGradientHandler
from moe_triton.compat.colossalai.global_variables import moe_env
from moe_triton.compat.colossalai.nn.layer import WrappedDropout, WrappedDropPath
from moe_triton.compat.colossalai.nn.loss import MoeCrossEntropyLoss
from moe_triton.compat.colossalai.trainer import Trainer, hooks
from moe_triton.compat.colossalai.utils import checkpoint, get_dataloader, get_moe_epsize_param_dict
from tests.helpers.colossalai_context import forget
from tests.helpers.colossalai_models import layers


@pytest.fixture(autouse=True)
def clean():
    forget()
    yield
    forget()


def test_config_files(tmp_path):
    (tmp_path / "config.py").write_text(
        "_hidden = 1\nBATCH = 4\nparallel = dict(moe=dict(size=2, chunks=3), tensor=2)\n"
    )
    found = read_config(str(tmp_path / "config.py"))
    assert found == {"BATCH": 4, "parallel": {"moe": {"size": 2, "chunks": 3}, "tensor": 2}}
    settings = settings_of(found)
    assert (settings.moe_size, settings.exchange, settings.tensor_size) == (2, {"chunks": 3}, 2)
    (tmp_path / "config.json").write_text('{"max_ep_size": 4, "clip_grad_norm": 1.0}')
    assert settings_of(read_config(tmp_path / "config.json")).max_ep_size == 4
    with pytest.raises(FileNotFoundError, match=r"none\.py"):
        read_config(tmp_path / "none.py")


@pytest.mark.parametrize(
    ("config", "error", "name"),
    [
        ({"parallel": {"moe": {}}}, ValueError, "parallel.moe"),
        ({"parallel": {"moe": {"size": ...}}}, TypeError, "parallel.moe.size"),
        ({"parallel": {"moe": 2}, "max_ep_size": 2}, ValueError, "max_ep_size"),
        ({"parallel": {"tensor": {"size": 2, "mode": "2d"}}}, ValueError, "parallel.tensor"),
        ({"parallel": {"pipeline": 2}}, ValueError, "parallel.pipeline"),
        ({"parallel": {"sequence": 2}}, ValueError, "sequence"),
        ({"parallel": 3}, TypeError, "parallel"),
        ({"fp16": {"mode": "torch"}}, ValueError, "fp16"),
        ({"gradient_accumulation": 0}, ValueError, "gradient_accumulation"),
        ({"clip_grad_norm": -1.0}, ValueError, "clip_grad_norm"),
        ({"parallel": {"moe": {"size": 2}}}, ValueError, "size"),  # one process
        ({"parallel": {"moe": {"size": 1, "speed": 2}}}, TypeError, "speed"),
        (3, TypeError, "config"),
        ("config.yaml", ValueError, "config"),
    ],
)
def test_bad_configs(config, error, name):
    def start():
        colossalai.launch(config, verbose=False)
        MOE_CONTEXT.get_info(2)

    with pytest.raises(error, match=name):
        start()


def test_launch_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    colossalai.launch_from_torch({"max_ep_size": 1}, seed=3, verbose=False)
    first = torch.rand(3)
    colossalai.launch_from_torch({}, seed=3, verbose=False)
    assert torch.equal(torch.rand(3), first)
    assert not MOE_CONTEXT.is_initialized
    assert global_context.get_global_rank() == global_context.get_local_rank(ParallelMode.MOE_DATA) == 0
    with pytest.raises(ValueError, match="host"):
        colossalai.launch({}, 0, 2, verbose=False)


def test_environments():
    assert moe_env.model_parallel_size is None
    moe_env.setup(1)
    assert (MOE_CONTEXT.generation, moe_env.data_parallel_size) == ("v0.0.2", 1)
    MOE_CONTEXT.setup(seed=5)
    assert (MOE_CONTEXT.generation, MOE_CONTEXT.world_size, MOE_CONTEXT.min_dp_size) == ("v0.1.6", 1, 1)
    assert MOE_CONTEXT.get_info(6)[0] == 6


def test_streams():
    moe_set_seed(11)
    torch.manual_seed(0)
    with seed(ParallelMode.TENSOR):
        assert get_current_mode() is ParallelMode.TENSOR
        inside = torch.rand(4)
        with seed(ParallelMode.TOKENS):
            other = torch.rand(4)
    outside = torch.rand(4)
    assert get_current_mode() is ParallelMode.DATA
    torch.manual_seed(0)
    assert torch.equal(with_seed(torch.rand, ParallelMode.TENSOR)(4), inside)  # torch.manual_seed rules the streams
    assert torch.equal(torch.rand(4), outside)
    assert len({tuple(draw.tolist()) for draw in (inside, other, outside)}) == 3
    with pytest.raises(ValueError, match="overwrite"):
        add_seed(ParallelMode.TENSOR, 1)
    with pytest.raises(TypeError, match="mode"):
        add_seed("tensor", 1)


@pytest.mark.parametrize("module", [WrappedDropout(0.5), WrappedDropPath(0.5)], ids=["dropout", "path"])
def test_dropout_modules(module):
    moe_set_seed(1)
    x = torch.ones(4000, 3)
    out = module(x)
    assert set(out.unique().tolist()) == {0.0, 2.0}
    assert out.mean().item() == pytest.approx(1.0, abs=0.1)
    assert torch.equal(module.eval()(x), x)
    module.train()
    torch.manual_seed(2)
    weights = torch.ones(4000, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(checkpoint(module, weights).sum(), weights)
    assert set(grad.unique().tolist()) == {0.0, 2.0}


def make_engine(config=None, seed: int = 0) -> tuple[Engine, list]:
    colossalai.launch(config or {}, seed=seed, verbose=False)
    moe_set_seed(seed)
    model = layers()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    engine, *_ = colossalai.initialize(model, optimizer, MoeCrossEntropyLoss(), verbose=False)
    generator = torch.Generator().manual_seed(9)
    data = [(torch.randn(8, 3, 16, generator=generator), torch.randint(5, (8,), generator=generator)) for _ in range(4)]
    return engine, data


def test_engine_accumulates_and_clips():
    engine, data = make_engine({"gradient_accumulation": 2, "clip_grad_norm": 1e-3})
    engine.train()
    stepped = []
    for x, y in data:
        engine.zero_grad()
        engine.backward(engine.criterion(engine(x), y))
        stepped.append(engine.step())
    assert stepped == [False, True, False, True]
    norm = torch.stack([p.grad.norm() for p in engine.model.parameters()]).norm().item()
    assert norm == pytest.approx(1e-3, rel=1e-3)
    whole, _ = make_engine()
    engine, _ = make_engine({"gradient_accumulation": 2})
    for x, y in data[:2]:
        engine.zero_grad()
        engine.backward(engine.criterion(engine(x), y))
        engine.step()
        whole.backward(whole.criterion(whole(x), y) / 2)
    for a, b in zip(engine.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_handler_rules():
    engine, _ = make_engine()
    assert MoeGradientHandler(engine.model, engine.optimizer).rule == "mean"
    with pytest.raises(ValueError, match="rule"):
        MoeGradientHandler(engine.model, rule="upstream")
    dense, experts = (
        sum(p.numel() for p in ps)
        for ps in (engine.model.first.gate.parameters(), engine.model.first.experts.parameters())
    )
    assert dense < experts
    assert set(get_moe_epsize_param_dict(engine.model)) == {1}


def test_initialize_without_experts_needs_no_handler():
    colossalai.launch({}, verbose=False)
    model = nn.Linear(2, 2)
    engine, *rest = colossalai.initialize(
        model, torch.optim.SGD(model.parameters(), 0.1), None, [1], [2], 3, verbose=False
    )
    assert engine.gradient_handlers == []
    assert rest == [[1], [2], 3]
    for name, arguments in {"model": (3, engine.optimizer), "optimizer": (model, 3)}.items():
        with pytest.raises(TypeError, match=name):
            colossalai.initialize(*arguments)
    with pytest.raises(ValueError, match="ophooks"):
        colossalai.initialize(model, engine.optimizer, ophooks=[1])


class Recorder(hooks.BaseHook):
    """Notes what it is told."""

    def __init__(self, priority: int) -> None:
        super().__init__(priority)
        self.moments: list[str] = []

    def __getattribute__(self, name: str):
        if name in MOMENTS:
            return lambda *args: self.moments.append(name)
        return super().__getattribute__(name)


MOMENTS = [name for name in vars(hooks.BaseHook) if name.startswith(("before_", "after_"))]


def test_trainer_learns_and_tells_its_hooks():
    engine, data = make_engine()
    recorder = Recorder(5)
    scheduler = torch.optim.lr_scheduler.StepLR(engine.optimizer, 1, 0.5)
    trainer = Trainer(engine)
    trainer.fit(
        data, 3, test_dataloader=data[:1], test_interval=2, display_progress=True,
        hooks=[hooks.LossHook(), hooks.AccuracyHook(), hooks.LRSchedulerHook(scheduler, by_epoch=True), recorder,
               hooks.ThroughputHook(), hooks.LogMetricByEpochHook(interval=2)],
    )  # fmt: skip
    train, test = trainer.metrics["train"], trainer.metrics["test"]
    assert train["Loss"][-1] < train["Loss"][0]
    assert train["LR"] == [1e-2, 5e-3, 2.5e-3]
    assert len(train["Throughput"]) == 3
    assert len(test["Accuracy"]) == 1
    assert 0 <= test["Accuracy"][0] <= 1
    moments = recorder.moments
    assert moments[:4] == ["after_hook_is_attached", "before_train", "before_train_epoch", "before_train_iter"]
    assert moments.count("after_train_iter") == 12
    assert moments.count("after_test_iter") == moments.count("before_test") == 1
    assert moments[-1] == "after_train"
    assert trainer.predict(data[0][0]).shape == (8, 5)
    trainer.evaluate(data, hooks=[hooks.AccuracyHook()])
    assert len(trainer.metrics["test"]["Accuracy"]) == 2


def test_trainer_stops_and_resumes(tmp_path):
    def run(epochs: int, resume: bool, save: bool, max_steps: int | None = None) -> Trainer:
        engine, data = make_engine()
        trainer = Trainer(engine)
        schedule = torch.optim.lr_scheduler.OneCycleLR(engine.optimizer, 1e-2, total_steps=12)  # sets the rate itself
        if resume:
            trainer.load(tmp_path)
        wanted = [hooks.LossHook(), hooks.LRSchedulerHook(schedule, by_epoch=False)]
        wanted += [hooks.SaveCheckpointHook(1, tmp_path)] if save else []
        trainer.fit(data, epochs, max_steps, hooks=wanted)
        return trainer

    whole = run(3, resume=False, save=False)
    run(2, resume=False, save=True)
    resumed = run(3, resume=True, save=False)
    assert resumed.metrics == whole.metrics
    assert (resumed.cur_epoch, resumed.cur_step) == (3, 12)
    assert run(3, resume=False, save=False, max_steps=5).cur_step == 5


def test_bad_trainer_arguments():
    engine, data = make_engine()
    for name, make in {"engine": lambda: Trainer(3), "hooks": lambda: Trainer(engine).fit(data, 1, hooks=[3])}.items():
        with pytest.raises(TypeError, match=name):
            make()
    with pytest.raises(ValueError, match="schedule"):
        Trainer(engine, schedule=3)


def test_get_dataloader():
    loader = get_dataloader(list(range(10)), shuffle=True, batch_size=5)
    assert sorted(torch.cat(list(loader)).tolist()) == list(range(10))
