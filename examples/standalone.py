"""Soft-IntroVAE on eight Gaussians in plain PyTorch: the whole idea in one file, no package needed.

An ordinary VAE, trained by two players. The encoder gives real points a high ELBO and what the decoder makes a low one;
the decoder makes points that the encoder takes for real. (Daniel & Tamar, CVPR 2021, Eq. 4 and Algorithm 1.)

    python standalone.py            # about three minutes on two cores, writes standalone.png
    python standalone.py --steps 200
"""

import argparse
import math

import matplotlib.pyplot as plt
import torch
from torch import nn

BETA_REC, BETA_KL, BETA_NEG, S = 0.2, 0.3, 0.9, 1 / 2  # the paper's weights for this data; S = 1 / dimensions
BATCH, LATENT, WARMUP = 256, 2, 1000


def mlp(inputs, outputs, hidden=256):
    layers = [nn.Linear(inputs, hidden), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))


def eight_gaussians(n):
    angle = torch.randint(8, (n,)) * math.pi / 4
    return (2 * torch.stack([angle.cos(), angle.sin()], 1) + 0.02 * torch.randn(n, 2)) / 1.414


def encode(x):
    """Mean and log-variance of q(z|x), a draw from it, and its KL from N(0, I)."""
    mean, logvar = encoder(x).chunk(2, dim=1)
    logvar = logvar.clamp(-20, 10)
    z = mean + torch.randn_like(mean) * (logvar / 2).exp()
    return z, 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(1)


def error(x, y):
    return ((x - y) ** 2).sum(1)


def update(optimizer, loss):
    encoder.zero_grad()
    decoder.zero_grad()
    loss.backward()
    optimizer.step()


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=8000)
parser.add_argument("--out", default="standalone.png")
arguments = parser.parse_args()

torch.manual_seed(0)
encoder, decoder = mlp(2, 2 * LATENT), mlp(LATENT, 2)
optimizer_e = torch.optim.Adam(encoder.parameters(), 5e-4)
optimizer_d = torch.optim.Adam(decoder.parameters(), 5e-4)

for step in range(arguments.steps):
    for optimizer in (optimizer_e, optimizer_d):
        optimizer.param_groups[0]["lr"] = 5e-4 * (1 + math.cos(math.pi * step / arguments.steps)) / 2
    x = eight_gaussians(BATCH)
    z, kl = encode(x)

    if step < min(WARMUP, arguments.steps // 8):  # start as a VAE that covers every mode
        update(optimizer_e, S * (0.8 * error(x, decoder(z)) + 0.05 * kl).mean())
        optimizer_d.step()
        continue

    # Encoder: raise the ELBO of real points, lower that of fakes: reconstructions and samples from the prior.
    z_prior = torch.randn(BATCH, LATENT)
    loss = S * (BETA_REC * error(x, decoder(z)) + BETA_KL * kl).mean()
    for fake in (decoder(z).detach(), decoder(z_prior).detach()):
        z_fake, kl_fake = encode(fake)
        loss = loss + 0.25 * torch.exp(-2 * S * (BETA_REC * error(fake, decoder(z_fake)) + BETA_NEG * kl_fake)).mean()
    update(optimizer_e, loss)

    # Decoder: reconstruct, and make fakes whose posterior is close to the prior.
    z = z.detach()
    kl_fakes = [encode(decoder(latent))[1].mean() for latent in (z, z_prior)]
    loss_d = S * (BETA_REC * error(x, decoder(z)).mean() + BETA_KL * (kl_fakes[0] + kl_fakes[1]) / 2)
    update(optimizer_d, loss_d)

    if step % 500 == 0:
        print(f"step {step:5d}  KL real {kl.mean():.2f}  reconstruction {kl_fakes[0]:.2f}  sample {kl_fakes[1]:.2f}")

with torch.no_grad():
    panels = {"real": eight_gaussians(2000), "sample": decoder(torch.randn(2000, LATENT))}
figure, axes = plt.subplots(1, 2, figsize=(6, 3.2), layout="constrained")
for axis, (title, points) in zip(axes, panels.items(), strict=True):
    axis.scatter(*points.T, s=2)
    axis.set(title=title, xlim=(-2, 2), ylim=(-2, 2), aspect="equal")
figure.savefig(arguments.out, dpi=110)
print("wrote", arguments.out)
