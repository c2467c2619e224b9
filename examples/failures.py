"""Makes the pictures of docs/numbers.md: trainings that go wrong in known ways, beside one that does not.

    python examples/failures.py                    # all of them into docs/failures, four minutes on one core
    python examples/failures.py asleep --out .     # one of them
    python examples/failures.py --steps 20 --out . # a look at what it does

Each picture has the curves of the log above real data, reconstructions and samples. The guard is off, since it would
mend some of them. Networks are small, so that each run takes seconds.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

import introvae
from introvae import VAE, SoftIntroVAE, Warmup
from introvae.training.curves import curves

IN_THE_PLANE: dict[str, Any] = {
    "data": "density:8gaussians",
    "network_options": {"hidden": 64, "waves": 32, "encoder_frequency": 0.2},
    "batch_size": 128,
    "steps": 3000,
    "lr": 1e-3,
    "lr_schedule": "cosine",
    "ema": 0.99,
}
DIGITS: dict[str, Any] = {
    "data": "digits",
    "network": "mlp",
    "network_options": {"hidden": 128},
    "latent_dim": 16,
    "steps": 3000,
    "lr": 1e-3,
    "lr_schedule": "cosine",
    "ema": 0.99,
}
GENTLE = Warmup(share=0.2, beta_rec=1.0, beta_kl=0.1)
COVERING = Warmup(share=0.2, beta_rec=0.8, beta_kl=0.05)
AS_PUBLISHED = Warmup(share=0.2, beta_rec=0.2, beta_kl=0.3)

CASES: dict[str, dict[str, Any]] = {
    "healthy": {**DIGITS, "objective": SoftIntroVAE(beta_kl=0.2, beta_neg=25), "warmup": GENTLE},
    "collapse": {**DIGITS, "objective": VAE(beta_kl=30)},
    "asleep": {**DIGITS, "objective": SoftIntroVAE(beta_kl=0.2, beta_neg=400), "warmup": GENTLE},
    "runaway": {**DIGITS, "objective": SoftIntroVAE(beta_kl=0.2, beta_neg=1), "warmup": GENTLE},
    "rate": {
        **DIGITS,
        "objective": SoftIntroVAE(beta_kl=0.2, beta_neg=25),
        "warmup": GENTLE,
        "lr": 0.03,
        "lr_schedule": "constant",
    },
    "covered": {**IN_THE_PLANE, "objective": SoftIntroVAE(0.2, 0.3, 0.9), "warmup": COVERING},
    "warmup": {**IN_THE_PLANE, "objective": SoftIntroVAE(0.2, 0.3, 0.9), "warmup": AS_PUBLISHED},
    "modes": {**IN_THE_PLANE, "objective": SoftIntroVAE(0.2, 0.9, 0.9), "warmup": COVERING},
}
"""What each run is. `healthy` is a small form of the recipe for digits, `covered` of that for 8 Gaussians; each other
one has one thing wrong.
"""


def draw(run: introvae.Run, path: Path) -> None:
    """The curves of a run above its last picture."""
    buffer = io.BytesIO()
    curves(run.log(), images=run.config().data == "digits").savefig(buffer, dpi=100)
    parts = [Image.open(buffer).convert("RGB"), Image.open(run.images / "final.png").convert("RGB")]
    width = max(part.width for part in parts)
    sheet = Image.new("RGB", (width, sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        sheet.paste(part, ((width - part.width) // 2, top))
        top += part.height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("docs/failures"), help="folder for the pictures")
    parser.add_argument("--steps", type=int, help="shorter runs, for a quick look")
    arguments = parser.parse_args()
    shown = ("rec", "kl_real", "kl_reconstruction", "kl_sample", "loss_encoder", "loss_decoder", "apart_fakes")
    for name in arguments.names:
        settings = CASES[name] | ({"steps": arguments.steps} if arguments.steps else {})
        with tempfile.TemporaryDirectory() as folder:
            out = str(Path(folder) / name)
            try:
                run = introvae.fit(**settings, recipe="none", guard="off", image_every=0, out=out, progress=False)
            except introvae.DivergedError as error:
                print(f"{name}: {error}")
                continue
            draw(run, arguments.out / f"{name}.png")
            last = {key: float(f"{run.log()[-1][key]:.3g}") for key in shown if key in run.log()[-1]}
            measured = introvae.evaluate(run)["metrics"]
            told = ("modes", "share_within_3_sigma", "active_units", "psnr_db", "class_entropy_nats", "confident_share")
            last |= {key: float(f"{measured[key]['value']:.3g}") for key in told if key in measured}
            print(f"{name}: {json.dumps(last)}", flush=True)


if __name__ == "__main__":
    main()
