"""A Hub on this machine, so that the real clients push to it and pull from it over HTTP.

It answers (`routes.py`) what huggingface_hub, transformers, timm and datasets ask for when they push and load models
and data sets, in both ways of transfer: LFS, and Xet (`xet_store.py`), which is the clients' default.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import uvicorn
from routes import Routes
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from store import Refused, Store
from xet_store import XetStore

USERS = {
    "tok-alice": {"name": "alice", "role": "write"},
    "tok-read": {"name": "alice", "role": "read"},
    "tok-bob": {"name": "bob", "role": "write"},
}
CLIENT_GONE = 499  # stands in the log for requests whose client did not wait for the answer


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
    """Answers requests in place of the server, cuts their connection, or lets them wait."""

    applies: Callable[[Seen], bool]
    status: int
    times: int
    delay: float
    abort: bool


@dataclass
class HubServer:
    """The server, and what tests want to know of it."""

    folder: Path
    token: str = "tok-alice"
    log: list[Seen] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)  # errors of this server itself, which no test asked for

    def __post_init__(self) -> None:
        self.store = Store(self.folder, USERS)
        self.xet = XetStore(self.store, self)
        self.routes = Routes(self.store, self.xet, self)
        self.base = self.delivery = ""

    # ---- For tests ----

    def fail(
        self,
        applies: Callable[[Seen], bool],
        status: int = 0,
        times: int = 1,
        delay: float = 0.0,
        abort: bool = False,
    ) -> None:
        """Spoil the next `times` requests to which `applies`: wait `delay` seconds, then cut or answer a status.

        With neither `status` nor `abort` the request is only late; it is lost if its client went away meanwhile.
        """
        self.faults.append(Fault(applies, status, times, delay, abort))

    def heal(self) -> None:
        """End all faults."""
        self.faults.clear()

    def requests(self, part: str = "") -> list[Seen]:
        """What arrived so far, with that in its path."""
        return [seen for seen in self.log if part in seen.path]

    def uploads(self) -> list[Seen]:
        """What brought the content of large files, in either way of transfer."""
        return self.requests("/lfs-content/put/") + self.requests("/v1/xorbs/")

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
        with self.store.lock:
            self.store.add_commit(repository, "refs/heads/main", self.store.tree(repository, "main") | added, title)

    def start(self, port: int = 0) -> None:
        """Serve on a port of this machine, a free one when 0, until the process ends or `kill`."""
        app = Starlette(routes=[Route("/{path:path}", self._answer, methods=["GET", "HEAD", "POST", "PUT", "DELETE"])])
        settings = {"host": "127.0.0.1", "port": port, "log_level": "critical", "lifespan": "off"}
        self.server = uvicorn.Server(uvicorn.Config(app, **settings))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            if not self.thread.is_alive():
                raise RuntimeError(f"the test Hub could not listen on port {port} of 127.0.0.1: is it taken?")
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
            answer = await self._spoiled(request, seen) or await run_in_threadpool(self.routes.answer, seen)
        except Refused as refusal:
            headers = {"X-Error-Message": refusal.message, **refusal.headers}
            headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
            answer = JSONResponse({"error": refusal.message}, refusal.status, headers=headers)
        except ClientDisconnect:
            answer = Response(status_code=CLIENT_GONE)
        except Exception:
            self.crashes.append(f"{seen.method} {seen.path}\n{traceback.format_exc()}")
            answer = Response(status_code=500)
        seen.status = answer.status_code
        return answer

    async def _spoiled(self, request: Request, seen: Seen) -> Response | None:
        """The answer of a fault, if there is one for this request."""
        fault = await run_in_threadpool(self._fault_for, seen)
        if fault is None:
            return None
        await asyncio.sleep(fault.delay)
        if fault.abort:
            for connection in list(self.server.server_state.connections):
                if connection.client == request.client:
                    connection.transport.abort()
        elif fault.status:
            return JSONResponse({"error": "a fault of the test"}, fault.status)
        gone = fault.abort or await request.is_disconnected()
        return Response(status_code=CLIENT_GONE) if gone else None

    def _fault_for(self, seen: Seen) -> Fault | None:
        with self.store.lock:
            for fault in list(self.faults):
                if fault.times > 0 and fault.applies(seen):
                    fault.times -= 1
                    return fault
        return None
