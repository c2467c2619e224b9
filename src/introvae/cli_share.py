"""The commands that hand a model on, thin as those in `cli`: torch is imported inside them only."""

from __future__ import annotations

from pathlib import Path

from introvae.commands import parser_for


def export(words: list[str]) -> None:
    """A run's model as files that other programs run."""
    parser = parser_for(
        "export",
        "Write the encoder and the decoder as files that run without introvae, for batches of any size; each is\n"
        "loaded again and compared with the model. export.json beside them tells what they take.",
        "example:\n  introvae export runs/mine --format onnx             (extra: pip install 'introvae[onnx]')\n"
        "  introvae export runs/mine --format torch -o handover\n\n"
        "x are images in [0, 1], prepared as export.json says; z are latents, such as draws from N(0, 1).",
    )
    parser.add_argument("run", help="the run folder")
    parser.add_argument("--format", default="onnx", help="onnx (encoder.onnx) or torch (encoder.pt2); default: onnx")
    parser.add_argument("-o", "--output", help="folder of the files (default: RUN/export)")
    own = parser.parse_args(words)
    from introvae.apps import export as exporting
    from introvae.training.run import Run

    run = Run.open(own.run)
    latents = run.config().objective.encodes != "nothing"
    folder = Path(own.output) if own.output else run.folder / "export"
    for name, about in exporting.export(run.model(), folder, own.format, latents).items():
        taken = ", ".join(f"{key} {shape}" for key, shape in about["inputs"].items()).replace("'", "")
        given = ", ".join(f"{key} {shape}" for key, shape in about["outputs"].items()).replace("'", "")
        print(f"{name:<8} {about['path']}: {taken} -> {given}; at most {about['difference']:.1g} from the model")
