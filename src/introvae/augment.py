"""Differentiable augmentation: what keeps a critic from learning a small set of images by heart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from introvae.errors import ConfigError, DataError, unknown

__all__ = ["Augmentation", "color", "cutout", "list_policies", "translation"]

BRIGHTNESS = 0.25
"""Largest change of brightness: the paper's 0.5 for values in [-1, 1], here for values in [0, 1]."""
GREY = 0.5
"""What comes in from outside and fills the cut: the paper's 0 for values in [-1, 1]."""
SHIFT, CUT = 1 / 8, 1 / 2
"""Largest shift, and side of the square that is cut out, as shares of the image's side."""
DRAWS = 8
"""Uniform draws that an image takes, whatever the policy: three for color, two each for translation and cutout, and
whether the image is changed at all."""


@dataclass(frozen=True)
class Augmentation:
    """A random change of images that gradients pass: T(x; u) is a function of the images and of uniform draws u alone.

    A GAN with few images overfits in its discriminator. If every image that it judges, real or fake, goes through the
    same random T, then it learns the distribution of T(x), and since gradients reach the generator through T, the
    generator learns images G(z) whose T(G(z)) look so, not augmented images. Changing real images alone would make
    the generator imitate the changes.

    **In an introspective VAE** the encoder is the critic and also the inference network, and real images are
    reconstructed. The sound place for T is between the decoder and everything that looks at its images:

    - x' = T(x; u) is encoded, with draws u of its own for each real image;
    - its reconstruction is compared as ||x' - T(D(z); u)||^2, with the *same* u;
    - fakes are judged as T(D(z); u) (reconstructions) and T(D(z_p); v) (samples), in both phases, and what is decoded
      of *their* latents goes through the same draws as they did.

    So the objective sees an ordinary introspective VAE of the images T(x) whose decoder is T after D, and its losses
    stay as in the papers. D itself makes clean images: D(z) = x gives the least error for every u. Two other placements
    look simpler and are not sound. Reconstructing x' by D(z) itself, with T only before the judge, asks D for augmented
    images, and samples then show shifts, holes and strange colours (the leak that the GAN does not have, since nothing
    is compared with real images there). Reconstructing x from E(x') makes a denoising model, in which no latent needs
    to tell what was cut out, so that clean images are reconstructed less exactly.

    What leaks all the same: where u can be seen in x' (the grey border of a shift), the posterior may encode it, which
    costs KL and says nothing about x. And the encoder must know images as they are, since these are what it is used
    for: `probability` leaves a share unchanged. That share also keeps T invertible as a map of distributions, without
    which even a GAN may leak: Karras et al. (2020) saw none as long as at least a fifth of the images came unchanged.
    The paper's own setting is 1.

    Arguments:
        policy: names with commas between, applied in this order: color, translation, cutout. "" changes nothing.
        probability: share of the images that are changed, each with all of the policy.

    Raises:
        ConfigError: an unknown name, something else than text, or a probability outside of [0, 1].

    Source: Zhao et al. (2020), Differentiable Augmentation for Data-Efficient GAN Training, Sec. 3 and 4; Karras et al.
        (2020), Training Generative Adversarial Networks with Limited Data, Sec. 2.2.

    Example:
        >>> augment = Augmentation("color,translation,cutout")
        >>> u = augment.draw(4, torch.Generator().manual_seed(0))
        >>> augment(torch.rand(4, 3, 16, 16), u).shape
        torch.Size([4, 3, 16, 16])
    """

    policy: str = "color,translation,cutout"
    probability: float = 0.8

    def __post_init__(self) -> None:
        if not isinstance(self.policy, str):
            raise ConfigError(f"the augmentation is {self.policy!r}: give names, such as 'color,translation'")
        for name in self.names:
            if name not in POLICIES:
                raise unknown("augmentation", name, list_policies())
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"the probability of augmentation is {self.probability}: give a share in [0, 1]")

    @property
    def names(self) -> tuple[str, ...]:
        """The policy's parts, in order."""
        return tuple(name.strip() for name in self.policy.split(",") if name.strip())

    @staticmethod
    def draw(
        n: int,
        generator: torch.Generator | None = None,
        kinds: int | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Uniform draws in [0, 1) for n images, `[n, 8]`, or for n samples with several kinds of images each,
        `[n, kinds, 8]`: row i is sample i's, so that a batch can be shared out. A CPU `generator` gives the same draws
        on every `device`.
        """
        shape = (n, DRAWS) if kinds is None else (n, kinds, DRAWS)
        source = device if generator is None else generator.device
        return torch.rand(shape, generator=generator, device=source).to(device)

    def __call__(self, x: Tensor, draws: Tensor) -> Tensor:
        """T(x; u).

        Arguments:
            x: images `[N, C, H, W]` in [0, 1]; the result may leave that range by color.
            draws: `[N, 8]`, from `draw`.

        Raises:
            DataError: x are no images, or the draws are not as many.
        """
        if x.ndim != 4:
            raise DataError(f"augmentation changes images [N, C, H, W], not {tuple(x.shape)}: leave it out")
        if draws.shape != (len(x), DRAWS):
            raise DataError(f"{len(x)} images need draws [{len(x)}, {DRAWS}], not {tuple(draws.shape)}: see draw")
        if not self.names or self.probability == 0:
            return x
        changed = x
        for name in self.names:
            columns, function = POLICIES[name]
            changed = function(changed, draws[:, columns])
        if self.probability == 1:
            return changed
        return torch.where(_each(draws[:, DRAWS - 1] < self.probability), changed, x)


def color(x: Tensor, u: Tensor) -> Tensor:
    """Brightness, then saturation, then contrast.

    Each is an affine map: a shift by up to 0.25; the distance to the pixel's mean over the channels times 0 ... 2; the
    distance to the image's mean times 0.5 ... 1.5.

    Arguments:
        x: `[N, C, H, W]`.
        u: `[N, 3]`, uniform in [0, 1).
    """
    brightness, saturation, contrast = (_each(column) for column in u.to(x.dtype).unbind(1))
    x = x + BRIGHTNESS * (2 * brightness - 1)
    grey = x.mean(dim=1, keepdim=True)
    x = grey + 2 * saturation * (x - grey)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (0.5 + contrast) * (x - mean)


def translation(x: Tensor, u: Tensor) -> Tensor:
    """A shift by whole pixels, up to an eighth of each side either way; grey comes in.

    Arguments:
        x: `[N, C, H, W]`.
        u: `[N, 2]`, uniform in [0, 1).
    """
    inside, places = [], []
    for size, draw in zip(x.shape[2:], u.unbind(1), strict=True):
        most = round_half_up(SHIFT * size)
        shift = _whole(draw, 2 * most + 1) - most
        place = torch.arange(size, device=x.device) - shift[:, None]
        inside.append((place >= 0) & (place < size))
        places.append(place.clamp(0, size - 1))
    moved = x.gather(2, places[0][:, None, :, None].expand_as(x))
    moved = moved.gather(3, places[1][:, None, None, :].expand_as(x))
    return torch.where(inside[0][:, None, :, None] & inside[1][:, None, None, :], moved, GREY)


def cutout(x: Tensor, u: Tensor) -> Tensor:
    """A grey rectangle, half as high and as wide as the image, whose centre is anywhere in it.

    Arguments:
        x: `[N, C, H, W]`.
        u: `[N, 2]`, uniform in [0, 1).
    """
    inside = []
    for size, draw in zip(x.shape[2:], u.unbind(1), strict=True):
        side = round_half_up(CUT * size)
        # An even side has its centre between pixels: one place more than there are pixels.
        first = _whole(draw, size + 1 - side % 2) - side // 2
        place = torch.arange(size, device=x.device) - first[:, None]
        inside.append((place >= 0) & (place < side))
    return torch.where(inside[0][:, None, :, None] & inside[1][:, None, None, :], GREY, x)


POLICIES: dict[str, tuple[slice, Callable[[Tensor, Tensor], Tensor]]] = {
    "color": (slice(0, 3), color),
    "translation": (slice(3, 5), translation),
    "cutout": (slice(5, 7), cutout),
}


def list_policies() -> list[str]:
    """Names that a policy is made of.

    Example:
        >>> list_policies()
        ['color', 'translation', 'cutout']
    """
    return list(POLICIES)


def round_half_up(value: float) -> int:
    """The nearest whole number; of two the larger."""
    return int(value + 0.5)


def _each(column: Tensor) -> Tensor:
    """One number an image, `[N]`, to go with `[N, C, H, W]`."""
    return column[:, None, None, None]


def _whole(u: Tensor, count: int) -> Tensor:
    """Uniform whole numbers below `count`."""
    return (u * count).long().clamp_(max=count - 1)  # u may be 1 after rounding to fewer digits
