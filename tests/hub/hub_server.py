"""A Hub on the loopback interface: what `huggingface_hub` asks of the real one for model repositories.

Accounts with read and write tokens, private repositories, branches, commits, LFS uploads in one piece or several, and
downloads with ranges. Contents are kept in memory. `Hub.fail`, `cut_uploads` and `cut_downloads` make it misbehave.
"""

import base64
import hashlib
import http.server
import json
import re
import threading
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_FROM, LFS_SUFFIXES = 1_000_000, (".safetensors", ".png", ".mp4", ".gif")
GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass(frozen=True)
class File:
    """A file of a commit; `lfs` tells how it was uploaded."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """The git object's name: of the content, or of the pointer."""
        content = self.content
        if self.lfs:
            content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(content)}\n"
            content = content.encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def entry(self, path: str) -> dict:
        told = {"type": "file", "path": path, "rfilename": path, "size": len(self.content), "oid": self.oid}
        told["blobId"] = self.oid
        if self.lfs:
            told["lfs"] = {"oid": self.sha256, "sha256": self.sha256, "size": len(self.content), "pointerSize": 130}
        return told


@dataclass
class Repo:
    """Commits by name, each a complete list of files, and branches."""

    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, File], message: str) -> str:
        parent = self.branches.get(branch, "")
        tree = "".join(f"{path}{file.oid}" for path, file in sorted(files.items()))
        name = hashlib.sha1(f"{len(self.commits)}{parent}{message}{tree}".encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        self.messages.append(message)
        return name

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        name = self.resolve(revision)
        assert name is not None, f"no revision {revision}"
        return {path: file.content for path, file in self.commits[name].items()}


@dataclass
class Fault:
    """The next `times` requests whose path matches `pattern` are answered with `status`.

    With status 0 the request is carried out and the connection closed without an answer.
    """

    pattern: str
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "made to fail"


class Hub:
    """The server's contents and behaviour.

    Attributes:
        repos: By "user/name".
        seen: Requests as (method, path).
        ranges: Requests for a part of a file as (path, Range).
        tokens: Token to (account, may write).
        part_size: Bytes per part of large uploads; None sends files in one piece.
        paused: Requests to commit wait until this is set.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.tokens = {
            "hf_writeWriteWriteWriteWriteWriteWrite": ("user", True),
            "hf_readReadReadReadReadReadReadReadRea": ("user", False),
            "hf_otherOtherOtherOtherOtherOtherOther": ("other", True),
        }
        self.part_size: int | None = None
        self.paused = threading.Event()
        self.paused.set()
        self.seen: list[tuple[str, str]] = []
        self.ranges: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.upload_cuts: list[int] = []
        self.download_cuts: dict[str, list[int]] = {}
        self.lock = threading.RLock()
        self.address = ""

    write_token = property(lambda self: next(iter(self.tokens)))
    read_token = property(lambda self: list(self.tokens)[1])
    other_token = property(lambda self: list(self.tokens)[2])

    def fail(self, pattern: str, status: int, **options: object) -> None:
        """Makes the next requests fail: see `Fault`."""
        self.faults.append(Fault(pattern, status, **options))

    def cut_uploads(self, *after: int) -> None:
        """Closes the connections of the next uploads when so many bytes have arrived."""
        self.upload_cuts += after

    def cut_downloads(self, name: str, *after: int) -> None:
        """Closes the connections of the next downloads of a file after so many bytes."""
        self.download_cuts.setdefault(name, []).extend(after)

    def create(self, repo_id: str, *, private: bool = False) -> Repo:
        repo = self.repos[repo_id] = Repo(private)
        repo.commit("main", {".gitattributes": File(GIT_ATTRIBUTES, lfs=False)}, "initial commit")
        return repo

    def count(self, method: str, pattern: str = "") -> int:
        return sum(used == method and re.search(pattern, path) is not None for used, path in self.seen)

    def forget(self) -> None:
        """Empties the list of requests."""
        self.seen.clear()
        self.ranges.clear()

    def fault_for(self, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None


class Refused(Exception):
    """An answer other than 2xx: status, message and headers."""

    def __init__(self, status: int, message: str, code: str = "", **body: object) -> None:
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **body}


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    hub: Hub
    _mute = False

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        account = self.headers.get("Authorization", "").removeprefix("Bearer ")
        with self.hub.lock:
            self.hub.seen.append((self.command, path))
            if "Range" in self.headers:
                self.hub.ranges.append((path, self.headers["Range"]))
        body = self._body()
        if body is None:
            return
        fault = self.hub.fault_for(path)
        self._mute = fault is not None and fault.status == 0
        if fault is not None and not self._mute:
            self._json({"error": fault.message}, fault.status, fault.headers)
            return
        if path.endswith("/commit/main"):
            self.hub.paused.wait()
        try:
            self._account = self._who(account)
            self._route(path, body)
        except Refused as refused:
            headers = {"X-Error-Message": str(refused)} | ({"X-Error-Code": refused.code} if refused.code else {})
            self._json(refused.body, refused.status, headers)

    def _body(self) -> bytes | None:
        """What was sent; None when the connection was cut in the middle of it."""
        length = int(self.headers.get("Content-Length") or 0)
        if self.command == "PUT":
            with self.hub.lock:
                cut = self.hub.upload_cuts.pop(0) if self.hub.upload_cuts else None
            if cut is not None:
                self.rfile.read(min(cut, length))
                self.close_connection = True
                return None
        return self.rfile.read(length)

    def _who(self, token: str) -> tuple[str, bool] | None:
        if token and token not in self.hub.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def _route(self, path: str, body: bytes) -> None:
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                with self.hub.lock:
                    answer(self, body, **match.groupdict())
                return
        raise Refused(404, f"no such address: {self.command} {path}")

    # ---- accounts and repositories -------------------------------------------------------------------------------

    def _may_read(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        hidden = repo is not None and repo.private and (self._account or ("", False))[0] != repo_id.split("/")[0]
        if repo is None or hidden:
            raise Refused(401 if self._account is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def _may_write(self, repo_id: str) -> Repo:
        repo = self._may_read(repo_id)
        self._check_writer(repo_id.split("/")[0])
        return repo

    def _check_writer(self, namespace: str) -> None:
        if self._account is None:
            raise Refused(401, "Invalid username or password.")
        name, writes = self._account
        if not writes or name != namespace:
            raise Refused(403, f"You don't have the rights to write under the namespace {namespace!r}")

    def _commit_of(self, repo: Repo, revision: str) -> tuple[str, dict[str, File]]:
        name = repo.resolve(revision)
        if name is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return name, repo.commits[name]

    def whoami(self, body: bytes) -> None:
        if self._account is None:
            raise Refused(401, "Invalid username or password.")
        name, writes = self._account
        token = {"displayName": "test", "role": "write" if writes else "read"}
        self._json({"type": "user", "name": name, "orgs": [], "auth": {"type": "access_token", "accessToken": token}})

    def create_repo(self, body: bytes) -> None:
        asked = json.loads(body)
        if self._account is None:
            raise Refused(401, "Invalid username or password.")
        repo_id = f"{asked['organization'] or self._account[0]}/{asked['name']}"
        url = f"{self.hub.address}/{repo_id}"
        if repo_id in self.hub.repos:
            raise Refused(409, "You already created this model repo", url=url)
        self._check_writer(repo_id.split("/")[0])
        self.hub.create(repo_id, private=asked.get("visibility") == "private")
        self._json({"url": url, "name": repo_id})

    def validate_yaml(self, body: bytes) -> None:
        """As the Hub: the metadata must be a mapping whose licence and tags are text."""
        content = json.loads(body)["content"]
        match = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", content, re.DOTALL)
        try:
            metadata = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            raise Refused(400, "bad YAML", errors=[{"message": str(error)}], warnings=[]) from error
        tags = (metadata or {}).get("tags") or []
        if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
            raise Refused(400, "bad metadata", errors=[{"message": '"tags" must be a list of text'}], warnings=[])
        self._json({"errors": [], "warnings": [] if metadata else [{"message": "empty or missing yaml metadata"}]})

    def info(self, body: bytes, repo_id: str, revision: str = "main") -> None:
        repo = self._may_read(repo_id)
        name, files = self._commit_of(repo, revision)
        self._json(
            {
                "_id": name[:24],
                "id": repo_id,
                "modelId": repo_id,
                "sha": name,
                "private": repo.private,
                "tags": [],
                "siblings": [file.entry(path) for path, file in files.items()],
            }
        )

    def tree(self, body: bytes, repo_id: str, revision: str, folder: str = "") -> None:
        _, files = self._commit_of(self._may_read(repo_id), revision)
        inside = f"{folder}/" if folder else ""
        listed = [file.entry(path) for path, file in files.items() if path.startswith(inside)]
        if folder and not listed:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        self._json(listed)

    def paths_info(self, body: bytes, repo_id: str, revision: str) -> None:
        _, files = self._commit_of(self._may_read(repo_id), revision)
        asked = parse_qs(body.decode()).get("paths", [])
        self._json([files[path].entry(path) for path in asked if path in files])

    def refs(self, body: bytes, repo_id: str) -> None:
        repo = self._may_read(repo_id)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in repo.branches.items()
        ]
        self._json({"branches": branches, "tags": [], "converts": []})

    def branch(self, body: bytes, repo_id: str, revision: str) -> None:
        repo = self._may_write(repo_id)
        if revision in repo.branches:
            raise Refused(409, "Reference already exists")
        name, _ = self._commit_of(repo, json.loads(body or b"{}").get("startingPoint", "main"))
        repo.branches[revision] = name
        self._json({})

    # ---- uploads ---------------------------------------------------------------------------------------------------

    def preupload(self, body: bytes, repo_id: str, revision: str) -> None:
        repo = self._may_write(repo_id)
        _, files = self._commit_of(repo, revision)
        answer = []
        for asked in json.loads(body)["files"]:
            path, there = asked["path"], files.get(asked["path"])
            lfs = path.endswith(LFS_SUFFIXES) or asked["size"] >= LFS_FROM
            told = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if there is not None:
                told["oid"] = there.sha256 if there.lfs else there.oid
            answer.append(told)
        self._json({"files": answer})

    def lfs_batch(self, body: bytes, repo_id: str) -> None:
        self._may_write(repo_id)
        objects = []
        for asked in json.loads(body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            told = {"oid": oid, "size": size}
            if oid not in self.hub.blobs:
                url = f"{self.hub.address}/lfs/{oid}"
                upload: dict = {"href": url, "header": {}}
                if self.hub.part_size is not None and size > self.hub.part_size:
                    count = -(-size // self.hub.part_size)
                    parts = {f"{number:05d}": f"{url}/{number}" for number in range(1, count + 1)}
                    upload = {
                        "href": f"{url}/complete/{size}",
                        "header": {"chunk_size": str(self.hub.part_size), **parts},
                    }
                told["actions"] = {"upload": upload, "verify": {"href": f"{url}/verify", "header": {}}}
            objects.append(told)
        self._json({"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str, part: str = "") -> None:
        if part:
            self.hub.parts.setdefault(oid, {})[int(part)] = body
        else:
            self._store(oid, body)
        self._send(200, b"", {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def complete(self, body: bytes, oid: str, size: str) -> None:
        parts = self.hub.parts.pop(oid)
        asked = [part["partNumber"] for part in json.loads(body)["parts"]]
        content = b"".join(parts[number] for number in asked)
        if len(content) != int(size):
            raise Refused(400, "parts are missing")
        self._store(oid, content)
        self._json({})

    def _store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(422, "the content is not what was announced")
        self.hub.blobs[oid] = content

    def verify(self, body: bytes, oid: str) -> None:
        asked = json.loads(body)
        if len(self.hub.blobs.get(oid, b"")) != asked["size"]:
            raise Refused(422, "incomplete")
        self._json({})

    def commit(self, body: bytes, repo_id: str, revision: str) -> None:
        repo = self._may_write(repo_id)
        if revision not in repo.branches:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files, message = dict(repo.commits[repo.branches[revision]]), ""
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refused(400, f"{value['path']}: the LFS object was never uploaded")
                files[value["path"]] = File(self.hub.blobs[value["oid"]], lfs=True)
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise Refused(400, f"unknown operation {key}")
        name = repo.commit(revision, files, message)
        self._json({"success": True, "commitOid": name, "commitUrl": f"{self.hub.address}/{repo_id}/commit/{name}"})

    # ---- downloads -------------------------------------------------------------------------------------------------

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        name, files = self._commit_of(self._may_read(repo_id), revision)
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        file = files[path]
        tag = file.sha256 if file.lfs else file.oid
        headers = {"X-Repo-Commit": name, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        if file.lfs:
            headers |= {"X-Linked-Etag": f'"{tag}"', "X-Linked-Size": str(len(file.content))}
        status, content = 200, file.content
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            start, end = int(asked[1]), int(asked[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            status, content = 206, content[start : end + 1]
        cuts = self.hub.download_cuts.get(path, []) if self.command == "GET" else []
        self._send(status, content, headers, cut=cuts.pop(0) if cuts else None)

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        if self._mute:
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if cut is None else content[:cut])
        if cut is not None:
            self.close_connection = True


_ID, _REV = r"(?P<repo_id>[^/]+/[^/]+)", r"(?P<revision>.+)"
_MODEL = rf"/api/models/{_ID}"
ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create_repo),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", _MODEL, Handler.info),
    ("GET", rf"{_MODEL}/revision/{_REV}", Handler.info),
    ("GET", rf"{_MODEL}/tree/(?P<revision>[^/]+)", Handler.tree),
    ("GET", rf"{_MODEL}/tree/(?P<revision>[^/]+)/(?P<folder>.+)", Handler.tree),
    ("POST", rf"{_MODEL}/paths-info/{_REV}", Handler.paths_info),
    ("GET", rf"{_MODEL}/refs", Handler.refs),
    ("POST", rf"{_MODEL}/branch/{_REV}", Handler.branch),
    ("POST", rf"{_MODEL}/preupload/{_REV}", Handler.preupload),
    ("POST", rf"{_MODEL}/commit/{_REV}", Handler.commit),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.put),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})/(?P<part>\d+)", Handler.put),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/complete/(?P<size>\d+)", Handler.complete),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", Handler.verify),
    ("GET|HEAD", rf"/{_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]


class Server:
    """`with Server() as hub:` serves a new, empty Hub on a free port; `hub.address` is its address."""

    def __enter__(self) -> Hub:
        hub = Hub()
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("_Handler", (Handler,), {"hub": hub}))
        self._server.daemon_threads = True
        hub.address = f"http://127.0.0.1:{self._server.server_port}"
        self._hub = hub
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return hub

    def __exit__(self, *_: object) -> None:
        self._hub.paused.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
