"""Pairs of encoder and decoder, built from a name."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

from introvae.errors import ConfigError, first_line, positive, unknown
from introvae.networks.blocks import use_gradient_checkpointing
from introvae.networks.conv import build_conv
from introvae.networks.dcgan import build_dcgan
from introvae.networks.disentangled import build_disentangled
from introvae.networks.mlp import build_mlp
from introvae.networks.residual import build_residual
from introvae.networks.style import build_style

__all__ = [
    "build_network",
    "import_network",
    "list_networks",
    "network_for",
    "register_network",
    "settled_options",
    "use_gradient_checkpointing",
]

Builder = Callable[..., tuple[nn.Module, nn.Module]]

_NETWORKS: dict[str, Builder] = {
    "mlp": build_mlp,
    "conv": build_conv,
    "residual": build_residual,
    "dcgan": build_dcgan,
    "style": build_style,
    "disentangled": build_disentangled,
    # For tests: every path in seconds.
    "tiny-mlp": partial(build_mlp, hidden=16, depth=2),
    "tiny-conv": partial(build_conv, channels=(4,)),
    "tiny-residual": partial(build_residual, width=1 / 16),
    "tiny-dcgan": partial(build_dcgan, channels=(4,), hidden=16, depth=1),
    "tiny-disentangled": partial(build_disentangled, channels=(4,), hidden=8),
    "tiny-style": partial(build_style, width=1 / 128, style_dim=8, mapping=2),
}
SHIPPED = frozenset(_NETWORKS)
"""Names that every program knows; whoever uses another one registers it first."""


def list_networks() -> list[str]:
    """Names of all registered networks.

    Example:
        >>> list_networks()[:2]
        ['mlp', 'conv']
    """
    return list(_NETWORKS)


def register_network(name: str, builder: Builder) -> None:
    """Make `builder(shape, latent_dim, **options) -> (encoder, decoder)` known under `name`.

    A model that is built from a registered name can be saved and loaded; any other pair of modules works for training.

    Arguments:
        name: for `--network` and `IntrospectiveVAE.build`.
        builder: called with the shape of one sample and Z; its keyword-only parameters are the network's options. The
            encoder takes `[N, *shape]` and gives mean and log-variance, each `[N, Z]`; the decoder goes back.

    Raises:
        ConfigError: the name is taken.
    """
    if name in _NETWORKS:
        raise ConfigError(f"a network named {name!r} is registered already: choose another name")
    _NETWORKS[name] = builder


def import_network(path: str) -> None:
    """Register a builder under its import path, "module.function", unless it is known; other names are left alone.

    Only settings that somebody gives name networks so. `IntrospectiveVAE.from_pretrained` imports nothing: it knows
    such a network once the settings of its run are read, or `register_network` was called.

    Raises:
        ConfigError: it cannot be imported, or is no builder: its first parameters are to be `shape` and `latent_dim`.

    Example:
        >>> import_network("introvae.networks.conv.build_conv")
        >>> "introvae.networks.conv.build_conv" in list_networks()
        True
    """
    module, _, name = path.rpartition(".")
    if path in _NETWORKS or not module:
        return
    try:
        builder = getattr(import_module(module), name)
        first = list(inspect.signature(builder).parameters)[:2]
    except Exception as error:  # whatever a user's module does
        raise ConfigError(
            f"network {path!r} cannot be imported ({type(error).__name__}: {first_line(error)}): give "
            "MODULE.FUNCTION of a module that Python finds, such as by PYTHONPATH"
        ) from error
    if first != ["shape", "latent_dim"]:
        raise ConfigError(f"{path} is no builder of networks: its first parameters must be shape and latent_dim")
    register_network(path, builder)


def network_for(shape: tuple[int, ...]) -> str:
    """The network that "auto" stands for: conv for images, mlp for vectors."""
    return "conv" if len(shape) == 3 else "mlp"


def build_network(
    name: str, shape: tuple[int, ...], latent_dim: int, options: dict[str, Any] | None = None
) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of the network `name` for data of `shape`.

    Arguments:
        name: one of `list_networks()`.
        shape: of one sample, (C, H, W) or (D,).
        latent_dim: Z.
        options: the builder's own settings, such as {"channels": [32, 64]}.

    Raises:
        ConfigError: an unknown name or option, or a shape that the network cannot take.

    Example:
        >>> import torch
        >>> encoder, decoder = build_network("conv", (1, 28, 28), latent_dim=32, options={"channels": [8, 16]})
        >>> decoder(encoder(torch.rand(2, 1, 28, 28))[0]).shape
        torch.Size([2, 1, 28, 28])
    """
    if name not in _NETWORKS:
        raise unknown("network", name, list_networks())
    positive(latent_dim=latent_dim)
    builder, options = _NETWORKS[name], dict(options or {})
    parameters = inspect.signature(builder).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        for option in options:
            if option not in known:
                raise unknown(f"option of network {name!r}", option, known)
    try:
        return builder(tuple(shape), latent_dim, **options)
    except TypeError as error:
        raise ConfigError(
            f"the options {options} of network {name!r} have values of a wrong kind: give numbers, such as "
            "channels: [32, 64]"
        ) from error


def settled_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a network with those that were not given, as today's defaults have them, ready for JSON.

    A saved model keeps these, so that it loads as it was when a later version has other defaults.

    Arguments:
        name: one of `list_networks()`.
        options: those that were given. Of the others, what JSON does not know is left out.

    Example:
        >>> settled_options("mlp", {"hidden": 32})["depth"] == build_mlp.__kwdefaults__["depth"]
        True
    """
    settled = json.loads(json.dumps(options))
    for parameter in inspect.signature(_NETWORKS[name]).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name not in options:
            with suppress(TypeError, ValueError):  # a default of a user's builder may be anything, or missing
                settled[parameter.name] = json.loads(json.dumps(parameter.default))
    return settled
