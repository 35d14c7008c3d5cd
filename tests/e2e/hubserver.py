"""A Hugging Face Hub of one process: the endpoints that huggingface_hub calls to publish a model and fetch it again.

Written from what the client (2.4) sends and reads, kept in memory, and strict where the Hub is: a commit may only name
LFS objects that are stored, a commit on an old parent is refused, and a private repository does not exist without its
owner's token. It speaks LFS and not Xet, which needs a storage service of its own: clients turn Xet off with
HF_HUB_DISABLE_XET. What it does with bodies, redirects and ETags is enough for the client's cache.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
USERS = {"hf_writer": ("user", "write"), "hf_reader": ("user", "read"), "hf_other": ("other", "write")}


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class File:
    content: bytes
    is_lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else git_hash(self.content)

    def entry(self, path: str) -> dict[str, Any]:
        """A line of a tree."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        lfs = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(pointer)}
        oid = git_hash(pointer.encode() if self.is_lfs else self.content)
        return {"type": "file", "path": path, "size": len(self.content), "oid": oid} | (
            {"lfs": lfs} if self.is_lfs else {}
        )


@dataclass
class Repo:
    private: bool = False
    card_data: dict[str, Any] | None = None
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, File], message: str = "") -> str:
        sha = hashlib.sha1(repr((branch, len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.commits[self.branches[branch]].items()}


class HubServer(ThreadingHTTPServer):
    """`drop_uploads_after` finished uploads, every further one is cut off in the middle."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads: Counter[str] = Counter()  # finished, by LFS oid
        self.requests: list[str] = []
        self.drop_uploads_after: int | None = None
        self.num_drops = 0
        self.most_drops = 10**9

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add_repo(self, name: str, files: dict[str, bytes] | None = None, **about: Any) -> Repo:
        repo = self.repos[name] = Repo(**about)
        content = {".gitattributes": GIT_ATTRIBUTES, **(files or {})}
        repo.commit("main", {path: File(data) for path, data in content.items()})
        return repo

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away is not news


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.parts = [unquote(part) for part in url.path.strip("/").split("/")]
        self.server.requests.append(f"{self.command} {url.path}")
        if self.command == "PUT":
            self._put_object()
            return
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        try:
            self._send(200, self._route())
        except _Refused as refused:
            self._send(refused.status, {"error": refused.message}, message=refused.message, code=refused.code)

    def _send(self, status: int, value: Any, *, message: str | None = None, code: str | None = None) -> None:
        if isinstance(value, File):
            body, headers = value.content, {"ETag": f'"{value.etag}"', "X-Repo-Commit": self.commit_sha}
        else:
            body, headers = json.dumps(value).encode(), {"Content-Type": "application/json"}
        self.send_response(status)
        headers |= {"X-Error-Message": message} if message else {}
        headers |= {"X-Error-Code": code} if code else {}
        for name, text in headers.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _user(self, *, needed: bool) -> tuple[str, str]:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token in USERS:
            return USERS[token]
        if token or needed:
            raise _Refused(401, "Invalid credentials in Authorization header")
        return "", ""

    def _writer(self, repo: str) -> None:
        user, role = self._user(needed=True)
        if role != "write" or repo.split("/")[0] != user:
            raise _Refused(403, f"You don't have the rights to write under the namespace {repo.split('/')[0]}")

    def _repo(self, name: str) -> Repo:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and self._user(needed=False)[0] != name.split("/")[0]):
            raise _Refused(
                401 if not self.headers.get("Authorization") else 404, "Repository not found", "RepoNotFound"
            )
        return repo

    def _files(self, repo: Repo, revision: str) -> dict[str, File]:
        self.commit_sha = repo.branches.get(revision, revision)
        if self.commit_sha not in repo.commits:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo.commits[self.commit_sha]

    def _route(self) -> Any:
        parts = self.parts
        if parts == ["api", "whoami-v2"]:
            name, role = self._user(needed=True)
            return {"type": "user", "name": name, "auth": {"type": "access_token", "accessToken": {"role": role}}}
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(self.body))
        if parts == ["api", "validate-yaml"]:
            return self._validate(json.loads(self.body)["content"])
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            return self._model("/".join(parts[2:4]), parts[4:])
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            return self._batch("/".join(parts[:2]).removesuffix(".git"), json.loads(self.body))
        if len(parts) > 4 and parts[2] == "resolve":
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        raise _Refused(404, f"no such endpoint: {self.command} {self.path}")

    def _create(self, asked: dict[str, Any]) -> Any:
        name = f"{asked['organization'] or self._user(needed=True)[0]}/{asked['name']}"
        self._writer(name)
        if name in self.server.repos:
            raise _Refused(409, "You already created this model repo")
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.server.add_repo(name, private=private)
        return {"url": f"{self.server.endpoint}/{name}", "name": name}

    def _validate(self, content: str) -> Any:
        data = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else {}
        wrong = [key for key in ("base_model", "license", "library_name") if not isinstance(data.get(key, ""), str)]
        if wrong:
            raise _Refused(400, f"{wrong[0]} must be a string")
        return {"errors": [], "warnings": []}

    def _model(self, name: str, rest: list[str]) -> Any:
        repo = self._repo(name)
        match rest:
            case [] | ["revision", _]:
                files = self._files(repo, rest[1] if rest else "main")
                siblings = [self._sibling(path, file) for path, file in files.items()]
                about = {"cardData": repo.card_data} if repo.card_data else {}
                return {"id": name, "sha": self.commit_sha, "private": repo.private, "siblings": siblings, **about}
            case ["auth-check", "write"]:
                self._writer(name)
                return {}
            case ["tree", revision, *_]:
                return [file.entry(path) for path, file in self._files(repo, revision).items()]
            case ["branch", branch]:
                self._writer(name)
                if branch in repo.branches:
                    raise _Refused(409, "Reference already exists")
                repo.branches[branch] = repo.branches["main"]
                return {}
            case ["preupload", revision]:
                self._writer(name)
                return self._preupload(self._files(repo, revision), json.loads(self.body)["files"])
            case ["commit", revision]:
                self._writer(name)
                return self._commit(repo, name, revision)
        raise _Refused(404, f"no such endpoint: {self.command} {self.path}")

    def _sibling(self, path: str, file: File) -> dict[str, Any]:
        lfs = {"lfs": {"sha256": file.sha256, "size": len(file.content), "pointerSize": 130}} if file.is_lfs else {}
        return {"rfilename": path, "size": len(file.content), "blobId": git_hash(file.content), **lfs}

    def _preupload(self, there: dict[str, File], asked: list[dict[str, Any]]) -> Any:
        answers = []
        for file in asked:
            mode = "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular"
            known = {"oid": there[file["path"]].etag} if file["path"] in there else {}
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        return {"files": answers}

    def _batch(self, name: str, asked: dict[str, Any]) -> Any:
        self._writer(name)
        assert "basic" in asked["transfers"]
        objects = []
        for item in asked["objects"]:
            upload = {"upload": {"href": f"{self.server.endpoint}/lfs/{item['oid']}"}}
            missing = item["oid"] not in self.server.objects
            objects.append({"oid": item["oid"], "size": item["size"], **({"actions": upload} if missing else {})})
        return {"transfer": "basic", "objects": objects}

    def _put_object(self) -> None:
        length, server = int(self.headers["Content-Length"]), self.server
        full = server.drop_uploads_after is not None and sum(server.uploads.values()) >= server.drop_uploads_after
        if full and server.num_drops < server.most_drops:
            server.num_drops += 1
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.shutdown(2)
            return
        content, oid = self.rfile.read(length), self.parts[-1]
        assert hashlib.sha256(content).hexdigest() == oid
        server.objects[oid] = content
        server.uploads[oid] += 1
        self._send(200, {})

    def _commit(self, repo: Repo, name: str, branch: str) -> Any:
        files = dict(self._files(repo, branch))
        message = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", self.commit_sha) != self.commit_sha:
                    raise _Refused(412, "A commit has happened since. Please refresh and try again.")
            elif item["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise _Refused(400, f"LFS pointer to an object that does not exist: {value['oid']}")
                files[value["path"]] = File(self.server.objects[value["oid"]], is_lfs=True)
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(branch, files, message)
        return {"commitUrl": f"{self.server.endpoint}/{name}/commit/{sha}", "commitOid": sha}

    def _resolve(self, name: str, revision: str, path: str) -> Any:
        files = self._files(self._repo(name), revision)
        if path not in files:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        return files[path]
