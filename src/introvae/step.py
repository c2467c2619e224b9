"""The two-phase update that all objectives share."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from introvae.augment import Augmentation
from introvae.errors import ConfigError, DataError, not_negative
from introvae.gaussian import DiagonalGaussian, dependence, lent_within
from introvae.model import IntrospectiveVAE, squared_error
from introvae.objectives import Judged, Objective, Values, Warmup
from introvae.parallel import Alone
from introvae.players import Noise, Part, Players, mean_record

__all__ = ["IntrospectiveStep", "Noise", "step_class"]


OWN = "own"
"""Name of the value that says how much a step without fakes takes of the latents that are not lent."""


def step_class(objective: Objective) -> type[Any]:
    """The class of the update that trains an objective: its own, or the one that all others share.

    Example:
        >>> from introvae import SoftIntroVAE
        >>> step_class(SoftIntroVAE()).__name__
        'IntrospectiveStep'
    """
    return objective.step_class or IntrospectiveStep


class _Seen(NamedTuple):
    """What the decoder's phase takes over from the encoder's."""

    x: Tensor
    """Real images as they were encoded."""
    z: Tensor
    posterior: DiagonalGaussian
    kl_weight: Tensor | None
    decoded: tuple[Tensor, Tensor] | None
    """Reconstructions and samples with their graph; None where they are decoded anew."""
    record: dict[str, Tensor]


class IntrospectiveStep(Players):
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
        augment: T, which changes every image that is encoded or compared, real and decoded alike, so that the step is
            one on images T(x) with the decoder T after D (see `Augmentation`).
        lent: so many latents, the first ones, are lent: each image is decoded from those of another image of its group,
            see `lent_within`. The step's `condition` is then the groups, and no network gets it.

    Raises:
        ConfigError: a rate that is not above 0, an unknown precision, accumulation for an objective that compares the
            samples of a batch; accumulation or several processes where latents are lent.

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
        augment: Augmentation | None = None,
        lent: int = 0,
        independence: float = 0.0,
    ) -> None:
        not_negative(independence=independence)
        if independence and not lent:
            raise ConfigError("independence is of the latents that are not lent: lend some, or leave it out")
        if lent and (accumulation > 1 or (peers is not None and peers.count > 1)):
            raise ConfigError(
                "the images of a whole batch lend each other latents: take accumulation 1 and one process, or leave "
                "paired out"
            )
        super().__init__(
            model,
            objective,
            warmup=warmup,
            lr=lr,
            adam_betas=adam_betas,
            precision=precision,
            peers=peers,
            accumulation=accumulation,
            capturable=capturable,
            augment=augment,
        )
        self.share, self.lent, self.independence = share, lent, independence
        self.target = _copied(model.decoder) if objective.target_lag else None
        # Batch statistics would mix reconstructions and samples: such networks see them one after the other.
        self.one_batch = not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        # The gradient into the latents is wanted for reconstructions only. Where images cost more than launches,
        # samples are decoded apart, so that they take no part in that backward pass.
        self.decode_apart = not self.one_batch or (model.device.type == "cpu" and len(model.shape or ()) == 3)

    def __call__(
        self,
        x: Tensor,
        noise: Noise | None = None,
        values: Values | None = None,
        *,
        warming: bool = False,
        gradients: bool = False,
        condition: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Update both players on the batch `x: [N, ...]`.

        Arguments:
            x: real images or vectors.
            noise: the step's draws; drawn from torch's default generator when not given.
            values: the objective's changeable settings as 0-d tensors; its own when not given. Where latents are lent,
                `OWN` may tell the share of a sample's own latents in those that the warm-up decodes: at 0 they are
                draws from the prior, so that what is lent learns first all that it can tell.
            warming: take a VAE's step with the warm-up's loss instead.
            gradients: report the norms of the decoder's gradient too, of its two parts apart: what the fakes' terms
                say and what the reconstruction of real images says. Costs a backward pass more.
            condition: the class of each x, int64 `[N]`, where the model has classes. Both networks get it, for x and
                its reconstruction as for the n-th sample, so that samples have the batch's classes. Where latents are
                lent, the group of each x instead.

        Returns:
            Detached scalars: rec (squared error summed over pixels), kl_* in nats and loss_encoder, all before the
            update; loss_decoder after the encoder's; apart_fakes and apart_real, the squared distance of samples to
            reconstructions and to real images (0 and their variance for a decoder that collapsed, nearly equal for a
            good one). A step without fakes leaves theirs out. With `gradients`, gradient_adversarial
            and gradient_reconstruction: Euclidean norms over all of the decoder's weights. With augmentation all are
            of augmented images, but apart_* are of images as they are: equal fakes, changed by different draws, would
            not look alike.

        Raises:
            DataError: x has another shape than the model takes, or is too small a batch for the objective; noise
                without the draws for augmentation.
            RuntimeError: a loss reads a term that its objective does not declare.
        """
        noise, values = self.filled(x, noise, values)
        if warming or not self.objective.adversarial:
            return self._joint(self._parts(x, noise, condition), values, warming)
        return self._two_player(self._parts(x, noise, condition), values, gradients)

    def _joint(self, parts: list[Part], values: Values, warming: bool) -> dict[str, Tensor]:
        records = []
        for plain, noise, groups in parts:
            x = self._shown(plain, noise, 0)
            with self._autocast(x):
                posterior, weight, condition = self._posterior(x, groups)
                z = posterior.sample(noise.real)
                if self.lent and OWN in values:
                    z = torch.cat(
                        [z[:, : self.lent], noise.real[:, self.lent :].lerp(z[:, self.lent :], values[OWN])], 1
                    )
                reconstruction = self._shown(self.model.decode(z, condition), noise, 0)
                real = Judged(x, z, posterior, squared_error(x, reconstruction), kl_weight=weight)
            if warming:
                loss = self.warmup.loss(real, self.objective.scale_of(x))
            else:
                real = self._of_all(real)
                loss = self.objective.encoder_loss(real, (), values)
            self._backward(self._independent(loss, real, groups), self.encoder_params + self.decoder_params)
            records.append(_record(self.objective, real, (), loss, loss))
        self._update(self.encoder_optimizer, self.encoder_params)
        self._update(self.decoder_optimizer, self.decoder_params)
        return mean_record(records)

    def _two_player(self, parts: list[Part], values: Values, gradients: bool) -> dict[str, Tensor]:
        seen = [self._for_encoder(part, values) for part in parts]
        self._update(self.encoder_optimizer, self.encoder_params)
        apart = [torch.zeros_like(p) for p in self.decoder_params] if gradients else []
        records = [
            {**before.record, "loss_decoder": self._for_decoder(part, values, before, apart)}
            for part, before in zip(parts, seen, strict=True)
        ]
        norms = self._norms(apart) if gradients else {}
        self._update(self.decoder_optimizer, self.decoder_params)
        return {**mean_record(records), **norms}

    def _norms(self, adversarial: list[Tensor]) -> dict[str, Tensor]:
        """Norms of the decoder's gradient: of its adversarial part, which is given, and of the rest."""
        rest = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.decoder_params]
        torch._foreach_sub_(rest, adversarial)  # pyright: ignore[reportPrivateImportUsage]
        if self.peers.count > 1:
            self.peers.average([*adversarial, *rest])
        parts = {"gradient_adversarial": adversarial, "gradient_reconstruction": rest}
        return {name: nn.utils.get_total_norm(part) for name, part in parts.items()}

    def _for_encoder(self, part: Part, values: Values) -> _Seen:
        """The encoder's gradients; fakes are given."""
        objective, (plain, noise, groups) = self.objective, part
        x = self._shown(plain, noise, 0)
        with self._autocast(x):
            posterior, weight, condition = self._posterior(x, groups)
            z = self._latent(posterior, noise.real)
            # The decoder's graph starts at a leaf, so that it survives the encoder's update and serves both phases.
            leaf = z.detach().requires_grad_()
            decoded = self._decode(leaf, noise.prior, condition)
            reconstruction, sample = self._both_shown(decoded, noise)
            fakes = (reconstruction.detach(), sample.detach())
            latents = (leaf.detach(), noise.prior)
            rec_gradient = "encoder" if objective.reads_fake_rec_in_encoder else ""
            judged = self._judge(fakes, latents, noise.fakes, noise, condition, rec_gradient)
        real = self._of_all(Judged(x, z, posterior, squared_error(x, reconstruction), reconstruction, weight))
        loss = objective.encoder_loss(real, judged, values)
        # The reconstruction's gradient comes back through the decoder to the leaf, and from there goes into the
        # encoder, together with all its other terms, in one backward pass.
        (into_z,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        self._backward(self._independent(loss + (z * into_z).sum(), real, groups), self.encoder_params)
        kept = (reconstruction, sample) if self.share and self.accumulation == 1 else None
        record = {**_record(objective, real, judged, loss, None), **_apart(plain, *decoded)}
        return _Seen(x, leaf.detach(), posterior.detach(), weight, kept, record)

    def _for_decoder(self, part: Part, values: Values, seen: _Seen, apart: list[Tensor]) -> Tensor:
        """The decoder's gradients, judged by the updated encoder; its loss. The gradients of the fakes' terms alone
        are added to `apart`, unless that is empty.
        """
        objective, posterior, x, (_, noise, groups) = self.objective, seen.posterior, seen.x, part
        condition = None if self.lent else groups
        with self._autocast(x):
            fakes = seen.decoded or self._both_shown(self._decode(seen.z, noise.prior, condition), noise)
            if objective.reads_real_in_decoder:
                with torch.no_grad():
                    posterior, *_ = self._posterior(x, groups)
            latents, rec_gradient = (seen.z, noise.prior), objective.reads_fake_rec_in_decoder
            judged = self._judge(fakes, latents, noise.again, noise, condition, rec_gradient)
        reconstruction = fakes[0]
        error = squared_error(x, reconstruction)
        real = self._of_all(Judged(x, seen.z, posterior, error, reconstruction, seen.kl_weight))
        loss = objective.decoder_loss(real, judged, values)
        if apart:
            given = replace(real, reconstruction_error=real.rec.detach(), reconstruction=reconstruction.detach())
            alone = objective.decoder_loss(given, judged, values) / self.accumulation
            found = torch.autograd.grad(
                alone, self.decoder_params, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            torch._foreach_add_(apart, found)  # pyright: ignore[reportPrivateImportUsage]
        self._backward(loss, self.decoder_params)
        return loss.detach()

    def _judge(
        self,
        fakes: tuple[Tensor, ...],
        latents: tuple[Tensor, ...],
        draws: Tensor,
        noise: Noise,
        condition: Tensor | None,
        rec_gradient: str,
    ) -> tuple[Judged, ...]:
        """What the encoder says of reconstructions and samples; `draws` are for their latents, and `rec_gradient` says
        whom the error's gradient reaches.
        """
        kinds = (0, 1)
        if not self.objective.judges_reconstruction:
            fakes, latents, draws, kinds = fakes[1:], latents[1:], draws.chunk(2)[1], kinds[1:]
        x, n = torch.cat(fakes), len(fakes[0])
        posterior = self._encode(x, n, condition)
        rec = None
        if rec_gradient in ("encoder", "target"):
            rec = squared_error(x, self._decode_again(self._latent(posterior, draws), kinds, noise, condition))
        elif rec_gradient == "fake":
            with torch.no_grad():
                again = self._decode_again(self._latent(posterior, draws), kinds, noise, condition)
            rec = squared_error(x, again)
        elif rec_gradient == "redecode":
            again = self._decode_again(self._latent(posterior, draws).detach(), kinds, noise, condition)
            rec = squared_error(x.detach(), again)
        return tuple(
            self._of_all(Judged(x[rows], z, posterior[rows], None if rec is None else rec[rows]))
            for z, rows in zip(latents, (slice(0, n), slice(n, None)), strict=False)
        )

    def _posterior(self, x: Tensor, condition: Tensor | None) -> tuple[DiagonalGaussian, Tensor | None, Tensor | None]:
        """What real images are decoded from, what its KL counts, and the condition that the networks get."""
        if not self.lent:
            return self.model.encode(x, condition), None, condition
        if condition is None:
            raise DataError("latents are lent within groups: give the step the group of each sample as its condition")
        return *lent_within(self.model.encode(x), condition, self.lent), None

    def _independent(self, loss: Tensor, real: Judged, groups: Tensor | None) -> Tensor:
        """The encoder's loss, and what its latents that are not lent tell of the groups."""
        if not self.independence or groups is None:
            return loss
        weight = self.independence * self.objective.scale_of(real.x)
        return loss + weight * dependence(real.z[:, self.lent :], groups)

    def fake_kls(self, x: Tensor, noise: Noise, condition: Tensor | None = None) -> dict[str, Tensor]:
        """The KLs of the fakes that a step without fakes would make of each sample's own latents, for the log."""
        return super().fake_kls(x, noise, None if self.lent else condition)

    def _latent(self, posterior: DiagonalGaussian, draws: Tensor) -> Tensor:
        """What the decoder gets of a posterior."""
        return posterior.mode if self.objective.encodes == "mode" else posterior.sample(draws)

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

    def _decode(self, of_real: Tensor, prior: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """The images of two batches of latents."""
        if self.decode_apart:
            return self.model.decode(of_real, condition), self.model.decode(prior, condition)
        both = _repeated(condition, 2)
        reconstruction, sample = self.model.decode(torch.cat([of_real, prior]), both).chunk(2)
        return reconstruction, sample

    def _both_shown(self, decoded: tuple[Tensor, Tensor], noise: Noise) -> tuple[Tensor, Tensor]:
        """Reconstructions and samples as they are judged."""
        return self._shown(decoded[0], noise, 0), self._shown(decoded[1], noise, 1)

    def _decode_again(self, latents: Tensor, kinds: tuple[int, ...], noise: Noise, condition: Tensor | None) -> Tensor:
        """The images of fakes' latents, to compare with the fakes; `condition` is that of each kind."""
        if self.one_batch:
            images = self._lagging(latents, _repeated(condition, len(kinds)))
        else:
            images = torch.cat([self._lagging(part, condition) for part in latents.chunk(len(kinds))])
        if self.augment is None:
            return images
        each = zip(images.chunk(len(kinds)), kinds, strict=True)
        return torch.cat([self._shown(part, noise, kind) for part, kind in each])

    def _lagging(self, latents: Tensor, condition: Tensor | None) -> Tensor:
        """The target decoder's images, where there is one."""
        if self.target is None:
            return self.model.decode(latents, condition)
        return self.target(latents) if condition is None else self.target(latents, condition)

    def _encode(self, fakes: Tensor, n: int, condition: Tensor | None) -> DiagonalGaussian:
        """The posteriors of fakes, n of each kind; `condition` is that of each kind."""
        if self.one_batch:
            return self.model.encode(fakes, _repeated(condition, len(fakes) // n))
        kinds = [self.model.encode(part, condition) for part in fakes.split(n)]
        return DiagonalGaussian(torch.cat([q.mean for q in kinds]), torch.cat([q.logvar for q in kinds]))

    def renew_target(self) -> None:
        """Make the target decoder equal to the decoder; every `objective.target_lag` steps this is the caller's to do,
        as the training loop does it.
        """
        if self.target is not None:
            with torch.no_grad():  # in place: a CUDA graph knows its tensors by their address
                for ours, theirs in zip(_tensors(self.target), _tensors(self.model.decoder), strict=True):
                    ours.copy_(theirs)

    def state_dict(self) -> dict[str, Any]:
        """Networks and optimisers as tensors and plain values."""
        target = {} if self.target is None else {"target": self.target.state_dict()}
        return {**super().state_dict(), **target}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: the optimisers' moments do not fit the weights.
        """
        super().load_state_dict(state)
        if self.target is not None:
            self.target.load_state_dict(state["target"])


def _copied(module: nn.Module) -> nn.Module:
    """A copy that takes no gradients. (A plain deepcopy cannot copy the planner's tensors without content.)"""
    own = {id(t): nn.Parameter(t.detach().clone(), requires_grad=False) for t in module.parameters()}
    own |= {id(t): t.clone() for t in module.buffers()}
    return copy.deepcopy(module, own)


def _repeated(condition: Tensor | None, times: int) -> Tensor | None:
    """The condition of so many kinds of fake."""
    return condition if condition is None or times == 1 else torch.cat([condition] * times)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _record(
    objective: Objective,
    real: Judged,
    fakes: tuple[Judged, ...],
    loss_encoder: Tensor,
    loss_decoder: Tensor | None,
) -> dict[str, Tensor]:
    with torch.no_grad():
        record = {"rec": real.rec.mean(), **objective.recorded(real, fakes), "loss_encoder": loss_encoder.detach()}
        if loss_decoder is not None:
            record["loss_decoder"] = loss_decoder.detach()
    return record


@torch.no_grad()
def _apart(real: Tensor, reconstruction: Tensor, sample: Tensor) -> dict[str, Tensor]:
    """How far samples are from reconstructions and from real images."""
    return {
        "apart_fakes": squared_error(sample, reconstruction).mean(),
        "apart_real": squared_error(sample, real).mean(),
    }
