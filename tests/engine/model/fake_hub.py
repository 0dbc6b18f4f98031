"""A hub on the loopback device, as the library huggingface_hub sees one: a list of files, and the files by ranges."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "c" * 40
REPOSITORY = "some/model"
# What the hub keeps outside of git.
_LARGE = (".safetensors", ".gguf")


class FakeHub(ThreadingHTTPServer):
    """Serves `files` as the repository some/model."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.silent = False  # takes connections and answers nothing
        self.send_at_most: dict[str, int] = {}  # bytes of a file after which the sending stands still
        self.ranges: list[tuple[str, int]] = []  # of every GET of a file: its first byte
        self.authorizations: list[str | None] = []  # and the token it came with
        self.told: dict[str, dict[str, object]] = {}  # a file's LFS facts that the list tells wrongly
        self.revisions: set[str] = set()  # of which the tree or a file was asked for
        self.knows_ranges = True
        self.endless: set[str] = set()  # files whose sending goes on as long as anybody listens
        self.together: threading.Barrier | None = None  # at which the GETs of files wait for each other
        self.other: FakeHub | None = None  # where large files are
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def entry(self, name: str) -> dict[str, object]:
        """A file as the list of the repository shows it."""
        content = self.files[name]
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": oid}
        if name.endswith(_LARGE):
            entry["lfs"] = {"oid": self.sha256(name), "size": len(content), "pointerSize": 134}
        return entry

    def sibling(self, name: str) -> dict[str, object]:
        """The same as it stands among the facts of the model."""
        entry = self.entry(name)
        sibling = {"rfilename": name, "size": entry["size"], "blobId": entry["oid"]}
        if name.endswith(_LARGE):
            facts = {"sha256": self.sha256(name), "size": entry["size"], "pointerSize": 134}
            sibling["lfs"] = {**facts, **self.told.get(name, {})}
        return sibling

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self.files[name]).hexdigest()


@contextmanager
def hub_of(files: dict[str, bytes]) -> Iterator[FakeHub]:
    """Serves until the block ends."""
    hub = FakeHub(files)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        hub.shutdown()
        thread.join()
        hub.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        hub, path = self.server, urlsplit(self.path).path
        if hub.silent:
            hub.closing.wait()
            self.close_connection = True
        elif path.startswith(f"/api/models/{REPOSITORY}/tree/"):
            hub.revisions.add(path.rpartition("/")[2])
            self._say(json.dumps([hub.entry(name) for name in hub.files]).encode())
        elif path in (f"/api/models/{REPOSITORY}", f"/api/models/{REPOSITORY}/revision/main"):
            facts = {"id": REPOSITORY, "sha": COMMIT, "siblings": [hub.sibling(name) for name in hub.files]}
            self._say(json.dumps(facts).encode())
        elif (name := _file_of(path)) in hub.files:
            hub.revisions.add(path.split("/")[4])
            if hub.other is not None and name.endswith(_LARGE):
                self._redirect(name, hub.other)
            else:
                self._send_file(name, with_body)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _say(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _redirect(self, name: str, other: FakeHub) -> None:
        self.send_response(302)
        self.send_header("Location", other.url + self.path)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Etag", f'"{other.sha256(name)}"')
        self.send_header("X-Linked-Size", str(len(other.files[name])))
        self.send_header("Content-Length", "0")
        self.end_headers()
        if self.command == "GET":
            self.server.authorizations.append(self.headers.get("Authorization"))

    def _send_file(self, name: str, with_body: bool) -> None:
        hub = self.server
        content, begin = hub.files[name], 0
        asked = self.headers.get("Range") if hub.knows_ranges else None
        if asked:
            begin = int(asked.removeprefix("bytes=").partition("-")[0])
        rest = content[begin:]
        self.send_response(206 if asked else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hub.sha256(name) if name.endswith(_LARGE) else hub.entry(name)["oid"]}"')
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        if name in hub.endless:
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if not with_body:
            return
        hub.ranges.append((name, begin))
        hub.authorizations.append(self.headers.get("Authorization"))
        if hub.together is not None:
            hub.together.wait(timeout=60)
        limit = hub.send_at_most.get(name)
        try:
            self.wfile.write(rest if limit is None else rest[:limit])
            if limit is not None:
                self.wfile.flush()
                hub.closing.wait()
            while name in hub.endless and not hub.closing.is_set():
                self.wfile.write(bytes(1 << 20))
        except ConnectionError:  # the client was killed
            self.close_connection = True


def _file_of(path: str) -> str:
    """The file that /some/model/resolve/REVISION/FILE names, of the one revision there is; else nothing."""
    revision, _, name = path.removeprefix(f"/{REPOSITORY}/resolve/").partition("/")
    return name if revision in ("main", COMMIT) else ""
