"""The papers' pseudo-code written plainly in float64: nothing shared, every equation spelled out once more.

An independent transcription to hold the package against; it uses nothing of it but the networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Result:
    """The losses of both players and the gradient of every weight, by the network's parameter order."""

    loss_encoder: Tensor
    loss_decoder: Tensor
    encoder: list[Tensor] = field(default_factory=list)
    decoder: list[Tensor] = field(default_factory=list)


def kl(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * torch.sum(1 + logvar - mu**2 - torch.exp(logvar), dim=1)


def rec(x: Tensor, y: Tensor) -> Tensor:
    return ((x.reshape(len(x), -1) - y.reshape(len(y), -1)) ** 2).sum(1)


def latent(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    return mu + torch.exp(logvar / 2) * eps


def freeze(module: nn.Module, frozen: bool) -> None:
    for p in module.parameters():
        p.requires_grad_(not frozen)
        p.grad = None


def gradients(module: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]


def mmd(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], official: bool, joint: bool, reduce_sum: bool) -> Tensor:
    """Equations 4 and 5 of AS-IntroVAE with loops over the pairs."""

    def k(p: tuple[Tensor, Tensor], i: int, q: tuple[Tensor, Tensor], j: int) -> Tensor:
        lam = torch.exp(p[1][i]).clamp(min=1e-4) + torch.exp(q[1][j]).clamp(min=1e-4)
        density = torch.exp(-0.5 * (p[0][i] - q[0][j]) ** 2 / lam) / torch.sqrt(lam)
        if not official:
            density = density / math.sqrt(2 * math.pi)
        if joint:
            return density.prod()
        return density.sum() if reduce_sum else density.mean()

    def mean(p: tuple[Tensor, Tensor], q: tuple[Tensor, Tensor], same: bool) -> Tensor:
        n = len(p[0])
        pairs = [k(p, i, q, j) for i in range(n) for j in range(n) if official or not same or i != j]
        total = torch.stack(pairs).sum()
        return total if reduce_sum else total / len(pairs)

    return mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)


def update(
    encoder: nn.Module,
    decoder: nn.Module,
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    x: Tensor,
    noise: Any,
    losses: tuple[Callable[..., Tensor], Callable[..., Tensor]],
    official: bool = False,
    real_again: bool = True,
    look: Callable[[nn.Module], None] = lambda player: None,
) -> tuple[Tensor, Tensor]:
    """Algorithm 1: update the encoder, then the decoder; everything is computed anew in each phase.

    `real_again` encodes the real images a second time for the decoder, which only AS-IntroVAE's contrast to them reads;
    `look` is called with each player just before its optimiser steps.
    """
    encoder_loss, decoder_loss = losses
    eps_rec, eps_sample = noise.fakes.chunk(2)
    again_rec, again_sample = noise.again.chunk(2)

    freeze(encoder, False)
    freeze(decoder, True)
    mu, logvar = encoder(x)
    z = latent(mu, logvar, noise.real)
    x_r, x_p = decoder(z), decoder(noise.prior)
    mu_r, logvar_r = encoder(x_r.detach())
    mu_p, logvar_p = encoder(x_p.detach())
    x_rr = decoder(latent(mu_r, logvar_r, eps_rec))
    x_pp = decoder(latent(mu_p, logvar_p, eps_sample))
    loss_e = encoder_loss(
        x, x_r, (mu, logvar), (mu_r, logvar_r), (mu_p, logvar_p), rec(x_r.detach(), x_rr), rec(x_p.detach(), x_pp)
    )
    loss_e.backward()
    look(encoder)
    optimizers[0].step()

    freeze(encoder, True)
    freeze(decoder, False)
    q = (mu.detach(), logvar.detach())
    if real_again:
        with torch.no_grad():
            q = encoder(x)
    x_r, x_p = decoder(z.detach()), decoder(noise.prior)
    mu_r, logvar_r = encoder(x_r)
    mu_p, logvar_p = encoder(x_p)
    z_rr, z_pp = latent(mu_r, logvar_r, again_rec), latent(mu_p, logvar_p, again_sample)
    if official:
        rec_r = rec(x_r.detach(), decoder(z_rr.detach()))
        rec_p = rec(x_p.detach(), decoder(z_pp.detach()))
    else:
        rec_r, rec_p = rec(x_r, decoder(z_rr).detach()), rec(x_p, decoder(z_pp).detach())
    loss_d = decoder_loss(x, x_r, q, (mu_r, logvar_r), (mu_p, logvar_p), rec_r, rec_p)
    loss_d.backward()
    look(decoder)
    optimizers[1].step()
    freeze(encoder, False)
    return loss_e.detach(), loss_d.detach()


def textbook(
    encoder: nn.Module,
    decoder: nn.Module,
    x: Tensor,
    noise: Any,
    losses: Callable[..., tuple[Callable[..., Tensor], Callable[..., Tensor]]],
    settings: dict[str, Any],
    lr: float,
    adam_betas: tuple[float, float],
) -> Result:
    """One update of fresh players, with the gradients that their optimisers saw."""
    encoder_optimizer = torch.optim.Adam(encoder.parameters(), lr=lr, betas=adam_betas)
    decoder_optimizer = torch.optim.Adam(decoder.parameters(), lr=lr, betas=adam_betas)
    seen: dict[int, list[Tensor]] = {}
    loss_e, loss_d = update(
        encoder,
        decoder,
        (encoder_optimizer, decoder_optimizer),
        x,
        noise,
        losses(**settings),
        official=settings.get("variant") == "official_code",
        look=lambda player: seen.__setitem__(id(player), gradients(player)),
    )
    return Result(loss_e, loss_d, seen[id(encoder)], seen[id(decoder)])


def introvae(beta: float, alpha: float, margin: float, variant: str = "paper") -> Any:
    def hinge(kls: Tensor) -> Tensor:
        if variant == "official_code":
            return torch.clamp(margin - kls.mean(), min=0)
        return torch.clamp(margin - kls, min=0).mean()

    def encoder_loss(x, x_r, q, q_r, q_p, rec_r, rec_p):
        adversarial = alpha * (hinge(kl(*q_r)) + hinge(kl(*q_p)))
        return kl(*q).mean() + adversarial + beta * 0.5 * rec(x, x_r).mean()

    def decoder_loss(x, x_r, q, q_r, q_p, rec_r, rec_p):
        return alpha * (kl(*q_r).mean() + kl(*q_p).mean()) + beta * 0.5 * rec(x, x_r).mean()

    return encoder_loss, decoder_loss


def soft_introvae(
    beta_rec: float,
    beta_kl: float,
    beta_neg: float,
    gamma_r: float = 0.0,
    variant: str = "paper",
    consistency: float = 0.0,
    decoder_kl: float = 1.0,
) -> Any:
    def encoder_loss(x, x_r, q, q_r, q_p, rec_r, rec_p):
        s = 1 / x[0].numel()
        exp_r = torch.exp(-2 * s * (beta_rec * rec_r + beta_neg * kl(*q_r))).mean()
        exp_p = torch.exp(-2 * s * (beta_rec * rec_p + beta_neg * kl(*q_p))).mean()
        loss = s * (beta_rec * rec(x, x_r).mean() + beta_kl * kl(*q).mean()) + 0.25 * (exp_r + exp_p)
        apart = torch.nn.functional.mse_loss(q[0], q_r[0])
        lengths = q[0].square().sum(1).sqrt() * q_r[0].square().sum(1).sqrt()
        turned = (1 - (q[0] * q_r[0]).sum(1) / lengths).mean()
        return loss + consistency * (0.5 * apart + turned)

    def decoder_loss(x, x_r, q, q_r, q_p, rec_r, rec_p):
        s = 1 / x[0].numel()
        return s * (
            beta_rec * rec(x, x_r).mean()
            + decoder_kl * beta_kl * 0.5 * (kl(*q_r).mean() + kl(*q_p).mean())
            + gamma_r * 0.5 * beta_rec * (rec_r.mean() + rec_p.mean())
        )

    return encoder_loss, decoder_loss


def as_introvae(
    beta_rec: float,
    beta_kl: float,
    beta_neg: float,
    c: float,
    kernel: str = "marginal",
    contrast: str = "reconstruction-sample",
    variant: str = "paper",
    distance_weight: float = 1.0,
    decoder_kl: float = 1.0,
) -> Any:
    official, joint = variant == "official_code", kernel == "joint"

    def squash(q):
        return tuple(torch.tanh(t) for t in q) if official else q

    def encoder_loss(x, x_r, q, q_r, q_p, rec_r, rec_p):
        s = 1 / x[0].numel()
        a = q if contrast == "real-sample" else q_r
        d = distance_weight * mmd(squash(a), squash(q_p), official, joint, reduce_sum=official)
        total = 0.0
        for r, k in ((rec_r, kl(*q_r)), (rec_p, kl(*q_p))):
            total = total + torch.exp(-2 * s * (beta_rec * r + beta_neg * (c * k + (1 - c) * d))).mean()
        return s * (beta_rec * rec(x, x_r).mean() + beta_kl * kl(*q).mean()) + 0.25 * total

    def decoder_loss(x, x_r, q, q_r, q_p, rec_r, rec_p):
        s = 1 / x[0].numel()
        a = q if contrast == "real-sample" else q_r
        q_r, q_p, a = squash(q_r), squash(q_p), squash(a)
        d = distance_weight * mmd(a, q_p, official, joint, reduce_sum=False)
        if official:
            adversarial = 0.5 * (c * (kl(*q_r).mean() + kl(*q_p).mean()) + (1 - c) * d)
        else:
            adversarial = c * 0.5 * (kl(*q_r).mean() + kl(*q_p).mean()) + (1 - c) * d
        return s * (beta_rec * rec(x, x_r).mean() + decoder_kl * beta_kl * adversarial)

    return encoder_loss, decoder_loss
