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


def studio(words: list[str]) -> None:
    """A web page about runs and models, on this machine only."""
    parser = parser_for(
        "studio",
        "Look at trained models on a web page: samples, reconstructions, scores and heat maps of your images, ways\n"
        "through the latent space, nearest training images, the curves of a run while it trains. Several runs stand\n"
        "side by side with the same seeds. The page answers this machine only (127.0.0.1) and asks no other for\n"
        "anything; from afar, take ssh -L 7860:127.0.0.1:7860 HOST.",
        "example:\n  introvae studio runs/mine             (extra: pip install 'introvae[studio]')\n"
        "  introvae studio runs/a runs/b --port 8000\n  introvae studio runs/faces --direction smile.safetensors",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN|MODEL", help="run folders, finished or not, or saved models")
    parser.add_argument("--port", type=int, help="of the page (default: the first free one from 7860 on)")
    direction = "directions of the latent space that introvae edit --save wrote, of the first run's model"
    parser.add_argument("--direction", nargs="+", default=[], metavar="FILE", help=direction)
    own = parser.parse_args(words)
    from introvae.extras import import_extra
    from introvae.studio.page import serve
    from introvae.studio.view import View

    import_extra("gradio")  # missing, it is said before anything is loaded
    views = [View(source, own.direction if i == 0 else ()) for i, source in enumerate(own.runs)]
    serve(views, own.port, lambda address: print(f"studio   {address}\nCtrl-C ends it", flush=True))


def push(words: list[str]) -> None:
    """A run's model on the Hugging Face hub."""
    parser = parser_for(
        "push",
        "Put a run's model on the Hugging Face hub, with its settings, numbers and a picture of samples, and a card\n"
        "written from them. No image and no file name of the data goes along. introvae's from_pretrained loads it.",
        "example:\n  introvae push runs/mine owner/mine --folder card       (look at it first: nothing is sent)\n"
        "  introvae push runs/mine owner/mine --private --license cc-by-4.0",
    )
    parser.add_argument("run", help="the run folder; evaluate it before, then its numbers are in the card")
    parser.add_argument("name", metavar="OWNER/MODEL", help="on the hub; made where it is not there yet")
    parser.add_argument("--folder", help="write there what would be sent, and send nothing")
    parser.add_argument("--private", action="store_true", help="show a new one to yourself only")
    parser.add_argument("--license", help="of the model, as the hub names it, such as apache-2.0")
    parser.add_argument("--revision", help="branch to write to (default: the main one)")
    own = parser.parse_args(words)
    from introvae.apps import push as pushing
    from introvae.training.run import Run

    run = Run.open(own.run)
    if own.folder:
        print(pushing.package(run, own.folder, own.name, own.license))
        return
    print(pushing.push(run, own.name, private=own.private, license=own.license, revision=own.revision))
