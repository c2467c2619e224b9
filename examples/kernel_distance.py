"""Makes the figure of docs/kernel-distance.md: AS-IntroVAE's distance D against numerical integration in one dimension,
and its joint and marginal kernels over 2 to 512 latent dimensions, in float32 and float64.

    python examples/kernel_distance.py               # a minute on one core
    python examples/kernel_distance.py --repeats 5   # a look at what it does
"""

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Independent, Normal

from introvae import DiagonalGaussian
from introvae.objectives import as_distance

DIMS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
TYPICAL, SHARP = (-3.0, -1.0), (-7.0, -5.0)  # ranges of the posteriors' log-variances
BATCH, SHIFT = 64, 0.5  # posteriors a batch; what the second batch's means are moved by in each dimension
BLUE, GREEN, RED, GREY = "#1f4e79", "#4c956c", "#b5402f", "#777777"


def posteriors(
    n: int, dim: int, seed: int, logvars: tuple[float, float] = TYPICAL, shift: float = 0.0, dtype=torch.float64
) -> DiagonalGaussian:
    """`[n, dim]`: log-variance uniform, mean ~ N(shift, 1 - variance), so that the aggregate is N(shift, I)."""
    generator = torch.Generator().manual_seed(seed)
    low, high = logvars
    logvar = low + (high - low) * torch.rand(n, dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    return DiagonalGaussian((shift + noise * (1 - logvar.exp()).sqrt()).to(dtype), logvar.to(dtype))


def overlaps(a: DiagonalGaussian, b: DiagonalGaussian, kernel: str) -> Tensor:
    """Kernel of each pair, `[N, M]`, written a second time: the package refuses "joint" above 8 dimensions."""
    density = Normal(b.mean, (a.variance[:, None] + b.variance).sqrt())
    if kernel == "joint":
        return Independent(density, 1).log_prob(a.mean[:, None]).exp()
    return density.log_prob(a.mean[:, None]).exp().mean(dim=-1)


def mean_of(pairs: Tensor, unbiased: bool) -> Tensor:
    """Mean over the pairs `[N, N]` of one batch, without those of a posterior with itself if `unbiased`."""
    return pairs[~torch.eye(len(pairs), dtype=torch.bool)].mean() if unbiased else pairs.mean()


def distance(a: DiagonalGaussian, b: DiagonalGaussian, kernel: str, unbiased: bool = True) -> Tensor:
    own = (mean_of(overlaps(p, p, kernel), unbiased) for p in (a, b))
    return sum(own, start=-2 * overlaps(a, b, kernel).mean())


def integrated(a: DiagonalGaussian, b: DiagonalGaussian, points: int = 5001) -> tuple[float, float]:
    """The biased and the unbiased D of two batches `[N, 1]` by the trapezoidal rule over z.

    The biased one is the integral of the squared difference of the two mixtures' densities; the unbiased one needs the
    integral of each pair's product.
    """
    reach = 10 * torch.cat([a.variance, b.variance]).max().sqrt() + torch.cat([a.mean, b.mean]).abs().max()
    z = torch.linspace(-reach.item(), reach.item(), points, dtype=torch.float64)
    step = z[1] - z[0]  # the ends' half weights fall on densities that are zero there
    p, q = (Normal(batch.mean, batch.variance.sqrt()).log_prob(z).exp() for batch in (a, b))
    biased = ((p.mean(0) - q.mean(0)).square() * step).sum()
    unbiased = sum(mean_of(r @ r.T * step, True) for r in (p, q)) - 2 * (p @ q.T * step).mean()
    return biased.item(), float(unbiased)


def expected(dim: int, kernel: str, shift: float = SHIFT) -> float:
    """What D is on average: the squared L2 distance of N(0, I) and N(shift, I), or its mean over the dimensions."""
    d = dim if kernel == "joint" else 1
    return 2 * (4 * math.pi) ** (-d / 2) * -math.expm1(-d * shift**2 / 4)


def measured(dim: int, kernel: str, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """One kernel evaluation, and D, its noise and its gradient over pairs of batches whose distributions differ."""
    distances, gradients, of_kl = [], [], []
    for seed in range(repeats):
        a, b = (
            posteriors(BATCH, dim, 2 * seed, dtype=dtype),
            posteriors(BATCH, dim, 2 * seed + 1, TYPICAL, SHIFT, dtype),
        )
        b.mean.requires_grad_()
        distances.append(distance(a, b, kernel))
        gradients.append(torch.autograd.grad(distances[-1], b.mean)[0].double().norm())
        of_kl.append(b.mean.detach().norm() / BATCH)  # the mean KL's gradient, which D competes with
    drawn = torch.stack(distances).detach().double()
    a, b, sharp = (posteriors(BATCH, dim, i, r, dtype=dtype) for i, r in enumerate((TYPICAL, TYPICAL, SHARP)))
    return {
        "two posteriors": overlaps(a, b, kernel).median().item(),
        "one with itself": overlaps(a, a, kernel).diagonal().median().item(),
        "sharp one with itself": overlaps(sharp, sharp, kernel).diagonal().median().item(),
        "D": drawn.mean().abs().item(),
        "gradient": torch.stack(gradients).median().item(),
        "KL's gradient": torch.stack(of_kl).median().item(),
        "signal/noise": (drawn.mean().abs() / drawn.std()).item(),  # NaN where every D is 0
    }


def draw_check(axis) -> None:
    """D over the separation of two batches in one dimension: the package's, and by numerical integration."""
    separations = torch.linspace(0, 5, 41).tolist()
    worst = 0.0
    for logvar, colour in ((-2, BLUE), (-4, GREEN), (-6, RED)):
        batches = [[posteriors(BATCH, 1, i, (logvar - 1, logvar + 1), i * s) for i in (0, 1)] for s in separations]
        exact_of = torch.tensor([integrated(a, b) for a, b in batches], dtype=torch.float64)
        for unbiased, exact in ((False, exact_of[:, 0].tolist()), (True, exact_of[:, 1].tolist())):
            ours = [as_distance(a, b, unbiased=unbiased).item() for a, b in batches]
            worst = max(worst, *(abs(d / e - 1) for d, e in zip(ours, exact, strict=True)))
            label = None if unbiased else f"log-variance {logvar} ± 1"
            axis.plot(separations, ours, "--" if unbiased else "-", color=colour, lw=1.3, label=label)
            axis.plot(separations[::2], exact[::2], "o", color=colour, ms=3.5, mfc="white", mew=0.9)
    axis.plot([], [], "-", color=GREY, label="biased: pairs i = i kept")
    axis.plot([], [], "--", color=GREY, label="unbiased: left out")
    axis.plot([], [], "o", color=GREY, ms=3.5, mfc="white", label="numerical integration")
    title = f"D in one dimension, {BATCH} posteriors a batch"
    axis.set(title=title, xlabel="separation of the batches", ylim=(-0.15, 1.15))
    axis.legend(fontsize=8, frameon=False, loc="upper left", ncols=2)
    axis.text(0.98, 0.02, f"largest relative difference {worst:.0e}", transform=axis.transAxes, ha="right", fontsize=8)
    print(f"1 dimension: largest relative difference from numerical integration {worst:.1e}")


def draw_line(axis, double: list[float], single: list[float], colour: str, label: str) -> None:
    """A line of float64 values, circles where float32 has a value, crosses at the frame where it has none."""
    axis.plot(DIMS, double, color=colour, lw=1.3, label=label)
    bottom, top = axis.get_ylim()
    for dim, value in zip(DIMS, single, strict=True):
        lost = not bottom < value < top
        height = (top if value >= top else bottom) if lost else value
        axis.plot(dim, height, "x" if lost else "o", color=colour, ms=5, mew=1.6, clip_on=False, zorder=5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/kernel-distance.png"), help="the figure")
    parser.add_argument("--repeats", type=int, default=50, help="pairs of batches for each point")
    arguments = parser.parse_args()

    figure = Figure(figsize=(12, 6.6), layout="constrained")
    axes = figure.subplot_mosaic([["1D", "kernel", "D"], ["1D", "gradient", "signal/noise"]], width_ratios=(1.2, 1, 1))
    draw_check(axes["1D"])
    for name, title, limits, ticks in (
        ("kernel", "one kernel evaluation (median)", (1e-60, 1e120), range(-60, 121, 30)),
        ("D", "|D| of shifted batches (dotted: expected)", (1e-60, 1e3), range(-60, 1, 10)),
        ("gradient", "norm of the gradient for the means", (1e-60, 1e3), range(-60, 1, 10)),
        ("signal/noise", "|mean D| / standard deviation of D", (0.05, 100), range(-1, 3)),
    ):
        axes[name].set(title=title, xscale="log", yscale="log", ylim=limits, xticks=DIMS, xticklabels=DIMS)
        axes[name].set_yticks([10.0**exponent for exponent in ticks])
        axes[name].minorticks_off()
    for kernel, colour in (("marginal", BLUE), ("joint", RED)):
        double, single = (
            [measured(z, kernel, dtype, arguments.repeats) for z in DIMS] for dtype in (torch.float64, torch.float32)
        )
        for dim, row in zip(DIMS, single, strict=True):
            print(f"{kernel} {dim:3d}  " + "  ".join(f"{name} {value:.1e}" for name, value in row.items()))
        lines = [("kernel", "two posteriors", colour)] + [
            (name, name, colour) for name in ("D", "gradient", "signal/noise")
        ]
        if kernel == "joint":
            lines += [("kernel", "one with itself", "#d98c5f"), ("kernel", "sharp one with itself", "#8e5572")]
        for panel, name, line_colour in lines:
            exact, trained = ([row[name] for row in rows] for rows in (double, single))
            draw_line(axes[panel], exact, trained, line_colour, f"{kernel}, {name}" if panel == "kernel" else kernel)
        axes["D"].plot(DIMS, [expected(z, kernel) for z in DIMS], ":", color=colour, lw=1.3)
    axes["gradient"].plot(
        DIMS, [row["KL's gradient"] for row in double], ":", color=GREY, lw=1.3, label="of the mean KL"
    )
    for name in ("kernel", "gradient", "signal/noise"):
        axes[name].legend(fontsize=8, frameon=False, loc="lower left" if name == "gradient" else "upper left")
    axes["signal/noise"].axhline(1, color=GREY, lw=0.8)
    for name in ("gradient", "signal/noise"):
        axes[name].set_xlabel("latent dimensions")
    key = "lines: float64    circles: float32    crosses: in float32 nothing is left but 0 (below) or infinity (above)"
    figure.supxlabel(key, fontsize=9, x=0.99, ha="right")
    for axis in axes.values():
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=100)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
