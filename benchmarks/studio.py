"""How quick the studio is: `python benchmarks/studio.py RUN --json FILE` (of images of 28 or 32 pixels).

Two measurements of the page of a run, served by a process of its own on this machine:

- from asking for the page to its first picture being drawn in a browser (Chromium and playwright), the median of five;
- sheets of samples a second that four clients get at the same time, each with seeds of its own, picture included.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import progress, report

CLIENTS, LOADS = 4, 5
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


def first_picture(address: str) -> float:
    """Seconds to the first picture, the median of several loads; each browser is new and has nothing in its cache."""
    from playwright.sync_api import sync_playwright

    chromium = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
    if chromium is None:
        raise SystemExit("chromium is missing: install it, or give --no_browser")
    taken = []
    with sync_playwright() as api:
        for _ in range(LOADS):
            browser = api.chromium.launch(executable_path=chromium, args=FLAGS)
            page = browser.new_page()
            started = time.perf_counter()
            page.goto(address, wait_until="commit")
            page.wait_for_function("(document.querySelector('#samples-0 img') || {}).naturalWidth > 0", polling=20)
            taken.append(time.perf_counter() - started)
            browser.close()
    return statistics.median(taken)


def sheets_per_second(address: str, number: int, requests: int) -> float:
    """Sheets a second that the clients get together; they ask as the page does, each on a connection that it keeps.

    gradio's own client for Python would be most of the work: it sets up a new connection, with its certificates, for
    each of three requests, and so takes more processor time than what it asks.
    """
    host = urllib.parse.urlsplit(address).netloc
    clients = [http.client.HTTPConnection(host) for _ in range(CLIENTS)]

    def ask(index: int) -> None:
        for i in range(requests):
            words = {"data": [1000 * index + i, number, 1.0, None], "session_hash": f"client{index}"}
            headers = {"Content-Type": "application/json"}
            clients[index].request("POST", "/gradio_api/run/draw", json.dumps(words), headers)
            answer = json.load(clients[index].getresponse())
            picture = base64.b64decode(answer["data"][0]["url"].removeprefix("data:image/png;base64,"))
            assert picture.startswith(b"\x89PNG")

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(ask, range(CLIENTS)))  # what is first is slow
        started = time.perf_counter()
        list(pool.map(ask, range(CLIENTS)))
        return CLIENTS * requests / (time.perf_counter() - started)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("run", type=Path, help="a run folder or a saved model")
    words.add_argument("--json", type=Path, help="where to write the results")
    words.add_argument("--requests", type=int, default=40, help="of each client (default: 40)")
    words.add_argument("--no_browser", action="store_true", help="measure the clients only")
    own = words.parse_args()
    serving = subprocess.Popen(
        [sys.executable, "-m", "introvae", "studio", str(own.run), "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert serving.stdout is not None
        found = re.search(r"http://\S+", serving.stdout.readline())
        if found is None:
            raise SystemExit(f"the studio does not start: try introvae studio {own.run}")
        cases: list[dict[str, Any]] = []
        if not own.no_browser:
            cases.append({"case": "first picture", "seconds": first_picture(found[0])})
            progress(str(cases[-1]))
        for number in (1, 36):
            rate = sheets_per_second(found[0], number, own.requests)
            cases.append({"case": f"{CLIENTS} clients, sheets of {number}", "requests_per_second": rate})
            progress(str(cases[-1]))
        report(cases, own.json, run=own.run.name)
    finally:
        serving.terminate()
        serving.wait(30)


if __name__ == "__main__":
    main()
