"""What a notebook shows of a run and of a report."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from introvae.training.run import Report, Run

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
        measured = list(_measured(run.report()).items())[:MEASURED]
        parts.append(_table({name: f"{about['value']:.4g}" for name, about in measured}))
    if pictures := run.pictures():
        content = base64.b64encode(pictures[-1][1].read_bytes()).decode()
        parts.append(f'<img alt="step {pictures[-1][0]}" src="data:image/png;base64,{content}">')
    return "".join(parts)


COLUMNS = {"value": "value", "std": "spread", "floor": "floor", "n": "n"}
"""What the table of a report has of each metric, and how the column is called."""


def html_of_report(report: Report) -> str:
    """The metrics of a report as a table, a row each; the protocol is shown when the mouse rests on it."""
    head = "".join(f"<th>{title}</th>" for title in ("metric", *COLUMNS.values()))
    rows = []
    for name, about in _measured(report).items():
        cells = "".join(f"<td>{_number(about.get(key))}</td>" for key in COLUMNS)
        protocol = escape(str(about.get("protocol", "")))
        rows.append(f'<tr title="{protocol}"><th>{escape(name)}</th>{cells}</tr>')
    title = escape(f"{report.get('data', '')}, {report.get('run', '')}".strip(", "))
    return f"<p><b>{title}</b></p><table><tr>{head}</tr>{''.join(rows)}</table>"


def _measured(report: Report) -> dict[str, dict[str, Any]]:
    """The metrics that are one number."""
    metrics = report.get("metrics", {})
    return {name: about for name, about in metrics.items() if isinstance(about.get("value"), int | float)}


def _number(value: float | int | None) -> str:
    """Four digits; counts whole, nothing for None."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _table(rows: dict[str, Any]) -> str:
    lines = (f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows.items())
    return f"<table>{''.join(lines)}</table>"
