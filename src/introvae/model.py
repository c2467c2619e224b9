"""The model: an ordinary variational autoencoder that knows nothing of its training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from introvae.classes import Classes
from introvae.errors import CheckpointError, ConfigError, DataError, first_line, positive
from introvae.files import write_atomically
from introvae.gaussian import DiagonalGaussian
from introvae.networks import build_network, network_for, settled_options
from introvae.networks.conditional import Conditional, build_conditional
from introvae.networks.style import Growing

FORMAT = 1
"""Version of the saved model's layout; `from_pretrained` refuses others."""


class IntrospectiveVAE(nn.Module):
    """An encoder and a decoder, and what one does with them.

    A class-conditional model has `classes`. Its methods take a `condition`, the class of each sample: int64 `[N]`, one
    index or name for all, or float `[N, K]`, a mixture's share of each of the K classes. Other models take none.

    Arguments:
        encoder: any module with `encoder(x) -> (mean, logvar)`, each `[N, Z]`; with classes, `encoder(x, condition)`.
        decoder: any module with `decoder(z) -> x`; with classes, `decoder(z, condition)`.
        latent_dim: Z.
        classes: that both networks are told of: their number, their names, or with frequencies (`Classes`).

    Raises:
        ConfigError: a latent dimension that is not above 0, fewer than two classes.

    Example:
        >>> model = IntrospectiveVAE.build(shape=(1, 28, 28), latent_dim=32, channels=[8, 16])
        >>> model.reconstruct(torch.rand(4, 1, 28, 28)).shape
        torch.Size([4, 1, 28, 28])
        >>> model.sample(2, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        classes: int | Sequence[str] | Classes | None = None,
    ) -> None:
        super().__init__()
        positive(latent_dim=latent_dim)
        self.encoder, self.decoder, self.latent_dim = encoder, decoder, latent_dim
        self.classes = None if classes is None else Classes.of(classes)
        self.config: dict[str, Any] | None = None
        self._side: int | None = None

    @classmethod
    def build(
        cls,
        shape: tuple[int, ...],
        network: str = "auto",
        latent_dim: int = 128,
        *,
        data: dict[str, Any] | None = None,
        classes: int | Sequence[str] | Classes | None = None,
        **options: Any,
    ) -> IntrospectiveVAE:
        """A new model from the name of its network.

        Arguments:
            shape: of one sample, (C, H, W) or (D,).
            network: a registered name, or "auto": conv for images, mlp for vectors.
            latent_dim: Z.
            data: facts about the data (name, value range) to be saved with the model.
            classes: for a class-conditional pair; see `introvae.networks.conditional`.
            options: the network's own settings, such as `channels=[32, 64]`.

        Raises:
            ConfigError: an unknown network or option, or a shape that the network cannot take.
        """
        name = network_for(tuple(shape)) if network == "auto" else network
        known = None if classes is None else Classes.of(classes)
        if known is None:
            encoder, decoder = build_network(name, tuple(shape), latent_dim, options)
        else:
            encoder, decoder = build_conditional(name, tuple(shape), latent_dim, len(known), options)
        model = cls(encoder, decoder, latent_dim, known)
        model.config = {
            "format": FORMAT,
            "network": name,
            "shape": list(shape),
            "latent_dim": latent_dim,
            "options": settled_options(name, options),
            "data": data or {},
        }
        if known is not None:
            model.config["classes"] = known.to_dict()
        return model

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Shape of one sample, at the level where `grow` put it, or None for a model that was not built from a name."""
        if self.config is None:
            return None
        channels, *sides = self.config["shape"]
        return (channels, *sides) if self._side is None else (channels, self._side, self._side)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def grow(self, side: int, alpha: Tensor | None = None) -> None:
        """Let networks that can (`networks.style.Growing`) work on images of `side` pixels from now on.

        A new or loaded model works on images of its full side; what is saved is the same at every level.

        Arguments:
            side, alpha: as in `Growing.grow`.

        Raises:
            ConfigError: the networks cannot grow, or have no such level.
        """
        for player in (self.encoder, self.decoder):
            network = player.network if isinstance(player, Conditional) else player
            if not isinstance(network, Growing):
                raise ConfigError(f"{type(network).__name__} cannot grow: take network style, or no growing")
            network.grow(side, alpha)
        self._side = side

    def condition_for(self, labels: Tensor | None, names: Sequence[str] = ()) -> Tensor | None:
        """The condition of labelled data, int64 `[N]`; None for a model without classes, which needs no labels.

        Arguments:
            labels, names: as in `Classes.indices`.

        Raises:
            DataError: a sample has no class, or one that the model does not know.
        """
        return None if self.classes is None else self.classes.indices(labels, names)

    def draw_condition(self, n: int, generator: torch.Generator | None = None) -> Tensor | None:
        """Classes of n samples, int64 `[n]`, drawn as often as they occur in the training data, from a CPU generator;
        None for a model without classes.
        """
        return None if self.classes is None else self.classes.draw(n, generator)

    def encode(self, x: Tensor, condition: Tensor | int | str | None = None) -> DiagonalGaussian:
        """The posterior q(z|x) of `x: [N, ...]`; its log-variance stays inside `gaussian.LOGVAR_RANGE`.

        Raises:
            DataError: x has another shape than the model was built for, or is not of a float type; the condition is not
                one class of each sample.
            ConfigError: a model with classes gets no condition, or one without gets one.
        """
        if not x.is_floating_point():
            raise DataError(f"the model takes floats, images in [0, 1], not {x.dtype}: divide uint8 images by 255")
        if self.shape is not None and tuple(x.shape[1:]) != self.shape:
            raise DataError(f"the model takes data of shape {self.shape}, not {tuple(x.shape[1:])}")
        return DiagonalGaussian.bounded(*self.encoder(x, *self._given(condition, x)))

    def decode(self, z: Tensor, condition: Tensor | int | str | None = None) -> Tensor:
        """The images or vectors of the latents `z: [N, Z]`.

        Raises:
            DataError, ConfigError: the condition, as in `encode`.
        """
        return self.decoder(z, *self._given(condition, z))

    def _given(self, condition: Tensor | int | str | None, x: Tensor) -> tuple[Tensor, ...]:
        """The condition of `x: [N, ...]` as the networks take it, if they do."""
        if self.classes is not None:
            return (self.classes.given(condition, len(x), x.device),)
        if condition is not None:
            raise ConfigError("the model knows no classes: leave the condition (or label) out")
        return ()

    def forward(self, x: Tensor, condition: Tensor | int | str | None = None) -> Tensor:
        """Same as `reconstruct`, with gradients."""
        return self.decode(self.encode(x, condition).mode, condition)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, condition: Tensor | int | str | None = None) -> Tensor:
        """What the decoder makes of the mode of each posterior; same shape as `x: [N, ...]`.

        Raises:
            DataError, ConfigError: as in `encode`.
        """
        return self(x, condition)

    @torch.no_grad()
    def sample(
        self, n: int, generator: torch.Generator | None = None, condition: Tensor | int | str | None = None
    ) -> Tensor:
        """Decode n draws from the prior N(0, I), `[n, ...]`.

        Arguments:
            n: number of samples.
            generator: a CPU generator, so that the same seed gives the same latents on every device.
            condition: their classes; where a model with classes gets none, they are drawn, as often as they occur in
                the training data.

        Raises:
            ConfigError: n is not above 0.
            DataError: the condition, as in `encode`.
        """
        positive(n=n)
        parameter = next(self.parameters())
        z = torch.randn(n, self.latent_dim, generator=generator, dtype=parameter.dtype)
        condition = self.draw_condition(n, generator) if condition is None else condition
        return self.decode(z.to(parameter.device), condition)

    @torch.no_grad()
    def interpolate(
        self,
        a: Tensor,
        b: Tensor,
        steps: int = 8,
        spherical: bool = False,
        condition: Tensor | int | str | None = None,
        end_condition: Tensor | int | str | None = None,
    ) -> Tensor:
        """Decode the way between the modes of `a` and `b`, both `[N, ...]`; `[N, steps, ...]`, ends included.

        Arguments:
            steps: number of points, at least 2.
            spherical: keep to the great circle and change the length linearly (Shoemake 1985).
            condition: classes of `a`.
            end_condition: classes of `b`, by default those of `a`; on the way they are mixed.

        Raises:
            ConfigError: fewer than two steps.
            DataError: the ends have different shapes, or not the model's; the condition, as in `encode`.
        """
        if steps < 2:
            raise ConfigError(f"steps is {steps}: give at least 2")
        if a.shape != b.shape:
            raise DataError(f"the ends have shapes {tuple(a.shape)} and {tuple(b.shape)}: give as many of each")
        end_condition = condition if end_condition is None else end_condition
        start, end = self.encode(a, condition).mode[:, None], self.encode(b, end_condition).mode[:, None]
        t = torch.linspace(0, 1, steps, dtype=start.dtype, device=start.device)[None, :, None]
        z = slerp(start, end, t) if spherical else torch.lerp(start, end, t)
        mixed = None
        if self.classes is not None:
            first, last = (self.classes.mixture(of, start)[:, None] for of in (condition, end_condition))
            mixed = torch.lerp(first, last, t).flatten(0, 1)
        return self.decode(z.flatten(0, 1), mixed).unflatten(0, (len(a), steps))

    def elbo(
        self,
        x: Tensor,
        *,
        beta_rec: float = 1.0,
        beta_kl: float = 1.0,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        condition: Tensor | int | str | None = None,
    ) -> Tensor:
        """-(beta_rec * squared error + beta_kl * KL) of each sample, `[N]`, with one draw of z; given its class, where
        the model has classes.

        Source: Soft-IntroVAE (2021), Eq. 1; the squared error stands for a Gaussian likelihood of variance 1/2
        without its constant.
        """
        posterior = self.encode(x, condition)
        error = squared_error(x, self.decode(posterior.sample(noise, generator), condition))
        return -(beta_rec * error + beta_kl * posterior.kl())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, each whole or not at all.

        Raises:
            ConfigError: the model was not built from a registered network's name.
        """
        from safetensors.torch import save

        if self.config is None:
            raise ConfigError(
                "only a model from IntrospectiveVAE.build can be saved whole: register your networks with "
                "register_network, or keep model.state_dict()"
            )
        folder = Path(folder)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_atomically(folder / "model.safetensors", save(tensors))
        write_atomically(folder / "config.json", (json.dumps(self.config, indent=2) + "\n").encode())

    @classmethod
    def from_config(cls, config: dict[str, Any], path: str = "config") -> IntrospectiveVAE:
        """A new model of the kind that `model.config` describes; its weights are drawn apart from all other draws.

        Raises:
            CheckpointError: it describes no known model; the message names `path`.
        """
        try:
            with torch.random.fork_rng(devices=[]):
                return cls.build(
                    tuple(config["shape"]),
                    config["network"],
                    config["latent_dim"],
                    data=config["data"],
                    classes=Classes.from_dict(config.get("classes")),
                    **config["options"],
                )
        except (ConfigError, KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise CheckpointError(
                f"{path} describes no known model ({error}): restore it from a copy, or register its network first"
            ) from error

    @classmethod
    def from_pretrained(cls, source: str | Path, revision: str | None = None) -> IntrospectiveVAE:
        """Load what `save_pretrained` wrote, in evaluation mode; no code of the source is run.

        Arguments:
            source: a folder, or a name on the Hugging Face hub ("owner/model").
            revision: branch, tag or commit on the hub.

        Raises:
            CheckpointError: a file is missing or cut, or keys or shapes differ from the network's.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = _fetch(source, revision)
        model = cls.from_config(_read_config(folder / "config.json"), str(folder / "config.json"))
        path = folder / "model.safetensors"
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): restore it from a copy or train again") from error
        check_state(tensors, model.state_dict(), str(path))
        model.load_state_dict(tensors)
        return model.eval()


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    """Squared error of each sample, `[N]`, summed over pixels and channels."""
    return (x - y).square().flatten(1).sum(dim=1)


def check_state(found: dict[str, Tensor], expected: dict[str, Tensor], path: str) -> None:
    """Raise `CheckpointError` naming what differs, unless both have the same names, shapes and types."""
    for problem, names in (("lacks", expected.keys() - found.keys()), ("has unknown", found.keys() - expected.keys())):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (" …" if len(names) > 3 else "")
            raise CheckpointError(
                f"{path} {problem} weights ({listed}): it belongs to another network, restore the right file"
            )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            raise CheckpointError(
                f"{path}: {name} is {found[name].dtype} {tuple(found[name].shape)}, the network has "
                f"{tensor.dtype} {tuple(tensor.shape)}: it belongs to another network, restore the right file"
            )


def _fetch(source: str | Path, revision: str | None) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    parts = str(source).split("/")
    if len(parts) != 2 or not all(parts) or folder.is_absolute() or str(source).startswith("."):
        raise CheckpointError(f"no model folder at {source}: give a folder with config.json, or owner/model on the hub")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        files = ["config.json", "model.safetensors"]
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=files))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = first_line(error)
        raise CheckpointError(f"no model folder at {source}, and the hub does not give it: {reason}") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): restore it from a copy") from error
    kinds = {"format": int, "network": str, "shape": list, "latent_dim": int, "options": dict, "data": dict}
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no model description: restore it from a copy")
    for key, kind in kinds.items():
        if not isinstance(config.get(key), kind):
            raise CheckpointError(f"{path}: {key!r} is missing or no {kind.__name__}: restore it from a copy")
    if config["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {config['format']}, this version reads {FORMAT}: use the version that wrote it"
        )
    return config


def slerp(start: Tensor, end: Tensor, t: Tensor) -> Tensor:
    """The way on the great circle between latents `[..., Z]`, with lengths that change linearly (Shoemake 1985)."""
    lengths = [v.norm(dim=-1, keepdim=True) for v in (start, end)]
    tiny = torch.finfo(start.dtype).tiny
    directions = [v / length.clamp(min=tiny) for v, length in zip((start, end), lengths, strict=True)]
    angle = (directions[0] * directions[1]).sum(dim=-1, keepdim=True).clamp(-1, 1).acos()
    sine = angle.sin()
    # (Nearly) parallel or opposite directions have no unique circle: go straight.
    safe = sine.clamp(min=1e-4)
    direction = (((1 - t) * angle).sin() * directions[0] + (t * angle).sin() * directions[1]) / safe
    return torch.where(sine < 1e-4, torch.lerp(start, end, t), torch.lerp(lengths[0], lengths[1], t) * direction)
