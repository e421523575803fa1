"""A Hub of our own for the tests of this folder, which run in a process of their own (tests/test_hub_server.py).

Clients read their settings when they are imported, so the server starts and the settings are made before that.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

MODE = os.environ.get("NC_HF_HUB_MODE")  # "xet" or "lfs"
collect_ignore_glob = [] if MODE else ["test_*.py"]

if MODE:
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    import pytest
    from server import HubServer

    FOLDER = Path(tempfile.mkdtemp(prefix="nc_hf-hub-"))
    SERVER = HubServer(FOLDER / "server")
    SERVER.start()
    os.environ |= {
        "HF_ENDPOINT": SERVER.base,
        "HF_TOKEN": SERVER.token,
        "HF_HOME": str(FOLDER / "home"),
        "HF_XET_XORB_COMPRESSION_POLICY": "none",
        "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "DISABLE_SAFETENSORS_CONVERSION": "1",
        "HF_HUB_DISABLE_XET": "1" if MODE == "lfs" else "0",
    }

    @pytest.fixture(scope="session")
    def hub() -> HubServer:
        """The server: `files`, `commits`, `requests`, `fail` and `heal`."""
        return SERVER

    @pytest.fixture(autouse=True)
    def healed(hub):
        """No fault of one test reaches the next."""
        yield
        hub.heal()

    @pytest.fixture(scope="session")
    def user() -> str:
        """Whose token the clients use."""
        return "alice"

    @pytest.fixture
    def fresh_cache(tmp_path, monkeypatch) -> Path:
        """An empty cache of downloads."""
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        return tmp_path / "hub-cache"

    def pytest_sessionfinish() -> None:
        """Leave nothing behind."""
        import shutil

        shutil.rmtree(FOLDER, ignore_errors=True)
