"""A server that speaks the Hub's HTTP API, as far as a model is pushed and loaded.

No server that can be had as a package takes pushes, so this is a stand-in: huggingface_hub's own
client talks to it over HTTP, but what it answers is our reading of the client and of the Hub's
documentation. Repositories, branches, commits, LFS uploads with their checksums, one token.
"""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, Self
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"

Files = dict[str, bytes]


class Commit(NamedTuple):
    """What a branch points to."""

    sha: str
    title: str
    files: Files


class Repository:
    """Branches of one model."""

    def __init__(self, *, private: bool) -> None:
        self.private = private
        self.branches = {"main": Commit("0" * 40, "initial commit", {})}

    def find(self, revision: str) -> Commit | None:
        """By branch or commit."""
        commits = (each for each in self.branches.values() if each.sha == revision)
        return self.branches.get(revision) or next(commits, None)


class HubServer:
    """Use as a context manager."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: Files = {}
        self.requests: list[str] = []
        self._http = _Http(("127.0.0.1", 0), _Handler)
        self._http.hub = self
        self._thread = Thread(target=self._http.serve_forever, daemon=True)

    @property
    def endpoint(self) -> str:
        """As in HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._http.server_port}"

    def environment(self, cache: Path) -> dict[str, str]:
        """What makes huggingface_hub talk to this server; read when it is imported."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HOME": str(cache),
            "HF_TOKEN": TOKEN,
        }

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> Commit:
        """Apply one commit; ValueError where it names bytes that were never uploaded."""
        repository = self.repositories[name]
        before = repository.branches[branch]
        files, title = dict(before.files), ""
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if len(self.large.get(value["oid"], b"")) != value["size"]:
                    raise ValueError(f"{value['path']} was not uploaded")
                files[value["path"]] = self.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise ValueError(f"unknown operation {key}")
        sha = hashlib.sha1(f"{before.sha}{title}{sorted(files)}".encode()).hexdigest()
        repository.branches[branch] = Commit(sha, title, files)
        return repository.branches[branch]


class _Http(ThreadingHTTPServer):
    hub: HubServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> "HubServer":
        http: Any = self.server
        return http.hub

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self._answer(b"")

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def do_PUT(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def _answer(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.command == "POST" and self.headers["Authorization"] != f"Bearer {TOKEN}":
            self._reply(401, {"error": "Invalid username or password."})
            return
        for pattern, method in _ROUTES:
            match = re.fullmatch(f"(GET|HEAD|POST|PUT) {pattern}", f"{self.command} {path}")
            if match is not None:
                method(self, body, *match.groups()[1:])
                return
        self._reply(404, {"error": f"no route for {self.command} {path}"})

    def _reply(self, status: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self._reply(404, {"error": code}, {"X-Error-Code": code})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        there = name in self.hub.repositories
        if not there:
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repositories[name] = Repository(private=bool(private))
        self._reply(409 if there else 200, {"url": f"{self.hub.endpoint}/{name}", "id": name})

    def branch(self, _: bytes, name: str, branch: str) -> None:
        branches = self.hub.repositories[name].branches
        there = branch in branches
        branches.setdefault(branch, branches["main"])
        self._reply(409 if there else 200, {})

    def validate(self, _: bytes) -> None:
        self._reply(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        if self.hub.repositories[name].find(revision) is None:
            self._missing("RevisionNotFound")
            return
        files = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for each in json.loads(body)["files"]
        ]
        self._reply(200, {"files": files})

    def batch(self, body: bytes, _name: str) -> None:
        objects = [
            {
                **each,
                "actions": {"upload": {"href": f"{self.hub.endpoint}/large/{each['oid']}"}},
            }
            for each in json.loads(body)["objects"]
        ]
        self._reply(200, {"transfer": "basic", "objects": objects})

    def put_large(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._reply(400, {"error": "another checksum"})
            return
        self.hub.large[oid] = body
        self._reply(200, {})

    def commit(self, body: bytes, name: str, revision: str) -> None:
        try:
            lines = [json.loads(line) for line in body.splitlines()]
            made = self.hub.commit(name, revision, lines)
        except (KeyError, ValueError) as error:
            self._reply(400, {"error": str(error)})
            return
        url = f"{self.hub.endpoint}/{name}/commit/{made.sha}"
        self._reply(
            200, {"success": True, "commitUrl": url, "commitOid": made.sha, "hookOutput": ""}
        )

    def info(self, _: bytes, name: str, revision: str | None = None) -> None:
        found = self._commit(name, revision or "main")
        if found is not None:
            siblings = [{"rfilename": path} for path in sorted(found.files)]
            body = {"id": name, "modelId": name, "sha": found.sha, "siblings": siblings}
            self._reply(200, {**body, "private": self.hub.repositories[name].private})

    def tree(self, _: bytes, name: str, revision: str) -> None:
        found = self._commit(name, revision)
        if found is not None:
            rows = [
                {
                    "type": "file",
                    "path": path,
                    "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest(),
                }
                for path, data in sorted(found.files.items())
            ]
            self._reply(200, rows)

    def resolve(self, _: bytes, name: str, revision: str, path: str) -> None:
        found = self._commit(name, revision)
        if found is None:
            return
        if path not in found.files:
            self._missing("EntryNotFound")
            return
        data = found.files[path]
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": found.sha,
            "Accept-Ranges": "bytes",
        }
        self._reply(200, data, headers)

    def _commit(self, name: str, revision: str) -> Commit | None:
        repository = self.hub.repositories.get(name)
        found = None if repository is None else repository.find(revision)
        if found is None:
            self._missing("RepoNotFound" if repository is None else "RevisionNotFound")
        return found


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", _Handler.validate),
    (rf"/api/models/{_NAME}/branch/(.+)", _Handler.branch),
    (rf"/api/models/{_NAME}/preupload/(.+)", _Handler.preupload),
    (rf"/api/models/{_NAME}/commit/(.+)", _Handler.commit),
    (rf"/api/models/{_NAME}/tree/([^/]+)/?", _Handler.tree),
    (rf"/api/models/{_NAME}/revision/(.+)", _Handler.info),
    (rf"/api/models/{_NAME}", _Handler.info),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    (r"/large/(\w+)", _Handler.put_large),
    (rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
)
