"""What a model makes of held-out data: reconstructions and posteriors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from introvae.data import ArrayData, Part
from introvae.gaussian import DiagonalGaussian
from introvae.measures.entries import Metrics, at_once, entry
from introvae.metrics import posterior, reconstruction
from introvae.model import IntrospectiveVAE

MOST_CLASSES = 100
"""A table of more classes is not read."""

Distance = Callable[[Tensor, Tensor], Tensor]


class Heldout(NamedTuple):
    """Held-out data and, of each sample, how well it is reconstructed, and its posterior; on the CPU.

    The reconstructions themselves are not kept: of large images they would fill the memory.

    Arguments:
        part: the data.
        errors: of each reconstruction, `[N]` by the metric's name: mse and, of images, psnr_db, ssim and more.
        posterior: of all.
        condition: the class of each, `[N]`, where the model takes one.
    """

    part: Part
    errors: dict[str, Tensor]
    posterior: DiagonalGaussian
    condition: Tensor | None = None

    @property
    def mse(self) -> Tensor:
        """Mean squared error of each reconstruction, `[N]`."""
        return self.errors["mse"]

    def reconstruct(self, model: IntrospectiveVAE, rows: slice | list[int] = slice(None)) -> Tensor:
        """The reconstructions of some rows, made anew."""
        mode, batch = self.posterior.mode[rows], at_once(tuple(self.part.x.shape[1:]))
        condition = None if self.condition is None else self.condition[rows]
        with torch.no_grad():
            parts = [
                model.decode(mode[some].to(model.device), None if condition is None else condition[some]).cpu()
                for some in (slice(start, start + batch) for start in range(0, len(mode), batch))
            ]
        return torch.cat(parts)


@torch.no_grad()
def look_at_heldout(
    model: IntrospectiveVAE,
    data: ArrayData,
    *,
    part: Part | None = None,
    lpips: Distance | None = None,
    batch: int | None = None,
) -> Heldout:
    """Encode the held-out part and decode the modes, a batch at a time, once for all that is measured and drawn.

    Arguments:
        part: another part than the held-out one.
        lpips: a distance of images to be measured too.
        batch: how many at a time, by default as many as images of their size allow.
    """
    part = data.heldout if part is None else part
    batch = at_once(data.shape) if batch is None else batch
    condition = model.condition_for(part.labels, data.class_names)
    posteriors: list[DiagonalGaussian] = []
    errors: dict[str, list[Tensor]] = {}
    for start in range(0, len(part), batch):
        x = part[slice(start, start + batch)].tensor(model.device)
        classes = None if condition is None else condition[start : start + batch]
        posteriors.append(model.encode(x, classes))
        y = model.decode(posteriors[-1].mode, classes)
        values = {"mse": reconstruction.mse(x, y)}
        if x.ndim == 4:
            values |= {"psnr_db": reconstruction.psnr_db(x, y), "ssim": reconstruction.ssim(x, y)}
            if lpips is not None:
                values["lpips"] = lpips(x, y)
        for name, value in values.items():
            errors.setdefault(name, []).append(value.cpu())
    mean, logvar = (torch.cat([getattr(p, name).cpu() for p in posteriors]) for name in ("mean", "logvar"))
    return Heldout(part, {name: torch.cat(v) for name, v in errors.items()}, DiagonalGaussian(mean, logvar), condition)


def class_posteriors(heldout: Heldout, names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Where labelled held-out data's posteriors lie class by class: how much of the latent space each class takes.

    Arguments:
        heldout: with labels; unlabelled samples are left out.
        names: of the classes, by number.

    Returns:
        For each class that occurs, in their order: "class", "n", mean "mse", mean "kl_nats", "active_units", the latent
        dimensions whose posterior mean varies within the class, and "protocol". Nothing without labels, of a single
        class, and of more than `MOST_CLASSES`, which no reader compares.

    Example:
        >>> part, q = Part(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1])), torch.tensor([[0.0], [2.0], [1.0], [1.0]])
        >>> its = Heldout(part, {"mse": torch.zeros(4)}, DiagonalGaussian(q, torch.zeros(4, 1)))
        >>> [(row["class"], row["kl_nats"], row["active_units"]) for row in class_posteriors(its, ("a", "b"))]
        [('a', 1.0, 1), ('b', 0.5, 0)]
    """
    labels = heldout.part.labels
    known = [] if labels is None else [label for label in labels.unique().tolist() if label >= 0]
    if labels is None or not 1 < len(known) <= MOST_CLASSES:
        return []
    kl, found = heldout.posterior.kl(), []
    kind, how = _how(heldout)
    protocol = (
        f"n held-out {kind} of the class, {how}; squared error and KL: means over them; active units: latent "
        f"dimensions whose posterior mean varies by more than {posterior.ACTIVE_VARIANCE} over them"
    )
    for label in known:
        its = labels == label
        found.append(
            {
                "class": names[label] if label < len(names) else str(label),
                "n": int(its.sum()),
                "mse": float(heldout.mse[its].mean()),
                "kl_nats": float(kl[its].mean()),
                "active_units": posterior.active_units(heldout.posterior.mean[its]) if its.sum() > 1 else 0,
                "protocol": protocol,
            }
        )
    return found


def heldout_metrics(model: IntrospectiveVAE, heldout: Heldout, posteriors: bool = True) -> Metrics:
    """How well held-out data are reconstructed and, where the encoder gives them, how their posteriors lie."""
    n, images, (kind, how) = len(heldout.part), heldout.part.x.ndim == 4, _how(heldout)
    protocol = f"{n} held-out {kind}, {how}; mean and std over {kind}"
    notes = {"lpips": "; AlexNet, version 0.1, images under 64 pixels enlarged"}
    if images:
        sigma = reconstruction.ssim_sigma(min(heldout.part.x.shape[2:]))
        notes["ssim"] = f"; Gaussian window with sigma {sigma}, all pixels, mirrored border"
    values = dict(heldout.errors)
    if posteriors:
        values["kl_real_nats"] = heldout.posterior.kl()
    found = {name: entry(value.tolist(), n, protocol + notes.get(name, "")) for name, value in values.items()}
    if n > 1 and posteriors:
        found |= _posterior(model, heldout, kind)
    return found


def _how(heldout: Heldout) -> tuple[str, str]:
    """What is held out, images or vectors, and how the model was run on it."""
    kind, mode = ("images", "evaluation mode, ") if heldout.part.x.ndim == 4 else ("vectors", "")
    return kind, f"z = mode, {mode}saved weights"


def _posterior(model: IntrospectiveVAE, heldout: Heldout, kind: str) -> Metrics:
    n, (mean, logvar) = len(heldout.part), (heldout.posterior.mean, heldout.posterior.logvar)
    text = (
        f"of {model.latent_dim} latent dimensions, those whose posterior mean varies by more than "
        f"{posterior.ACTIVE_VARIANCE} over the held-out {kind}"
    )
    found = {"active_units": entry([posterior.active_units(mean)], n, text)}
    text = (
        f"{n} held-out {kind}: KL to the prior of the Gaussian with the moments of their posteriors' mean; an encoder "
        "that gives the prior for all of them has 0 too"
    )
    found["kl_aggregate_nats"] = entry([posterior.aggregate_kl_nats(mean, logvar)], n, text)
    return found
