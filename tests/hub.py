"""A stand-in for the Hugging Face hub on this machine: repositories in memory, the requests of pushing and loading."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_good"
"""Whoever says this may write."""


@dataclass
class Hub:
    """What the stand-in holds.

    Arguments:
        address: for HF_ENDPOINT.
        repositories: files by the name of the repository.
        private: names of those made so.
    """

    address: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)

    def revision(self, name: str) -> str:
        return sha1(b"".join(sorted(self.repositories[name].values()))).hexdigest()


@contextmanager
def hub() -> Iterator[Hub]:
    """The stand-in, answering."""
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, code: int, content: Any, headers: dict[str, str] | None = None) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(code)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.answer(401, {"error": "Invalid username or password."})
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                state.repositories.setdefault(name, {})
                if asked.get("private") or asked.get("visibility") == "private":
                    state.private.add(name)
                return self.answer(200, {"url": f"{state.address}/{name}", "name": name, "id": name})
            found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/[^/?]+.*", self.path)
            if found is None or found[1] not in state.repositories:
                return self.answer(404, {"error": "not found"})
            if found[2] == "preupload":
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                return self.answer(200, {"files": files})
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    state.repositories[found[1]][entry["value"]["path"]] = content
            revision = state.revision(found[1])
            url = f"{state.address}/{found[1]}/commit/{revision}"
            return self.answer(200, {"success": True, "commitOid": revision, "commitUrl": url})

        def do_GET(self) -> None:
            about = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(/revision/[^/?]+|/tree/[^/?]+)?(\?.*)?", self.path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
            if about is not None and about[1] in state.repositories:
                files = state.repositories[about[1]]
                if (about[2] or "").startswith("/tree"):
                    listed = [
                        {"type": "file", "path": name, "size": len(content), "oid": sha1(content).hexdigest()}
                        for name, content in files.items()
                    ]
                    return self.answer(200, listed)
                siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
                revision = state.revision(about[1])
                return self.answer(200, {"id": about[1], "sha": revision, "siblings": siblings, "tags": []})
            if file is not None and file[2] in state.repositories.get(file[1], {}):
                content = state.repositories[file[1]][file[2]]
                headers = {"ETag": f'"{sha1(content).hexdigest()}"', "X-Repo-Commit": state.revision(file[1])}
                return self.answer(200, content, headers)
            return self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
