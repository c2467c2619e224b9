"""The same model in training mode or with its raw weights, measured on the same data and latents as the saved one."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from introvae.data import ArrayData, Density
from introvae.errors import ConfigError, DataError
from introvae.measures.heldout import Heldout, look_at_heldout
from introvae.measures.sets import NEIGHBOURS, SURE, Sets, decoded, small
from introvae.metrics import classifier, histogram, kernel
from introvae.metrics.collect import Collected, Wanted, collect
from introvae.metrics.frechet import frechet_distance
from introvae.metrics.manifold import DENSITY_NEIGHBOUR, NEIGHBOUR, Manifold, neighbourhoods
from introvae.metrics.posterior import active_units, aggregate_kl_nats
from introvae.model import IntrospectiveVAE

Values = dict[str, float]

NOT_FINITE, NO_WEIGHTS = "not finite", "no checkpoint with these weights"
"""What stands in a variant's place that could not be measured."""
AROUND_ZERO = ("kid_", "class_distance_", "energy_distance")
"""How the metrics begin that good samples have near 0 (or below): a difference as a share of that says nothing."""
ENERGY_POINTS = 2000
"""Of points in the plane, so many go into an energy distance."""


class Yardstick(Protocol):
    """What variants of a model are measured by: `saved` holds the saved model's values, `protocol` how."""

    @property
    def n(self) -> int: ...

    @property
    def protocol(self) -> str: ...

    @property
    def saved(self) -> Values: ...

    def measure(self, model: IntrospectiveVAE, batch: int) -> Values: ...


@dataclass(frozen=True)
class SetYardstick:
    """Held-out images or rows, and samples of fixed latents.

    Arguments:
        data: where the held-out part comes from.
        sets: what was found of the saved model's samples, and of the real data.
        heldout: what was found of its reconstructions; None where its encoder is none.
        posteriors: whether the encoder gives them.
    """

    data: ArrayData
    sets: Sets
    heldout: Heldout | None
    posteriors: bool = True

    @property
    def n(self) -> int:
        """So many held-out samples, and so many draws."""
        return self.sets.compared

    @property
    def protocol(self) -> str:
        """How it is measured."""
        held = "" if self.heldout is None else f"{self.n} held-out samples, z = mode, and "
        text = f"{held}{self.n} latents, the same ones as for the saved model"
        if fully := [name for name, (_, fully) in self.sets.spaces.items() if fully]:
            train = min(kernel.SUBSET, len(self.sets.train.spaces[fully[0]].features))
            text += f"; KID against {train} training images, precision to coverage against {self.n} held-out ones"
        if judges := list(self.sets.judges):
            heldout = len(torch.cat(self.sets.heldout.spaces[judges[0]].classes))
            text += f"; shares of classes against {heldout} held-out images"
        return text + (f"; MS-SSIM of {self.pairs} pairs of samples" if self.pairs else "")

    @property
    def pairs(self) -> int:
        """So many pairs of the samples are compared by MS-SSIM."""
        return sum(map(len, self.sets.early.alike))

    @property
    def saved(self) -> Values:
        """The saved model's values; nothing is computed anew but means and distances."""
        return self._values(self.heldout, self.sets.rows[: self.n], self.sets.early)

    def measure(self, model: IntrospectiveVAE, batch: int) -> Values:
        """Another model's values."""
        found = None
        if self.heldout is not None:
            found = look_at_heldout(model, self.data, part=self.sets.unseen[slice(self.n)], batch=batch)
        wanted = [Wanted(space, self.n, self.n if fully else 0) for space, fully in self.sets.spaces.values()]
        read = decoded(model, self.sets.latents, self.sets.condition)
        samples = collect(read, wanted, self.n, batch=batch, pairs=self.pairs)
        return self._values(found, torch.arange(self.n), samples)

    def _values(self, heldout: Heldout | None, rows: Tensor, samples: Collected) -> Values:
        values: Values = {}
        if heldout is not None:
            values = {name: e[rows].mean().item() for name, e in heldout.errors.items() if name != "lpips"}
            if self.posteriors:
                mean, logvar = heldout.posterior.mean[rows], heldout.posterior.logvar[rows]
                values["kl_real_nats"] = heldout.posterior.kl()[rows].mean().item()
                values["active_units"] = float(active_units(mean))
                values["kl_aggregate_nats"] = aggregate_kl_nats(mean, logvar)
        if samples.alike:
            values["msssim_pairs"] = torch.cat(samples.alike).mean().item()
        for name, (space, fully) in self.sets.spaces.items():
            ours, real = samples.spaces[name], self.sets.train.spaces[name]
            assert ours.sums is not None
            assert real.sums is not None
            values[f"frechet_{name}"] = frechet_distance(ours.sums, real.sums)
            if fully:
                values |= self._by_features(name, ours.features[: self.n].to(self.sets.device))
            if space.judge is not None and name in self.sets.judges:
                k = len(space.judge.classes)
                shares, wanted = ours.shares(k), self.sets.heldout.spaces[name].shares(k)
                values[f"confident_share_{name}"] = ours.confident(SURE)
                values[f"class_entropy_nats_{name}"] = classifier.entropy_nats(shares)
                values[f"class_distance_{name}"] = float((shares - wanted).abs().sum() / 2)
        return values

    def _by_features(self, name: str, ours: Tensor) -> Values:
        """What the features themselves tell, and not their mean and covariance alone."""
        train, unseen, _ = self.sets.features(name)
        unseen = unseen[: self.n]
        values = {f"kid_{name}": kernel.polynomial_mmd(ours, train[: kernel.SUBSET])}
        if min(len(ours), len(unseen)) > DENSITY_NEIGHBOUR and not (name == "pixels" and small(self.data)):
            real = Manifold(unseen, [NEIGHBOUR, DENSITY_NEIGHBOUR])
            found = neighbourhoods(real, Manifold(ours, [NEIGHBOUR]))
            values |= {f"{metric}_{name}": getattr(found, metric) for metric in NEIGHBOURS}
        return values


class PlaneYardstick:
    """Points of a density, and samples of fixed latents.

    Arguments:
        model: the saved one.
        density: where the real points come from.
        n: real points, and samples.
        seed: of both.
    """

    def __init__(self, model: IntrospectiveVAE, density: Density, n: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.n, self.density = n, density
        self.real = density.sample(n, generator)
        self.latents = torch.randn(n, model.latent_dim, generator=generator)
        self.condition = model.draw_condition(n, generator)
        self.protocol = (
            f"{n} real points and samples of {n} latents, the same ones as for the saved model, one draw; KL and JSD "
            f"as soft_introvae, energy distance of the first {min(n, ENERGY_POINTS)}"
        )
        self.saved = self.measure(model, n)

    @torch.no_grad()
    def measure(self, model: IntrospectiveVAE, batch: int) -> Values:
        """A model's values."""
        read = decoded(model, self.latents, self.condition)
        fake = torch.cat([read(start, start + batch).cpu() for start in range(0, self.n, batch)])
        kl, jsd = histogram.soft_introvae_kl_jsd(self.real, fake, self.density.extent)
        distance = histogram.energy_distance(self.real[:ENERGY_POINTS], fake[:ENERGY_POINTS])
        values = {"kl_soft_introvae": kl, "jsd_soft_introvae": jsd, "energy_distance": distance}
        if self.density.modes is not None and self.density.sigma is not None:
            found, near = histogram.mode_coverage(fake, self.density.modes, self.density.sigma)
            values |= {"modes": float(found), "share_within_3_sigma": near}
        return values


def measure_variants(
    model: IntrospectiveVAE, yardstick: Yardstick, raw: Mapping[str, Tensor] | None, batch: int, seed: int = 0
) -> dict[str, Any]:
    """The main metrics of the saved model in training mode, and of the weights that were not averaged.

    The saved model itself is left as it is: what running statistics a pass in training mode would change are a copy's.

    Arguments:
        model: the saved one, in evaluation mode.
        yardstick: what was found of it.
        raw: the weights at the end of the training, where they are known.
        batch: of the training: in training mode, a batch normalisation takes its statistics from so many.
        seed: of what is random in training mode, such as a dropout.

    Returns:
        {variant: {metric: {"value", "saved", "gap", "n", "protocol"}}}; "saved" is the saved model's value on the same
        data and latents, "gap" the difference as a share of it (but of `AROUND_ZERO`). In the place of a variant that
        makes values that are not finite, or of raw weights that are not known, a text says so.
    """
    while yardstick.n > 1 and yardstick.n % batch == 1:
        batch += 1  # a last batch of one has no statistics
    found: dict[str, Any] = {}
    for name, weights, training in (("training mode", None, True), ("raw weights", raw, False)):
        if name == "raw weights" and raw is None:
            found[name] = NO_WEIGHTS
            continue
        variant = copy.deepcopy(model)
        if weights is not None:
            variant.load_state_dict(dict(weights))
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            try:
                values = yardstick.measure(variant.train(training), batch)
            except (ConfigError, DataError):  # the first: posteriors whose spread is not finite
                values = {}
        if not values or not all(math.isfinite(value) for value in values.values()):
            found[name] = NOT_FINITE
            continue
        size = min(batch, yardstick.n)
        how = f"saved weights in training mode, batches of {size}" if training else "last weights, evaluation mode"
        found[name] = {
            metric: _entry(metric, values[metric], saved, yardstick.n, f"{how}; {yardstick.protocol}")
            for metric, saved in yardstick.saved.items()
        }
    return found


def _entry(metric: str, value: float, saved: float, n: int, protocol: str) -> dict[str, Any]:
    gap = {"gap": (value - saved) / abs(saved)} if saved and not metric.startswith(AROUND_ZERO) else {}
    return {"value": value, "saved": saved, **gap, "n": n, "protocol": protocol}
