"""How long a step takes with each normaliser: `python benchmarks/normalisers.py --json normalisers.json`.

Steps of Soft-IntroVAE with the networks of `introvae compare --recipe normalisers`, one of each in turn, so that what
else the machine does hits all. The precision is the one that `introvae fit` takes on the machine. Times are medians,
the share is that of the step with layer normalisation.
"""

from __future__ import annotations

from functools import partial

import torch
from common import alternate, device_option, parser, progress, report

from introvae import IntrospectiveStep, IntrospectiveVAE, SoftIntroVAE
from introvae.machine import keep_freed_memory
from introvae.networks.blocks import NORMS
from introvae.precision import pick_precision

SHAPE, BATCH, CHANNELS, LATENTS = (1, 28, 28), 64, [16, 32], 16


def main() -> None:
    options = parser(__doc__)
    device_option(options)
    own = options.parse_args()
    x = torch.rand(BATCH, *SHAPE, device=own.device)
    precision = pick_precision("auto", own.device, SHAPE)
    runs = {}
    for norm in NORMS:
        model = IntrospectiveVAE.build(SHAPE, "conv", LATENTS, channels=CHANNELS, norm=norm).to(own.device)
        runs[norm] = partial(IntrospectiveStep(model, SoftIntroVAE(beta_neg=256.0), lr=1e-4, precision=precision), x)
    with keep_freed_memory():
        seconds = alternate(runs, 5 if own.short else 40, own.device, warm=2)
    cases = [
        {
            "norm": norm,
            "device": str(own.device),
            "precision": precision,
            "step_ms": round(1000 * taken, 2),
            "of_layer": taken / seconds["layer"],
        }
        for norm, taken in seconds.items()
    ]
    for case in cases:
        progress(f"{case['norm']}: {case['of_layer']:.2f}")
    report(cases, own.json, shape=SHAPE, batch=BATCH, channels=CHANNELS)


if __name__ == "__main__":
    main()
