"""The store of chunks behind the clients' default way of transfer, as far as hf_xet needs one over HTTP.

A file is a list of terms, each a range of chunks of a xorb. Clients upload xorbs, then a shard that says which terms
make up which file. Chunks must come uncompressed (HF_XET_XORB_COMPRESSION_POLICY=none).
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, Response
from store import Refused, replace

if TYPE_CHECKING:
    from server import HubServer, Seen
    from store import Store

TOKEN = "xet-token"
HEADER = 8  # bytes before each chunk: version, 3 of packed length, scheme, 3 of length
ENTRY = 48  # bytes of a header or a term in a shard
END_OF_FILES = b"\xff" * 32
HAS_VERIFICATION, HAS_SHA256 = 1 << 31, 1 << 30


def hash_text(raw: bytes) -> str:
    """32 bytes as clients write them: four little-endian numbers in hexadecimal."""
    return b"".join(raw[start : start + 8][::-1] for start in range(0, 32, 8)).hex()


def chunks_of(xorb: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of each chunk, its header included."""
    position = 0
    while position + HEADER <= len(xorb) and xorb[position : position + 7] != b"XETBLOB":
        length, scheme = int.from_bytes(xorb[position + 1 : position + 4], "little"), xorb[position + 4]
        assert scheme == 0, "compressed chunks are not understood here"
        yield position, position + HEADER + length
        position += HEADER + length


class XetStore:
    """Xorbs in a folder, and in `xet.json` the terms of each file."""

    def __init__(self, store: Store, server: HubServer) -> None:
        self.store, self.server, self.folder = store, server, store.folder / "xorbs"
        self.folder.mkdir(exist_ok=True)
        state = store.folder / "xet.json"
        kept = json.loads(state.read_text()) if state.is_file() else {"files": {}, "hashes": {}}
        self.files: dict[str, list[tuple[str, int, int, int]]] = kept["files"]
        self.hashes: dict[str, str] = kept["hashes"]  # by sha256

    def hash_of(self, sha256: str) -> str | None:
        """The client's hash of a content that came this way."""
        return self.hashes.get(sha256)

    def token(self, base: str) -> Response:
        """Where this store is, in the body for hf_xet and in headers for huggingface_hub."""
        expiry = int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": base, "X-Xet-Access-Token": TOKEN, "X-Xet-Token-Expiration": str(expiry)}
        return JSONResponse({"accessToken": TOKEN, "exp": expiry, "casUrl": base}, headers=headers)

    def route(self, seen: Seen, parts: list[str]) -> Response:
        """Answer one request; 404 makes the client fall back to an older route."""
        if parts[0] == "xorbs":
            first, last = map(int, seen.headers["range"].removeprefix("bytes=").split("-"))
            content = self._xorb(parts[1])[first : last + 1]
            return Response(content, 206, headers={"Content-Range": f"bytes {first}-{last}/*"})
        if parts[:2] == ["v1", "telemetry"]:
            return JSONResponse({})
        if seen.headers.get("authorization") != f"Bearer {TOKEN}":
            return Response(status_code=401)
        if parts[:2] == ["v1", "xorbs"]:
            path = self.folder / parts[3]
            inserted = not path.is_file()
            replace(path, seen.body)
            return JSONResponse({"was_inserted": inserted})
        if parts[:2] == ["v1", "shards"]:
            with self.store.lock:
                self._take_shard(seen.body)
            return JSONResponse({"result": 1})
        if parts[:2] == ["v1", "reconstructions"] and parts[2] in self.files:
            return self._reconstruction(seen, self.files[parts[2]])
        return Response(status_code=404)

    def _xorb(self, name: str) -> bytes:
        if not (self.folder / name).is_file():
            raise Refused(400, f"the xorb {name} was never uploaded")
        return (self.folder / name).read_bytes()

    def _take_shard(self, shard: bytes) -> None:
        position = ENTRY
        while shard[position : position + 32] != END_OF_FILES:
            file_hash = hash_text(shard[position : position + 32])
            flags, count = struct.unpack_from("<II", shard, position + 32)
            position += ENTRY
            terms = []
            for _ in range(count):
                _, size, start, end = struct.unpack_from("<IIII", shard, position + 32)
                terms.append((hash_text(shard[position : position + 32]), size, start, end))
                position += ENTRY
            position += ENTRY * count * bool(flags & HAS_VERIFICATION)
            sha256 = self.store.put(b"".join(self._content(xorb, start, end) for xorb, _, start, end in terms))
            if flags & HAS_SHA256:
                if hash_text(shard[position : position + 32]) != sha256:
                    raise Refused(400, "the content has another sha256")
                position += ENTRY
            self.files[file_hash] = terms
            self.hashes[sha256] = file_hash
        kept = {"files": self.files, "hashes": self.hashes}
        replace(self.store.folder / "xet.json", json.dumps(kept).encode())

    def _content(self, name: str, start: int, end: int) -> bytes:
        xorb = self._xorb(name)
        return b"".join(xorb[first + HEADER : last] for first, last in list(chunks_of(xorb))[start:end])

    def _reconstruction(self, seen: Seen, terms: list[tuple[str, int, int, int]]) -> Response:
        total = sum(size for _, size, _, _ in terms)
        first, last = 0, total - 1
        if "range" in seen.headers:
            begin, _, stop = seen.headers["range"].removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(stop or last), last)
        if first >= total:
            return Response(status_code=416)
        wanted: list[dict[str, Any]] = []
        spans: dict[str, list[int]] = {}
        position, offset = 0, 0
        for xorb, size, start, end in terms:
            if position + size > first and position <= last:
                offset = offset if wanted else first - position
                wanted.append({"hash": xorb, "unpacked_length": size, "range": {"start": start, "end": end}})
                low, high = spans.setdefault(xorb, [start, end])
                spans[xorb] = [min(low, start), max(high, end)]
            position += size
        # One entry a xorb: clients do not accept entries that overlap.
        fetch = {xorb: [self._fetch(xorb, start, end)] for xorb, (start, end) in spans.items()}
        return JSONResponse({"offset_into_first_range": offset, "terms": wanted, "fetch_info": fetch})

    def _fetch(self, xorb: str, start: int, end: int) -> dict[str, Any]:
        chunks = list(chunks_of(self._xorb(xorb)))
        bytes_range = {"start": chunks[start][0], "end": chunks[end - 1][1] - 1}
        url = f"{self.server.delivery}/xorbs/{xorb}"
        return {"range": {"start": start, "end": end}, "url": url, "url_range": bytes_range}
