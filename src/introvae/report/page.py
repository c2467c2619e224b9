"""The page of a report: one HTML file that needs nothing from outside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TEMPLATE = Path(__file__).with_name("page.html")

MOST = 200
"""At most so many rows of a list of files; report.json has all."""

CAPTIONS = {
    "overview": "Held-out data, their reconstructions, and draws from the prior.",
    "samples": "More samples: latents drawn from the prior, decoded. Nothing was selected.",
    "neighbours": "Each sample beside the training images that are nearest to it. A model that had learnt images by "
    "heart would draw one of them.",
    "ranked": "Held-out images beside their reconstructions, sorted by squared error: the best, the middle, the worst.",
    "interpolation": "Each row goes from one held-out image (far left) to another (far right); between them the way "
    "through the latent space, decoded.",
    "columns": "Held-out rows, reconstructions and samples; and how much of each column the reconstructions keep.",
    "errors": "How well single held-out samples are reconstructed.",
    "curves": "Training. In an introspective VAE the KL of fakes stays above that of real data, at a steady distance; "
    "below it the adversary is asleep.",
    "latent": "Which latent dimensions carry information. Those near zero are not used.",
}
"""What each picture shows, in the order in which the page shows them."""

CURVES = {
    "VAE": "Training. A VAE has no adversary: the KL of fakes is only looked at.",
    "AGE": "Training. AGE's encoder raises the divergence of fakes above that of real data, its decoder lowers it.",
    "WGANGP": "Training. The critic's estimate of the Wasserstein distance, and the penalty on its gradient.",
}
"""What the curves show of objectives that are no introspective VAE."""

SPACES = {
    "thumb": "8 x 8 pixel averages (layout, light)",
    "randconv": "untrained convolutional features (edges, texture)",
    "pixels": "the pixels",
    "values": "the standardised values",
    "mnist": "a digit classifier's features",
    "cifar10": "a CIFAR-10 classifier's features",
    "inception": "Inception's features (FID)",
}
"""What each feature space looks at."""
JUDGES = ("mnist", "cifar10")
"""Those that are a classifier's."""

MEANING = {
    "mse": "mean squared error",
    "psnr_db": "peak signal-to-noise ratio, dB; higher is better",
    "ssim": "structural similarity, at most 1",
    "kl_real_nats": "KL of held-out data to the prior, nats",
    "active_units": "latent dimensions in use",
    "kl_aggregate_nats": "KL to the prior of the Gaussian fit to all posteriors together, nats; 0 of a collapsed "
    "encoder too",
    "lpips": "LPIPS, how different reconstructions look to a network; lower is better",
    "msssim_pairs": "likeness (MS-SSIM) of pairs of samples; above the floor, samples are too alike",
    "confident_share": "share of samples that a classifier is sure of",
    "class_entropy_nats": "spread of the samples over the classes, nats",
    "kl_soft_introvae": "KL of histograms, authors' protocol; lower is better",
    "jsd_soft_introvae": "Jensen-Shannon divergence, authors' protocol; lower is better",
    "kl_nats": "KL of normalised histograms, nats; lower is better",
    "jsd_nats": "Jensen-Shannon divergence, nats; lower is better",
    "energy_distance": "energy distance; lower is better",
    "modes": "modes found",
    "share_within_3_sigma": "share of samples within 3 sigma of a mode",
    "gnelbo": "grid-normalised ELBO; lower is better",
    **{f"frechet_{name}": f"Fréchet distance of {space}; lower is better" for name, space in SPACES.items()},
    **{f"kid_{name}": f"kernel distance (KID) of {space}; lower is better" for name, space in SPACES.items()},
    **{f"precision_{name}": f"share of samples near real images, by {space}" for name, space in SPACES.items()},
    **{f"recall_{name}": f"share of real images near samples, by {space}" for name, space in SPACES.items()},
    **{f"density_{name}": f"how densely real images surround samples, by {space}" for name, space in SPACES.items()},
    **{f"coverage_{name}": f"share of real images with a sample beside, by {space}" for name, space in SPACES.items()},
    **{f"confident_share_{name}": f"share of samples that the {name} classifier is sure of" for name in JUDGES},
    **{f"class_entropy_nats_{name}": f"spread of the samples over the {name} classes, nats" for name in JUDGES},
    **{f"class_distance_{name}": f"how far the shares of the {name} classes are off; 0 is best" for name in JUDGES},
}
"""The metrics in a reader's words."""


def render(report: dict[str, Any], folder: Path, settings: str, environment: Sequence[tuple[str, str]]) -> str:
    """The page as text.

    Arguments:
        report: as in report.json.
        folder: of the run, where the pictures lie.
        settings: the text of config.yaml.
        environment: names and versions of what computed it.
    """
    pictures = [
        {
            "name": name,
            "caption": _caption(name, caption, report),
            "source": embedded((folder / report["pictures"][name]).read_bytes()),
        }
        for name, caption in CAPTIONS.items()
        if name in report["pictures"]
    ]
    return rendered(
        TEMPLATE,
        report=report,
        most=MOST,
        pictures=pictures,
        settings=settings,
        environment=environment,
        meaning=MEANING,
    )


def rendered(template: Path, **values: Any) -> str:
    """A template of ours as a page that needs nothing from outside; it may include the stylesheet of all pages."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader([template.parent, TEMPLATE.parent])
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    jinja.filters["number"] = number
    return jinja.get_template(template.name).render(**values)


def _caption(name: str, caption: str, report: dict[str, Any]) -> str:
    if name == "curves":
        return CURVES.get(report["objective"], caption)
    if name == "overview" and report["objective"] == "WGANGP":
        return "Real data, and draws from the prior."
    if name == "neighbours":
        its = report["neighbours"]
        far = [
            f"{number(its[kind]['samples'])}, {number(its[kind]['samples_5'])} (held-out images "
            f"{number(its[kind]['heldout'])}, {number(its[kind]['heldout_5'])})"
            for kind in ("pixels", "features")
        ]
        return (
            f"{caption} Distance to the nearest of {_searched(its)} training images, median and 5 % quantile: by "
            f"pixels {far[0]}, by 1 - cosine in {its['space']} {far[1]}. Protocol: {its['protocol']}."
        )
    return caption


def _searched(its: dict[str, Any]) -> str:
    """How many training images were looked at; where they are not all, a copy of another one looks new."""
    some, all_of = its["searched"], its["train"]
    return f"{some:,}" if some == all_of else f"{some:,} (of {all_of:,}: copies of the others are not seen)"


def embedded(png: bytes) -> str:
    """A picture as the source of an <img>."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def number(value: float | int | None) -> str:
    """Four significant digits, or nothing.

    Example:
        >>> number(0.12345), number(12345.6), number(None)
        ('0.1235', '12,346', '')
    """
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
