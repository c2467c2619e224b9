"""The studio's page in a real browser: what people see, what they may not reach, what is said of bad input."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from introvae import fit

pytestmark = pytest.mark.studio

pytest.importorskip("gradio", reason="gradio is missing: the extra studio")
PICTURES = os.environ.get("INTROVAE_SCREENSHOTS")
"""A folder in which the pictures of the documentation are left."""
OFFLINE = """
import os
import sys

HERE = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "", None)
NAMED = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")


def refuse(event, arguments):
    if event in NAMED:
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg") and isinstance(arguments[1], tuple):
        host = arguments[1][0]  # other addresses are files of this machine
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host not in HERE:
        with open(os.environ["INTROVAE_ASKED"], "a", encoding="utf-8") as file:
            file.write(f"{event} {host}\\n")
        raise OSError(f"no network: {event} {host}")


sys.addaudithook(refuse)
"""
"""A sitecustomize.py: its process reaches no other machine, and leaves in $INTROVAE_ASKED which ones it asked for."""


def without_network(asked: Path) -> dict[str, str]:
    """The environment of a process that begins with `OFFLINE`, which lies beside the file of what was asked for."""
    asked.touch()
    (asked.parent / "sitecustomize.py").write_text(OFFLINE)
    places = [str(asked.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places), "INTROVAE_ASKED": str(asked)}


@dataclass
class Studio:
    """A page that is served, and what its process has said."""

    address: str
    process: subprocess.Popen[str]
    said: Path
    asked: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of the digits, of different length."""
    base = tmp_path_factory.mktemp("runs")
    return [
        fit(data="digits", steps=steps, out=str(base / name)).folder for name, steps in (("short", 30), ("long", 300))
    ]


@pytest.fixture(scope="module")
def studio(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """Both runs' page, served by a process without a network."""
    said = tmp_path_factory.mktemp("said") / "studio.txt"
    asked = said.with_name("asked.txt")
    words = [sys.executable, "-m", "introvae", "studio", *map(str, folders), "--port", "0"]
    with open(said, "w") as file:
        environment = without_network(asked)
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, text=True, env=environment)
        try:
            yield Studio(_address(process, said), process, said, asked)
        finally:
            process.terminate()
            process.wait(30)


def _address(process: subprocess.Popen[str], said: Path) -> str:
    for _ in range(600):
        found = re.search(r"http://127\.0\.0\.1:\d+/", said.read_text())
        if found:
            return found[0]
        assert process.poll() is None, said.read_text()
        time.sleep(0.1)
    raise AssertionError(said.read_text())


@pytest.fixture
def tab(browser: Any, studio: Studio) -> Iterator[Any]:
    """The page, loaded; at the end neither it nor its server asked another machine, and the console has no error."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(studio.address)
    page.wait_for_selector("#samples-0 img")
    yield page
    page.close()
    outside = [url for url in asked if not url.startswith((studio.address, "data:", "blob:"))]
    assert outside == []
    assert studio.asked.read_text() == ""
    assert complaints == []
    assert "Traceback" not in studio.said.read_text()


def shown(page: Any, key: str) -> str:
    return page.locator(f"#{key} img").first.get_attribute("src")


def after(page: Any, key: str, act: Callable[[], Any]) -> str:
    """The address of a picture once `act` has changed it."""
    there = page.locator(f"#{key} img").count()
    before = shown(page, key) if there else None
    act()
    page.wait_for_function(
        "([key, before]) => {const i = document.querySelector(`#${key} img`); "
        "return i && i.src !== before && i.complete && i.naturalWidth > 0}",
        arg=[key, _absolute(page, before)],
        timeout=30_000,
    )
    return shown(page, key)


def _absolute(page: Any, address: str | None) -> str | None:
    return address and page.evaluate("a => new URL(a, document.baseURI).href", address)


def decoded(page: Any, key: str) -> np.ndarray:
    """A picture's pixels, as the browser got them."""
    address = shown(page, key)
    inline = address.startswith("data:image/png;base64,")
    content = (
        base64.b64decode(address.partition(",")[2]) if inline else page.request.get(_absolute(page, address)).body()
    )
    return np.asarray(Image.open(io.BytesIO(content)))


def keep(page: Any, name: str) -> None:
    if PICTURES:
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(PICTURES) / f"studio-{name}.png")


def open_tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def png(width: int = 8, height: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


# --- what people see


def test_samples_of_two_runs_side_by_side_follow_seed_and_truncation(tab: Any) -> None:
    assert tab.title() == "introvae studio"
    first = [decoded(tab, f"samples-{i}") for i in (0, 1)]
    assert first[0].shape == first[1].shape
    assert (first[0] != first[1]).any()
    keep(tab, "samples")
    drawn = after(tab, "samples-1", lambda: tab.locator("#another").click())
    assert drawn.startswith("data:image/png;base64,")  # in the answer itself: no file, and no second request for it
    other = decoded(tab, "samples-1")
    assert (other != first[1]).any()
    after(tab, "samples-1", lambda: tab.locator("#truncation input[type=range]").fill("0"))
    cells = decoded(tab, "samples-1")[2:-2, 2:-2]
    side = 48 + 2
    assert (cells[:48, :48] == cells[side : side + 48, side : side + 48]).all()  # all alike: the middle


def test_an_upload_is_reconstructed_scored_and_mapped(tab: Any) -> None:
    open_tab(tab, "An image")
    tab.wait_for_selector("#again img", timeout=60_000)
    sample = decoded(tab, "image")
    upload = tab.locator("input[type=file]:visible, .tabitem:visible input[type=file]").first
    after(tab, "image", lambda: upload.set_input_files({"name": "mine.png", "mimeType": "image/png", "buffer": png()}))
    assert (decoded(tab, "image") != sample).any()
    assert decoded(tab, "heat").ndim == 3
    table = tab.locator("#scores").inner_text()
    assert all(word in table for word in ("neg_elbo", "error", "kl", "%"))
    assert tab.get_by_text(re.compile(r"Compared with \d+ held-out images")).first.is_visible()
    keep(tab, "image")
    after(tab, "neighbours", lambda: tab.locator("#nearest").click())
    assert decoded(tab, "neighbours").shape[1] > 300


def test_the_way_between_two_images_changes_with_them(tab: Any) -> None:
    open_tab(tab, "Between two images")
    tab.wait_for_selector("#way img", timeout=60_000)
    before = decoded(tab, "way")
    keep(tab, "between")
    number = tab.get_by_label("seed of the sample, or number of the held-out image").locator("visible=true").nth(1)
    after(tab, "way", lambda: number.fill("7"))
    assert (decoded(tab, "way") != before).any()


def test_a_slider_moves_the_image_in_the_latent_space(tab: Any) -> None:
    open_tab(tab, "Move in the latent space")
    tab.wait_for_selector("#moved img", timeout=60_000)
    tab.wait_for_function("document.querySelector('#dimension-0').textContent.match(/dimension \\d+/)")
    before = decoded(tab, "moved")
    slider = tab.locator("#dimension-0 input[type=range]")
    after(tab, "moved", lambda: slider.fill("3.5"))
    assert (decoded(tab, "moved") != before).any()
    keep(tab, "move")


def test_the_curves_are_there(tab: Any) -> None:
    open_tab(tab, "Training")
    tab.wait_for_selector("text=step 30 of 30", timeout=60_000)
    tab.wait_for_selector(".tabitem:visible img, [role=tabpanel]:visible img", timeout=30_000)
    keep(tab, "training")


def test_sheets_are_as_wide_as_their_place(tab: Any) -> None:
    open_tab(tab, "Between two images")
    tab.wait_for_selector("#way img", timeout=60_000)
    place, picture = (tab.locator(key).bounding_box() for key in ("#way", "#way img"))
    assert picture["width"] > place["width"] - 40  # the download button is beside it
    assert picture["height"] == pytest.approx(picture["width"] * 52 / 552, abs=2)


def narrow(page: Any, name: str) -> None:
    """A tab on a phone, where most of them are in a menu."""
    page.set_viewport_size({"width": 390, "height": 844})
    page.locator(".overflow-menu button").first.click()
    page.locator(".overflow-dropdown").get_by_text(name).click()


def test_a_narrow_window_shows_it_all(tab: Any) -> None:
    tab.set_viewport_size({"width": 390, "height": 844})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390


def test_on_a_phone_the_words_of_the_scores_are_whole(tab: Any) -> None:
    open_tab(tab, "An image")
    tab.wait_for_selector("#scores td", timeout=60_000)
    tab.set_viewport_size({"width": 390, "height": 844})
    assert tab.locator("#scores table").bounding_box()["width"] <= tab.locator("#scores").bounding_box()["width"]
    broken = tab.evaluate(
        """() => [...document.querySelectorAll('#scores th, #scores td')].flatMap(cell => {
            const text = cell.firstChild, words = [...text.data.matchAll(/[^\\s-]+/g)];
            return words.filter(word => {
                const range = document.createRange();
                range.setStart(text, word.index);
                range.setEnd(text, word.index + word[0].length);
                return new Set([...range.getClientRects()].map(box => box.top)).size > 1;
            }).map(word => word[0]);
        })"""
    )
    assert broken == []


def test_on_a_phone_the_moved_image_stays_in_sight_of_the_last_slider(tab: Any) -> None:
    narrow(tab, "Move in the latent space")
    tab.wait_for_selector("#moved img", timeout=60_000)
    slider = tab.locator("[id^=dimension-] input[type=range]").last
    slider.focus()
    after(tab, "moved", lambda: tab.keyboard.press("ArrowRight"))
    picture, place = tab.locator("#moved img").bounding_box(), slider.bounding_box()
    assert 0 <= picture["y"] < picture["y"] + picture["height"] <= place["y"] <= 844


# --- by keyboard alone


def focused(page: Any) -> dict[str, str]:
    return page.evaluate(
        """() => {
            const one = document.activeElement, style = getComputedStyle(one);
            const name = one.ariaLabel || one.textContent.trim() || one.querySelector('[aria-label]')?.ariaLabel;
            return {tag: one.tagName, name: name || one.value, outline: style.outlineStyle};
        }"""
    )


def test_tab_finds_what_can_be_used_and_shows_where_it_is(tab: Any) -> None:
    tab.get_by_role("tab", name="Training").focus()
    found = []
    for _ in range(30):
        tab.keyboard.press("Tab")
        now = focused(tab)
        if now["tag"] == "BODY":
            break
        found.append(now)
    assert all(one["name"] and one["outline"] == "solid" for one in found), found
    names = [one["name"] for one in found]
    assert names[0] == "seed"
    assert names.index("another seed") > names.index("range slider for number")
    assert names[-2:] == ["Download"] * 2  # one for each picture, and nothing else of them
    assert names.count("Download") == 2


def test_keys_change_the_steps_and_set_a_dimension_back(tab: Any) -> None:
    tab.get_by_role("tab", name="Between two images").focus()
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#way img", timeout=60_000)
    width = decoded(tab, "way").shape[1]
    tab.get_by_label("range slider for steps").focus()
    after(tab, "way", lambda: tab.keyboard.press("ArrowRight"))
    assert decoded(tab, "way").shape[1] == width + 50
    tab.get_by_role("tab", name="Move in the latent space").focus()
    tab.keyboard.press("Enter")
    tab.wait_for_selector("#moved img", timeout=60_000)
    tab.wait_for_function("document.querySelector('#dimension-0').textContent.match(/dimension \\d+/)")
    tab.locator("#dimension-0 input[type=range]").focus()
    after(tab, "moved", lambda: tab.keyboard.press("End"))
    far = decoded(tab, "moved")
    tab.locator("#dimension-0 button").focus()
    after(tab, "moved", lambda: tab.keyboard.press("Enter"))
    assert (decoded(tab, "moved") != far).any()


# --- what is refused

BAD = {
    "text": ("notes.txt", b"Hello, I am a text.", "no image that can be read"),
    "text called an image": ("notes.png", b"Hello, I am a text.", "no image that can be read"),
    "cut": ("cut.png", png(200, 200)[:5000], "cut.png"),
    "30 megapixels": ("large.png", b"", "6,000 x 5,000 pixels"),
    "a name that climbs": ("../../etc/passwd", b"root:x:0:0", "no image that can be read"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_uploads_get_a_line(tab: Any, studio: Studio, kind: str) -> None:
    name, content, message = BAD[kind]
    if kind == "30 megapixels":
        buffer = io.BytesIO()
        Image.new("L", (6000, 5000), 128).save(buffer, "PNG")
        content = buffer.getvalue()
    open_tab(tab, "An image")
    tab.wait_for_selector("#again img", timeout=60_000)
    upload = tab.locator("input[type=file]:visible, .tabitem:visible input[type=file]").first
    upload.set_input_files({"name": name, "mimeType": "image/png", "buffer": content})
    tab.wait_for_selector(f"text={message}", timeout=30_000)
    assert "Traceback" not in tab.content()
    assert "/tmp" not in tab.locator(".toast-body, [data-testid=toast-body]").first.inner_text()
    assert "Traceback" not in studio.said.read_text()


def status(address: str, host: str | None = None) -> int:
    request = urllib.request.Request(address, headers={} if host is None else {"Host": host})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_no_file_of_the_machine_is_reachable(studio: Studio, folders: list[Path]) -> None:
    assert status(studio.address) == 200
    for path in ("/etc/passwd", "../../etc/passwd", "..%2F..%2Fetc%2Fpasswd", folders[0] / "config.yaml", __file__):
        for way in ("gradio_api/file=", "file=", "gradio_api/file/"):
            assert status(f"{studio.address}{way}{path}") in (403, 404), f"{way}{path}"


def test_a_path_given_in_a_files_place_is_refused(tab: Any, studio: Studio) -> None:
    """As an upload's place is told by the page, someone may tell another."""
    answer = tab.evaluate(
        """async () => {
            const config = window.gradio_config, found = [];
            for (const dependency of config.dependencies) {
                const files = dependency.inputs.filter(
                    id => config.components.find(c => c.id === id)?.type === 'file');
                if (!files.length || dependency.outputs.length < 3) continue;
                const data = dependency.inputs.map(id => {
                    const c = config.components.find(c => c.id === id);
                    if (c.type === 'file') return {path: '/etc/passwd', meta: {_type: 'gradio.FileData'}};
                    return c.type === 'radio' ? 'upload' : c.props.value ?? null;
                });
                const body = JSON.stringify({data, fn_index: dependency.id, session_hash: 'abc' + dependency.id});
                const joined = await fetch('gradio_api/queue/join', {method: 'POST', body,
                    headers: {'Content-Type': 'application/json'}});
                const said = await fetch('gradio_api/queue/data?session_hash=abc' + dependency.id);
                found.push(await said.text());
            }
            return found;
        }"""
    )
    assert answer
    for text in answer:
        assert "process_completed" in text
        assert '"success":false' in text.replace(" ", "")
        assert "root:" not in text
        assert "Traceback" not in text


def test_pages_of_other_names_are_not_answered(studio: Studio) -> None:
    assert status(studio.address, "evil.example") == 400
    with urllib.request.urlopen(studio.address, timeout=30) as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert "connect-src 'self'" in policy
    assert "http" not in policy


def test_the_server_asks_no_other_machine(studio: Studio) -> None:
    """Neither as it starts (gradio's counting of its users and its look for a new version do) nor for a page."""
    for path in ("", "config", "gradio_api/info"):
        assert status(f"{studio.address}{path}") == 200
    time.sleep(1)  # gradio asks in threads of their own
    assert studio.asked.read_text() == ""


def test_a_process_without_a_network_reaches_itself_alone_and_what_it_asks_is_seen(
    studio: Studio, tmp_path: Path
) -> None:
    code = f"""
import socket
from urllib.request import urlopen

print(urlopen({studio.address!r}).status)
for ask in (lambda: urlopen("http://introvae.example"), lambda: socket.socket().connect(("192.0.2.1", 80))):
    try:
        ask()
    except OSError as error:
        print(error)
"""
    asked = tmp_path / "asked.txt"
    words, environment = [sys.executable, "-c", code], without_network(asked)
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=60)
    answered, *errors = done.stdout.splitlines()
    assert answered == "200"
    assert len(errors) == 2
    assert all("no network" in error for error in errors)
    assert asked.read_text().splitlines() == ["socket.getaddrinfo introvae.example", "socket.connect 192.0.2.1"]


def test_a_taken_port_is_said(studio: Studio, folders: list[Path]) -> None:
    port = studio.address.rstrip("/").rpartition(":")[2]
    words = [sys.executable, "-m", "introvae", "studio", str(folders[0]), "--port", port]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "--port" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_wildest_upload_is_too_large(tab: Any, studio: Studio) -> None:
    open_tab(tab, "An image")
    tab.wait_for_selector("#again img", timeout=60_000)
    upload = tab.locator("input[type=file]:visible, .tabitem:visible input[type=file]").first
    upload.set_input_files({"name": "big.png", "mimeType": "image/png", "buffer": bytes(30 * 2**20)})
    tab.wait_for_selector("text=/exceeds|too large|maximum/i", timeout=30_000)


def test_ctrl_c_ends_it_while_a_page_is_open(browser: Any, folders: list[Path], tmp_path: Path) -> None:
    said = tmp_path / "said.txt"
    words = [sys.executable, "-m", "introvae", "studio", str(folders[0]), "--port", "0"]
    with open(said, "w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, text=True)
    page = browser.new_page()
    page.goto(_address(process, said))
    page.wait_for_selector("#samples-0 img")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    page.close()
    assert "Traceback" not in said.read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_uploads_are_gone_when_it_ends(number: int, code: int, folders: list[Path], tmp_path: Path) -> None:
    said, scratch = tmp_path / "said.txt", tmp_path / "scratch"
    scratch.mkdir()
    words = [sys.executable, "-m", "introvae", "studio", str(folders[0]), "--port", "0"]
    with open(said, "w") as file:
        environment = {**os.environ, "TMPDIR": str(scratch)}
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, text=True, env=environment)
    address = _address(process, said)
    answer = httpx.post(f"{address}gradio_api/upload", files={"files": ("mine.png", png())}, timeout=60)
    assert answer.status_code == 200
    assert list(scratch.glob("introvae-studio-*/**/mine.png"))
    process.send_signal(number)
    assert process.wait(20) == code
    assert list(scratch.glob("introvae-studio-*")) == []
    assert "Traceback" not in said.read_text()


def test_a_run_that_trains_shows_its_curves_growing(browser: Any, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "introvae"]
    run = tmp_path / "growing"
    settings = ["--data", "digits", "--steps", "100000", "--checkpoint_every", "20", "--log_every", "10"]
    training = subprocess.Popen([*words, "fit", *settings, "--out", str(run), "--quiet"])
    said = tmp_path / "said.txt"
    try:
        for _ in range(600):
            if list((run / "checkpoints").glob("*.pt")):
                break
            time.sleep(0.1)
        with open(said, "w") as file:
            serving = subprocess.Popen(
                [*words, "studio", str(run), "--port", "0"], stdout=file, stderr=subprocess.STDOUT, text=True
            )
        try:
            page = browser.new_page()
            page.goto(_address(serving, said))
            page.wait_for_selector("#samples-0 img")
            after(page, "samples-0", lambda: page.locator("#another").click())  # a single run's samples follow, too
            after(page, "samples-0", lambda: None)  # and become those of a newer model by themselves
            open_tab(page, "Training")
            page.wait_for_selector("text=/step [0-9,]+ of 100,000/", timeout=60_000)
            line = page.get_by_text(re.compile(r"step [0-9,]+ of 100,000")).first.inner_text()
            page.wait_for_function("line => !document.body.innerText.includes(line)", arg=line, timeout=60_000)
            page.close()
        finally:
            serving.terminate()
            serving.wait(30)
    finally:
        training.terminate()
        training.wait(60)
    assert "Traceback" not in said.read_text()
    assert json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"] > 20
