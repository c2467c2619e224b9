"""Resumable state: one dict of tensors and plain values, written whole or not at all."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch

from introvae.errors import CheckpointError
from introvae.files import write_atomically

FORMAT = 1
KEEP = 2
"""How many of a run's newest checkpoints stay on disk."""


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `step_NNNNNNNN.pt` and remove all but the newest `KEEP`."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "step": step, **state}, buffer)
    path = checkpoint_path(folder, step)
    write_atomically(path, buffer.getvalue())
    for old in list_checkpoints(folder)[:-KEEP]:
        old.unlink(missing_ok=True)
    return path


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step_{step:08d}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted(folder.glob("step_????????.pt"))


def load_checkpoint(path: Path, device: torch.device | str) -> dict[str, Any]:
    """Read a checkpoint; no code in it is run.

    Raises:
        CheckpointError: the file is cut, is no checkpoint of this package or has another format.
    """
    others = [other.name for other in list_checkpoints(path.parent) if other != path]
    remedy = f"remove it to go on from {others[-1]}" if others else "start the run anew"
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is cut or no checkpoint: {remedy}") from error
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise CheckpointError(f"{path} is no checkpoint of a run: {remedy}")
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} has format {state.get('format')}, this version reads {FORMAT}: "
            "resume with the version that made it"
        )
    return state
