"""Two networks that train against each other: their optimisers, their noise, and what a checkpoint keeps of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from introvae.augment import Augmentation
from introvae.errors import CheckpointError, ConfigError, DataError, one_of, positive, whole
from introvae.model import IntrospectiveVAE
from introvae.objectives import Objective, Values, Warmup
from introvae.parallel import Alone

ACCUMULATE_NOT = "its gradients are no mean over parts, take accumulation 1"


class Noise(NamedTuple):
    """All random draws of one step: standard normal ones, and uniform ones for augmentation.

    Arguments:
        real: `[N, Z]`, for z ~ q(z|x).
        prior: `[N, Z]`, the latents z_p of the samples.
        fakes: `[2N, Z]`, for the fakes' latents (reconstructions, then samples) in the encoder's phase.
        again: `[2N, Z]`, for the fakes' latents in the decoder's phase.
        augment: `[N, 2, 8]`, uniform in [0, 1), for the augmentation of each real image with its reconstruction, and of
            each sample; None where there is none.

    Example:
        >>> Noise.draw(8, latent_dim=2).fakes.shape
        torch.Size([16, 2])
    """

    real: Tensor
    prior: Tensor
    fakes: Tensor
    again: Tensor
    augment: Tensor | None = None

    @classmethod
    def draw(
        cls,
        n: int,
        latent_dim: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        augment: bool = False,
    ) -> Noise:
        """Draw the noise for a batch of n; a CPU `generator` gives the same draws on every `device`.

        The draws for augmentation, where they are asked for, come after the others and leave them as they are.
        """
        source = device if generator is None else generator.device
        draws = torch.randn(6 * n, latent_dim, generator=generator, device=source, dtype=dtype).to(device)
        uniform = Augmentation.draw(n, generator, kinds=2, device=device) if augment else None
        return cls(draws[:n], draws[n : 2 * n], draws[2 * n : 4 * n], draws[4 * n :], uniform)

    def rows(self, rows: slice) -> Noise:
        """The noise of some samples of the batch: what they get does not depend on how the batch is shared out."""

        def of_both(pair: Tensor) -> Tensor:
            return torch.cat([half[rows] for half in pair.chunk(2)])

        augment = None if self.augment is None else self.augment[rows]
        return Noise(self.real[rows], self.prior[rows], of_both(self.fakes), of_both(self.again), augment)

    def map(self, function: Callable[[Tensor], Tensor]) -> Noise:
        """The noise with the same done to all draws that there are, such as moving them to a device."""
        return self._replace(**{name: function(draws) for name, draws in self._asdict().items() if draws is not None})


Part = tuple[Tensor, Noise, Tensor | None]
"""Samples, their noise and their condition: a batch, or some of one."""


class Players:
    """Base of all updates: an encoder and a decoder, each with an Adam of its own.

    A child adds `__call__(x, noise, values, *, warming, gradients, condition)`, which updates both and returns detached
    scalars.

    Arguments:
        model: the networks; trained in place.
        objective: what each player wants.
        warmup: the loss of the VAE steps (`warming=True`).
        lr: Adam's rate of both players.
        adam_betas: Adam's decay rates.
        precision: "bf16" lets the networks' layers compute in bf16 (autocast); weights, posteriors, latents, decoded
            images, losses and Adam's moments stay float32. "float32" (and "tf32") leave all as it is.
        peers: the processes that share each batch; gradients are averaged over them.
        accumulation: parts in which a batch goes through each phase, for less memory.
        capturable: keep the rate and Adam's counts on the GPU, for `CapturedStep`.
        augment: changes every image that is encoded or compared, real and decoded alike (see `Augmentation`).

    Raises:
        ConfigError: a rate that is not above 0, an unknown precision, accumulation for an objective that compares the
            samples of a batch.
    """

    def __init__(
        self,
        model: IntrospectiveVAE,
        objective: Objective,
        *,
        warmup: Warmup | None = None,
        lr: float = 2e-4,
        adam_betas: tuple[float, float] = (0.9, 0.999),
        precision: str = "float32",
        peers: Alone | None = None,
        accumulation: int = 1,
        capturable: bool = False,
        augment: Augmentation | None = None,
    ) -> None:
        positive(lr=lr, accumulation=accumulation)
        whole(accumulation=accumulation)
        if accumulation > 1 and objective.batch_coupled:
            raise ConfigError(f"{type(objective).__name__} compares the samples of a batch: {ACCUMULATE_NOT}")
        one_of(("float32", "tf32", "bf16"), precision=precision)
        self.model, self.objective, self.warmup = model, objective, warmup or Warmup()
        self.precision, self.peers, self.accumulation = precision, peers or Alone(), accumulation
        self.capturable, self._lr, self.augment = capturable, lr, augment
        self.encoder_params = [p for p in model.encoder.parameters() if p.requires_grad]
        self.decoder_params = [p for p in model.decoder.parameters() if p.requires_grad]
        self.encoder_optimizer = self._adam(self.encoder_params, lr, adam_betas)
        self.decoder_optimizer = self._adam(self.decoder_params, lr, adam_betas)

    def _adam(self, params: list[nn.Parameter], lr: float, betas: tuple[float, float]) -> torch.optim.Adam:
        rate = torch.tensor(lr, device=params[0].device) if self.capturable else lr
        return torch.optim.Adam(params, lr=rate, betas=betas, fused=True, capturable=self.capturable)

    def _parts(self, x: Tensor, noise: Noise, condition: Tensor | None) -> list[Part]:
        """The micro-batches of a batch."""
        if self.accumulation == 1:
            return [(x, noise, condition)]
        if self.objective.batch_coupled:
            raise ConfigError(f"{type(self.objective).__name__} compares the samples of a batch: {ACCUMULATE_NOT}")
        if len(x) % self.accumulation:
            raise ConfigError(f"a batch of {len(x)} does not split into {self.accumulation} parts: take another number")
        size = len(x) // self.accumulation
        rows = [slice(start, start + size) for start in range(0, len(x), size)]
        return [(x[part], noise.rows(part), None if condition is None else condition[part]) for part in rows]

    def filled(self, x: Tensor, noise: Noise | None, values: Values | None) -> tuple[Noise, Values]:
        """Noise and values of a step on the batch x: where they are not given, draws from torch's default generator and
        the objective's own.
        """
        if noise is None:
            augment = self.augment is not None
            noise = Noise.draw(len(x), self.model.latent_dim, device=x.device, dtype=x.dtype, augment=augment)
        if values is None:
            values = {name: x.new_tensor(value) for name, value in self.objective.values().items()}
        return noise, values

    def _shown(self, images: Tensor, noise: Noise, kind: int) -> Tensor:
        """Images as they are encoded and compared: real ones and reconstructions (kind 0), or samples (kind 1)."""
        if self.augment is None:
            return images
        if noise.augment is None:
            raise DataError("this noise has no draws for augmentation: take Noise.draw(..., augment=True)")
        return self.augment(images, noise.augment[:, kind])

    @torch.no_grad()
    def fake_kls(self, x: Tensor, noise: Noise, condition: Tensor | None = None) -> dict[str, Tensor]:
        """The KLs of the fakes that a step without fakes would make, for the log."""
        model = self.model.eval()  # a look must not move the statistics of a batch normalisation
        z = model.encode(self._shown(x, noise, 0), condition).sample(noise.real)
        found = {}
        for kind, (name, latents) in enumerate((("kl_reconstruction", z), ("kl_sample", noise.prior))):
            fakes = self._shown(model.decode(latents, condition), noise, kind)
            found[name] = model.encode(fakes, condition).kl().mean()
        model.train()
        return found

    def _backward(self, loss: Tensor, params: list[nn.Parameter]) -> None:
        # The mean over the batch is the mean of its parts' means.
        (loss / self.accumulation if self.accumulation > 1 else loss).backward(inputs=params)

    def _autocast(self, x: Tensor) -> torch.autocast:
        # One context a phase: weights are cast once in it, and anew after the update.
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _update(self, optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
        if self.peers.count > 1:
            self.peers.average([p.grad for p in params if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def set_lr(self, lr: float) -> None:
        """Set the rate of both players."""
        for optimizer in (self.encoder_optimizer, self.decoder_optimizer):
            for group in optimizer.param_groups:
                if not isinstance(group["lr"], Tensor):
                    group["lr"] = lr
                elif self._lr != lr:  # on the device, where a graph reads it
                    group["lr"].fill_(lr)
        self._lr = lr

    def state_dict(self) -> dict[str, Any]:
        """Networks and optimisers as tensors and plain values."""
        return {
            "model": self.model.state_dict(),
            "encoder_optimizer": self.encoder_optimizer.state_dict(),
            "decoder_optimizer": self.decoder_optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: the optimisers' moments do not fit the weights.
        """
        players = (
            ("encoder_optimizer", self.encoder_optimizer, self.encoder_params),
            ("decoder_optimizer", self.decoder_optimizer, self.decoder_params),
        )
        for name, _, params in players:
            _check_moments(state[name], params, name)
        self.model.load_state_dict(state["model"])
        for name, optimizer, params in players:
            rate = torch.tensor(self._lr, device=params[0].device) if self.capturable else self._lr
            groups = [{**group, "lr": rate, "capturable": self.capturable} for group in state[name]["param_groups"]]
            optimizer.load_state_dict({**state[name], "param_groups": groups})


def _check_moments(state: Mapping[str, Any], params: list[nn.Parameter], name: str) -> None:
    """Adam's fused kernel trusts the shapes of its moments: wrong ones would write over other memory."""
    moments = state["state"]
    if not moments:
        return  # not a step taken yet
    if moments.keys() != set(range(len(params))):
        raise CheckpointError(f"{name} has moments of {len(moments)} weights, the network has {len(params)}")
    for index, parameter in enumerate(params):
        found = moments[index]
        for moment in ("exp_avg", "exp_avg_sq"):
            if found[moment].shape != parameter.shape or found[moment].dtype != parameter.dtype:
                raise CheckpointError(f"{name}: {moment} {index} does not fit its weight: it is another network's")


def mean_record(records: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean over the parts of a batch of what each recorded."""
    if len(records) == 1:
        return records[0]
    return {name: torch.stack([record[name] for record in records]).mean() for name in records[0]}
