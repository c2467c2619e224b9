"""The command that searches for what does not belong."""

from __future__ import annotations

from pathlib import Path

from introvae.commands import parser_for
from introvae.errors import ConfigError

SCORES = {
    "neg_elbo": "weighted sum of error and KL, as in the training objective",
    "error": "squared error of the reconstruction",
    "kl": "KL of the posterior to the prior, nats",
    "neg_log_likelihood": "importance-sampled -log p(x), nats",
    "perceptual": "distance of image and reconstruction in a feature space",
    "complexity": "bits that the model needs less bits that PNG needs",
    "latent": "Mahalanobis distance of the latent from those of the training images",
}
"""Those of apps.scores in a few words each, without importing it."""
DEFAULT = "error,kl,neg_elbo,latent"


def detect(words: list[str]) -> None:
    """`introvae detect RUN --images FOLDER`."""
    example = (
        "example:\n  introvae detect runs/mine --images inbox\n"
        "  introvae detect runs/mine --images inbox --normal good --labels labels.csv\n"
        "  introvae detect runs/brains --images scans --masks lesions --scores neg_elbo,perceptual --maps 100\n\n"
        "scores (higher for what does not belong):\n"
        + "\n".join(f"  {name:<20} {meaning}" for name, meaning in SCORES.items())
    )
    parser = parser_for("detect", "Score images: what does not belong, and where.", example)
    parser.add_argument("run", help="the run folder")
    parser.add_argument("--images", required=True, help="a folder, file or table to search, prepared as the run's data")
    parser.add_argument("--normal", help="what is normal, for the thresholds (default: what the run held out)")
    parser.add_argument("--labels", help="a CSV of names (of scans FILE slice N) and labels, 0 normal, 1 anomalous")
    parser.add_argument(
        "--masks", help="a folder with masks of anomalous pixels (of scans volumes), named as the images"
    )
    parser.add_argument("--scores", help=f"joined by commas (default: {DEFAULT}; of AGE: error,latent)")
    parser.add_argument("--by", help="the score that decides (default: neg_elbo, or the first)")
    parser.add_argument("--rate", type=float, default=0.05, help="share of false alarms allowed (default: 0.05)")
    parser.add_argument("--maps", type=int, default=24, help="how many heat maps, of the highest (default: 24)")
    parser.add_argument("--map", help="kind of heat map: local, residual, latent or combined (default: local)")
    parser.add_argument("--features", default="randconv", help="space of the score perceptual (default: randconv)")
    parser.add_argument("--draws", type=int, default=64, help="latents an image for a likelihood (default: 64)")
    parser.add_argument("--batch", type=int, help="images at a time (default: what fits)")
    parser.add_argument("--seed", type=int, default=0, help="of those latents (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--out", help="folder of the results (default: RUN/detect/NAME)")
    own = parser.parse_args(words)
    if own.scores is not None and not own.scores.strip(","):
        raise ConfigError(f"no score is named: choose some of {', '.join(SCORES)}")
    from introvae.apps.detect import detect as search
    from introvae.apps.detect import table

    report = search(
        own.run,
        own.images,
        normal=own.normal,
        labels=own.labels,
        masks=own.masks,
        scores=None if own.scores is None else [name.strip() for name in own.scores.split(",") if name.strip()],
        deciding=own.by,
        false_positive_rate=own.rate,
        maps=own.maps,
        features=own.features,
        heatmap=own.map,
        draws=own.draws,
        batch_size=own.batch,
        seed=own.seed,
        device=own.device,
        out=own.out,
    )
    folder = Path(report["folder"])
    print(table(report))
    print(f"scores   {folder / 'scores.csv'}\npage     {folder / 'report.html'}")
    if report.get("maps"):
        print(f"maps     {folder / 'maps'}")
