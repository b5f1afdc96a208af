"""A hub on loopback: the parts of its HTTP interface that a download uses, with faults that tests can switch on.

Large files answer with a redirect to a second host name, as on the real hub, so that tests see what goes to whom.
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".gguf", ".bin")


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass
class FakeHub:
    """Repositories by id, each a mapping of revision to commit and of commit to files; and the faults to play."""

    files: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    info_status: int = 200
    info_body: bytes | None = None
    file_statuses: list[int] = field(default_factory=list)
    sent_before_break: dict[str, list[int]] = field(default_factory=dict)
    served_instead: dict[str, bytes] = field(default_factory=dict)
    ignores_range: bool = False
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    port: int = 0

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        commit = hashlib.sha1(repr((repo, sorted(files.items()))).encode(), usedforsecurity=False).hexdigest()
        self.files.setdefault(repo, {})[commit] = files
        self.branches.setdefault(repo, {})[revision] = commit
        return commit

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ranges(self, name: str) -> list[str | None]:
        """The Range headers of all requests for a file's bytes, in order."""
        return [headers.get("range") for _, path, headers in self.requests if path.endswith(f"/bytes/{name}")]

    def serve(self) -> ThreadingHTTPServer:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.hub.requests.append((self.command, path, headers))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, revision = "/".join(parts[2:4]), "/".join(parts[5:]) or "main"
            self._info(repo, revision)
        elif "resolve" in parts:
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        elif "bytes" in parts:
            repo, commit = "/".join(parts[1:3]), parts[3]
            self._bytes("/".join(parts[5:]), self.hub.files[repo][commit])
        else:
            self._answer(404, b"")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _info(self, repo: str, revision: str) -> None:
        if self.hub.info_body is not None or self.hub.info_status != 200:
            self._answer(self.hub.info_status, self.hub.info_body or b"")
            return
        if repo not in self.hub.files:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        commit = self.hub.branches[repo].get(revision)
        if commit is None:
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = []
        for name, content in self.hub.files[repo][commit].items():
            sibling: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": git_sha1(content)}
            if name.endswith(LARGE):
                sha256 = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
            siblings.append(sibling)
        body = json.dumps({"_id": "0", "id": repo, "modelId": repo, "sha": commit, "siblings": siblings})
        self._answer(200, body.encode(), {"Content-Type": "application/json"})

    def _resolve(self, repo: str, commit: str, name: str) -> None:
        if repo in self.hub.gated and "authorization" not in {key.lower() for key in self.headers}:
            self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
            return
        if self.hub.file_statuses:
            self._answer(self.hub.file_statuses.pop(0), b"")
            return
        content = self.hub.files[repo][commit][name]
        facts = {"X-Repo-Commit": commit, "ETag": f'"{git_sha1(content)}"'}
        if name.endswith(LARGE):
            facts["X-Linked-Size"] = str(len(content))
            facts["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        # Another host name for the same server, as a content network would be.
        facts["Location"] = f"http://localhost:{self.hub.port}/cdn/{repo}/{commit}/bytes/{name}"
        self._answer(302, b"", facts)

    def _bytes(self, name: str, files: dict[str, bytes]) -> None:
        content = self.hub.served_instead.get(name, files[name])
        wanted = self.headers.get("Range")
        start = int(wanted.removeprefix("bytes=").split("-")[0]) if wanted and not self.hub.ignores_range else 0
        if start >= len(content) and start:
            self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        facts = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        breaks = self.hub.sent_before_break.get(name)
        stop = breaks.pop(0) if breaks else None
        self._answer(206 if start else 200, content[start:], facts, stop)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, stop: int | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        if stop is not None:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if stop is None else body[:stop])
