"""One of the processes that test_parallel starts: `python parallel_worker.py FOLDER`, with a launcher's environment.

It leaves all that it saw in FOLDER/RANK.pt. In FOLDER are runs to go on with: "one", which one process began, and
"terminated", which two did.
"""

from __future__ import annotations

import io
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from commands import call
from introvae import VAE, ASIntroVAE, ConfigError, IntrospectiveStep, Noise, Objective, SoftIntroVAE, Warmup
from introvae.parallel import Alone, Peers
from introvae.training.readback import Readback
from test_step import CASES as OBJECTIVES
from test_step import SOFT, build

STEPS, BATCH = 8, 6


class Uncoupled(ASIntroVAE):
    """AS-IntroVAE as it would be if every process compared its own samples only."""

    batch_coupled = False


@dataclass(frozen=True)
class Case:
    """What is trained."""

    network: str
    objective: Objective
    warming: bool = False


def cases() -> dict[str, Case]:
    kinds: dict[str, tuple[Objective, bool]] = {
        **{name: (objective(**settings), False) for name, (objective, _, settings) in OBJECTIVES.items()},
        "vae": (VAE(beta_rec=0.8, beta_kl=0.05), False),
        "warmup": (SoftIntroVAE(beta_neg=1.0), True),
    }
    found = {f"{name}-{network}": Case(network, *kind) for name, kind in kinds.items() for network in ("mlp", "conv")}
    return {**found, "uncoupled": Case("mlp", Uncoupled(**SOFT))}


def trained(case: Case, peers: Alone) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The weights after some steps on this process' rows of batches that are the same for all, and the last record."""
    model = build(case.network)
    step = IntrospectiveStep(model, case.objective, warmup=Warmup(STEPS, 0.8, 0.05), lr=1e-3, peers=peers)
    generator = torch.Generator().manual_seed(2)
    rows, readback = peers.rows(BATCH), Readback(peers)
    for index in range(STEPS):
        x = torch.rand(BATCH, *(model.shape or ()), generator=generator, dtype=torch.float64)
        noise = Noise.draw(BATCH, model.latent_dim, generator, dtype=torch.float64)
        # c grows from 0 to nearly 1: at 1 AS-IntroVAE's distance would have no weight.
        values = {name: x.new_tensor(v) for name, v in case.objective.values(index / (5 * STEPS)).items()}
        record = step(x[rows], noise.rows(rows), values, warming=case.warming)
    readback.put({}, record, {})
    (row,) = readback.rows(wait=True)
    return {name: weight.clone() for name, weight in model.state_dict().items()}, row


def own_rows(rank: int) -> Tensor:
    """`[2, 3]`, not contiguous: what a process has to gather."""
    return (torch.arange(6, dtype=torch.float64).view(3, 2).T + 10 * rank).requires_grad_()


def exchanged(peers: Peers, folder: Path) -> dict[str, Any]:
    """What came of each exchange."""
    rank = peers.index
    found: dict[str, Any] = {"index": rank, "count": peers.count, "first": peers.first, "device": str(peers.device)}

    rows = peers.rows(6)
    found["rows"] = [rows.start, rows.stop]
    try:
        peers.rows(7)
    except ConfigError as error:
        found["refused"] = str(error)

    averaged = [torch.tensor(4.0 * rank), torch.full((2, 3), 2.0 * rank).T, torch.tensor([1.0, 2.0 + rank])]
    peers.average(averaged)
    found["averaged"] = averaged

    x = own_rows(rank)
    gathered = peers.gather(x)
    gathered.square().sum().backward()
    found["gathered"], found["gradient"] = gathered.detach(), x.grad
    y = own_rows(rank)
    ((rank + 1) * peers.gather(y).square().sum()).backward()
    found["gradient of unlike losses"] = y.grad

    found["any"] = [
        peers.any(up[rank], peers.device) for up in ((False, False), (False, True), (True, False), (True, True))
    ]
    found["told"] = [peers.tell({"rank": rank, "none": None}), str(peers.tell(Path(f"run-{rank}")))]

    if not peers.first:
        time.sleep(0.3)
        (folder / "late").touch()
    peers.wait()
    found["waited"] = (folder / "late").exists()

    model = build("conv-batch", seed=rank)  # its weights are channels last, its buffers of two types
    for buffer in model.buffers():
        buffer.fill_(rank + 3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    peers.copy_first(model)
    found["copied"] = {"before": before, "after": dict(model.state_dict())}
    return found


def commands(folder: Path) -> dict[str, list[str]]:
    """Commands that all processes run, by name."""
    fit = ["fit", "--recipe", "none", "--network", "tiny-conv", "--steps", "2", "--device", "cpu"]
    fit += ["--precision", "float32", "--quiet", "--batch_size"]
    digits, norm = ["--data", "digits"], ["--out", str(folder / "norm"), "--network_options.norm"]
    return {
        "batch_size": [*fit, "15", *digits, "--out", str(folder / "odd")],
        "norm": [*fit, "16", *digits, *norm, "batch"],
        "remedy": [*fit, "16", *digits, *norm, "layer"],
        "one": ["fit", "--resume", str(folder / "one"), "--quiet"],
        "terminated": ["fit", "--resume", str(folder / "terminated"), "--quiet"],
        "dry_run": [*fit, "16", *digits, "--dry_run"],
        "evaluate": ["evaluate", str(folder / "norm"), "--metrics", "mse", "--device", "cpu"],
        # Only the first meets these. Last: where the others are not told, they wait until it has ended.
        "taken": [*fit, "16", *digits, "--out", str(folder / "one")],
        "missing": [*fit, "16", "--data", str(folder / "none.npy"), "--out", str(folder / "missing")],
    }


def said(words: list[str]) -> list[Any]:
    """The exit code of a command and what it printed; 1 and where it came to where it crashed."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = call(*words)
        except Exception:
            code = 1
            traceback.print_exc()
    return [code, out.getvalue(), err.getvalue()]


def main(folder: Path) -> None:
    peers = Peers(cpu=True)
    found = {
        "trained": {name: trained(case, peers) for name, case in cases().items()},
        "exchanged": exchanged(peers, folder),
        "said": {name: said(words) for name, words in commands(folder).items()},
    }
    torch.save(found, folder / f"{peers.index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
