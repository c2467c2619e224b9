"""How well a run translates ETH-80: `python benchmarks/translation.py runs/objects --json translation.json`.

ETH-80 shows objects of eight classes from many directions. A small network is trained on the run's training images to
tell the class, and the azimuth of the four classes that have a front (cars, cows, dogs, horses), seen from the side. It
then judges images that were held out (views of known objects that neither it nor the model was trained on):

- real ones and their reconstructions: the ceiling;
- translated ones, with the class of image A and the content of image B, for all pairs of images of the four classes
  that are not both of one: how often is the class A's (chance: one in eight), how often is the azimuth within 45
  degrees of B's (chance: one in four; how often it is within 45 degrees of another image's stands beside it)?

Standard errors are of a bootstrap over the images, not over the pairs, which are no independent draws. A linear
classifier on the training images' latents tells what class latents and the others know of class and azimuth, and
the mutual information gap whether single latents stand for class, azimuth and elevation.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import progress, report
from torch import Tensor, nn
from torch.nn import functional as F

from introvae import IntrospectiveVAE, Run
from introvae.apps.explore import latents
from introvae.apps.translate import translate
from introvae.data import ArrayData, Part
from introvae.evaluation import load_for
from introvae.metrics.disentanglement import mutual_information_gap
from introvae.networks.disentangled import class_dim
from introvae.pictures import image_grid, save_picture

FRONTS = ("car", "cow", "dog", "horse")
SIDEWAYS = 45
"""Degrees of elevation from which on an object is seen from the side: at 0 it is seen from above."""
NEAR = 45
"""Degrees that an azimuth may be wrong."""


@dataclass
class Views:
    """Images `[N, 3, S, S]`, their classes `[N]`, azimuths and elevations in degrees `[N]`."""

    x: Tensor
    label: Tensor
    azimuth: Tensor
    elevation: Tensor

    def __getitem__(self, rows: Tensor) -> Views:
        return Views(self.x[rows], self.label[rows], self.azimuth[rows], self.elevation[rows])


def views(part: Part) -> Views:
    """A part of ETH-80, whose file names tell the view: horse10-090-068.jpg has elevation 90 and azimuth 67.5."""
    found = [re.search(r"-(\d{3})-(\d{3})\.", name) for name in part.names]
    if part.labels is None or not all(found) or not found:
        raise SystemExit("these are not ETH-80's images: their names tell no view")
    angles = torch.tensor([[float(match[1]), float(match[2])] for match in found if match])
    return Views(part.tensor(), part.labels, angles[:, 1], angles[:, 0])


class Judge(nn.Module):
    """Class logits `[N, K]` and the direction of the azimuth `[N, 2]`."""

    def __init__(self, classes: int, side: int) -> None:
        super().__init__()
        widths, layers = (3, 32, 64, 128), []
        for a, b in pairwise(widths):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(8, b), nn.ReLU()]
            layers += [nn.Conv2d(b, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3))
        self.head = nn.Linear(widths[-1] * (side // 8) ** 2, classes + 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.head(self.features(x - 0.5))
        return found[:, :-2], F.normalize(found[:, -2:], dim=1)


def direction(degrees: Tensor) -> Tensor:
    return torch.stack([torch.deg2rad(degrees).cos(), torch.deg2rad(degrees).sin()], dim=1)


def trained_judge(train: Views, fronts: Tensor, epochs: int, seed: int) -> Judge:
    """A judge that saw the training views, shifted by up to a sixteenth, in other brightness, sharp and blurred."""
    torch.manual_seed(seed)
    side = train.x.shape[-1]
    judge, reach = Judge(int(train.label.max()) + 1, side), side // 16
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01)
    steps = epochs * (len(train.x) // 64)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    turned = torch.isin(train.label, fronts) & (train.elevation >= SIDEWAYS)
    for step in range(steps):
        rows = torch.randint(len(train.x), (64,))
        x = train.x[rows].roll([int(torch.randint(-reach, reach + 1, ())) for _ in range(2)], dims=(2, 3))
        x = (x + 0.1 * torch.randn(64, 1, 1, 1)).clamp(0, 1)
        if step % 2:
            x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        logits, front = judge(x)
        loss = F.cross_entropy(logits, train.label[rows])
        if (sideways := turned[rows]).any():
            loss = loss + (1 - (front * direction(train.azimuth[rows])).sum(dim=1))[sideways].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if step % 200 == 199:
            progress(f"judge, step {step + 1} of {steps}: loss {float(loss):.3f}")
    return judge.eval()


@torch.no_grad()
def judged(judge: Judge, x: Tensor) -> tuple[Tensor, Tensor]:
    """Class indices and azimuths in degrees."""
    parts = [judge(part) for part in x.split(256)]
    logits, front = (torch.cat(found) for found in zip(*parts, strict=True))
    return logits.argmax(dim=1), torch.rad2deg(torch.atan2(front[:, 1], front[:, 0])) % 360


def near(a: Tensor, b: Tensor) -> Tensor:
    """Whether azimuths differ by at most `NEAR` degrees."""
    apart = (a - b).abs() % 360
    return torch.minimum(apart, 360 - apart) <= NEAR


def shares(right: Tensor, valid: Tensor, draws: int = 1000) -> tuple[float, float]:
    """The share of right pairs `[N, N]` among the valid ones, and its standard error over draws of the N images."""
    generator = torch.Generator().manual_seed(0)

    def share(weight: Tensor) -> float:
        pairs = valid * weight[:, None] * weight[None]
        return float((right * pairs).sum() / pairs.sum())

    n = len(right)
    drawn = [torch.randint(n, (n,), generator=generator).bincount(minlength=n).float() for _ in range(draws)]
    return share(torch.ones(n)), float(torch.tensor([share(weight) for weight in drawn]).std())


def translated(model: IntrospectiveVAE, judge: Judge, seen: Views) -> dict[str, Any]:
    """What the judge says of all pairs."""
    n = len(seen.x)
    images = translate(model, seen.x, seen.x)
    label, azimuth = (found.unflatten(0, (n, n)) for found in judged(judge, images.flatten(0, 1)))
    valid = (seen.label[:, None] != seen.label[None]).float()
    anew = seen.azimuth[torch.randperm(n, generator=torch.Generator().manual_seed(1))]
    of_a, of_b, chance = (
        near(azimuth, seen.azimuth[:, None]),
        near(azimuth, seen.azimuth[None]),
        near(azimuth, anew[None]),
    )
    cases = {
        "class_of_a": label == seen.label[:, None],
        "class_of_b": label == seen.label[None],
        "azimuth_of_b": of_b,
        "azimuth_of_a": of_a,
        "azimuth_of_others": chance,
        "both": (label == seen.label[:, None]) & of_b,
    }
    found: dict[str, Any] = {"pairs": int(valid.sum())}
    for name, right in cases.items():
        found[name], found[f"{name}_se"] = shares(right.float(), valid)
    return found


def probes(model: IntrospectiveVAE, train: Views, held: Views, fronts: Tensor) -> dict[str, float]:
    """What linear classifiers read off each part of the latents of held-out views; azimuths in eighths of a circle."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    first, found = class_dim(model.encoder), {}
    z, z_held = latents(model, train.x), latents(model, held.x)
    for part, columns in (("class", slice(0, first)), ("content", slice(first, None))):
        for factor, of, kept in (
            ("class", lambda v: v.label, lambda v: v.label >= 0),
            ("azimuth", octant, lambda v: torch.isin(v.label, fronts) & (v.elevation >= SIDEWAYS)),
        ):
            regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
            regression.fit(z[kept(train), columns].numpy(), of(train[kept(train)]).numpy())
            right = regression.predict(z_held[kept(held), columns].numpy()) == of(held[kept(held)]).numpy()
            found[f"{factor}_from_{part}_latents"] = float(right.mean())
    factors = {"class": train.label, "azimuth": octant(train), "elevation": train.elevation.long()}
    gap = mutual_information_gap(z, factors)
    return {**found, "mutual_information_gap": gap.value, **{f"gap_{name}": value for name, value in gap.gaps.items()}}


def octant(seen: Views) -> Tensor:
    return (seen.azimuth / 45).round().long() % 8


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("runs", nargs="+", type=Path, help="runs of --network disentangled on ETH-80")
    words.add_argument("--epochs", type=int, default=40, help="of the judge's training (default: 40)")
    words.add_argument("--seed", type=int, default=0, help="of the judge (default: 0)")
    words.add_argument("--json", type=Path, help="where to write the results")
    words.add_argument("--sheet", type=Path, help="folder for a picture of each run's translations")
    own = words.parse_args()
    cases = []
    judge, known = None, None
    for folder in own.runs:
        run = Run.open(folder)
        config, model = run.config(), run.model()
        data = load_for(config, model, None)
        assert isinstance(data, ArrayData)
        train, held = views(data.train), views(data.heldout)
        fronts = torch.tensor([data.class_names.index(name) for name in FRONTS])
        if judge is None or known != data.fingerprint():
            judge, known = trained_judge(train, fronts, own.epochs, own.seed), data.fingerprint()
        turned = held[torch.isin(held.label, fronts) & (held.elevation >= SIDEWAYS)]
        case: dict[str, Any] = {
            "case": folder.name,
            "objective": type(config.objective).__name__,
            "paired": config.paired,
        }
        for kind, every, some in (
            ("real", held.x, turned.x),
            ("reconstruction", model.reconstruct(held.x), model.reconstruct(turned.x)),
        ):
            case[f"class_{kind}"] = float((judged(judge, every)[0] == held.label).float().mean())
            case[f"azimuth_{kind}"] = float(near(judged(judge, some)[1], turned.azimuth).float().mean())
        case |= translated(model, judge, turned)
        case |= probes(model, train, held, fronts)
        cases.append(case)
        if own.sheet is not None:
            rows = torch.tensor([int((turned.label == label).nonzero()[i]) for label in fronts for i in range(2)])
            x = turned.x[rows]
            sheet = torch.cat(
                [torch.cat([torch.ones_like(x[:1]), x])[None], torch.cat([x[:, None], translate(model, x, x)], 1)]
            )
            save_picture(image_grid(sheet.flatten(0, 1), len(rows) + 1), own.sheet / f"{folder.name}.png")
    report(cases, own.json, chance={"class": 1 / 8, "azimuth": 2 * NEAR / 360})


if __name__ == "__main__":
    main()
