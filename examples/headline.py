"""Makes the figure of the README: a VAE beside Soft-IntroVAE, in the plane and on real digits, same network and data.

    python examples/headline.py                  # about a quarter of an hour on two cores
    python examples/headline.py --steps 200      # a look at what it does

Each model is trained with a recipe of the package (`introvae recipes`); finished runs in --runs are used again.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

import introvae
from introvae.pictures import image_grid

DATA = {"density:8gaussians": "8 Gaussians", "digits": "handwritten digits, 8 x 8 pixels"}
OBJECTIVES = {"VAE": "vae", "Soft-IntroVAE": "softintrovae"}


def trained(data: str, title: str, folder: Path, steps: int | None) -> introvae.Run:
    """The run of one objective on one data set, trained now unless it is in the folder."""
    run = folder / f"{data.removeprefix('density:')}-{OBJECTIVES[title]}"
    if (run / "model" / "config.json").is_file():
        return introvae.Run.open(run)
    if (run / "config.yaml").is_file():
        return introvae.fit(resume=run)
    print(f"training {title} on {data} in {run}")
    shorter: dict[str, Any] = {"steps": steps} if steps else {}
    return introvae.fit(recipe=run.name, out=str(run), **shorter)


def draw_points(axis, points: torch.Tensor) -> None:
    axis.scatter(points[:, 0], points[:, 1], s=2, alpha=0.5, linewidths=0, color="#1f4e79", rasterized=True)
    axis.set(xlim=(-2, 2), ylim=(-2, 2), aspect="equal")


def draw_images(axis, images: torch.Tensor) -> None:
    axis.imshow(image_grid(images, columns=8), cmap="gray", vmin=0, vmax=255)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="where the runs are kept (default: runs/headline)")
    parser.add_argument("--out", type=Path, help="the figure (default: headline.png beside the runs)")
    parser.add_argument("--steps", type=int, help="shorter runs, for a quick look")
    arguments = parser.parse_args()
    arguments.runs = arguments.runs or Path("runs/headline" + (f"-{arguments.steps}" if arguments.steps else ""))
    arguments.out = arguments.out or arguments.runs / "headline.png"

    figure = Figure(figsize=(8.4, 5.9), layout="constrained")
    axes = figure.subplots(2, 3)
    for row, (data_name, label) in zip(axes, DATA.items(), strict=True):
        data = introvae.load_data(data_name)
        generator = torch.Generator().manual_seed(0)
        if isinstance(data, introvae.DensityData):
            draw, n, real = draw_points, 4000, data.density.sample(4000, generator)
        else:
            draw, n, real = draw_images, 64, data.heldout.tensor()[:64]
        draw(row[0], real)
        row[0].set_title("real", fontsize=10)
        row[0].set_ylabel(label, fontsize=10)
        for axis, title in zip(row[1:], OBJECTIVES, strict=True):
            run = trained(data_name, title, arguments.runs, arguments.steps)
            draw(axis, run.model().sample(n, torch.Generator().manual_seed(0)))
            axis.set_title(f"{title}, samples", fontsize=10)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=100)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
