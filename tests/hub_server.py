"""A dataset repository on 127.0.0.1 that speaks as much of the hub's protocol as huggingface_hub needs to fetch files.

    with FakeHub({"datasets/manifest.json": b"{}"}) as hub:
        os.environ["HF_ENDPOINT"] = hub.endpoint

Served: the dataset's head commit, paths-info with sizes and hashes, HEAD and GET of files with X-Repo-Commit, ETag,
Content-Length, Range. `requests` records all; `cut` makes a file's next transfers break off, `hidden` lets them fail.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote

LFS_BYTES = 4096  # smaller files are plain git blobs, hashed as such


class Request(NamedTuple):
    method: str
    path: str      # of the file within the repository, or of the API call
    start: int     # of the Range asked for


class FakeHub:
    def __init__(self, files: dict[str, bytes]):
        self.files = dict(files)
        self.commit = secrets.token_hex(20)
        self.requests: list[Request] = []
        self.cut: dict[str, list[int]] = {}  # path -> after how many bytes its next transfers break off
        self.hidden: set[str] = set()        # listed, yet answered with 404
        handler = type("Handler", (FakeHubHandler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def publish(self, files: dict[str, bytes]) -> None:
        """A new commit."""
        self.files.update(files)
        self.commit = secrets.token_hex(20)

    def downloads(self) -> list[str]:
        return [request.path for request in self.requests if request.method == "GET" and request.path in self.files]

    def oid(self, path: str) -> str:
        data = self.files[path]
        if len(data) >= LFS_BYTES:
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def entry(self, path: str) -> dict[str, object]:
        size = len(self.files[path])
        entry: dict[str, object] = {"type": "file", "path": path, "size": size, "oid": self.oid(path)}
        if len(self.files[path]) >= LFS_BYTES:
            entry |= {"oid": "0" * 40, "lfs": {"oid": self.oid(path), "size": size, "pointerSize": 134}}
        return entry


class FakeHubHandler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.file(self.path, with_body=False)

    def do_GET(self) -> None:
        if "/resolve/" in self.path:
            self.file(self.path, with_body=True)
        else:
            self.note(self.path)
            self.json({"id": "fake/export", "sha": self.hub.commit, "siblings": [], "tags": []})

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.note(self.path)
        self.json([self.hub.entry(path) for path in form["paths"] if path in self.hub.files])

    def note(self, path: str, start: int = 0) -> None:
        self.hub.requests.append(Request(self.command, path, start))

    def json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def file(self, url: str, with_body: bool) -> None:
        revision, _, path = unquote(url).partition("/resolve/")[2].partition("/")
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes="):].split("-")[0])
        self.note(path, start)
        if path not in self.hub.files or path in self.hub.hidden or revision not in ("main", self.hub.commit):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", self.hub.commit)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        whole = self.hub.files[path]
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.send_header("ETag", f'"{self.hub.oid(path)}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(whole) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(whole) - 1}/{len(whole)}")
        self.end_headers()
        if with_body:
            cuts = self.hub.cut.get(path)
            length = cuts.pop(0) if cuts else len(whole)
            self.wfile.write(whole[start:start + length])
            if start + length < len(whole):
                self.close_connection = True
