"""The studio's web page: gradio's components around `view`, for this machine only."""

from __future__ import annotations

import base64
import functools
import html
import io
import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from introvae.apps.judge import HEATMAPS
from introvae.errors import ConfigError, IntrovaeError
from introvae.extras import import_extra
from introvae.studio.view import KINDS, MOST_SAMPLES, Source, View

if TYPE_CHECKING:
    from fastapi import FastAPI
    from PIL.Image import Image

HOST = "127.0.0.1"
EVERY = "every class"
PORTS = range(7860, 7960)
"""The first free one is taken where none is asked for."""
MOST_BYTES = 25 * 2**20
"""Larger uploads are refused."""
AT_ONCE = 4
"""So many requests are answered at a time; more would only share the processor."""
LOOK_EVERY = 3.0
"""Seconds between two looks at the log of a run that trains."""
GRACE = 1
"""Seconds that requests have to end after Ctrl-C."""
MOVABLE = 8
"""Sliders for latent dimensions at most, the most active ones."""
REACH = 4.0
"""How far sliders of the latent go, in standard deviations of the prior."""
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; "
    "frame-ancestors 'none'; base-uri 'self'; form-action 'self'; object-src 'none'"
)
"""With it the browser itself asks no other machine for anything."""
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
STYLE = """
.pixels img {image-rendering: pixelated; object-fit: contain}
/* A frame is as wide as its picture has pixels; the download button has its place beside a sheet, not upon it. */
.wide .image-frame, .wide .image-frame img {width: 100%}
.wide .image-frame img {height: auto}
.wide .image-container {padding-right: 24px}
/* What the sliders move stays in sight of them: that is of the window only where nothing around it scrolls. */
.gradio-container {overflow: clip !important}
.stays {position: sticky; top: 0; align-self: flex-start; z-index: 50; background: var(--body-background-fill)}
@media (max-width: 1000px) {
  .stays {flex-basis: 100%}
  .stays .pixels {height: 36vh !important}
  .beneath input, .beneath button {scroll-margin-top: calc(36vh + 80px)}
}
.aside {min-width: min(220px, 100%) !important}
.scores table {width: 100%; border-collapse: collapse}
.scores .html-container {padding: 0 !important}
@media (max-width: 600px) {.scores table {font-size: 12px !important}}
.scores th, .scores td {padding: 5px 4px; border: 1px solid var(--border-color-primary); text-align: left}
/* Who goes by keyboard sees where: gradio shows nothing at sliders, and a pale border elsewhere. */
:is(a, button, input, [tabindex]):focus-visible {
  outline: 2px solid var(--body-text-color) !important; outline-offset: 2px !important
}
input[type=range]:focus-visible {outline-offset: 6px !important}
"""
KEYS = """() => {
  const idle = ".pixels .image-container > button, .pixels a > button";
  const skip = () => document.querySelectorAll(idle).forEach(button => {button.tabIndex = -1});
  new MutationObserver(skip).observe(document.body, {childList: true, subtree: true});
  skip();
}"""
"""Of each picture, Tab finds the link that downloads it; not the picture, which gradio makes a button without a name or
a use, nor the button inside the link."""

log = logging.getLogger("introvae")


def serve(views: Sequence[View], port: int | None = None, ready: Callable[[str], Any] = print) -> None:
    """Show the page until Ctrl-C or SIGTERM, on 127.0.0.1; uploads are kept in a folder that is removed at the end.

    Arguments:
        views: what is shown.
        port: by default the first free one of `PORTS`.
        ready: called with the page's address as soon as it answers.

    Raises:
        MissingExtraError: gradio is not installed.
        ConfigError: the port is taken, or none of `PORTS` is free.
    """
    import_extra("gradio")
    import uvicorn

    listening = _listening(port)
    before = os.environ.get("GRADIO_TEMP_DIR")
    with ExitStack() as stack:
        stack.callback(listening.close)
        if threading.current_thread() is threading.main_thread():  # no other may say what a signal does
            # uvicorn stops at SIGTERM and sends it once more, which would end the process with the uploads still there.
            stack.callback(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, _exit))
        os.environ["GRADIO_TEMP_DIR"] = stack.enter_context(tempfile.TemporaryDirectory(prefix="introvae-studio-"))
        stack.callback(_restore, "GRADIO_TEMP_DIR", before)
        # Open pages listen on without end: Ctrl-C must not wait for them.
        config = uvicorn.Config(
            application(views), log_level="critical", access_log=False, timeout_graceful_shutdown=GRACE
        )
        server = uvicorn.Server(config)
        ready(f"http://{HOST}:{listening.getsockname()[1]}/")
        with suppress(KeyboardInterrupt):
            server.run(sockets=[listening])


def _exit(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)  # the code that a shell knows for it


def _restore(name: str, value: str | None) -> None:
    os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value


def _listening(port: int | None) -> socket.socket:
    for candidate in PORTS if port is None else (port,):
        found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind((HOST, candidate))
            found.listen(128)  # who asks before the page is built waits
        except (OSError, OverflowError):
            found.close()
            continue
        return found
    taken = f"port {port} is" if port is not None else f"ports {PORTS[0]} to {PORTS[-1]} are"
    raise ConfigError(f"{taken} not to be had on {HOST}: give another --port")


def application(views: Sequence[View]) -> FastAPI:
    """The page and what it asks for, as a web application that answers only as this machine.

    Arguments:
        views: what is shown, at least one.

    Raises:
        MissingExtraError: gradio is not installed.
        ConfigError: no views.
    """
    gr = import_extra("gradio")
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    if not views:
        raise ConfigError("there is nothing to show: give a run or a model")
    app = FastAPI(openapi_url=None)
    fonts = {
        "font": [gr.themes.Font("system-ui"), "sans-serif"],
        "font_mono": [gr.themes.Font("ui-monospace"), "monospace"],
    }
    gr.mount_gradio_app(
        app,
        page(views),
        path="/",
        server_name=HOST,
        footer_links=[],
        run_history=False,
        show_error=True,
        max_file_size=MOST_BYTES,
        allowed_paths=[],
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        css=STYLE,
        js=KEYS,
        theme=gr.themes.Default(**fonts),
    )
    app.add_middleware(_Headers)
    # A page of elsewhere whose name is made to point here is not answered.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return app


class _Headers:
    """Adds `HEADERS` to every answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)


def page(views: Sequence[View]) -> Any:
    """gradio's Blocks of the whole page."""
    gr = import_extra("gradio")
    named = _by_name(views)
    encoding = {name: view for name, view in named.items() if view.encodes}
    with gr.Blocks(title="introvae studio", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        head = gr.Markdown(_head(named))
        redraw = _samples_tab(gr, named)
        if encoding:
            _image_tab(gr, encoding)
            _between_tab(gr, encoding)
        _moving_tab(gr, named)
        timer = gr.Timer(LOOK_EVERY, active=not all(view.finished for view in views))
        if any(view.run is not None for view in views):
            _training_tab(gr, {name: view for name, view in named.items() if view.run is not None}, timer)
        if not all(view.finished for view in views):
            _follow(gr, blocks, named, timer, head, redraw)
    blocks.queue(default_concurrency_limit=AT_ONCE)
    return blocks


def _head(named: dict[str, View]) -> str:
    """What is shown, a line for each model."""
    return "\n\n".join(["# introvae studio", *(f"**{name}**: {view.facts()}" for name, view in named.items())])


def _follow(gr: Any, blocks: Any, named: dict[str, View], timer: Any, head: Any, redraw: Callable[[Any], Any]) -> None:
    """The head and the samples are those of the newest models, in pages that are open and in those that are loaded
    later; the training tab looks for newer models at each tick.
    """

    def now(known: list[int | None]) -> list[Any]:
        steps = [view.step for view in named.values()]
        return [_head(named), steps] if steps != known else [gr.skip()] * 2

    def newest(known: list[int | None]) -> list[Any]:
        for view in named.values():
            view.refresh()
        return now(known)

    steps = gr.State([view.step for view in named.values()])
    blocks.load(_said(newest), steps, [head, steps], show_progress="hidden")
    timer.tick(now, steps, [head, steps], show_progress="hidden")
    redraw(steps.change)


def _by_name(views: Sequence[View]) -> dict[str, View]:
    """Views by their names; of equal ones, the later have a number."""
    named: dict[str, View] = {}
    for view in views:
        name, number = view.name, 1
        while name in named:
            number += 1
            name = f"{view.name} ({number})"
        named[name] = view
    return named


def _said(function: Callable[..., Any]) -> Callable[..., Any]:
    """What was asked for and cannot be is said on the page in one line, without a traceback."""
    gr = import_extra("gradio")

    @functools.wraps(function)
    def wrapped(*words: Any) -> Any:
        try:
            return function(*words)
        except IntrovaeError as error:
            raise gr.Error(str(error), title="That will not do", print_exception=False) from None

    return wrapped


def _whole(value: float | None) -> int:
    """A number field's value, which is None when it is empty."""
    return 0 if value is None else int(value)


def _picture(gr: Any, title: str, *classes: str, column: dict[str, Any] | None = None, **settings: Any) -> Any:
    """A picture under its title, in a column of its own settings; gradio's own label would lie upon it."""
    with gr.Column(**{"min_width": 160, **(column or {})}):
        gr.Markdown(title)
        return gr.Image(
            type="pil",
            format="png",
            label=title,
            show_label=False,
            interactive=False,
            buttons=["download"],
            elem_classes=["pixels", *classes],
            **settings,
        )


def _inline(picture: Image) -> dict[str, str]:
    """A picture as gradio's page takes it from events with `postprocess=False`: whole in the answer, where gradio would
    write a file that the page must ask for. Level 1 takes a fifth of the time of zlib's usual one.
    """
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    content = base64.b64encode(buffer.getvalue()).decode()
    return {"url": f"data:image/png;base64,{content}", "orig_name": "image.png"}


def _chooser(gr: Any, named: dict[str, View]) -> Any:
    """Which of several runs; hidden where there is one."""
    return gr.Dropdown(list(named), value=next(iter(named)), label="run", visible=len(named) > 1)


def _classes(gr: Any, named: dict[str, View], *more: str) -> Any:
    """A class, for models that know some, or one of `more` choices before them."""
    names = list(dict.fromkeys(name for view in named.values() for name in view.labels))
    choices = [*more, *names]
    return gr.Dropdown(choices, value=choices[0] if names else None, label="class", visible=bool(names))


def _samples_tab(gr: Any, named: dict[str, View]) -> Callable[[Any], Any]:
    """Samples side by side; what is given back draws them anew at an event."""

    def draw(seed: float | None, number: float, truncation: float, label: str | None) -> Any:
        sheets = [
            # a class that only some of the models know is theirs alone
            _inline(view.samples(_whole(seed), int(number), truncation, label if label in view.labels else None))
            for view in named.values()
        ]
        return sheets if len(sheets) > 1 else sheets[0]  # gradio takes no list for a single picture

    with gr.Tab("Samples"):
        with gr.Row():
            seed = gr.Number(0, label="seed", precision=0, minimum=0, maximum=2**32 - 1, elem_id="seed")
            number = gr.Slider(1, min(MOST_SAMPLES, 144), value=36, step=1, label="number", min_width=240)
            truncation = gr.Slider(
                0,
                1.5,
                value=1.0,
                step=0.05,
                label="truncation (1: as trained)",
                elem_id="truncation",
                min_width=240,
            )
            label = _classes(gr, named, EVERY)
            another = gr.Button("another seed", elem_id="another")
        first = [view.samples(0, 36) for view in named.values()]  # made before anyone comes
        with gr.Row():
            shown = [
                _picture(gr, name, value=picture, elem_id=f"samples-{i}", height=560)
                for i, (name, picture) in enumerate(zip(named, first, strict=True))
            ]
        inputs = [seed, number, truncation, label]

        def redraw(event: Any) -> None:
            # Answered at once: a place in the queue would cost as much as the samples.
            event(
                _said(draw),
                inputs,
                shown,
                trigger_mode="always_last",
                show_progress="hidden",
                queue=False,
                postprocess=False,
            )

        for changed in inputs:
            redraw(changed.change)
        another.click(lambda value: (_whole(value) + 1) % 2**32, seed, seed, show_progress="hidden", queue=False)
    return redraw


def _picker(gr: Any, named: dict[str, View], title: str, number: int = 0) -> list[Any]:
    """Components that say which image is meant, in the order of `_source`'s arguments."""
    with gr.Group():
        kind = gr.Radio(list(KINDS), value="sample", label=title)
        which = gr.Number(number, label="seed of the sample, or number of the held-out image", precision=0, minimum=0)
        upload = gr.File(label="image file", type="filepath", height=120)
        label = _classes(gr, named)
    return [kind, upload, which, label]


def _source(view: View, kind: str, upload: str | None, number: float | None, label: str | None) -> Source:
    """What is meant; a model that does not know the class that is chosen is told its own first one."""
    known = label if label in view.labels else next(iter(view.labels), None)
    return Source(kind, upload, _whole(number), known)


def _on_pick(picker: Sequence[Any], function: Callable[..., Any], inputs: list[Any], outputs: list[Any]) -> None:
    """Call the function whenever another image is meant; an upload is meant as soon as it is there."""
    kind, upload, number, label = picker
    for event in (kind.input, number.change, label.input):
        event(_said(function), inputs, outputs, trigger_mode="always_last")
    upload.upload(lambda: "upload", None, kind, show_progress="hidden").then(_said(function), inputs, outputs)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in HTML: the browser gives its columns the widths that keep words whole, as gradio's own does not."""
    lines = ["".join(f'<th scope="col">{html.escape(word)}</th>' for word in head)]
    lines += ["".join(f"<td>{html.escape(word)}</td>" for word in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _image_tab(gr: Any, named: dict[str, View]) -> None:
    def look(name: str, heat: str, *picked: Any) -> list[Any]:
        found = named[name].seen(_source(named[name], *picked), heat)
        rows = [
            (score.name, score.meaning, f"{value:.4g} {score.unit}", f"{100 * below:.0f} %")
            for score, value, below in found.scores
        ]
        table = _table(("score", "what it is", "value", "usual images with less"), rows)
        return [found.image, found.reconstruction, found.heat, table, found.latent, f"Compared with {found.compared}."]

    def near(name: str, by: str, *picked: Any) -> list[Any]:
        sheet, distances = named[name].nearest(_source(named[name], *picked), by=by)
        return [sheet, "Distances: " + ", ".join(f"{distance:.3g}" for distance in distances)]

    with gr.Tab("An image") as tab:
        with gr.Row():
            with gr.Column(scale=1, min_width=260):
                run = _chooser(gr, named)
                picker = _picker(gr, named, "image")
                heat = gr.Dropdown(list(HEATMAPS), value=HEATMAPS[0], label="heat map")
            with gr.Column(scale=3):
                with gr.Row():
                    pictures = [
                        _picture(gr, title, elem_id=key, height=300)
                        for key, title in (
                            ("image", "image"),
                            ("again", "reconstruction"),
                            ("heat", "where it is unusual"),
                        )
                    ]
                scores = gr.HTML(elem_id="scores", elem_classes=["scores"])
                compared = gr.Markdown()
                latent = gr.Plot(label="latent", show_label=False, format="png")  # it would lie upon the title
                with gr.Row():
                    by = gr.Dropdown(["latents", "pixels"], value="latents", label="nearest by")
                    nearest = gr.Button("nearest training images", elem_id="nearest")
                neighbours = _picture(gr, "Training images, nearest first.", "wide", elem_id="neighbours")
                distances = gr.Markdown()
        inputs, outputs = [run, heat, *picker], [*pictures, scores, latent, compared]
        _on_pick(picker, look, inputs, outputs)
        for event in (tab.select, run.input, heat.input):
            event(_said(look), inputs, outputs)
        nearest.click(_said(near), [run, by, *picker], [neighbours, distances])
        for event in (pictures[0].change, run.input, by.input):  # the neighbours that are shown are of what was meant
            event(lambda: (None, ""), None, [neighbours, distances], show_progress="hidden", queue=False)


def _between_tab(gr: Any, named: dict[str, View]) -> None:
    def way(name: str, steps: float, spherical: bool, *picked: Any) -> Any:
        view, half = named[name], len(picked) // 2
        ends = (_source(view, *its) for its in (picked[:half], picked[half:]))
        return view.between(*ends, int(steps), spherical)

    with gr.Tab("Between two images") as tab:
        with gr.Row():
            run = _chooser(gr, named)
            steps = gr.Slider(2, 16, value=9, step=1, label="steps", min_width=240)
            spherical = gr.Checkbox(False, label="along the great circle", elem_classes=["aside"])
        sheet = _picture(gr, "From the one to the other, the images themselves at the ends.", "wide", elem_id="way")
        with gr.Row():
            pickers = [_picker(gr, named, title, number) for number, title in enumerate(("from", "to"))]
        inputs = [run, steps, spherical, *pickers[0], *pickers[1]]
        for picker in pickers:
            _on_pick(picker, way, inputs, [sheet])
        for event in (tab.select, run.input, spherical.input):
            event(_said(way), inputs, [sheet])
        # not its release, which arrow keys do not make
        steps.change(_said(way), inputs, [sheet], trigger_mode="always_last")


def _moving_tab(gr: Any, named: dict[str, View]) -> None:
    count = min(MOVABLE, *(view.model.latent_dim for view in named.values()))

    def begin(name: str, *picked: Any) -> list[Any]:
        """The image's latent, and the sliders where it is."""
        view = named[name]
        source = _source(view, *picked)
        latent = view.latent(source)
        chosen = view.active[:count]
        sliders = [
            gr.update(value=round(max(-REACH, min(REACH, latent[k])), 2), label=f"dimension {k}") for k in chosen
        ]
        there = bool(view.directions)
        known = gr.update(choices=["", *view.directions], value="", visible=there)
        return [
            latent,
            chosen,
            view.moved(latent, {}, source.label),
            known,
            gr.update(value=0.0, visible=there),
            *sliders,
        ]

    def move(name: str, latent: Any, chosen: Any, label: str | None, way: str, strength: float, *values: float) -> Any:
        if not latent:
            raise ConfigError("no image is chosen yet: choose one first")
        view = named[name]
        known = _source(view, "sample", None, 0, label).label
        return _inline(view.moved(latent, dict(zip(chosen, values, strict=True)), known, way or None, strength))

    with gr.Tab("Move in the latent space") as tab, gr.Row():
        with gr.Column(scale=1, min_width=260):
            run = _chooser(gr, named)
            picker = _picker(gr, named, "start from")
        picture = _picture(gr, "decoded", column={"scale": 2, "elem_classes": ["stays"]}, elem_id="moved", height=420)
        with gr.Column(scale=2, elem_classes=["beneath"]):
            sliders = [
                gr.Slider(-REACH, REACH, value=0.0, step=0.05, label="dimension", elem_id=f"dimension-{i}")
                for i in range(count)
            ]
            direction = gr.Dropdown([""], value="", label="saved direction", visible=False)
            strength = gr.Slider(-3, 3, value=0.0, step=0.1, label="its strength", visible=False)
        latent, chosen = gr.State([]), gr.State([])
        started = [latent, chosen, picture, direction, strength, *sliders]
        _on_pick(picker, begin, [run, *picker], started)
        for event in (tab.select, run.input):
            event(_said(begin), [run, *picker], started)
        inputs = [run, latent, chosen, picker[3], direction, strength, *sliders]
        # Their own button that sets sliders back makes a release and no input.
        for event in (direction.input, *(on for one in (*sliders, strength) for on in (one.input, one.release))):
            event(
                _said(move),
                inputs,
                picture,
                trigger_mode="always_last",
                show_progress="hidden",
                queue=False,
                postprocess=False,
            )


def _training_tab(gr: Any, named: dict[str, View], timer: Any) -> None:
    def look(name: str) -> list[Any]:
        view = named[name]
        return [view.progress(), view.curves(), state_of(view)]

    def look_again(name: str, known: str) -> list[Any]:
        for view in named.values():
            view.refresh()  # those that are not looked at here, too: their samples are
        return look(name) if state_of(named[name]) != known else [gr.skip()] * 3

    def state_of(view: View) -> str:
        return f"{view.logged} {view.step}"

    with gr.Tab("Training") as tab:
        run, progress = _chooser(gr, named), gr.Markdown()
        curves = gr.Plot(label="curves", show_label=False, format="png")
        known = gr.State("")
        outputs = [progress, curves, known]
        for event in (tab.select, run.input):
            event(_said(look), run, outputs)
        timer.tick(_said(look_again), [run, known], outputs, show_progress="hidden")
