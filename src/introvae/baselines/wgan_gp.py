"""WGAN-GP: a critic whose gradient is held near norm 1 measures the distance that the generator makes smaller."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from introvae.augment import Augmentation
from introvae.errors import ConfigError, positive, whole
from introvae.model import IntrospectiveVAE
from introvae.objectives import Objective, Values, Warmup
from introvae.parallel import Alone
from introvae.players import Noise, Part, Players, mean_record


class WGANGPStep(Players):
    """One update of the critic on each batch, and one of the generator on every n_critic-th.

    The critic is the encoder, whose score of x is the first component of its mean (its other outputs are in no loss);
    the generator is the decoder. So a WGAN-GP has the networks that every other model here has. One step is one batch
    of real images, as for all objectives, and n_critic steps are one update of the generator: over the same number of
    images the generator is updated n_critic times less often than an introspective decoder.

    The gradient penalty is computed in float32 at any precision: it is a derivative of a derivative.

    Arguments:
        model: encoder (critic) and decoder (generator); trained in place.
        objective: a `WGANGP`.
        warmup: has to be empty.
        lr, adam_betas: Adam's, by default as published. A run gives its own `lr` and `adam_betas` instead.
        precision, peers, accumulation: as in `IntrospectiveStep`.
        augment: changes every image that the critic sees, so that its gradient's norm is that at augmented images.
        capturable: has to be False: steps with and without an update of the generator are of two kinds.

    Raises:
        ConfigError: batch normalisation in the critic, a warm-up, a compiled critic, CUDA graphs.

    Source: Gulrajani et al. 2017, Improved Training of Wasserstein GANs, Algorithm 1 and Sec. 4.

    Example:
        >>> model = IntrospectiveVAE.build((2,), "tiny-mlp", latent_dim=2)
        >>> step = WGANGPStep(model, WGANGP(n_critic=2))
        >>> sorted(step(torch.randn(16, 2)))
        ['gradient_penalty', 'loss_critic', 'wasserstein']
        >>> sorted(step(torch.randn(16, 2)))
        ['gradient_penalty', 'loss_critic', 'loss_generator', 'wasserstein']
    """

    objective: WGANGP

    def __init__(
        self,
        model: IntrospectiveVAE,
        objective: WGANGP,
        *,
        warmup: Warmup | None = None,
        lr: float = 1e-4,
        adam_betas: tuple[float, float] = (0.0, 0.9),
        precision: str = "float32",
        peers: Alone | None = None,
        accumulation: int = 1,
        capturable: bool = False,
        augment: Augmentation | None = None,
    ) -> None:
        _refuse(model, warmup or Warmup(), capturable)
        super().__init__(
            model,
            objective,
            lr=lr,
            adam_betas=adam_betas,
            precision=precision,
            peers=peers,
            accumulation=accumulation,
            augment=augment,
        )
        self.steps = 0
        # From the start, so that a state has the same tensors before the generator's first update and after it.
        for optimizer in (self.encoder_optimizer, self.decoder_optimizer):
            _begin(optimizer)

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
        """Update the critic on the batch `x: [N, ...]`, and the generator if it is its turn.

        Arguments:
            x: real images or vectors.
            noise: the step's draws: `prior` for the critic's fakes, `again` for the generator's, `real` for the
                places between real and fake; drawn from torch's default generator when not given.
            values: the penalty's weight as a 0-d tensor; the objective's own when not given.
            warming, gradients: for the loop; there is no warm-up, and no reconstruction to tell gradients apart from.
            condition: the class of each x, int64 `[N]`, where the model has classes; the fakes have the same.

        Returns:
            Detached scalars, before the update: loss_critic, wasserstein (E D(x) - E D(g(z)), the critic's estimate of
            the distance) and gradient_penalty (without its weight). loss_generator, -E D(g(z)), where the generator was
            updated.

        Raises:
            DataError: x has another shape than the model takes; noise without the draws for augmentation.
        """
        noise, values = self.filled(x, noise, values)
        parts = self._parts(x, noise, condition)
        record = mean_record([self._for_critic(part, values) for part in parts])
        self._update(self.encoder_optimizer, self.encoder_params)
        self.steps += 1
        if self.steps % self.objective.n_critic == 0:
            losses = [self._for_generator(part) for part in parts]
            self._update(self.decoder_optimizer, self.decoder_params)
            record["loss_generator"] = torch.stack(losses).mean()
        return record

    def _for_critic(self, part: Part, values: Values) -> dict[str, Tensor]:
        """The critic's gradients; fakes are given."""
        plain, noise, condition = part
        x = self._shown(plain, noise, 0)
        with self._autocast(x):
            with torch.no_grad():
                fake = self._shown(self.model.decode(noise.prior, condition), noise, 1)
            both = None if condition is None else torch.cat([condition, condition])
            of_real, of_fake = self.score(torch.cat([x, fake]), both).chunk(2)
        share = torch.special.ndtr(noise.real[:, 0]).view(-1, *[1] * (x.ndim - 1))  # uniform in [0, 1]
        norms = self.gradient_norms(torch.lerp(fake, x, share), condition)
        loss, distance, penalty = self.objective.critic_loss(of_real, of_fake, norms, values)
        self._backward(loss, self.encoder_params)
        found = {"loss_critic": loss, "wasserstein": distance, "gradient_penalty": penalty}
        return {name: value.detach() for name, value in found.items()}

    def _for_generator(self, part: Part) -> Tensor:
        """The generator's gradients, judged by the updated critic; its loss."""
        x, noise, condition = part
        with self._autocast(x):
            fake = self._shown(self.model.decode(noise.again[: len(x)], condition), noise, 1)
            scores = self.score(fake, condition)
        loss = self.objective.generator_loss(scores)
        self._backward(loss, self.decoder_params)
        return loss.detach()

    def score(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """What the critic says of `x: [N, ...]`, `[N]`: the first component of the encoder's mean."""
        return self.model.encode(x, condition).mean[:, 0]

    def gradient_norms(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Euclidean norm of the score's gradient at each of `x: [N, ...]`, `[N]`, itself differentiable."""
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.score(x, condition).sum(), x, create_graph=True)
        return torch.linalg.vector_norm(gradient.flatten(1), dim=1)

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimisers and the count of steps, as tensors and plain values."""
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            CheckpointError: the optimisers' moments do not fit the weights.
        """
        super().load_state_dict(state)
        self.steps = state["steps"]


@dataclass(frozen=True)
class WGANGP(Objective):
    """L_critic = E D(g(z)) - E D(x) + penalty E (|grad D(x^)| - 1)^2;  L_generator = -E D(g(z)).

    x^ is a random place on the straight line between a real image and a fake. There is nothing that infers a latent:
    the model samples, and what its encoder gives is no posterior.

    Arguments:
        penalty: weight of the gradient penalty, the paper's lambda.
        n_critic: steps for each update of the generator; the critic is updated in all of them.

    Raises:
        ConfigError: a setting is out of range.

    Source: Gulrajani et al. 2017, Eq. 3 and Algorithm 1.

    Example:
        >>> WGANGP()
        WGANGP(penalty=10.0, n_critic=5)
    """

    penalty: float = 10.0
    n_critic: int = 5

    tunable: ClassVar[tuple[str, ...]] = ("penalty",)
    encodes: ClassVar[str] = "nothing"
    step_class: ClassVar[type[Any] | None] = WGANGPStep

    def __post_init__(self) -> None:
        positive(penalty=self.penalty, n_critic=self.n_critic)
        whole(n_critic=self.n_critic)

    def critic_loss(
        self, of_real: Tensor, of_fake: Tensor, norms: Tensor, values: Values
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the critic minimises, from scores and gradient norms `[N]`; and its two parts, distance and penalty."""
        distance = of_real.mean() - of_fake.mean()
        penalty = (norms - 1).square().mean()
        return values["penalty"] * penalty - distance, distance, penalty

    def generator_loss(self, of_fake: Tensor) -> Tensor:
        """What the generator minimises, from the scores of its fakes `[N]`."""
        return -of_fake.mean()


def _refuse(model: IntrospectiveVAE, warmup: Warmup, capturable: bool) -> None:
    if warmup.steps:
        raise ConfigError("WGANGP has no VAE to warm up: leave warmup.steps and warmup.share out")
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.encoder.modules()):
        raise ConfigError(
            "WGANGP's penalty is of each sample's own gradient, which batch normalisation mixes with others': choose "
            "another norm, such as --network_options.norm pixel"
        )
    if getattr(model.encoder, "_compiled_call_impl", None) is not None:
        raise ConfigError(
            "torch.compile has no derivative of a derivative, which WGANGP's penalty is: take compile none"
        )
    if capturable:
        raise ConfigError("WGANGP's steps are of two kinds, which CUDA graphs do not tell apart: take compile none")


def _begin(optimizer: torch.optim.Optimizer) -> None:
    """Give Adam the state that it would begin with at its first step."""
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
