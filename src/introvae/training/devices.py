"""What the steps run on: the device, a compiler for it, batch statistics over processes."""

from __future__ import annotations

import logging

import torch
from torch import nn

from introvae.errors import ConfigError, first_line
from introvae.model import IntrospectiveVAE
from introvae.parallel import Alone

log = logging.getLogger("introvae")


def share_statistics(model: IntrospectiveVAE, peers: Alone) -> None:
    """Let batch normalisations, where the model has any, see the samples of all processes.

    Raises:
        ConfigError: on the CPU, where torch has none that do.
    """
    batch_norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if peers.count == 1 or not batch_norms:
        return
    if model.device.type != "cuda":
        raise ConfigError("norm 'batch' sees one process' samples only on the CPU: take --network_options.norm pixel")
    model.encoder = nn.SyncBatchNorm.convert_sync_batchnorm(model.encoder)
    model.decoder = nn.SyncBatchNorm.convert_sync_batchnorm(model.decoder)


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile has a compiler for the device; where not, it is said.

    What it finds that it cannot compile runs as it is.
    """
    said = logging.getLogger("torch._inductor")
    before = said.level
    said.setLevel(logging.CRITICAL)
    try:
        torch.compile(lambda x: x.relu() + 1)(torch.ones(8, device=device))
    except Exception as error:  # it has no common base of errors
        reason = first_line(error)
        log.info("no compiler (%s): training goes on without; install a C++ compiler for --compile inductor", reason)
        return False
    finally:
        said.setLevel(before)
    torch._dynamo.config.suppress_errors = True
    return True


def pick_device(name: str) -> torch.device:
    """The device that "auto" or a name stands for.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)
        raise ConfigError(f"device {name!r} cannot be used ({reason}): choose auto or cpu") from error
    return device
