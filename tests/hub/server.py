"""A Hub on this machine, so that the real clients push to it and pull from it over HTTP.

It answers what huggingface_hub, transformers, timm and datasets ask for when they push and load models and data sets,
in both ways of transfer: LFS, and Xet (`xet_store.py`), which is the clients' default.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from store import LFS_SIZE, LFS_SUFFIXES, Refused, Store
from xet_store import XetStore

KINDS = {"models": "model", "datasets": "dataset"}
USERS = {
    "tok-alice": {"name": "alice", "role": "write"},
    "tok-read": {"name": "alice", "role": "read"},
    "tok-bob": {"name": "bob", "role": "write"},
}


@dataclass
class Seen:
    """One request as it arrived."""

    method: str
    path: str  # as sent: a revision with a slash is one segment
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes = b""
    status: int = 0


@dataclass
class Fault:
    """Answers requests in place of the server, or lets them wait."""

    applies: Callable[[Seen], bool]
    status: int
    times: int
    delay: float = 0.0


@dataclass
class HubServer:
    """The server, and what tests want to know of it."""

    folder: Path
    token: str = "tok-alice"
    log: list[Seen] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store = Store(self.folder, USERS)
        self.xet = XetStore(self.store, self)

    # ---- For tests ----

    def fail(self, applies: Callable[[Seen], bool], status: int = 0, times: int = 1, delay: float = 0.0) -> None:
        """Answer the next `times` requests to which `applies` with a status; 0 only delays them (seconds)."""
        self.faults.append(Fault(applies, status, times, delay))

    def heal(self) -> None:
        """End all faults."""
        self.faults.clear()

    def requests(self, part: str = "") -> list[Seen]:
        """What arrived so far, with that in its path."""
        return [seen for seen in self.log if part in seen.path]

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """Content by path of a repository."""
        tree = self.store.tree(self.store.repositories[f"{kind}/{name}"], revision)
        return {path: self.store.blob(entry["sha256"]).read_bytes() for path, entry in tree.items()}

    def commits(self, name: str, kind: str = "model") -> list[dict[str, Any]]:
        """Commits of the main branch, the newest first, each with `id` and `title`."""
        return self.store.history(self.store.repositories[f"{kind}/{name}"], "main")

    def commit(self, name: str, files: dict[str, bytes], title: str, kind: str = "model") -> None:
        """A commit by somebody else."""
        repository = self.store.repositories[f"{kind}/{name}"]
        added = {path: self.store.regular_file(content) for path, content in files.items()}
        self.store.add_commit(repository, "refs/heads/main", self.store.tree(repository, "main") | added, title)

    def start(self, port: int = 0) -> None:
        """Serve on a port of this machine, a free one when 0, until the process ends or `kill`."""
        app = Starlette(routes=[Route("/{path:path}", self._answer, methods=["GET", "HEAD", "POST", "PUT", "DELETE"])])
        settings = {"host": "127.0.0.1", "port": port, "log_level": "critical", "lifespan": "off"}
        self.server = uvicorn.Server(uvicorn.Config(app, **settings))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        self.base = f"http://127.0.0.1:{self.port}"
        # Another origin, as the real Hub's content delivery is: clients send it no token.
        self.delivery = f"http://localhost:{self.port}"

    def kill(self) -> None:
        """Stop at once and cut all connections; `start(hub.port)` comes back with what was kept on disk."""
        self.server.should_exit = self.server.force_exit = True
        for connection in list(self.server.server_state.connections):
            connection.transport.abort()

    # ---- One request ----

    async def _answer(self, request: Request) -> Response:
        seen = Seen(
            request.method,
            request.scope["raw_path"].decode(),
            parse_qs(request.scope["query_string"].decode()),
            dict(request.headers),
        )
        self.log.append(seen)
        try:
            seen.body = await request.body()
            answer = await run_in_threadpool(self._faulty, seen)
            answer = answer or await run_in_threadpool(self._route, seen)
        except Refused as refusal:
            headers = {"X-Error-Message": refusal.message, **refusal.headers}
            headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
            answer = JSONResponse({"error": refusal.message}, refusal.status, headers=headers)
        seen.status = answer.status_code
        return answer

    def _faulty(self, seen: Seen) -> Response | None:
        for fault in list(self.faults):
            if fault.times > 0 and fault.applies(seen):
                fault.times -= 1
                time.sleep(fault.delay)
                if fault.status:
                    return JSONResponse({"error": "a fault of the test"}, fault.status)
        return None

    def _route(self, seen: Seen) -> Response:
        parts = [unquote(part) for part in seen.path.strip("/").split("/")]
        if parts[0] == "lfs-content":
            return self._lfs_content(seen, parts[1], parts[2])
        if parts[0] in ("v1", "v2", "xorbs"):
            return self.xet.route(seen, parts)
        user = self.store.user_of(seen.headers.get("authorization"))
        if parts[-4:] == ["info", "lfs", "objects", "batch"][-4:]:
            kind, name = self._kind_and_name(parts[:-4])
            self.store.open(kind, name.removesuffix(".git"), user, write=True)
            return self._lfs_batch(json.loads(seen.body))
        if parts[0] != "api":
            kind, name = self._kind_and_name(parts)
            offset = 3 if parts[0] in KINDS else 2
            if parts[offset : offset + 1] == ["resolve"]:
                return self._resolve(kind, name, parts[offset + 1], "/".join(parts[offset + 2 :]), user)
            raise Refused(404, "Not Found")
        return self._api(seen, parts[1:], user)

    @staticmethod
    def _kind_and_name(parts: list[str]) -> tuple[str, str]:
        return (KINDS[parts[0]], "/".join(parts[1:3])) if parts[0] in KINDS else ("model", "/".join(parts[:2]))

    def _api(self, seen: Seen, parts: list[str], user: dict[str, Any] | None) -> Response:
        if parts == ["whoami-v2"]:
            if user is None:
                raise Refused(401, "Invalid username or password.")
            access = {"accessToken": {"displayName": "test", "role": user["role"]}}
            return JSONResponse({"type": "user", "name": user["name"], "orgs": [], "auth": access})
        if parts == ["validate-yaml"]:
            return JSONResponse({"errors": [], "warnings": []})
        if parts == ["repos", "create"]:
            return self._create(json.loads(seen.body), user)
        if parts[0] not in KINDS or len(parts) < 3:
            raise Refused(404, "Not Found")
        kind, name, action, rest = KINDS[parts[0]], "/".join(parts[1:3]), (parts[3:4] or [""])[0], parts[4:]
        handler = getattr(self, "_on_" + action.replace("-", "_"), None)
        if handler is None:
            raise Refused(404, "Not Found")
        writes = action in ("preupload", "commit", "branch", "xet-write-token") or rest == ["write"]
        repository = self.store.open(kind, name, user, write=writes)
        return handler(seen, kind, name, repository, rest)

    def _create(self, asked: dict[str, Any], user: dict[str, Any] | None) -> Response:
        kind, owner = asked.get("type") or "model", asked.get("organization") or (user or {}).get("name")
        name = f"{owner}/{asked['name']}"
        url = f"{self.base}/{'' if kind == 'model' else kind + 's/'}{name}"
        with self.store.lock:
            created = self.store.create(kind, name, asked.get("visibility") == "private", user)
        if created:
            return JSONResponse({"url": url, "name": name})
        # Clients read the URL also from the answer that the repository exists.
        return JSONResponse({"error": "You already created this repo", "url": url}, 409)

    # ---- A repository: reading ----

    def _on_(self, seen: Seen, kind: str, name: str, repository: dict, rest: list[str]) -> Response:
        return self._on_revision(seen, kind, name, repository, ["main"])

    def _on_revision(self, seen: Seen, kind: str, name: str, repository: dict, rest: list[str]) -> Response:
        commit = self.store.resolve(repository, rest[0])
        tree, card = self.store.tree(repository, commit), {}
        if "README.md" in tree:
            text = self.store.blob(tree["README.md"]["sha256"]).read_text()
            card = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}
        answer = {"_id": "0" * 24, "id": name, "sha": commit, "private": repository["private"], "gated": False}
        answer |= {"cardData": card, "tags": card.get("tags") or [], "pipeline_tag": card.get("pipeline_tag")}
        return JSONResponse(answer | {"siblings": [{"rfilename": path} for path in sorted(tree)]})

    def _on_auth_check(self, seen: Seen, kind: str, name: str, repository: dict, rest: list[str]) -> Response:
        return JSONResponse({})

    def _on_commits(self, seen: Seen, kind: str, name: str, repository: dict, rest: list[str]) -> Response:
        history = self.store.history(repository, rest[0])
        return JSONResponse([{**commit, "message": "", "authors": [], "tree": None} for commit in history])

    def _on_refs(self, seen: Seen, kind: str, name: str, repository: dict, rest: list[str]) -> Response:
        branches = [
            {"name": ref.removeprefix("refs/heads/"), "ref": ref, "targetCommit": commit}
            for ref, commit in repository["refs"].items()
            if ref.startswith("refs/heads/")
        ]
        return JSONResponse({"branches": branches, "tags": [], "converts": []})

    def _entry(self, path: str, file: dict[str, Any]) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": file["size"], "oid": file["oid"]}
        if file["lfs"]:
            entry["lfs"] = {"oid": file["sha256"], "size": file["size"], "pointerSize": 134}
            if xet_hash := self.xet.hash_of(file["sha256"]):
                entry["xetHash"] = xet_hash
        return entry

    def _on_tree(self, seen: Seen, kind: str, name: str, repository: dict, rest: list[str]) -> Response:
        folder = "/".join(rest[1:]).strip("/")
        recursive = seen.query.get("recursive", ["false"])[0].lower() == "true"
        entries: dict[str, dict] = {}
        for path, file in sorted(self.store.tree(repository, rest[0]).items()):
            if folder and not path.startswith(f"{folder}/"):
                continue
            below = path.removeprefix(f"{folder}/") if folder else path
            if "/" in below and not recursive:
                top = f"{folder}/{below.split('/')[0]}".strip("/")
                entries[top] = {"type": "directory", "path": top, "oid": "0" * 40, "size": 0}
            else:
                entries[path] = self._entry(path, file)
        if folder and not entries:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        return JSONResponse(list(entries.values()))

    def _on_paths_info(self, seen: Seen, kind: str, name: str, repository: dict, rest: list[str]) -> Response:
        asked, tree = parse_qs(seen.body.decode()).get("paths", []), self.store.tree(repository, rest[0])
        return JSONResponse([self._entry(path, tree[path]) for path in asked if path in tree])

    def _resolve(self, kind: str, name: str, revision: str, path: str, user: dict[str, Any] | None) -> Response:
        repository = self.store.open(kind, name, user)
        commit = self.store.resolve(repository, revision)
        file = self.store.tree(repository, commit).get(path)
        if file is None:
            raise Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file["sha256"] if file["lfs"] else file["oid"]}"'}
        if not file["lfs"]:
            return FileResponse(self.store.blob(file["sha256"]), headers=headers)
        headers |= {"X-Linked-Size": str(file["size"]), "X-Linked-Etag": f'"{file["sha256"]}"'}
        headers["Location"] = f"{self.delivery}/lfs-content/get/{file['sha256']}"
        if xet_hash := self.xet.hash_of(file["sha256"]):
            route = f"{self.base}/api/{kind}s/{name}/xet-read-token/{commit}"
            headers |= {"X-Xet-Hash": xet_hash, "X-Xet-Refresh-Route": route, "Link": f'<{route}>; rel="xet-auth"'}
        return Response(status_code=302, headers=headers)

    # ---- A repository: writing ----

    def _on_branch(self, seen: Seen, kind: str, name: str, repository: dict, rest: list[str]) -> Response:
        with self.store.lock:
            if f"refs/heads/{rest[0]}" in repository["refs"]:
                raise Refused(409, f"Reference already exists: {rest[0]}")
            start = json.loads(seen.body or b"{}").get("startingPoint", "main")
            repository["refs"][f"refs/heads/{rest[0]}"] = self.store.resolve(repository, start)
            self.store.save()
        return Response("OK")

    def _on_preupload(self, seen: Seen, kind: str, name: str, repository: dict, rest: list[str]) -> Response:
        tree, answers = self.store.tree(repository, rest[0]), []
        for file in json.loads(seen.body)["files"]:
            large = file["size"] > LFS_SIZE or file["path"].endswith(LFS_SUFFIXES)
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if present := tree.get(file["path"]):
                answer["oid"] = present["sha256"] if present["lfs"] else present["oid"]
            answers.append(answer)
        return JSONResponse({"files": answers})

    def _on_commit(self, seen: Seen, kind: str, name: str, repository: dict, rest: list[str]) -> Response:
        lines = [json.loads(line) for line in seen.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        with self.store.lock:
            head = self.store.resolve(repository, rest[0])
            if header.get("parentCommit") not in (None, head):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            tree = self._changed(dict(self.store.tree(repository, head)), lines)
            ref, answer = rest[0] if rest[0].startswith("refs/") else f"refs/heads/{rest[0]}", {}
            if "create_pr" in seen.query:
                ref = self._open_pull_request(repository, header["summary"])
                prefix = "" if kind == "model" else f"{kind}s/"
                answer["pullRequestUrl"] = f"{self.base}/{prefix}{name}/discussions/{ref.split('/')[-1]}"
            commit = self.store.add_commit(repository, ref, tree, header["summary"])
        return JSONResponse(answer | {"commitOid": commit, "commitUrl": f"{self.base}/{name}/commit/{commit}"})

    def _changed(self, tree: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = self.store.regular_file(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                tree[value["path"]] = self.store.large_file(value["oid"])
            elif line["key"] == "deletedFile" and tree.pop(value["path"], None) is None:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        return tree

    def _open_pull_request(self, repository: dict[str, Any], title: str) -> str:
        repository["pull_requests"].append(title)
        return f"refs/pr/{len(repository['pull_requests'])}"

    # ---- Transfer of large files ----

    def _lfs_batch(self, asked: dict[str, Any]) -> Response:
        objects = []
        for wanted in asked["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self.store.blob(wanted["oid"]).is_file():
                entry["actions"] = {"upload": {"href": f"{self.delivery}/lfs-content/put/{wanted['oid']}"}}
            objects.append(entry)
        return JSONResponse({"transfer": "basic", "objects": objects}, media_type="application/vnd.git-lfs+json")

    def _lfs_content(self, seen: Seen, action: str, sha256: str) -> Response:
        if action == "get":
            return FileResponse(self.store.blob(sha256), headers={"ETag": f'"{sha256}"'})
        if self.store.put(seen.body) != sha256:
            raise Refused(400, "the content has another sha256")
        return Response()

    def _on_xet_write_token(self, seen: Seen, kind: str, name: str, repository: dict, rest: list[str]) -> Response:
        return self.xet.token(self.base)

    _on_xet_read_token = _on_xet_write_token
