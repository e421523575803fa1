"""What the Hub answers to each request of its clients."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

import yaml
from starlette.responses import FileResponse, JSONResponse, Response
from store import LFS_SIZE, LFS_SUFFIXES, Refused, Store
from xet_store import XetStore

if TYPE_CHECKING:
    from server import HubServer, Seen

KINDS = {"models": "model", "datasets": "dataset"}
User = dict[str, Any] | None


@dataclass
class Target:
    """The repository that a request is about, and the rest of its path."""

    kind: str
    name: str
    repository: dict[str, Any]
    rest: list[str]


class Routes:
    """Answers by path; refusals are raised as `Refused`."""

    def __init__(self, store: Store, xet: XetStore, server: HubServer) -> None:
        self.store, self.xet, self.server = store, xet, server
        self.reading = {
            "": self._info,
            "revision": self._info,
            "auth-check": lambda seen, target: JSONResponse({}),
            "commits": self._commits,
            "refs": self._refs,
            "tree": self._tree,
            "paths-info": self._paths_info,
            "discussions": self._discussions,
            "xet-read-token": lambda seen, target: self.xet.token(self.server.base),
        }
        self.writing = {
            "branch": self._branch,
            "preupload": self._preupload,
            "commit": self._commit,
            "xet-write-token": lambda seen, target: self.xet.token(self.server.base),
        }

    def answer(self, seen: Seen) -> Response:
        """The answer to one request."""
        # Decoded after the split: a revision with a slash is one part.
        parts = [unquote(part) for part in seen.path.strip("/").split("/")]
        if parts[0] in ("v1", "v2", "xorbs"):
            return self.xet.route(seen, parts)
        if parts[0] == "lfs-content" and parts[1] in ("get", "put"):
            return self._lfs_content(seen, parts[2])
        user = self.store.user_of(seen.headers.get("authorization"))
        if parts[0] == "lfs-content":
            return self._lfs_verify(json.loads(seen.body), user)
        if parts[0] == "api":
            return self._api(seen, parts[1:], user)
        kind = KINDS[parts.pop(0)] if parts[0] in KINDS else "model"
        name, rest = "/".join(parts[:2]), parts[2:]
        if rest == ["info", "lfs", "objects", "batch"]:
            self.store.open(kind, name.removesuffix(".git"), user, write=True)
            return self._lfs_batch(json.loads(seen.body))
        if rest[:1] == ["resolve"]:
            return self._resolve(Target(kind, name, self.store.open(kind, name, user), rest[1:]))
        raise Refused(404, "Not Found")

    def _api(self, seen: Seen, parts: list[str], user: User) -> Response:
        if parts == ["whoami-v2"]:
            return self._whoami(user)
        if parts == ["validate-yaml"]:
            return JSONResponse({"errors": [], "warnings": []})
        if parts in (["repos", "create"], ["repos", "delete"]):
            return self._create_or_delete(parts[1], json.loads(seen.body), user)
        action, rest = (parts[3:4] or [""])[0], parts[4:]
        handler = self.reading.get(action) or self.writing.get(action)
        if parts[0] not in KINDS or len(parts) < 3 or handler is None:
            raise Refused(404, "Not Found")
        kind, name = KINDS[parts[0]], "/".join(parts[1:3])
        opens_pull_request = action == "discussions" and seen.method == "POST"
        write = action in self.writing or parts[3:] == ["auth-check", "write"] or opens_pull_request
        return handler(seen, Target(kind, name, self.store.open(kind, name, user, write=write), rest))

    def _url(self, kind: str, name: str) -> str:
        return f"{self.server.base}/{'' if kind == 'model' else kind + 's/'}{name}"

    # ---- Users and repositories ----

    def _whoami(self, user: User) -> Response:
        if user is None:
            raise Refused(401, "Invalid username or password.")
        access = {"accessToken": {"displayName": "test", "role": user["role"]}}
        return JSONResponse({"type": "user", "name": user["name"], "orgs": [], "auth": access})

    def _create_or_delete(self, action: str, asked: dict[str, Any], user: User) -> Response:
        kind, owner = asked.get("type") or "model", asked.get("organization") or (user or {}).get("name")
        name = f"{owner}/{asked['name']}"
        if action == "delete":
            self.store.delete(kind, name, user)
            return Response("OK")
        url = self._url(kind, name)
        if self.store.create(kind, name, asked.get("visibility") == "private", user):
            return JSONResponse({"url": url, "name": name})
        # Clients read the URL also from the answer that the repository exists.
        return JSONResponse({"error": "You already created this repo", "url": url}, 409)

    # ---- A repository: reading ----

    def _info(self, seen: Seen, target: Target) -> Response:
        commit = self.store.resolve(target.repository, (target.rest or ["main"])[0])
        tree, card = self.store.tree(target.repository, commit), {}
        if "README.md" in tree:
            text = self.store.blob(tree["README.md"]["sha256"]).read_text()
            card = (yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}) or {}
        answer = {"id": target.name, "sha": commit, "private": target.repository["private"], "gated": False}
        answer |= {"cardData": card, "tags": card.get("tags") or [], "pipeline_tag": card.get("pipeline_tag")}
        return JSONResponse(answer | {"siblings": [{"rfilename": path} for path in sorted(tree)]})

    def _commits(self, seen: Seen, target: Target) -> Response:
        history = self.store.history(target.repository, target.rest[0])
        return JSONResponse([{**commit, "message": "", "authors": [], "tree": None} for commit in history])

    def _refs(self, seen: Seen, target: Target) -> Response:
        branches = [
            {"name": ref.removeprefix("refs/heads/"), "ref": ref, "targetCommit": commit}
            for ref, commit in target.repository["refs"].items()
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

    def _tree(self, seen: Seen, target: Target) -> Response:
        folder = "/".join(target.rest[1:]).strip("/")
        recursive = seen.query.get("recursive", ["false"])[0].lower() == "true"
        entries: dict[str, dict[str, Any]] = {}
        for path, file in sorted(self.store.tree(target.repository, target.rest[0]).items()):
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

    def _paths_info(self, seen: Seen, target: Target) -> Response:
        asked, tree = parse_qs(seen.body.decode()).get("paths", []), self.store.tree(target.repository, target.rest[0])
        return JSONResponse([self._entry(path, tree[path]) for path in asked if path in tree])

    def _resolve(self, target: Target) -> Response:
        commit = self.store.resolve(target.repository, target.rest[0])
        file = self.store.tree(target.repository, commit).get("/".join(target.rest[1:]))
        if file is None:
            raise Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file["sha256"] if file["lfs"] else file["oid"]}"'}
        if not file["lfs"]:
            return FileResponse(self.store.blob(file["sha256"]), headers=headers)
        headers |= {"X-Linked-Size": str(file["size"]), "X-Linked-Etag": f'"{file["sha256"]}"'}
        headers["Location"] = f"{self.server.delivery}/lfs-content/get/{file['sha256']}"
        if xet_hash := self.xet.hash_of(file["sha256"]):
            route = f"{self.server.base}/api/{target.kind}s/{target.name}/xet-read-token/{commit}"
            headers |= {"X-Xet-Hash": xet_hash, "X-Xet-Refresh-Route": route, "Link": f'<{route}>; rel="xet-auth"'}
        return Response(status_code=302, headers=headers)

    # ---- A repository: writing ----

    def _branch(self, seen: Seen, target: Target) -> Response:
        ref, refs = f"refs/heads/{target.rest[0]}", target.repository["refs"]
        if target.rest[0].startswith("refs/"):
            raise Refused(400, f"Invalid reference name: {target.rest[0]}")
        with self.store.lock:
            if ref in refs:
                raise Refused(409, f"Reference already exists: {target.rest[0]}")
            start = json.loads(seen.body or b"{}").get("startingPoint", "main")
            refs[ref] = self.store.resolve(target.repository, start)
            self.store.save()
        return Response("OK")

    def _discussions(self, seen: Seen, target: Target) -> Response:
        """Open a pull request, or tell of one; the Xet way opens it here, the LFS way with its commit."""
        if seen.method == "POST":
            return JSONResponse(
                {"num": self.store.open_pull_request(target.repository, json.loads(seen.body)["title"])}
            )
        number, opened = int(target.rest[0]), target.repository["pull_requests"]
        if number > len(opened):
            raise Refused(404, "Not Found")
        answer = {"num": number, "status": "draft", "isPullRequest": True, "events": [], "filesWithConflicts": []}
        answer |= {"repo": {"name": target.name, "type": target.kind}, "changes": {"base": "refs/heads/main"}}
        return JSONResponse(answer | opened[number - 1])

    def _preupload(self, seen: Seen, target: Target) -> Response:
        tree, answers = self.store.tree(target.repository, target.rest[0]), []
        for file in json.loads(seen.body)["files"]:
            large = file["size"] > LFS_SIZE or file["path"].endswith(LFS_SUFFIXES)
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if present := tree.get(file["path"]):
                answer["oid"] = present["sha256"] if present["lfs"] else present["oid"]
            answers.append(answer)
        return JSONResponse({"files": answers})

    def _commit(self, seen: Seen, target: Target) -> Response:
        lines = [json.loads(line) for line in seen.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        repository, revision, url = target.repository, target.rest[0], self._url(target.kind, target.name)
        ref, answer = revision if revision.startswith("refs/") else f"refs/heads/{revision}", {}
        with self.store.lock:
            if ref not in repository["refs"]:
                raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            head = repository["refs"][ref]
            if header.get("parentCommit") not in (None, head):
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            tree = self._changed(dict(self.store.tree(repository, head)), lines)
            if "create_pr" in seen.query:
                number = self.store.open_pull_request(repository, header["summary"])
                ref, answer = f"refs/pr/{number}", {"pullRequestUrl": f"{url}/discussions/{number}"}
            commit = self.store.add_commit(repository, ref, tree, header["summary"])
        return JSONResponse(answer | {"commitOid": commit, "commitUrl": f"{url}/commit/{commit}"})

    def _changed(self, tree: dict[str, Any], lines: list[dict[str, Any]]) -> dict[str, Any]:
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "file":
                tree[value["path"]] = self.store.regular_file(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                tree[value["path"]] = self.store.large_file(value["oid"])
            elif key == "deletedFile":
                if tree.pop(value["path"], None) is None:
                    raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            elif key != "header":
                raise Refused(400, f"this Hub of the tests does not know the operation {key}")
        return tree

    # ---- Transfer of large files by LFS ----

    def _lfs_batch(self, asked: dict[str, Any]) -> Response:
        objects = []
        for wanted in asked["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if not self.store.blob(wanted["oid"]).is_file():
                links = {"upload": "put", "verify": "verify"}
                place = f"{self.server.delivery}/lfs-content"
                entry["actions"] = {name: {"href": f"{place}/{link}/{wanted['oid']}"} for name, link in links.items()}
            objects.append(entry)
        return JSONResponse({"transfer": "basic", "objects": objects}, media_type="application/vnd.git-lfs+json")

    def _lfs_content(self, seen: Seen, sha256: str) -> Response:
        """Bring or fetch a content; the link itself is the permission, no token comes with it."""
        if seen.method == "PUT":
            if self.store.put(seen.body) != sha256:
                raise Refused(400, "the content has another sha256")
            return Response()
        return FileResponse(self.store.blob(sha256), headers={"ETag": f'"{sha256}"'})

    def _lfs_verify(self, asked: dict[str, Any], user: User) -> Response:
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if self.store.large_file(asked["oid"])["size"] != asked["size"]:
            raise Refused(400, "the content has another size")
        return JSONResponse({})
