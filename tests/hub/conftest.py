"""A Hub of our own for the tests of this folder, which run in a process of their own (tests/test_hub_server.py).

Clients read their settings when they are imported, so the server starts and the settings are made before that.
To run the folder by hand: `NC_HF_HUB_MODE=xet python -m pytest tests/hub`, or `lfs`. Without the variable nothing of
it is collected. The server lives as long as the process: tests use repositories of their own names. It keeps a content
once for all repositories, as clients do, so a content that went up before is not sent again.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

MODE = os.environ.get("NC_HF_HUB_MODE")
# Pushes of a Trainer go through the functions that test_push.py sends in both ways of transfer.
collect_ignore_glob = {"xet": [], "lfs": ["test_trainer_push.py"]}.get(MODE, ["test_*.py"])

if MODE:
    if MODE not in ("xet", "lfs"):
        raise ValueError(f"NC_HF_HUB_MODE is {MODE!r}; say xet or lfs")
    if "huggingface_hub" in sys.modules:
        raise RuntimeError("huggingface_hub was imported before its settings were made; run tests/hub by itself")
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    from server import HubServer

    FOLDER = Path(tempfile.mkdtemp(prefix="nc_hf-hub-"))
    SERVER = HubServer(FOLDER / "server")
    SERVER.start()
    os.environ |= {
        "HF_ENDPOINT": SERVER.base,
        "HF_TOKEN": SERVER.token,
        "HF_HOME": str(FOLDER / "home"),
        "HF_XET_XORB_COMPRESSION_POLICY": "none",  # the server need not unpack what arrives
        "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "DISABLE_SAFETENSORS_CONVERSION": "1",
        "HF_HUB_DISABLE_XET": "1" if MODE == "lfs" else "0",
        "NO_PROXY": "127.0.0.1,localhost",
    }

    @pytest.fixture(scope="session")
    def hub() -> HubServer:
        """The server: `files`, `commits`, `commit`, `requests`, `uploads`, `fail`, `heal`, `kill` and `start`."""
        return SERVER

    @pytest.fixture(autouse=True)
    def healed(hub):
        """No fault of one test reaches the next, and the server itself did not break."""
        yield
        hub.heal()
        crashes, hub.crashes = hub.crashes, []
        assert not crashes, "\n".join(crashes)

    @pytest.fixture(scope="session")
    def user() -> str:
        """Whose token the clients use."""
        return "alice"

    @pytest.fixture(scope="session")
    def tokens() -> dict[str, str]:
        """The user's token, the user's that may only read, another user's, and nobody's."""
        return {"write": SERVER.token, "read": "tok-read", "bob": "tok-bob", "bad": "tok-nobody"}

    @pytest.fixture
    def fresh_cache(tmp_path, monkeypatch) -> Path:
        """An empty cache of downloads, for this test only."""
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        return tmp_path / "hub-cache"

    def pytest_unconfigure() -> None:
        """Leave nothing behind, also after tests that could not be collected."""
        shutil.rmtree(FOLDER, ignore_errors=True)
