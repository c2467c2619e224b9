"""Train the classifiers whose features the metrics `…_mnist` and `…_cifar10` are computed in.

    python scripts/train_classifiers.py DATA [--only mnist]

DATA holds the folders mnist and cifar10, each with train.parquet and test.parquet. Writes the weights into the package
(src/introvae/metrics/weights), with the accuracy on the test part in their metadata. It took 13 minutes for
MNIST and 29 for CIFAR-10 on two cores that others used too.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from introvae.data import ArrayData, load_data
from introvae.data.arrays import to_float
from introvae.metrics.classifier import CLASSIFIERS, WEIGHTS, ConvClassifier


@dataclass(frozen=True)
class Recipe:
    """How one classifier is made."""

    channels: int
    side: int
    widths: tuple[int, int, int]
    epochs: int
    flip: bool  # left and right look alike
    turn: float  # up to so many radians, and larger or smaller by as much
    batch: int = 256
    lr: float = 0.4
    weight_decay: float = 5e-4


RECIPES = {
    "mnist": Recipe(1, 28, (24, 48, 96), epochs=8, flip=False, turn=0.15),
    "cifar10": Recipe(3, 32, (40, 80, 160), epochs=14, flip=True, turn=0.0),
}
SHIFT = 1 / 8
"""Images are moved by up to this share of their side, in both directions."""


def train(recipe: Recipe, x: Tensor, labels: Tensor, seed: int = 0) -> ConvClassifier:
    """A classifier trained on uint8 images `[N, C, H, W]`, in evaluation mode."""
    torch.manual_seed(seed)
    network = ConvClassifier(recipe.channels, recipe.side, recipe.widths)
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.SGD(
        network.parameters(), recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )
    steps = len(x) // recipe.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, recipe.epochs * steps, pct_start=0.2)
    start = time.perf_counter()
    for epoch in range(recipe.epochs):
        total = torch.zeros(())
        for rows in torch.randperm(len(x))[: steps * recipe.batch].split(recipe.batch):
            images = varied(to_float(x[rows]), recipe).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                scores = network(images)
            loss = F.cross_entropy(scores.float(), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        print(f"epoch {epoch + 1:>2}  loss {total / steps:.4f}  {time.perf_counter() - start:.0f} s", flush=True)
    return network.eval()


def varied(x: Tensor, recipe: Recipe) -> Tensor:
    """Images moved, turned and mirrored at random, each differently; what comes in from outside mirrors the border."""
    n = len(x)
    angle = (2 * torch.rand(n) - 1) * recipe.turn
    zoom = 1 + (2 * torch.rand(n) - 1) * recipe.turn
    mirror = torch.where(torch.rand(n) < 0.5, -1.0, 1.0) if recipe.flip else torch.ones(n)
    # Whole pixels, where nothing is turned: moved by parts of one, images would be blurred.
    shift = (torch.rand(n, 2) * 2 - 1) * SHIFT * recipe.side
    shift = 2 / recipe.side * (shift if recipe.turn else shift.round())
    rows = [
        torch.stack([mirror * zoom * angle.cos(), -zoom * angle.sin(), shift[:, 0]], dim=1),
        torch.stack([mirror * zoom * angle.sin(), zoom * angle.cos(), shift[:, 1]], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, labels: Tensor) -> float:
    """Share of uint8 images that the network is right about."""
    right = [
        (network(to_float(part)).argmax(dim=1) == wanted)
        for part, wanted in zip(x.split(500), labels.split(500), strict=True)
    ]
    return torch.cat(right).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the classifiers of the metrics.")
    parser.add_argument("data", type=Path, help="the folder that holds mnist and cifar10")
    parser.add_argument("--only", choices=CLASSIFIERS)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    own = parser.parse_args()
    for name in (own.only,) if own.only else CLASSIFIERS:
        data, recipe = load_data(own.data / name), RECIPES[name]
        assert isinstance(data, ArrayData)
        assert data.train.labels is not None
        assert data.heldout.labels is not None
        network = train(recipe, data.train.x, data.train.labels)
        found = accuracy(network, data.heldout.x, data.heldout.labels)
        settings = {"channels": recipe.channels, "side": recipe.side, "widths": recipe.widths}
        facts = {
            "network": json.dumps(settings),
            "classes": json.dumps(data.class_names),
            "accuracy": f"{found:.4f}",
            "tested": str(len(data.heldout)),
            "made_by": "scripts/train_classifiers.py",
        }
        own.out.mkdir(parents=True, exist_ok=True)
        path = own.out / f"{name}.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, path, facts)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, {100 * found:.2f} % of {len(data.heldout)} test images")


if __name__ == "__main__":
    main()
