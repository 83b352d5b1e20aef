"""Checkpoints: what one set of ranks saved any other goes on with; an interrupted save loses nothing."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moe_triton import MoE
from moe_triton.distributed import CheckpointError, ExpertParallel, load_checkpoint, save_checkpoint
from tests.helpers import checkpoint_models as checkpointing
from tests.helpers import ranks
from tests.helpers.checkpoint_models import Net, Spread, make, resume, train_and_save


@pytest.mark.parametrize("experts", [8, 7])
def test_four_ranks_to_two_to_one_to_three(four_ranks, tmp_path, experts):
    a, b, c = (tmp_path / name for name in "abc")
    four_ranks.run(train_and_save, Spread({"ep": 4}, experts=experts), a)
    four_ranks.run(resume, Spread(ranks=(1, 3), experts=experts), a, 2, b)
    resume(Spread(experts=experts), b, 3, c)
    four_ranks.run(resume, Spread(ranks=(0, 1, 2), experts=experts), c, 4)


@pytest.mark.parametrize(
    ("before", "after", "optimizer", "activation"),
    [
        ({"ep": 2}, {"ep": 4}, "AdamW", "swiglu"),
        ({"ep": 4}, {"ep": 2, "order": "data-before-expert"}, "SGD", "swiglu"),
        ({"ep": 2, "etp": 2}, {"ep": 4}, "AdamW", "swiglu"),
        ({"ep": 4}, {"ep": 2, "etp": 2}, "NAdam", "swiglu"),
        ({"ep": 1, "etp": 4}, {"ep": 2, "etp": 2, "tp": 2}, "Adagrad", "relu2"),
        ({"ep": 2, "tp": 2}, {"ep": 1, "etp": 4}, "AdamW", "gpt_oss"),
    ],
    ids=str,
)
def test_any_layout_to_any_other(four_ranks, tmp_path, before, after, optimizer, activation):
    more = {"optimizer": optimizer, "layer": {"activation": activation}}
    four_ranks.run(train_and_save, Spread(before, **more), tmp_path)
    four_ranks.run(resume, Spread(after, **more), tmp_path, 2)
    resume(Spread(**more), tmp_path, 2)


@pytest.mark.parametrize("after", [{"ep": 4}, {"ep": 1, "etp": 4}], ids=str)
def test_adapters(four_ranks, tmp_path, after):
    four_ranks.run(train_and_save, Spread({"ep": 2, "etp": 2}, lora=True), tmp_path)
    four_ranks.run(resume, Spread(after, lora=True), tmp_path, 2)
    resume(Spread(lora=True), tmp_path, 2)


def test_fsdp2(four_ranks, tmp_path):
    expected = four_ranks.run(checkpointing.fully_sharded, tmp_path)[0]
    net = Net(Spread(experts=6), seed=3)
    net.scale = None
    optimizer = torch.optim.AdamW(net.parameters())
    load_checkpoint(tmp_path, net, optimizer)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, expected[f"model.{name}"]), name
        assert torch.equal(optimizer.state[parameter]["exp_avg"], expected[f"exp_avg.{name}"]), name


def test_each_piece_is_written_once(four_ranks, tmp_path):
    four_ranks.run(train_and_save, Spread({"ep": 2, "etp": 2}), tmp_path)
    manifest = json.loads((tmp_path / "checkpoint.json").read_text())["manifest"]
    elements = sum(torch.Size(entry["shape"]).numel() for entry in manifest["tensors"].values())
    written = sum(entry["bytes"] for entry in manifest["files"].values())
    assert 8 * elements - 8 * 2 < written < 8 * elements + 4096 * len(manifest["files"])
    assert manifest["tensors"]["model.moe.experts.gate_up_proj"] == {"shape": [8, 24, 8], "dtype": "float64"}
    assert manifest["experts"] == {"moe.experts": {"num_experts": 8}}
    assert not any("rank" in key or key.startswith("model.tied") for key in manifest["tensors"])


def saved(folder: Path, steps: int = 1) -> tuple[Net, torch.optim.Optimizer]:
    net, optimizer = make(Spread())
    for _ in range(steps):
        net.train_step(optimizer)
    save_checkpoint(folder, net, optimizer, extra={"spread": ""})
    return net, optimizer


def test_extra_and_placement_come_back(tmp_path):
    layer = MoE(8, 4, 4, expert_parallel=ExpertParallel(redundant_experts=2))
    slots = layer.experts.placement.physical_to_logical
    extra = {"step": 3, "betas": (0.9, [float("inf"), None]), "rng": torch.get_rng_state(), "names": {"a": True}}
    save_checkpoint(tmp_path, layer, extra=extra)
    back = load_checkpoint(tmp_path, MoE(8, 4, 4))
    assert torch.equal(back.pop("rng"), extra.pop("rng"))
    assert back == extra
    experts = json.loads((tmp_path / "checkpoint.json").read_text())["manifest"]["experts"]["experts"]
    assert experts == {"num_experts": 4, "placement": {"tensor": slots.tolist(), "dtype": "int32", "shape": [6]}}


def test_state_keeps_its_dtype_and_parameters_take_the_models(tmp_path):
    layer = MoE(8, 4, 4, dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(layer.parameters(), momentum=0.9)
    for parameter in layer.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.randn(parameter.shape)
    save_checkpoint(tmp_path, layer, optimizer)
    for dtype in (torch.bfloat16, torch.float32):
        other = MoE(8, 4, 4, dtype=dtype)
        again = torch.optim.SGD(other.parameters(), momentum=0.9)
        load_checkpoint(tmp_path, other, again)
        for mine, theirs in zip(other.parameters(), layer.parameters(), strict=True):
            assert torch.equal(mine, theirs.to(dtype))
            assert torch.equal(again.state[mine]["momentum_buffer"], optimizer.state[theirs]["momentum_buffer"])


def test_names_do_not_know_of_wrappers(tmp_path):
    layer = MoE(8, 4, 4)
    save_checkpoint(tmp_path, torch.compile(layer))
    other = MoE(8, 4, 4)
    load_checkpoint(tmp_path, other)
    for mine, theirs in zip(other.parameters(), layer.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_distributed_data_parallel(two_ranks, tmp_path):
    two_ranks.run(checkpointing.data_parallel, tmp_path)


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_a_full_disk_on_one_rank(two_ranks, tmp_path):
    two_ranks.run(checkpointing.full_disk, tmp_path / "kept")


def test_a_folder_that_cannot_be_made_and_ranks_that_disagree(two_ranks, tmp_path):
    two_ranks.run(checkpointing.refused, tmp_path)


def exit_codes(function: Callable[..., None], *calls: tuple[Any, ...]) -> list[int | None]:
    """Of processes of their own, one for each call."""
    context = ranks.fork_context()
    processes = [context.Process(target=function, args=call) for call in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.mark.ranks
def test_a_rank_killed_in_the_middle_of_a_save(tmp_path):
    folder = tmp_path / "checkpoint"
    store = str(tmp_path / "store")
    assert exit_codes(checkpointing.die_while_saving, (0, store, folder), (1, store, folder)) == [42, -signal.SIGKILL]
    # whoever survives tidies up; what the killed one left in its folder was never part of the checkpoint
    resume(Spread(), folder, 2)
    saved(folder)
    assert len(list(folder.glob("tensors-*"))) == 1


def die_before_the_switch(folder: Path) -> None:
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    train_and_save(Spread(), folder, 3)


@pytest.mark.ranks
def test_a_process_killed_before_the_switch(tmp_path):
    saved(tmp_path, steps=2)
    assert exit_codes(die_before_the_switch, (tmp_path,)) == [-signal.SIGKILL]
    assert len(list(tmp_path.glob("tensors-*"))) == 2  # all was written, nothing counts
    resume(Spread(), tmp_path, 2)
    saved(tmp_path, steps=3)
    assert len(list(tmp_path.glob("tensors-*"))) == 1
    resume(Spread(), tmp_path, 3)


@pytest.mark.parametrize(("failing", "calls"), [("fsync", 5), ("replace", 1)])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-C"])
def test_a_failure_at_any_point_keeps_the_checkpoint_before(tmp_path, monkeypatch, failing, calls, error):
    saved(tmp_path, steps=2)
    newer = MoE(8, 4, 4)
    for bad in range(1, calls + 1):  # the first call fails; in a second attempt the second one does, and so on
        with monkeypatch.context() as patch:
            fail_at(patch, failing, bad, error)
            message = rf"{tmp_path}.*No space left" if isinstance(error, OSError) else None
            with pytest.raises(CheckpointError if message else KeyboardInterrupt, match=message):
                save_checkpoint(tmp_path, newer)
        assert not list(tmp_path.glob("*.tmp"))
        # the last fsync is that of the folder, behind the rename: the new one is there, the old one's files are too
        switched = failing == "fsync" and bad == calls
        assert len(list(tmp_path.glob("tensors-*"))) == 1 + switched
        load_checkpoint(tmp_path, newer if switched else Net(Spread()))
    with monkeypatch.context() as patch:
        count = fail_at(patch, failing, calls + 1, error)
        save_checkpoint(tmp_path, newer)
    assert next(count) == calls + 1, f"{failing} is called {calls} times in a save"
    assert len(list(tmp_path.glob("tensors-*"))) == 1


def fail_at(patch: pytest.MonkeyPatch, name: str, bad: int, error: BaseException) -> Iterator[int]:
    """Makes os.`name` raise at its `bad`-th call. Returns the counter of the calls."""
    original, count = getattr(os, name), itertools.count(1)

    def maybe(*args, **kwargs):
        if next(count) == bad:
            raise error
        return original(*args, **kwargs)

    patch.setattr(os, name, maybe)
    return count


@pytest.mark.parametrize("damage", ["one byte", "truncated", "missing", "manifest", "manifest's byte", "foreign"])
def test_damaged_files_are_named_and_the_model_is_untouched(tmp_path, damage):
    saved(tmp_path)
    file = next(tmp_path.glob("tensors-*/*.safetensors"))
    if "manifest" in damage or damage == "foreign":
        file = tmp_path / "checkpoint.json"
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "foreign":
        file.write_text('{"a": 1}')
    elif damage.endswith("byte"):
        spot = data.index(b"AdamW") if "manifest" in damage else -100
        data[spot] ^= 1
        file.write_bytes(data)
    else:
        file.write_bytes(data[:-30])
    net, optimizer = make(Spread(), seed=5)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=str(file)):
        load_checkpoint(tmp_path, net, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not optimizer.state


def test_what_does_not_fit_is_named(tmp_path):
    save_checkpoint(tmp_path, MoE(8, 4, 4, bias=True))
    manifest = str(tmp_path / "checkpoint.json")
    layer = MoE(8, 4, 4, bias=True)
    cases = [
        (MoE(8, 4, 4), None, r"has 'model.experts.down_proj_bias', 'model.experts.gate_up_proj_bias', which the model"),
        (MoE(8, 4, 4, bias=True, residual=True), None, r"has no 'model.residual_coefficient.bias', .* and 1 more, whi"),
        (MoE(8, 4, 5, bias=True), None, r"model.router.weight: .* has shape \[4, 8\], the model \[5, 8\]"),
        (
            MoE(8, 6, 4, bias=True),
            None,
            r"model.experts.gate_up_proj: .* has shape \[4, 8, 8\], the model \[4, 12, 8\]",
        ),
        (layer, torch.optim.SGD(layer.parameters()), r"has no optimizer state"),
    ]
    for model, optimizer, message in cases:
        with pytest.raises(CheckpointError, match=message) as caught:
            load_checkpoint(tmp_path, model, optimizer)
        assert manifest in str(caught.value)
    optimizer = torch.optim.AdamW(layer.parameters())
    save_checkpoint(tmp_path, layer, optimizer)
    groups = [{"params": [parameter]} for parameter in layer.parameters()]
    for other, message in [
        (torch.optim.SGD(layer.parameters()), r"got SGD, but the state that was saved is of AdamW"),
        (torch.optim.AdamW(groups), r"got 5 parameter groups, but 1 were saved"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path, layer, other)
    layer.register_buffer("extra", torch.zeros(2))
    save_checkpoint(tmp_path, layer)
    layer.extra = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(CheckpointError, match=r"model.extra: .* has dtype torch.float32, the model torch.int32"):
        load_checkpoint(tmp_path, layer)


def test_bad_arguments_are_named(tmp_path):
    layer = MoE(8, 4, 4)
    stranger = torch.optim.SGD([nn.Parameter(torch.zeros(2, 3))])
    sgd = torch.optim.SGD(layer.parameters(), momentum=0.9)
    sgd.state[layer.router.weight]["row"] = torch.zeros(3)
    odd = nn.Module()
    odd.get_extra_state = lambda: {"a": 1}
    for arguments, kind, message in [
        ((layer.state_dict(),), TypeError, r"model: got OrderedDict, wanted a torch.nn.Module"),
        ((layer, 3), TypeError, r"optimizer: got int, wanted a torch.optim.Optimizer or None"),
        (
            (layer, stranger),
            ValueError,
            r"optimizer: group 0 has a parameter of shape \[2, 3\] that is not the model's",
        ),
        ((layer, sgd), TypeError, r"optimizer.router.weight.row: got a tensor of shape \[3\], wanted the parameter's"),
        ((MoE(8, 4, 4, device="meta"),), ValueError, r"'router.weight' is on the meta device"),
    ]:
        with pytest.raises(kind, match=message):
            save_checkpoint(tmp_path / "x", *arguments)
    for extra, message in [
        ({"a": {1: 2}}, r"extra\['a'\]: got dict with keys that"),
        ({"b": [b""]}, r"extra\['b'\]\[0\]"),
    ]:
        with pytest.raises(TypeError, match=message):
            save_checkpoint(tmp_path / "x", layer, extra=extra)
    with pytest.raises(TypeError, match=r"group: got int"):
        save_checkpoint(tmp_path / "x", layer, group=3)
    assert not (tmp_path / "x").exists()


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    for name in ("tensors-notes", "data"):
        (tmp_path / name).mkdir()
    saved(tmp_path)
    shutil.copytree(next(tmp_path.glob("tensors-0*")), tmp_path / "tensors-000009")  # of an interrupted save
    saved(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.json", "tensors-notes", "data", "tensors-000002"}
