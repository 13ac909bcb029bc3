"""A loopback HTTP server with what the Hugging Face Hub's download client asks for, and plain files beside it.

It can break a connection in the middle of a file, know no ranges, and tell sizes that are not true.
"""

import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Contents:
    """What the server holds and how it behaves.

    Attributes:
        repos: "datasets/user/name" or "models/user/name" to file names and contents.
        files: Path to content of plain files.
        cuts: Path to the numbers of bytes after which the next answers for it end; None sends all of one.
        refuse: Path to the status codes of the next answers for it.
        ranges: Whether plain files can be asked for in parts.
        told: File name of a repository to contents whose size and checksum are told instead of the true ones.
        seen: Requests as (method, path, range).
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    cuts: dict[str, list[int | None]] = field(default_factory=dict)
    refuse: dict[str, list[int]] = field(default_factory=dict)
    ranges: bool = True
    told: dict[str, bytes] = field(default_factory=dict)
    seen: list[tuple[str, str, str | None]] = field(default_factory=list)

    def count(self, method: str) -> Counter:
        return Counter(path for used, path, _ in self.seen if used == method)


def _entry(name: str, content: bytes) -> dict:
    digest = hashlib.sha256(content).hexdigest()
    lfs = {"sha256": digest, "oid": digest, "size": len(content), "pointerSize": 130, "pointer_size": 130}
    return {"rfilename": name, "path": name, "type": "file", "size": len(content), "oid": digest[:40], "lfs": lfs}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    contents: Contents

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.contents.seen.append((self.command, path, self.headers.get("Range")))
        if self.contents.refuse.get(path):
            self._send(self.contents.refuse[path].pop(0), b"refused", {}, body)
        elif path.startswith("/api/"):
            self._api(path, body)
        elif path in self.contents.files:
            self._file(path, self.contents.files[path], {}, body, self.contents.ranges)
        else:
            self._resolve(path, body)

    def _api(self, path: str, body: bool) -> None:
        match = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(/.*)?", path)
        kind, repo, rest = match.groups() if match else (None, None, None)
        held = self.contents.repos.get(f"{kind}/{repo}")
        if held is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
            return
        entries = [_entry(name, self.contents.told.get(name, content)) for name, content in held.items()]
        answer = entries if (rest or "").startswith("/tree") else {"id": repo, "sha": COMMIT, "siblings": entries}
        self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, body)

    def _resolve(self, path: str, body: bool) -> None:
        match = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        held = self.contents.repos.get(f"{'datasets' if match[1] else 'models'}/{match[2]}", {}) if match else {}
        if not match or match[3] not in held:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            return
        told = self.contents.told.get(match[3], held[match[3]])
        headers = {"X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(told))}
        headers["X-Linked-Etag"] = f'"{hashlib.sha256(told).hexdigest()}"'
        self._file(path, held[match[3]], headers, body, True)

    def _file(self, path: str, content: bytes, headers: dict, body: bool, ranges: bool) -> None:
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        status, start = 200, 0
        if wanted and ranges and self.headers.get("If-Range", tag) == tag:
            status, start = 206, int(wanted[1])
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        cuts = self.contents.cuts.get(path, [])
        cut = cuts.pop(0) if cuts and body else None
        self._send(status, content[start:], {**headers, "ETag": tag, "Accept-Ranges": "bytes"}, body, cut)

    def _send(self, status: int, content: bytes, headers: dict, body: bool, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content if cut is None else content[:cut])
        if cut is not None:
            self.close_connection = True


@contextmanager
def serve(contents: Contents):
    """Starts the server; gives its address."""
    handler = type("Handler", (_Handler,), {"contents": contents})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
