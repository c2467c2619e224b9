"""Directions of the latent space that mean something, found from two sets of samples, and samples moved along them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from introvae.apps.explore import Batch, Condition, decoded, latents
from introvae.errors import CheckpointError, ConfigError, DataError, one_of
from introvae.files import write_atomically
from introvae.model import IntrospectiveVAE

METHODS = ("mean", "classifier")


@dataclass(frozen=True)
class Direction:
    """A direction in one model's latent space.

    Arguments:
        vector: `[Z]`; strength 1 leads from the average sample without to the average sample with.
        method: how it was found.
        model: fingerprint of the model's weights; latent spaces of two models have nothing to do with each other.
        agreement: cosine between the directions of two halves of the samples: near 1, more of them would change little;
            None where a set has one sample.
    """

    vector: Tensor
    method: str
    model: str
    agreement: float | None = None

    def save(self, path: str | Path) -> Path:
        """Write a .safetensors file.

        Raises:
            ConfigError: the name ends otherwise, or cannot be written.
        """
        from safetensors.torch import save

        path = Path(path)
        if path.suffix != ".safetensors":
            raise ConfigError(f"a direction cannot be saved as {path}: give FILE.safetensors")
        facts = {"kind": "introvae direction", "method": self.method, "model": self.model}
        facts |= {"latent_dim": str(len(self.vector)), "agreement": str(self.agreement)}
        try:
            write_atomically(path, save({"direction": self.vector.contiguous()}, facts))
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error}): choose another file") from error
        return path

    @classmethod
    def load(cls, path: str | Path, model: IntrospectiveVAE) -> Direction:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file cannot be read, or its direction is another model's.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                facts, vector = file.metadata() or {}, file.get_tensor("direction")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read as a direction ({error}): make it anew") from error
        if vector.shape != (model.latent_dim,):
            raise CheckpointError(
                f"{path} is a direction in {vector.numel()} dimensions and the model has {model.latent_dim}: use the "
                "model that it was made with, or make it anew"
            )
        if facts.get("model") != _fingerprint(model):
            raise CheckpointError(
                f"{path} is a direction of another model, whose latent space is another: use that one, or make it anew"
            )
        known = facts.get("agreement", "None")
        return cls(vector, facts.get("method", ""), facts["model"], None if known == "None" else float(known))


def direction(
    model: IntrospectiveVAE,
    with_: Tensor | Iterable[Batch],
    without: Tensor | Iterable[Batch],
    method: str = "mean",
    condition: Condition = None,
    without_condition: Condition = None,
) -> Direction:
    """What two sets of samples differ in, as a direction in the latent space.

    "mean" is the difference of the mean latents, m. "classifier" is the part of m along n, the unit normal of a
    logistic regression between the two sets: n (n . m), the shortest way to where the classifier sees the average
    sample with. The mean is the default: the normal is made to decide, so that it leans towards dimensions that vary
    little and are no part of the difference (for two Gaussians of one covariance C it is along inverse(C) m), and
    leads to latents that no sample has. With fewer samples than dimensions it is mostly its regularisation. It helps
    where something else differs between the sets by chance and varies strongly.

    Arguments:
        with_, without: samples with and without what is to be changed, as in `latents`; alike in all else.
        method: "mean" or "classifier".
        condition, without_condition: classes of the two, where they are tensors.

    Raises:
        ConfigError: an unknown method.
        DataError: the two sets have the same mean latents.

    Source: Larsen et al. 2016 (VAE/GAN), Sec. 4.2, for the difference of means; Shen et al. 2020 (InterFaceGAN) for the
    normal of a linear classifier; Haufe et al. 2014 for what such a normal does not show.

    Example:
        >>> model = IntrospectiveVAE.build((2,), "tiny-mlp", latent_dim=3)
        >>> direction(model, torch.randn(9, 2) + 2, torch.randn(9, 2)).vector.shape
        torch.Size([3])
    """
    one_of(METHODS, method=method)
    sets = (latents(model, with_, condition), latents(model, without, without_condition))
    vector = _difference(*sets, method)
    if not bool(vector.abs().max() > 0):
        raise DataError("both sets have the same mean latents, so there is no direction: give sets that differ")
    agreement = None
    if min(map(len, sets)) > 1:
        halves = [_difference(sets[0][half::2], sets[1][half::2], method) for half in (0, 1)]
        agreement = float(torch.nn.functional.cosine_similarity(halves[0], halves[1], dim=0))
    return Direction(vector.float(), method, _fingerprint(model), agreement)


def edit(
    model: IntrospectiveVAE,
    x: Tensor,
    direction: Direction | Tensor,
    strengths: Sequence[float],
    condition: Condition = None,
) -> Tensor:
    """Samples moved along a direction of the latent space and decoded, `[N, S, ...]`; strength 0 reconstructs.

    Arguments:
        x: `[N, ...]`.
        direction: from `direction`, or any vector `[Z]`.
        strengths: S factors; negative ones take away.
        condition: classes of x.

    Raises:
        ConfigError: no strengths, or a direction of another latent space.

    Example:
        >>> model = IntrospectiveVAE.build((1, 8, 8), "tiny-conv", latent_dim=4)
        >>> edit(model, torch.rand(2, 1, 8, 8), torch.ones(4), [-1, 0, 1]).shape
        torch.Size([2, 3, 1, 8, 8])
    """
    vector = direction.vector if isinstance(direction, Direction) else direction
    if vector.shape != (model.latent_dim,):
        raise ConfigError(f"the direction has shape {tuple(vector.shape)}: give one of ({model.latent_dim},)")
    if isinstance(direction, Direction) and direction.model != _fingerprint(model):
        raise ConfigError("the direction is another model's, whose latent space is another: make it anew")
    if not strengths:
        raise ConfigError("there are no strengths: give at least one")
    z = latents(model, x, condition)
    moved = z[:, None] + torch.tensor(list(strengths), dtype=z.dtype)[:, None] * vector.to(z)
    given = None if model.classes is None else model.classes.given(condition, len(x))
    of = None if given is None else given.repeat_interleave(len(strengths), dim=0)
    return decoded(model, moved.flatten(0, 1), of).unflatten(0, (len(x), len(strengths)))


def _difference(with_: Tensor, without: Tensor, method: str) -> Tensor:
    difference = with_.double().mean(dim=0) - without.double().mean(dim=0)
    if method == "mean" or not bool(difference.abs().max() > 0):
        return difference
    from sklearn.linear_model import LogisticRegression

    x = torch.cat([with_, without]).double()
    y = torch.arange(len(x)) < len(with_)
    fitted = LogisticRegression(class_weight="balanced", max_iter=10_000).fit(x.numpy(), y.numpy())
    normal = torch.nn.functional.normalize(torch.from_numpy(fitted.coef_[0]), dim=0)
    return normal * (normal @ difference)


def _fingerprint(model: IntrospectiveVAE) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
