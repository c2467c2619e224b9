"""What the published recipes cost from end to end: images seen, weights, EFLOP.

    python benchmarks/recipe_cost.py [RECIPE ...]

Prints the columns of docs/recipes.md in a minute or two: every kind of step that a run takes (warm-up, each level of
growing while it is faded in and after) is counted once, with tensors that have shapes but no content, so nothing is
trained and no data set is read. FLOPs are those of matrix products and convolutions, two for each multiply-add. Hours
are at 30 TFLOP/s, a GPU of 100 TFLOP/s in use at 30 %: an assumption, not a measurement.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from common import counted_flops, table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from introvae.model import IntrospectiveVAE
from introvae.networks import network_for
from introvae.players import Noise
from introvae.step import step_class
from introvae.training.config import FitConfig, list_recipes, load_config, recipe_path
from introvae.training.growing import Schedule
from introvae.training.planner import give_no_content

IMAGES = {
    "ylecun/mnist": 60_000,
    "zalando-datasets/fashion_mnist": 60_000,
    "uoft-cs/cifar10": 50_000,
    "ufldl-stanford/svhn:cropped_digits": 73_257,
    "flwrlabs/celeba": 162_770,
    "eurecom-ds/celeba-hq-256": 29_000,
    "bitmind/celeb-a-hq": 29_000,
    "merkol/ffhq-256": 60_000,
}
"""Training images of the sets whose recipes count in epochs."""
RATE = 30e12


@dataclass(frozen=True)
class Cost:
    """Of a whole run."""

    steps: int
    images: int
    weights: int
    flops: float

    @property
    def hours(self) -> float:
        return self.flops / RATE / 3600


def cost(name: str) -> Cost:
    """What the run of a recipe costs; images are of 64 pixels and three channels where it leaves that open."""
    config = load_config(recipe_path(name))
    side = config.size or 64
    shape = (2,) if config.data.startswith("density:") else (config.channels or 3, side, side)
    schedule = Schedule(config.growing, shape, config.batch_size)
    steps = config.steps or _steps(config, schedule)
    warmup = config.warmup.resolved(steps)
    network = network_for(shape) if config.network == "auto" else config.network
    model = IntrospectiveVAE.build(shape, network, config.latent_dim or 0, **config.network_options)
    weights = sum(parameter.numel() for parameter in model.parameters())
    fake = FakeTensorMode()
    give_no_content(model, fake)
    flops = 0.0
    with fake:
        step = step_class(config.objective)(model, config.objective, warmup=warmup)
        turns = getattr(config.objective, "n_critic", 1)  # WGAN-GP updates its generator in one step of these
        changes = {0, warmup.steps, steps, *(level.first for level in schedule.levels)}
        changes |= {level.first + level.fading for level in schedule.levels}
        for first, end in pairwise(sorted(changes)):
            batch, small = schedule.at(first).batch, _images(model, schedule, first, shape)
            x, noise = torch.empty(batch, *small), Noise.draw(batch, config.latent_dim or 0)

            def take(x: Tensor = x, noise: Noise = noise, warming: bool = first < warmup.steps) -> None:
                for _ in range(turns):
                    step(x, noise, warming=warming)

            flops += counted_flops(take) / turns * (end - first)
    return Cost(steps, schedule.samples(steps), weights, flops)


def _steps(config: FitConfig, schedule: Schedule) -> int:
    images, epochs = IMAGES[config.data], config.epochs or 0
    return schedule.steps_for(epochs * images) if config.growing.on else round(epochs * (images // config.batch_size))


def _images(model: IntrospectiveVAE, schedule: Schedule, step: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Bring the networks to the level of a step; the shape of its images."""
    if not schedule.growth.on:
        return shape
    alpha: Tensor | None = None if schedule.alpha(step) is None else torch.empty(())
    side = schedule.at(step).side
    model.grow(side, alpha)
    return (shape[0], side, side)


def rounded(value: float) -> str:
    """Two digits: 0.013, 1.3, 130, 1,300."""
    digits = 1 - math.floor(math.log10(value))
    return f"{round(value, digits):,.{max(0, digits)}f}"


def row(name: str) -> dict[str, str]:
    """A line of the table, as it stands in docs/recipes.md and in the recipe's head."""
    found = cost(name)
    return {
        "recipe": name,
        "steps": f"{found.steps:,}",
        "million images": rounded(found.images / 1e6),
        "EFLOP": rounded(found.flops / 1e18),
        "hours": rounded(found.hours),
        "million weights": rounded(found.weights / 1e6),
    }


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("recipes", nargs="*", metavar="RECIPE", help="default: all published ones and baselines")
    names = options.parse_args().recipes or [n for n in list_recipes() if n.endswith(("-published", "-baseline"))]
    print(table([row(name) for name in names]))


if __name__ == "__main__":
    main()
