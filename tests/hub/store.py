"""What a Hub keeps: repositories with refs, commits and files, on disk, and who may do what."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
import time
from pathlib import Path
from typing import Any

LFS_SUFFIXES = (".safetensors", ".parquet", ".png", ".bin", ".pt", ".arrow")
LFS_SIZE = 10 * 2**20  # bytes; larger files of any kind go the way of large files
ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class Refused(Exception):
    """An answer that is no success: status, the message, and the code by which clients tell errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers


def git_blob_id(content: bytes) -> str:
    """The object id that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def now() -> str:
    """The time as clients read it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


def replace(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part."""
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    partial.write_bytes(content)
    partial.replace(path)


class Store:
    """Repositories in one folder: `blobs/<sha256>` and `state.json`, which is replaced at once."""

    def __init__(self, folder: Path, users: dict[str, dict[str, Any]]) -> None:
        self.folder, self.users, self.lock = folder, users, threading.RLock()
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        state = folder / "state.json"
        self.repositories: dict[str, dict[str, Any]] = json.loads(state.read_text()) if state.is_file() else {}

    # ---- Files ----

    def blob(self, sha256: str) -> Path:
        """Where the content of that hash lies, if it does."""
        return self.folder / "blobs" / sha256

    def put(self, content: bytes) -> str:
        """Keep a content; its sha256."""
        sha256 = hashlib.sha256(content).hexdigest()
        if not self.blob(sha256).is_file():
            replace(self.blob(sha256), content)
        return sha256

    def regular_file(self, content: bytes) -> dict[str, Any]:
        """A file that travelled inside a commit."""
        return {"size": len(content), "oid": git_blob_id(content), "sha256": self.put(content), "lfs": False}

    def large_file(self, sha256: str) -> dict[str, Any]:
        """A file that arrived before its commit; git sees a pointer in its place."""
        if not self.blob(sha256).is_file():
            raise Refused(400, f"the content {sha256} was never uploaded")
        size = self.blob(sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return {"size": size, "oid": git_blob_id(pointer), "sha256": sha256, "lfs": True}

    # ---- People ----

    def user_of(self, authorization: str | None) -> dict[str, Any] | None:
        """Who sends a request; None for nobody in particular."""
        if not authorization:
            return None
        user = self.users.get(authorization.removeprefix("Bearer ").strip())
        if user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return user

    def open(self, kind: str, name: str, user: dict[str, Any] | None, *, write: bool = False) -> dict[str, Any]:
        """A repository, if the user may see it, or change it."""
        repository = self.repositories.get(f"{kind}/{name}")
        owner = user is not None and name.split("/")[0] == user["name"]
        if repository is None or (repository["private"] and not owner):
            # Over plain http, clients need the code to tell a missing repository from a refused one.
            raise Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise Refused(401, "Invalid username or password.")
        if write and not (owner and user["role"] == "write"):
            raise Refused(403, "You don't have write access to this repository")
        return repository

    # ---- Repositories ----

    def create(self, kind: str, name: str, private: bool, user: dict[str, Any] | None) -> bool:
        """Make a repository with a first commit; False when it was there."""
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if name.split("/")[0] != user["name"] or user["role"] != "write":
            raise Refused(403, "You don't have the rights to create a repo under this namespace")
        with self.lock:
            if f"{kind}/{name}" in self.repositories:
                return False
            repository = {"private": private, "refs": {}, "commits": {}, "pull_requests": []}
            self.repositories[f"{kind}/{name}"] = repository
            first = {".gitattributes": self.regular_file(ATTRIBUTES)}
            self.add_commit(repository, "refs/heads/main", first, "initial commit")
        return True

    def delete(self, kind: str, name: str, user: dict[str, Any] | None) -> None:
        """Forget a repository; contents stay, for others may hold them too."""
        with self.lock:
            self.open(kind, name, user, write=True)
            del self.repositories[f"{kind}/{name}"]
            self.save()

    def open_pull_request(self, repository: dict[str, Any], title: str) -> int:
        """A number, and a ref of that number on the head of main for the commits to come."""
        with self.lock:
            repository["pull_requests"].append({"title": title, "createdAt": now()})
            number = len(repository["pull_requests"])
            repository["refs"][f"refs/pr/{number}"] = repository["refs"]["refs/heads/main"]
            self.save()
        return number

    def resolve(self, repository: dict[str, Any], revision: str) -> str:
        """The commit that a branch, a ref or a commit id means."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in repository["refs"]:
                return repository["refs"][ref]
        if revision in repository["commits"]:
            return revision
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def tree(self, repository: dict[str, Any], revision: str) -> dict[str, dict[str, Any]]:
        """Files by path at a revision."""
        return repository["commits"][self.resolve(repository, revision)]["tree"]

    def add_commit(self, repository: dict[str, Any], ref: str, tree: dict[str, Any], title: str) -> str:
        """Put a tree on top of a ref; the id of the commit."""
        with self.lock:
            parent = repository["refs"].get(ref)
            identity = json.dumps([parent, title, secrets.token_hex(8)])
            commit = hashlib.sha1(identity.encode()).hexdigest()
            repository["commits"][commit] = {"parent": parent, "title": title, "date": now(), "tree": tree}
            repository["refs"][ref] = commit
            self.save()
        return commit

    def history(self, repository: dict[str, Any], revision: str) -> list[dict[str, Any]]:
        """Commits from a revision back to the first, each with its id."""
        commits, commit = [], self.resolve(repository, revision)
        while commit:
            commits.append({"id": commit, **repository["commits"][commit]})
            commit = repository["commits"][commit]["parent"]
        return commits

    def save(self) -> None:
        """Write the state; a reader never sees half of it."""
        replace(self.folder / "state.json", json.dumps(self.repositories).encode())
