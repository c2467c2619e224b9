"""The equilibria of Soft-IntroVAE and IntroVAE on small tables, checked by best response: can a player gain alone?

    python examples/equilibrium.py               # a few seconds: prints the gains, writes equilibrium.png

Points x and latents z are finite, encoder q(z|x) and decoder d(x|z) are tables, and p(z) is a given prior. Arrays:
`q` is (X, Z), `d` is (Z, X), rows sum to 1; `p_data` (positive) and marginals are (X,), `prior` is (Z,). Gains are in
nats; Soft-IntroVAE's players maximise, IntroVAE's minimise. What comes out is told in docs/equilibrium.md.
Sources: Daniel & Tamar, CVPR 2021 (Soft-IntroVAE); Huang et al., NeurIPS 2018, Theorem 1 (IntroVAE).
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import brentq, minimize
from scipy.special import rel_entr, softmax, xlogy

Array = np.ndarray


# Soft-IntroVAE: the two payoffs.
def elbo(q: Array, d: Array, prior: Array) -> Array:
    """W(x) = E_q log d(x|z) - KL(q(.|x) || p), shape (X,), at most log p_d(x); -inf if q has a z that never makes x."""
    return -rel_entr(q, prior * d.T).sum(1)


def posterior(d: Array, prior: Array) -> Array:
    """The true posterior d(x|z) p(z) / p_d(x), shape (X, Z): the encoder at which W = log p_d."""
    return prior * d.T / (prior @ d)[:, None]


def encoder_payoff(w: Array, p_d: Array, p_data: Array, alpha: float) -> float:
    """E_data W - E_d exp(alpha W) / alpha."""
    return float(p_data @ w - p_d @ np.exp(alpha * w) / alpha)


def decoder_payoff(w: Array, p_d: Array, p_data: Array, gamma: float) -> float:
    """E_data W + gamma E_d W."""
    return float((p_data + gamma * p_d) @ w)


# The distribution that the paper names.
def regularised(p: Array, p_data: Array, gamma: float) -> float:
    """KL(p_data || p) + gamma H(p)."""
    return float(rel_entr(p_data, p).sum() - gamma * xlogy(p, p).sum())


def sharpened(p_data: Array, gamma: float) -> Array:
    """The global argmin of KL(p_data || p) + gamma H(p), shape (X,).

    Stationary: p_data / p + gamma log p is one constant c for all x. Each x has a root below p_data / gamma, where the
    sum is convex, and one above. A minimum has at most one x above (second order), and that is the mode. So all
    candidates lie on a line: choose the mode's mass, take c from it and the lower root elsewhere, and ask for sum 1.
    """
    mode = int(p_data.argmax())
    others = np.delete(p_data, mode)[:, None]

    def lower_roots(mass: Array) -> Array:
        # With p = p_data / (gamma v) the equation is v - log v = k, v >= 1; Newton from the right is monotone.
        c = p_data[mode] / mass + gamma * np.log(mass)
        k = np.maximum(c / gamma - np.log(others / gamma), 1 + 1e-9)
        v = 2 * k
        for _ in range(50):
            v = (k + np.log(v) - 1) * v / (v - 1)
        return others / (gamma * v)

    def surplus(mass: Array) -> Array:
        return lower_roots(mass).sum(0) + mass - 1

    if gamma == 0:
        return p_data.copy()
    start = np.log(p_data[mode] / (1 - p_data[mode])) - 1e-3  # the mode never loses mass
    grid = 1 / (1 + np.exp(-np.linspace(start, 15, 2000)))
    sums = surplus(grid)
    candidates = []
    for i in np.flatnonzero(sums[:-1] * sums[1:] <= 0):
        mass = np.array([brentq(lambda m: surplus(np.array([m]))[0], grid[i], grid[i + 1], xtol=1e-15)])
        p = np.insert(lower_roots(mass)[:, 0], mode, mass)
        candidates.append(p / p.sum())
    return min(candidates, key=lambda p: regularised(p, p_data, gamma))


# Best responses.
def condition(p_d: Array, p_data: Array, alpha: float) -> bool:
    """Whether p_d <= p_data^(1 / (alpha + 1)) at each x."""
    return bool((p_d <= p_data ** (1 / (alpha + 1))).all())


def encoder_answer(d: Array, prior: Array, p_data: Array, alpha: float) -> Array:
    """The best encoder against a decoder, shape (X, Z), exact.

    The payoff is a sum over x of concave functions of W(x) that are greatest at W = log(p_data / p_d) / alpha. The
    encoder can make W anything from log p_d (the posterior) down to its worst single latent: by mixing the two.
    """
    p_d, best = prior @ d, posterior(d, prior)
    wanted = np.log(p_data / p_d) / alpha
    worst = np.eye(len(prior))[(prior * d.T).argmin(1)]
    low, high = np.zeros(len(p_d)), np.ones(len(p_d))  # the share of the worst latent; W falls as it grows
    for _ in range(60):
        share = (low + high) / 2
        enough = elbo(best + share[:, None] * (worst - best), d, prior) > wanted
        low, high = np.where(enough, share, low), np.where(enough, high, share)
    share = np.where(wanted >= np.log(p_d), 0, low)
    return best + share[:, None] * (worst - best)


def encoder_gain(q: Array, d: Array, prior: Array, p_data: Array, alpha: float) -> float:
    """What the encoder gains alone by its best answer, exact."""
    tables = encoder_answer(d, prior, p_data, alpha), q
    best, now = (encoder_payoff(elbo(t, d, prior), prior @ d, p_data, alpha) for t in tables)
    return best - now


def ascend(objective: Callable[[Array], tuple[float, Array]], starts: list[Array]) -> tuple[float, Array]:
    """The greatest value found of an objective (value, gradient) of decoder tables, and its table; L-BFGS on logits."""

    def negative(logits: Array) -> tuple[float, Array]:
        d = softmax(logits.reshape(starts[0].shape), axis=1)
        value, slope = objective(d)
        return -value, -(d * (slope - (d * slope).sum(1, keepdims=True))).ravel()

    runs = [minimize(negative, np.log(s).ravel(), jac=True, method="L-BFGS-B") for s in starts]
    best = min(runs, key=lambda run: run.fun)
    return -best.fun, softmax(best.x.reshape(starts[0].shape), axis=1)


def random_tables(n: int, shape: tuple[int, int], rng: np.random.Generator) -> list[Array]:
    """Positive tables from nearly constant to nearly one point per latent."""
    return [softmax(scale * rng.normal(size=shape), axis=1) for scale in np.geomspace(0.3, 10, n)]


def decoder_gain(
    q: Array, d: Array, prior: Array, p_data: Array, gamma: float, rng: np.random.Generator, n: int = 8
) -> tuple[float, float]:
    """What the decoder gains alone: (found by search, upper bound); the truth lies between.

    Bound: W <= log p_d, so that whatever the decoder does it gets at most E_data log p_d + gamma E_d log p_d, and the
    most of that is at `sharpened`. Search: L-BFGS from the present table, from that distribution without latents, from
    two mixtures of both and from n random tables.
    """

    def objective(table: Array) -> tuple[float, Array]:
        p_d, table = prior @ table, np.maximum(table, 1e-300)
        w = elbo(q, table, prior)
        slope = gamma * prior[:, None] * w + (p_data + gamma * p_d) * q.T / table
        return decoder_payoff(w, p_d, p_data, gamma), slope

    p_star = sharpened(p_data, gamma)
    now = decoder_payoff(elbo(q, d, prior), prior @ d, p_data, gamma)
    nearby = [(1 - blur) * d + blur * p_star for blur in (1e-9, 0.02, 0.2, 1.0)]  # logits hardly move at a vertex
    starts = [*nearby, *random_tables(n, d.shape, rng)]
    bound = decoder_payoff(np.log(p_star), p_star, p_data, gamma) - now
    return max(ascend(objective, starts)[0] - now, 0.0), bound


def leading_decoder(
    prior: Array, p_data: Array, alpha: float, gamma: float, rng: np.random.Generator, n: int = 8
) -> Array:
    """The best decoder (Z, X) found when the encoder answers each decoder with its own best response (Stackelberg)."""

    def objective(d: Array) -> tuple[float, Array]:
        p_d = np.maximum(prior @ d, 1e-300)
        wanted = np.log(p_data / p_d) / alpha  # taken as within the encoder's reach
        w, slope = np.minimum(np.log(p_d), wanted), np.where(wanted < np.log(p_d), -1 / alpha, 1) / p_d
        return decoder_payoff(w, p_d, p_data, gamma), prior[:, None] * (gamma * w + (p_data + gamma * p_d) * slope)

    return ascend(objective, random_tables(n, (len(prior), len(p_data)), rng))[1]


# Decoders with a given marginal.
def coupled(p: Array, prior: Array, share: float) -> Array:
    """A decoder (Z, X) with marginal p. At share 0 a latent tells nothing of x, at share 1 nearly all of it.

    Share 1 lays p and the prior side by side on [0, 1]; what x and z have in common is their joint mass.
    """
    right_x, right_z = p.cumsum(), prior.cumsum()[:, None]
    overlap = np.minimum(right_x, right_z) - np.maximum(right_x - p, right_z - prior[:, None])
    joint = np.where(overlap > 1e-12, overlap, 0)
    return share * joint / joint.sum(1, keepdims=True) + (1 - share) * p


def code_is_answer(p: Array, p_data: Array, gamma: float) -> bool:
    """Whether a code (each latent makes one point) of marginal p is proved the best answer to its posterior.

    The proof is in docs/equilibrium.md. It asks little: p and p_data need not be close.
    """
    ratio, spread = gamma * p / p_data, np.log(p.max() / p)
    return bool(np.where(ratio <= 1, ratio * (spread - 1) <= 1, np.log(ratio) + spread <= 2).all())


# IntroVAE's Theorem 1: the encoder is an energy table E(x) >= 0, the generator a table p_g(x).
def introvae_gains(energy: Array, p_g: Array, p_data: Array, margin: float) -> tuple[float, float]:
    """What encoder and generator gain alone, exact.

    V = E_data E + E_g [m - E]^+ is least pointwise at E = 0 or m: m sum min(p_data, p_g). U = E_g E is least at min E.
    """
    v = p_data @ energy + p_g @ np.maximum(margin - energy, 0)
    return float(v - margin * np.minimum(p_data, p_g).sum()), float(p_g @ energy - energy.min())


# The figure.
P_DATA, ALPHA = np.array([0.30, 0.24, 0.18, 0.13, 0.09, 0.06]), 2.0
PRIOR = np.full(24, 1 / 24)
BLUE, GOLD, RED = "#1f4e79", "#d99a2b", "#b3392f"


def draw_distributions(axis, rng: np.random.Generator) -> None:
    """p_data, the distribution that the paper names, and the decoder found by search."""
    x = np.arange(len(P_DATA))
    axis.bar(x - 0.3, P_DATA, 0.2, color="#9aa5b1", label="p_data")
    for i, (gamma, color) in enumerate(((0.1, "#a9c4de"), (0.3, "#5b8bb8"), (0.5, BLUE))):
        p_star, found = sharpened(P_DATA, gamma), PRIOR @ leading_decoder(PRIOR, P_DATA, ALPHA, gamma, rng)
        axis.bar(x - 0.1 + 0.2 * i, p_star, 0.2, color=color, label=f"p*, $\\gamma$ = {gamma}")
        axis.plot(x - 0.1 + 0.2 * i, found, ".k", ms=4, label="decoder found" if i == 2 else None)
        print(f"gamma {gamma}: p* = {p_star.round(3)}, decoder found within {abs(found - p_star).max():.0e}")
    axis.set(title="p* = argmin KL(p_data‖p) + $\\gamma$ H(p)", xlabel="x", ylabel="probability", xticks=x)


def draw_decoder_gains(axis, rng: np.random.Generator, gamma: float = 0.3) -> None:
    """Against the true posterior, at 20 wrong marginals, by what the latents tell of x."""
    p_star = sharpened(P_DATA, gamma)
    all_counts = [1 + rng.multinomial(18, rng.dirichlet(np.full(6, 3.0))) for _ in range(20)]
    for share, color, label in ((0.0, RED, "tells nothing of x"), (0.7, GOLD, "tells some"), (1.0, BLUE, "tells x")):
        points = []
        for counts in all_counts:
            d = coupled(counts / 24, PRIOR, share)
            excess = regularised(PRIOR @ d, P_DATA, gamma) - regularised(p_star, P_DATA, gamma)
            points.append((excess, decoder_gain(posterior(d, PRIOR), d, PRIOR, P_DATA, gamma, rng, n=3)[0]))
        axis.plot(*np.transpose(points), "o", color=color, ms=4, label=f"a latent {label}")
        gains = [gain for _, gain in points]
        print(f"20 wrong marginals, a latent {label}: the decoder gains {min(gains):.3f} to {max(gains):.3f}")
    proved = sum(code_is_answer(counts / 24, P_DATA, gamma) for counts in all_counts)
    print(f"    of the last, {proved} are proved equilibria for the decoder")
    axis.plot(0, 0, "k*", ms=11, label="p*")
    axis.set(
        title=f"Decoder's gain against the posterior, $\\gamma$ = {gamma}",
        ylabel="nats",
        xlabel="excess of KL + $\\gamma$ H over that of p*",
    )


def draw_encoder_payoff(axis) -> None:
    """As a function of W at the mode, up to the greatest W, which is the posterior's."""
    for gamma, color in ((0.5, BLUE), (1.0, RED)):
        p, p_d = P_DATA[0], sharpened(P_DATA, gamma)[0]
        w = np.append(np.linspace(-1.6, np.log(p_d), 500), min(np.log(p / p_d) / ALPHA, np.log(p_d)))
        payoff = p * w - p_d * np.exp(ALPHA * w) / ALPHA
        axis.plot(w[:-1], payoff[:-1], color=color, label=f"p* = {p_d:.2f} ($\\gamma$ = {gamma:g})")
        axis.plot(w[-2], payoff[-2], "o", color=color)
        axis.plot(w[-1], payoff[-1], "D", mfc="none", color=color, ms=10)
        print(f"encoder, gamma {gamma}: leaving the posterior at the mode gains {payoff[-1] - payoff[-2]:.4f}")
    axis.plot([], [], "ok", label="posterior, W = log p*")
    axis.plot([], [], "Dk", mfc="none", label="best W")
    limit = P_DATA[0] ** (1 / (ALPHA + 1))
    axis.set(title=f"Encoder's payoff at x = 0, limit $p_{{data}}^{{1/3}}$ = {limit:.2f}", xlabel="W(x)", ylabel="nats")


def draw_introvae(axis, rng: np.random.Generator, margin: float = 2.0) -> None:
    """Random energies and generators, and the saddle points."""
    points = []
    for i in range(300):
        p_g = P_DATA + rng.uniform() * (rng.dirichlet(np.ones(6)) - P_DATA)
        energy = rng.uniform(0, margin) + rng.uniform(0, 0.5) * rng.normal(size=6)
        energy = margin * (p_g > P_DATA) if i % 3 == 0 else np.maximum(energy, 0)  # a third: the encoder's best answer
        gains = sum(introvae_gains(energy, p_g, P_DATA, margin))
        points.append((np.abs(p_g - P_DATA).sum() / 2, gains / margin))
    axis.plot(*np.transpose(points), ".", color=BLUE, ms=4, label="random")
    axis.plot([0, 0.6], [0, 0.6], color=RED, label="least possible")
    saddle = max(sum(introvae_gains(np.full(6, e), P_DATA, P_DATA, margin)) for e in np.linspace(0, margin, 9))
    axis.plot(0, saddle, "k*", ms=11, label="p_g = p_data, E constant in [0, m]")
    print(f"IntroVAE: at most {saddle:.0e} to gain at the saddle points")
    axis.set(title="IntroVAE: gains of both players / m", xlabel="total variation between p_g and p_data")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("equilibrium.png"), help="the figure")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    figure = Figure(figsize=(9, 6.6), layout="constrained")
    axes = figure.subplots(2, 2)
    draw_distributions(axes[0, 0], rng)
    draw_decoder_gains(axes[0, 1], rng)
    draw_encoder_payoff(axes[1, 0])
    draw_introvae(axes[1, 1], rng)
    for axis in axes.flat:
        axis.legend(fontsize=8, frameon=False)
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=110)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
