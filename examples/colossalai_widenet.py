"""WideNet on real images with Colossal-AI's interface: one process, or experts over several.

    python examples/colossalai_widenet.py
    torchrun --nproc_per_node 4 examples/colossalai_widenet.py --moe-size 2
    python examples/colossalai_widenet.py --data FOLDER            # FOLDER/class name/*.png, or jpg

Without --data the images are scikit-learn's handwritten digits (8 x 8, no download; pip install scikit-learn). Prints
losses and the accuracy on held-out images, and writes curves.png and a checkpoint, which --resume takes up on any
number of processes. The losses do not depend on the number of processes: batches and noise on the images are drawn by
step and image, experts by their global id, and nothing is dropped unless --capacity-factor says so.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_triton.compat.colossalai as colossalai
from moe_triton.compat.colossalai.context import ParallelMode, global_context
from moe_triton.compat.colossalai.context.random import moe_set_seed
from moe_triton.compat.colossalai.model_zoo.moe.models import Widenet
from moe_triton.compat.colossalai.nn.loss import MoeLoss
from moe_triton.compat.colossalai.trainer import Trainer, hooks


def digits() -> tuple[Tensor, Tensor, int]:
    """scikit-learn's digits: images [N, 1, 8, 8] in 0..1, labels [N], classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit("the digits come with scikit-learn: pip install scikit-learn, or give --data") from error
    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target), 10


def image_folder(folder: Path, size: int) -> tuple[Tensor, Tensor, int]:
    """FOLDER/class name/image: [N, 3, size, size] in 0..1, labels by the classes' names in order, classes."""
    from PIL import Image

    names = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    images, labels = [], []
    for label, name in enumerate(names):
        for path in sorted((folder / name).iterdir()):
            if path.suffix.lower() in (".png", ".jpg", ".jpeg"):
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB").resize((size, size)), dtype=np.float32) / 255
                images.append(torch.from_numpy(pixels).permute(2, 0, 1))
                labels.append(label)
    if len(names) < 2 or len(images) < 10:
        raise SystemExit(f"--data: {folder} has {len(images)} images in {len(names)} folders, wanted one per class")
    return torch.stack(images), torch.tensor(labels), len(names)


class Batches:
    """Batches of this rank's images, drawn by epoch: the ranks' batches together are those of one process."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, seed: int, augment: bool) -> None:
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.seed, self.augment, self.epoch = seed, augment, 0
        self.group = global_context.group(ParallelMode.DATA)
        if batch_size % self.group.size:
            raise SystemExit(f"--batch-size: got {batch_size}, wanted a multiple of the {self.group.size} ranks")
        self.sampler = self  # the trainer tells it the epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images) // self.batch_size if self.augment else -(-len(self.images) // self.batch_size)

    def __iter__(self):
        random = np.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.images)) if self.augment else np.arange(len(self.images))
        shifts = random.integers(-1, 2, size=(len(order), 2))
        angles = random.uniform(-0.15, 0.15, size=len(order))
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            chosen = np.arange(start, min(start + self.batch_size, len(order)))
            # shares are equal but in the last batch of the held-out images, which everybody takes if it is too small
            shares = len(chosen) >= self.group.size
            mine = np.array_split(chosen, self.group.size)[self.group.rank] if shares else chosen
            images = self.images[order[mine]]
            if self.augment:
                images = moved(images, shifts[mine], angles[mine])
            yield images, self.labels[order[mine]]


def moved(images: Tensor, shifts: np.ndarray, angles: np.ndarray) -> Tensor:
    """Images turned by `angles` (radians) and shifted by `shifts` pixels (at 8 x 8, more for larger ones)."""
    cos, sin = torch.from_numpy(np.cos(angles)).float(), torch.from_numpy(np.sin(angles)).float()
    x, y = torch.from_numpy(shifts).float().T / 8
    matrix = torch.stack([torch.stack([cos, -sin, x], 1), torch.stack([sin, cos, y], 1)], 1)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def draw_curves(metrics: dict[str, dict[str, list[float]]], path: Path, every: int) -> None:
    """Loss and accuracy over epochs, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for phase, step in (("train", 1), ("test", every)):
        for axis, name in zip(axes, ("Loss", "Accuracy"), strict=True):
            values = metrics[phase].get(name, [])
            axis.plot([step * (i + 1) for i in range(len(values))], values, label=phase)
            axis.set(xlabel="epoch", title=name)
            axis.grid(alpha=0.3)
            axis.legend()
    figure.suptitle("WideNet")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a folder with a folder of images per class; default: digits")
    parser.add_argument("--image-size", type=int, default=32, help="to which the images of --data are resized")
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--moe-size", type=int, default=1, help="ranks that share one set of experts")
    parser.add_argument("--tensor-size", type=int, default=1, help="ranks that split the attention's heads")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--capacity-factor", type=float, help="of each rank's tokens; default: nothing is dropped")
    parser.add_argument("--noise", action="store_true", help="NormalNoiseGenerator on the router's logits")
    parser.add_argument("--drop-rate", type=float, default=0.0, help="dropout")
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=64, help="of all ranks together")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("widenet-run"), help="folder of curves.png and checkpoint/")
    parser.add_argument("--stop-after", type=int, metavar="EPOCHS", help="stop early, to be resumed")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in --out, to the same --epochs"
    )
    options = parser.parse_args()

    parallel = {"moe": {"size": options.moe_size}, "tensor": {"size": options.tensor_size, "mode": "1d"}}
    colossalai.launch_from_torch(config={"parallel": parallel}, seed=options.seed)
    is_first = global_context.get_global_rank() == 0

    images, labels, num_classes = digits() if options.data is None else image_folder(options.data, options.image_size)
    order = torch.from_numpy(np.random.default_rng(1234).permutation(len(images)))  # the same split for every seed
    held_out, trained = order[: len(order) // 5], order[len(order) // 5 :]
    images = (images - images[trained].mean()) / images[trained].std()
    size = images.shape[-1]
    train_data = Batches(images[trained], labels[trained], options.batch_size, options.seed, augment=True)
    test_data = Batches(images[held_out], labels[held_out], options.batch_size, options.seed, augment=False)

    moe_set_seed(options.seed)
    model = Widenet(
        num_experts=options.experts,
        capacity_factor=options.capacity_factor,
        img_size=size,
        patch_size=options.patch_size,
        in_chans=images.shape[1],
        num_classes=num_classes,
        depth=4,
        d_model=64,
        num_heads=4,
        d_kv=16,
        d_ff=128,
        drop_rate=options.drop_rate,
        noisy=options.noise,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.05)
    criterion = MoeLoss(aux_weight=0.01, loss_fn=nn.CrossEntropyLoss, label_smoothing=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.lr, epochs=options.epochs, steps_per_epoch=len(train_data), pct_start=0.15
    )
    engine, *_ = colossalai.initialize(model, optimizer, criterion, lr_scheduler=schedule)
    trainer = Trainer(engine)
    if options.resume:
        trainer.load(options.out / "checkpoint")

    every = 5
    start = time.perf_counter()
    trainer.fit(
        train_data,
        options.epochs if options.stop_after is None else min(options.stop_after, options.epochs),
        test_dataloader=test_data,
        test_interval=every,
        display_progress=True,
        hooks=[
            hooks.LossHook(),
            hooks.AccuracyHook(),
            hooks.LRSchedulerHook(schedule, by_epoch=False),
            hooks.LogMetricByEpochHook(interval=every),
            hooks.SaveCheckpointHook(every, options.out / "checkpoint"),
        ],
    )
    seconds = time.perf_counter() - start
    if trainer.cur_epoch % every:
        trainer.save(options.out / "checkpoint")
    if is_first:
        options.out.mkdir(parents=True, exist_ok=True)
        draw_curves(trainer.metrics, options.out / "curves.png", every)
    trainer.evaluate(test_data, hooks=[hooks.LossHook(), hooks.AccuracyHook()])
    if is_first:
        train, test = trainer.metrics["train"], trainer.metrics["test"]
        print(f"first losses {' '.join(f'{loss:.6f}' for loss in train['Loss'][:3])}")
        print(f"held-out accuracy {test['Accuracy'][-1]:.2%} on {len(held_out)} images, trained {seconds:.0f} s")
        print(f"curves in {options.out / 'curves.png'}, checkpoint in {options.out / 'checkpoint'}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
