"""A local Hub that keeps its repositories in memory. It implements the HTTP requests of a model's push and download.

Large files go through Git LFS. A test requests faults by the name of a route, and the server records every request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_good"
REGULAR_LIMIT = 10_000

REPO = r"(?P<repo>[^/]+/[^/]+)"
API = rf"/api/models/{REPO}"
REV = r"(?P<rev>[^/]+)"
ROUTES = [
    (name, method, re.compile(pattern))
    for name, method, pattern in [
        ("create", "POST", "/api/repos/create"),
        ("validate", "POST", "/api/validate-yaml"),
        ("info", "GET", API),
        ("info", "GET", rf"{API}/revision/{REV}"),
        ("branch", "POST", rf"{API}/branch/{REV}"),
        ("preupload", "POST", rf"{API}/preupload/{REV}"),
        ("commit", "POST", rf"{API}/commit/{REV}"),
        ("tree", "GET", rf"{API}/tree/{REV}"),
        ("batch", "POST", rf"/{REPO}\.git/info/lfs/objects/batch"),
        ("verify", "POST", rf"/{REPO}\.git/info/lfs/objects/verify"),
        ("put", "PUT", r"/storage/(?P<oid>[0-9a-f]{64})"),
        ("resolve", "HEAD", rf"/{REPO}/resolve/{REV}/(?P<path>.+)"),
        ("resolve", "GET", rf"/{REPO}/resolve/{REV}/(?P<path>.+)"),
    ]
]


@dataclass(frozen=True)
class Blob:
    """A committed file.

    Attributes:
        data: content of the file.
        lfs: whether the file is stored in LFS.
        oid: id of the content: its SHA-256 for an LFS file, otherwise git's SHA-1 of the blob.
    """

    data: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """Id of the content, as git or LFS computes it."""
        if self.lfs:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass
class Repo:
    """A repository. Each branch points to a commit, and a commit holds a complete tree of files."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, tree: dict[str, Blob], message: str) -> str:
        """Add a commit of ``tree`` to ``branch``, and return its id."""
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = tree, sha
        self.messages.append(message)
        return sha

    def tree(self, branch: str = "main") -> dict[str, Blob]:
        """Return the files of a branch by path."""
        return self.commits[self.branches[branch]]


class Refused(Exception):
    """An HTTP error response. ``code`` is the Hub's name for the error."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class HubServer(ThreadingHTTPServer):
    """The server. Use it as a context manager, and pass its ``url`` to the client.

    Attributes:
        repos: repositories by id.
        objects: uploaded LFS objects by SHA-256.
        requests: route names of all requests, in order.
        served: bytes that were downloaded of each file, by path.
        puts: number of complete uploads of each LFS object.
        unavailable: number of requests on each route that will get a 503.
        cuts: number of uploads of each LFS object that will be interrupted.
        cut_after: bytes after which an upload is interrupted.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.served: Counter[str] = Counter()
        self.puts: Counter[str] = Counter()
        self.unavailable: Counter[str] = Counter()
        self.cuts: Counter[str] = Counter()
        self.cut_after = 0

    @property
    def url(self) -> str:
        """Address of the server."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fail(self, route: str, times: int = 1) -> None:
        """Answer the next ``times`` requests on a route with a 503."""
        self.unavailable[route] += times

    def cut_upload(self, oid: str, *, after: int, times: int = 1) -> None:
        """Close the connection after ``after`` bytes in the next ``times`` uploads of the object ``oid``."""
        self.cuts[oid], self.cut_after = times, after

    def create(self, repo_id: str, *, private: bool = False) -> Repo:
        """Create a repository with the initial commit that the Hub makes."""
        repo = self.repos[repo_id] = Repo(private)
        repo.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "initial commit")
        return repo

    def __enter__(self) -> HubServer:
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()

    # One method for each route. ``body`` is the parsed JSON, or a list of its lines; the result is the response.

    def on_create(self, body: dict[str, Any]) -> dict[str, Any]:
        repo_id = f"{body['organization']}/{body['name']}"
        if repo_id in self.repos:
            raise Refused(409, "You already created this model repo")
        self.create(repo_id, private=body.get("visibility") == "private" or body.get("private") is True)
        return {"url": f"{self.url}/{repo_id}"}

    def on_validate(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"errors": [], "warnings": []}

    def on_info(self, body: None, repo: str, rev: str = "main") -> dict[str, Any]:
        return {"id": repo, "sha": self._sha(repo, rev), "private": self._repo(repo).private}

    def on_branch(self, body: dict[str, Any], repo: str, rev: str) -> dict[str, Any]:
        branches = self._repo(repo).branches
        if rev.startswith("refs/"):
            raise Refused(400, "Invalid reference for a branch")
        if rev in branches:
            raise Refused(409, "Reference already exists")
        branches[rev] = branches["main"]
        return {}

    def on_preupload(self, body: dict[str, Any], repo: str, rev: str) -> dict[str, Any]:
        tree = self._tree(repo, rev)
        return {
            "files": [
                {
                    "path": path,
                    "uploadMode": "lfs" if _is_large(path, file["size"]) else "regular",
                    "shouldIgnore": False,
                    **({"oid": tree[path].oid} if path in tree else {}),
                }
                for file in body["files"]
                for path in [file["path"]]
            ]
        }

    def on_batch(self, body: dict[str, Any], repo: str) -> dict[str, Any]:
        self._repo(repo)
        objects = []
        for item in body["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.objects:
                answer["actions"] = {
                    "upload": {"href": f"{self.url}/storage/{item['oid']}"},
                    "verify": {"href": f"{self.url}/{repo}.git/info/lfs/objects/verify"},
                }
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def on_verify(self, body: dict[str, Any], repo: str) -> dict[str, Any]:
        if len(self.objects.get(body["oid"], b"")) != body["size"]:
            raise Refused(404, "The object is not in the storage")
        return {}

    def on_commit(self, body: list[dict[str, Any]], repo: str, rev: str) -> dict[str, Any]:
        tree, message = dict(self._tree(repo, rev)), ""
        for line in body:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                tree[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
            elif line["key"] == "lfsFile" and value["oid"] in self.objects:
                tree[value["path"]] = Blob(self.objects[value["oid"]], lfs=True)
            else:
                raise Refused(400, f"Cannot commit {line}")
        sha = self._repo(repo).commit(rev, tree, message)
        return {"commitUrl": f"{self.url}/{repo}/commit/{sha}", "commitOid": sha}

    def on_tree(self, body: None, repo: str, rev: str) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid}
            | ({"lfs": {"oid": blob.oid, "size": len(blob.data), "pointerSize": 130}} if blob.lfs else {})
            for path, blob in self._tree(repo, rev).items()
        ]

    def on_resolve(self, body: None, repo: str, rev: str, path: str) -> tuple[bytes, dict[str, str]]:
        tree = self._tree(repo, rev)
        if path not in tree:
            raise Refused(404, "Entry not found", "EntryNotFound")
        return tree[path].data, {"ETag": f'"{tree[path].oid}"', "X-Repo-Commit": self._sha(repo, rev)}

    def _repo(self, repo: str) -> Repo:
        if repo not in self.repos:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return self.repos[repo]

    def _sha(self, repo: str, rev: str) -> str:
        repository = self._repo(repo)
        sha = repository.branches.get(rev, rev)
        if sha not in repository.commits:
            raise Refused(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        return sha

    def _tree(self, repo: str, rev: str) -> dict[str, Blob]:
        return self._repo(repo).commits[self._sha(repo, rev)]


def _is_large(path: str, size: int) -> bool:
    return path.endswith(".safetensors") or size > REGULAR_LIMIT


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    server: HubServer

    def log_message(self, format: str, *args: object) -> None:
        """Write no log: ``HubServer.requests`` records the requests."""

    def do_GET(self) -> None:
        self._dispatch()

    def do_HEAD(self) -> None:
        self._dispatch()

    def do_POST(self) -> None:
        self._dispatch()

    def do_PUT(self) -> None:
        self._dispatch()

    def _dispatch(self) -> None:
        path = urlsplit(self.path).path
        matches = ((name, pattern.fullmatch(path)) for name, method, pattern in ROUTES if method == self.command)
        name, match = next(((name, match) for name, match in matches if match), ("unknown", None))
        groups = {key: unquote(value) for key, value in match.groupdict().items()} if match else {}
        with self.server.lock:
            self.server.requests.append(name)
            cut = name == "put" and self._take(self.server.cuts, groups["oid"])
        if cut:
            self._hang_up()
            return
        raw = self._read_body()
        try:
            with self.server.lock:
                self._check(name)
                answer = self._store(raw, **groups) if name == "put" else self._call(name, raw, groups)
            body, headers = answer if isinstance(answer, tuple) else (json.dumps(answer).encode(), {})
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
            if name == "resolve" and self.command == "GET":
                if wanted:
                    body = body[int(wanted[1]) : int(wanted[2]) + 1 if wanted[2] else None]
                with self.server.lock:
                    self.server.served[groups["path"]] += len(body)
            self._answer(206 if wanted else 200, body, headers)
        except Refused as refused:
            message = str(refused)
            headers = {"X-Error-Message": message} | ({"X-Error-Code": refused.code} if refused.code else {})
            self._answer(refused.status, json.dumps({"error": message}).encode(), headers)

    def _check(self, name: str) -> None:
        if self._take(self.server.unavailable, name):
            raise Refused(503, "Service unavailable")
        # An upload needs no token, because the real storage uses signed addresses.
        if name != "put" and self.headers["Authorization"] != f"Bearer {TOKEN}":
            raise Refused(401, "Invalid credentials in Authorization header")
        if name == "unknown":
            raise Refused(404, f"No route for {self.command} {self.path}")

    def _call(self, name: str, raw: bytes, groups: dict[str, str]) -> Any:
        lines = [json.loads(line) for line in raw.splitlines()]
        body = lines if self.headers["Content-Type"] == "application/x-ndjson" else next(iter(lines), None)
        return getattr(self.server, f"on_{name}")(body, **groups)

    def _store(self, raw: bytes, oid: str) -> dict[str, Any]:
        self.server.puts[oid] += 1
        if hashlib.sha256(raw).hexdigest() != oid:
            raise Refused(400, "The object does not match its id")
        self.server.objects[oid] = raw
        return {}

    def _hang_up(self) -> None:
        self.rfile.read(self.server.cut_after)
        self.close_connection = True

    def _read_body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @staticmethod
    def _take(faults: Counter[str], key: str) -> bool:
        """Return whether a fault is left under ``key``, and use it up."""
        if not faults[key]:
            return False
        faults[key] -= 1
        return True
