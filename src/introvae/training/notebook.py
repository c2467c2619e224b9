"""What a notebook shows of a run."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from introvae.training.run import Run

MEASURED = 12
"""So many measures are shown at most; `Run.report` has all."""


def html_of(run: Run) -> str:
    """A run in a few lines of HTML that stand alone: its settings, its last step, its measures, its last picture."""
    config = run.config()
    facts = {
        "objective": type(config.objective).__name__,
        "data": config.data,
        "network": f"{config.network}, {config.latent_dim} latents",
        "steps": f"{config.steps or ''}",
    }
    rows = run.log()
    if rows:
        last = rows[-1]
        facts["steps"] = f"{last['step']:,} of {config.steps or last['step']:,}"
        shown = ("rec", "kl_real", "kl_reconstruction", "kl_sample")
        facts["last step"] = ", ".join(f"{name} {last[name]:.4g}" for name in shown if name in last)
    parts = [f"<p><b>{escape(str(run.folder))}</b></p>", _table(facts)]
    if run.report_path.is_file():
        measured = run.report().get("metrics", {})
        single = {
            name: about["value"] for name, about in measured.items() if isinstance(about.get("value"), int | float)
        }
        parts.append(_table({name: f"{value:.4g}" for name, value in list(single.items())[:MEASURED]}))
    if pictures := run.pictures():
        content = base64.b64encode(pictures[-1][1].read_bytes()).decode()
        parts.append(f'<img alt="step {pictures[-1][0]}" src="data:image/png;base64,{content}">')
    return "".join(parts)


def _table(rows: dict[str, Any]) -> str:
    lines = (f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows.items())
    return f"<table>{''.join(lines)}</table>"
