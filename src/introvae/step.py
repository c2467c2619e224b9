"""The two-phase update that all objectives share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from introvae.errors import CheckpointError, ConfigError, one_of, positive, whole
from introvae.gaussian import DiagonalGaussian
from introvae.model import IntrospectiveVAE, squared_error
from introvae.objectives import Judged, Objective, Values, Warmup
from introvae.parallel import Alone


class Noise(NamedTuple):
    """All standard normal draws of one step.

    Arguments:
        real: `[N, Z]`, for z ~ q(z|x).
        prior: `[N, Z]`, the latents z_p of the samples.
        fakes: `[2N, Z]`, for the fakes' latents (reconstructions, then samples) in the encoder's phase.
        again: `[2N, Z]`, for the fakes' latents in the decoder's phase.

    Example:
        >>> Noise.draw(8, latent_dim=2).fakes.shape
        torch.Size([16, 2])
    """

    real: Tensor
    prior: Tensor
    fakes: Tensor
    again: Tensor

    @classmethod
    def draw(
        cls,
        n: int,
        latent_dim: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Noise:
        """Draw the noise for a batch of n; a CPU `generator` gives the same draws on every `device`."""
        source = device if generator is None else generator.device
        draws = torch.randn(6 * n, latent_dim, generator=generator, device=source, dtype=dtype).to(device)
        return cls(draws[:n], draws[n : 2 * n], draws[2 * n : 4 * n], draws[4 * n :])

    def rows(self, rows: slice) -> Noise:
        """The noise of some samples of the batch: what they get does not depend on how the batch is shared out."""

        def of_both(pair: Tensor) -> Tensor:
            return torch.cat([half[rows] for half in pair.chunk(2)])

        return Noise(self.real[rows], self.prior[rows], of_both(self.fakes), of_both(self.again))


ACCUMULATE_NOT = "its gradients are no mean over parts, take accumulation 1"


class _Seen(NamedTuple):
    """What the decoder's phase takes over from the encoder's."""

    z: Tensor
    posterior: DiagonalGaussian
    decoded: tuple[Tensor, Tensor] | None
    """Reconstructions and samples with their graph; None where they are decoded anew."""
    record: dict[str, Tensor]


class IntrospectiveStep:
    """One update of the encoder, then one of the decoder, on the same batch.

    The passes are the papers' with what is computed twice there shared: the decoder's outputs of the encoder's phase
    serve the decoder's phase, whose weights have not changed, no second decode is made that no loss reads, and fakes
    go through the encoder as one batch. The gradients are those of the textbook order.

    Arguments:
        model: the networks; trained in place.
        objective: what each player wants.
        warmup: the loss of the VAE steps (`warming=True`).
        lr: Adam's rate of both players.
        adam_betas: Adam's decay rates.
        share: False recomputes the decoder's outputs in its own phase, as the papers' pseudo-code does.
        precision: "bf16" lets the networks' layers compute in bf16 (autocast); weights, posteriors, latents, decoded
            images, losses and Adam's moments stay float32. "float32" (and "tf32") leave all as it is.
        peers: the processes that share each batch; gradients are averaged over them.
        accumulation: parts in which a batch goes through each phase, for less memory: all of the encoder's, its update,
            then all of the decoder's, which decodes anew. Gradients are those of the whole batch, unless the networks
            have batch statistics.
        capturable: keep the rate and Adam's counts on the GPU, for `CapturedStep`.

    Raises:
        ConfigError: a rate that is not above 0, an unknown precision, accumulation for an objective that compares the
            samples of a batch.

    Source: Soft-IntroVAE (2021), Algorithm 1; IntroVAE (2018), Algorithm 1.

    Example:
        >>> from introvae import IntrospectiveVAE, SoftIntroVAE
        >>> model = IntrospectiveVAE.build(shape=(2,), network="tiny-mlp", latent_dim=2)
        >>> step = IntrospectiveStep(model, SoftIntroVAE(beta_neg=1.0))
        >>> sorted(step(torch.randn(16, 2)))
        ['apart_fakes', 'apart_real', 'kl_real', 'kl_reconstruction', 'kl_sample', 'loss_decoder', 'loss_encoder',
         'rec']
    """

    def __init__(
        self,
        model: IntrospectiveVAE,
        objective: Objective,
        *,
        warmup: Warmup | None = None,
        lr: float = 2e-4,
        adam_betas: tuple[float, float] = (0.9, 0.999),
        share: bool = True,
        precision: str = "float32",
        peers: Alone | None = None,
        accumulation: int = 1,
        capturable: bool = False,
    ) -> None:
        positive(lr=lr, accumulation=accumulation)
        whole(accumulation=accumulation)
        if accumulation > 1 and objective.batch_coupled:
            raise ConfigError(f"{type(objective).__name__} compares the samples of a batch: {ACCUMULATE_NOT}")
        self.accumulation = accumulation
        one_of(("float32", "tf32", "bf16"), precision=precision)
        self.model, self.objective, self.warmup = model, objective, warmup or Warmup()
        self.share, self.precision, self.peers, self.capturable = share, precision, peers or Alone(), capturable
        self._lr = lr
        self.encoder_params = [p for p in model.encoder.parameters() if p.requires_grad]
        self.decoder_params = [p for p in model.decoder.parameters() if p.requires_grad]
        self.encoder_optimizer = self._adam(self.encoder_params, lr, adam_betas)
        self.decoder_optimizer = self._adam(self.decoder_params, lr, adam_betas)
        # Batch statistics would mix reconstructions and samples: such networks see them one after the other.
        self.one_batch = not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        # The gradient into the latents is wanted for reconstructions only. Where images cost more than launches,
        # samples are decoded apart, so that they take no part in that backward pass.
        self.decode_apart = not self.one_batch or (model.device.type == "cpu" and len(model.shape or ()) == 3)

    def _adam(self, params: list[nn.Parameter], lr: float, betas: tuple[float, float]) -> torch.optim.Adam:
        rate = torch.tensor(lr, device=params[0].device) if self.capturable else lr
        return torch.optim.Adam(params, lr=rate, betas=betas, fused=True, capturable=self.capturable)

    def __call__(
        self,
        x: Tensor,
        noise: Noise | None = None,
        values: Values | None = None,
        *,
        warming: bool = False,
        gradients: bool = False,
    ) -> dict[str, Tensor]:
        """Update both players on the batch `x: [N, ...]`.

        Arguments:
            x: real images or vectors.
            noise: the step's normal draws; drawn from torch's default generator when not given.
            values: the objective's changeable settings as 0-d tensors; its own when not given.
            warming: take a VAE's step with the warm-up's loss instead.
            gradients: report the norms of the decoder's gradient too, of its two parts apart: what the fakes' terms
                say and what the reconstruction of real images says. Costs a backward pass more.

        Returns:
            Detached scalars: rec (squared error summed over pixels), kl_* in nats and loss_encoder, all before the
            update; loss_decoder after the encoder's; apart_fakes and apart_real, the squared distance of samples to
            reconstructions and to real images (0 and their variance for a decoder that collapsed, nearly equal for a
            good one). A step without fakes leaves theirs out. With `gradients`, gradient_adversarial
            and gradient_reconstruction: Euclidean norms over all of the decoder's weights.

        Raises:
            DataError: x has another shape than the model takes, or is too small a batch for the objective.
            RuntimeError: a loss reads a term that its objective does not declare.
        """
        if noise is None:
            noise = Noise.draw(len(x), self.model.latent_dim, device=x.device, dtype=x.dtype)
        if values is None:
            values = {name: x.new_tensor(value) for name, value in self.objective.values().items()}
        if warming or not self.objective.adversarial:
            return self._joint(x, noise, values, warming)
        return self._two_player(x, noise, values, gradients)

    def _joint(self, x: Tensor, noise: Noise, values: Values, warming: bool) -> dict[str, Tensor]:
        records = []
        for part, its_noise in self._parts(x, noise):
            with self._autocast(x):
                posterior = self.model.encode(part)
                z = posterior.sample(its_noise.real)
                real = Judged(part, z, posterior, squared_error(part, self.model.decode(z)))
            if warming:
                loss = self.warmup.loss(real, self.objective.scale_of(part))
            else:
                real = self._of_all(real)
                loss = self.objective.encoder_loss(real, (), values)
            self._backward(loss, self.encoder_params + self.decoder_params)
            records.append(_record(real, (), loss, loss))
        self._update(self.encoder_optimizer, self.encoder_params)
        self._update(self.decoder_optimizer, self.decoder_params)
        return _mean(records)

    def _two_player(self, x: Tensor, noise: Noise, values: Values, gradients: bool) -> dict[str, Tensor]:
        parts = self._parts(x, noise)
        seen = [self._for_encoder(part, its_noise, values) for part, its_noise in parts]
        self._update(self.encoder_optimizer, self.encoder_params)
        apart = [torch.zeros_like(p) for p in self.decoder_params] if gradients else []
        records = [
            {**before.record, "loss_decoder": self._for_decoder(part, its_noise, values, before, apart)}
            for (part, its_noise), before in zip(parts, seen, strict=True)
        ]
        norms = self._norms(apart) if gradients else {}
        self._update(self.decoder_optimizer, self.decoder_params)
        return {**_mean(records), **norms}

    def _norms(self, adversarial: list[Tensor]) -> dict[str, Tensor]:
        """Norms of the decoder's gradient: of its adversarial part, which is given, and of the rest."""
        rest = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.decoder_params]
        torch._foreach_sub_(rest, adversarial)  # pyright: ignore[reportPrivateImportUsage]
        if self.peers.count > 1:
            self.peers.average([*adversarial, *rest])
        parts = {"gradient_adversarial": adversarial, "gradient_reconstruction": rest}
        return {name: nn.utils.get_total_norm(part) for name, part in parts.items()}

    def _for_encoder(self, x: Tensor, noise: Noise, values: Values) -> _Seen:
        """The encoder's gradients; fakes are given."""
        objective = self.objective
        with self._autocast(x):
            posterior = self.model.encode(x)
            z = posterior.sample(noise.real)
            # The decoder's graph starts at a leaf, so that it survives the encoder's update and serves both phases.
            leaf = z.detach().requires_grad_()
            reconstruction, sample = self._decode(leaf, noise.prior)
            fakes = torch.cat([reconstruction, sample]).detach()
            latents = torch.cat([leaf.detach(), noise.prior])
            judged = self._judge(fakes, latents, noise.fakes, "encoder" if objective.reads_fake_rec_in_encoder else "")
        real = self._of_all(Judged(x, z, posterior, squared_error(x, reconstruction)))
        loss = objective.encoder_loss(real, judged, values)
        # The reconstruction's gradient comes back through the decoder to the leaf, and from there goes into the
        # encoder, together with all its other terms, in one backward pass.
        (into_z,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        self._backward(loss + (z * into_z).sum(), self.encoder_params)
        kept = (reconstruction, sample) if self.share and self.accumulation == 1 else None
        return _Seen(leaf.detach(), posterior.detach(), kept, _record(real, judged, loss, None))

    def _for_decoder(self, x: Tensor, noise: Noise, values: Values, seen: _Seen, apart: list[Tensor]) -> Tensor:
        """The decoder's gradients, judged by the updated encoder; its loss. The gradients of the fakes' terms alone
        are added to `apart`, unless that is empty.
        """
        objective, posterior = self.objective, seen.posterior
        with self._autocast(x):
            reconstruction, sample = seen.decoded or self._decode(seen.z, noise.prior)
            if objective.reads_real_in_decoder:
                with torch.no_grad():
                    posterior = self.model.encode(x)
            latents = torch.cat([seen.z, noise.prior])
            fakes = torch.cat([reconstruction, sample])
            judged = self._judge(fakes, latents, noise.again, objective.reads_fake_rec_in_decoder)
        real = self._of_all(Judged(x, seen.z, posterior, squared_error(x, reconstruction)))
        loss = objective.decoder_loss(real, judged, values)
        if apart:
            given = replace(real, reconstruction_error=real.rec.detach())
            alone = objective.decoder_loss(given, judged, values) / self.accumulation
            found = torch.autograd.grad(
                alone, self.decoder_params, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            torch._foreach_add_(apart, found)  # pyright: ignore[reportPrivateImportUsage]
        self._backward(loss, self.decoder_params)
        return loss.detach()

    def _parts(self, x: Tensor, noise: Noise) -> list[tuple[Tensor, Noise]]:
        """The micro-batches of a batch."""
        if self.accumulation == 1:
            return [(x, noise)]
        if self.objective.batch_coupled:
            raise ConfigError(f"{type(self.objective).__name__} compares the samples of a batch: {ACCUMULATE_NOT}")
        if len(x) % self.accumulation:
            raise ConfigError(f"a batch of {len(x)} does not split into {self.accumulation} parts: take another number")
        size = len(x) // self.accumulation
        rows = [slice(start, start + size) for start in range(0, len(x), size)]
        return [(x[part], noise.rows(part)) for part in rows]

    def _backward(self, loss: Tensor, params: list[nn.Parameter]) -> None:
        # The mean over the batch is the mean of its parts' means.
        (loss / self.accumulation if self.accumulation > 1 else loss).backward(inputs=params)

    def _judge(self, fakes: Tensor, latents: Tensor, noise: Tensor, rec_gradient: str) -> tuple[Judged, ...]:
        """What the encoder says of `fakes: [2N, ...]`; `rec_gradient` says whom the error's gradient reaches."""
        posterior = self._encode(fakes)
        rec = None
        if rec_gradient == "encoder":
            rec = squared_error(fakes, self._decode_again(posterior.sample(noise)))
        elif rec_gradient == "fake":
            with torch.no_grad():
                again = self._decode_again(posterior.sample(noise))
            rec = squared_error(fakes, again)
        elif rec_gradient == "redecode":
            again = self._decode_again(posterior.sample(noise).detach())
            rec = squared_error(fakes.detach(), again)
        n = len(fakes) // 2
        return tuple(
            self._of_all(Judged(fakes[half], latents[half], posterior[half], None if rec is None else rec[half]))
            for half in (slice(0, n), slice(n, None))
        )

    def _of_all(self, judged: Judged) -> Judged:
        """Where a sample's loss depends on the others: posteriors, errors and latents of all processes' samples."""
        if self.peers.count == 1 or not self.objective.batch_coupled:
            return judged
        columns = [judged.z, judged.posterior.mean, judged.posterior.logvar]
        if judged.reconstruction_error is not None:
            columns.append(judged.reconstruction_error[:, None])
        found = self.peers.gather(torch.cat(columns, dim=1))
        z, mean, logvar, *rest = found.split([column.shape[1] for column in columns], dim=1)
        error = rest[0].squeeze(1) if rest else None
        return replace(judged, z=z, posterior=DiagonalGaussian(mean, logvar), reconstruction_error=error)

    def _autocast(self, x: Tensor) -> torch.autocast:
        # One context a phase: weights are cast once in it, and anew after the update.
        return torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _decode(self, of_real: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """The images of two batches of latents."""
        if self.decode_apart:
            return self.model.decode(of_real), self.model.decode(prior)
        reconstruction, sample = self.model.decode(torch.cat([of_real, prior])).chunk(2)
        return reconstruction, sample

    def _decode_again(self, latents: Tensor) -> Tensor:
        if self.one_batch:
            return self.model.decode(latents)
        return torch.cat([self.model.decode(half) for half in latents.chunk(2)])

    def _encode(self, fakes: Tensor) -> DiagonalGaussian:
        if self.one_batch:
            return self.model.encode(fakes)
        halves = [self.model.encode(half) for half in fakes.chunk(2)]
        return DiagonalGaussian(torch.cat([q.mean for q in halves]), torch.cat([q.logvar for q in halves]))

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


def _mean(records: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    if len(records) == 1:
        return records[0]
    return {name: torch.stack([record[name] for record in records]).mean() for name in records[0]}


def _record(
    real: Judged, fakes: tuple[Judged, ...], loss_encoder: Tensor, loss_decoder: Tensor | None
) -> dict[str, Tensor]:
    with torch.no_grad():
        record = {"rec": real.rec.mean(), "kl_real": real.kl.mean(), "loss_encoder": loss_encoder.detach()}
        for name, fake in zip(("kl_reconstruction", "kl_sample"), fakes, strict=False):
            record[name] = fake.kl.mean()
        if fakes:
            reconstruction, sample = (fake.x.detach() for fake in fakes)
            record["apart_fakes"] = squared_error(sample, reconstruction).mean()
            record["apart_real"] = squared_error(sample, real.x).mean()
        if loss_decoder is not None:
            record["loss_decoder"] = loss_decoder.detach()
    return record
