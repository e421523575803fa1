"""The unmodified clients against our server: what they push they read back, byte for byte."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import PIL.Image
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import get_session
from server import CLIENT_GONE, HubServer
from transformers import AutoConfig, ViTConfig, ViTForImageClassification


def test_files_come_back_as_they_went(hub, user, tmp_path, fresh_cache):
    rng = np.random.default_rng(0)
    contents = {"a.json": b"{}", "deep/b.safetensors": rng.bytes(300_000), "c.safetensors": b"\0" * 200_000}
    for name, content in contents.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_bytes(content)
    api = HfApi()
    api.create_repo(f"{user}/files", exist_ok=True)
    api.create_repo(f"{user}/files", exist_ok=True)
    api.upload_folder(repo_id=f"{user}/files", folder_path=tmp_path / "out")
    folder = snapshot_download(f"{user}/files", cache_dir=fresh_cache)
    for name, content in contents.items():
        with open(f"{folder}/{name}", "rb") as file:
            assert file.read() == content
    assert {"a.json", "deep/b.safetensors"} <= set(api.list_repo_files(f"{user}/files"))
    assert hub.uploads() and all(hub.token not in str(request.headers) for request in hub.uploads())
    way = {"xet": "/v1/xorbs/", "lfs": "/lfs-content/put/"}[os.environ["NC_HF_HUB_MODE"]]
    assert all(way in request.path for request in hub.uploads())


def test_timm_pushes_and_loads(user, fresh_cache):
    model = timm.create_model("test_resnet", num_classes=3)
    timm.models.push_to_hf_hub(model, f"{user}/timm", safe_serialization=True)
    opened = timm.create_model(f"hf-hub:{user}/timm", pretrained=True, cache_dir=fresh_cache)
    assert all(torch.equal(t, opened.state_dict()[n]) for n, t in model.state_dict().items())


def test_transformers_pushes_and_loads(user, fresh_cache):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=4))
    model.push_to_hub(f"{user}/vit", private=True)
    opened = ViTForImageClassification.from_pretrained(f"{user}/vit", cache_dir=fresh_cache)
    assert all(torch.equal(t, opened.state_dict()[n]) for n, t in model.state_dict().items())


def test_datasets_pushes_and_loads(user, tmp_path):
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(6)]
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    rows = {"image": [PIL.Image.fromarray(p) for p in pixels], "label": [0, 1] * 3}
    split = Dataset.from_dict(rows, features=features)
    DatasetDict(train=split, test=split).push_to_hub(f"{user}/images", config_name="r100")
    back = load_dataset(f"{user}/images", "r100", split="train", cache_dir=str(tmp_path))
    assert back.features["label"].names == ["a", "b"] and back["label"][:] == rows["label"]
    assert all((np.asarray(image) == p).all() for image, p in zip(back["image"], pixels, strict=True))


def test_a_private_repository_is_for_its_owner(user, tokens, tmp_path):
    name, api = f"{user}/own", HfApi()
    api.create_repo(name, private=True)
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id=name)
    for token in (None, tokens["read"]):
        assert Path(hf_hub_download(name, "config.json", token=token, cache_dir=tmp_path)).read_bytes() == b"{}"
    refusals = [
        (False, RepositoryNotFoundError, 401, "not a valid model identifier"),
        (tokens["bob"], RepositoryNotFoundError, 404, "not a valid model identifier"),
        (tokens["bad"], HfHubHTTPError, 401, "connection error"),
    ]
    for token, error, status, words in refusals:
        where = {"token": token, "cache_dir": tmp_path / str(token)}
        with pytest.raises(HfHubHTTPError) as caught:
            hf_hub_download(name, "config.json", **where)
        assert type(caught.value) is error and caught.value.response.status_code == status
        with pytest.raises(OSError, match=words):
            AutoConfig.from_pretrained(name, **where)


def test_a_private_data_set_is_not_there_for_others(user, tmp_path):
    HfApi().create_repo(f"{user}/own-images", repo_type="dataset", private=True)
    with pytest.raises(DatasetNotFoundError):
        load_dataset(f"{user}/own-images", token=False, cache_dir=str(tmp_path))


def test_only_the_owner_may_write(user, tokens):
    HfApi().create_repo(f"{user}/open")
    for token, status in (("bob", 403), ("read", 403), ("bad", 401)):
        api = HfApi(token=tokens[token])
        with pytest.raises(HfHubHTTPError) as caught:
            api.upload_file(path_or_fileobj=b"", path_in_repo="a.json", repo_id=f"{user}/open")
        assert caught.value.response.status_code == status
        with pytest.raises(HfHubHTTPError):
            api.delete_repo(f"{user}/open")
    assert HfApi(token=False).repo_exists(f"{user}/open")
    HfApi().delete_repo(f"{user}/open")
    assert not HfApi().repo_exists(f"{user}/open")


def test_a_pull_request_leaves_main_alone(hub, user, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\1" * 1000)
    HfApi().create_repo(f"{user}/asked")
    commit = HfApi().upload_folder(repo_id=f"{user}/asked", folder_path=tmp_path, create_pr=True)
    assert commit.pr_num == 1 and commit.pr_url == f"{hub.base}/{user}/asked/discussions/1"
    assert hub.files(f"{user}/asked", "refs/pr/1")["model.safetensors"] == b"\1" * 1000
    assert set(hub.files(f"{user}/asked")) == {".gitattributes"}


def test_commits_on_the_same_head_at_once_leave_one(hub, user):
    api = HfApi()
    api.create_repo(f"{user}/heads")
    head = api.repo_info(f"{user}/heads").sha

    def commit(number: int) -> int:
        try:
            operations = [CommitOperationAdd(f"{number}.json", b"{}")]
            api.create_commit(f"{user}/heads", operations, commit_message="one", parent_commit=head)
        except HfHubHTTPError as error:
            return error.response.status_code
        return 200

    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(commit, range(4)))
    assert sorted(statuses) == [200, 412, 412, 412]
    assert set(hub.files(f"{user}/heads")) == {".gitattributes", f"{statuses.index(200)}.json"}


def test_two_pushes_at_once_both_arrive(hub, user, tmp_path):
    contents = {name: np.random.default_rng(ord(name)).bytes(200_000) for name in "ab"}
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.safetensors").write_bytes(content)
    HfApi().create_repo(f"{user}/together")
    with ThreadPoolExecutor(2) as pool:
        list(
            pool.map(lambda name: HfApi().upload_folder(repo_id=f"{user}/together", folder_path=tmp_path / name), "ab")
        )
    files = hub.files(f"{user}/together")
    assert {name: files[f"{name}.safetensors"] for name in "ab"} == contents
    assert len(hub.commits(f"{user}/together")) == 3


def test_parts_of_files_can_be_read(user):
    contents = {"card.txt": b"0123456789" * 10, "large.safetensors": bytes(range(256)) * 10}
    HfApi().create_repo(f"{user}/parts")
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    HfApi().create_commit(f"{user}/parts", operations, commit_message="parts")
    for name, content in contents.items():
        url, part = hf_hub_url(f"{user}/parts", name), {"Range": "bytes=30-49"}
        answer = get_session().get(url, headers=part, follow_redirects=True)
        assert answer.status_code == 206 and answer.content == content[30:50]


def test_faults_answer_cut_and_end(hub, user):
    asked = "/api/whoami-v2"
    hub.fail(lambda request: request.path == asked, status=418)
    hub.fail(lambda request: request.path == asked, abort=True)
    with pytest.raises(HfHubHTTPError, match="418"):
        HfApi().whoami()
    with pytest.raises(httpx2.RemoteProtocolError):
        HfApi().whoami()
    assert HfApi().whoami()["name"] == user
    assert [request.status for request in hub.requests(asked)[-3:]] == [418, CLIENT_GONE, 200]


def test_what_the_server_keeps_is_on_disk(hub, user, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\2" * 1000)
    HfApi().create_repo(f"{user}/kept")
    HfApi().upload_folder(repo_id=f"{user}/kept", folder_path=tmp_path)
    again = HubServer(hub.folder)
    assert again.files(f"{user}/kept") == hub.files(f"{user}/kept")
    assert again.store.repositories == hub.store.repositories
    assert again.xet.hashes == hub.xet.hashes


def test_a_client_killed_in_mid_upload_leaves_the_head_and_can_push_again(hub, user, tmp_path):
    (tmp_path / "out").mkdir()
    content = np.random.default_rng(1).bytes(400_000)
    (tmp_path / "out" / "model.safetensors").write_bytes(content)
    api = HfApi()
    api.create_repo(f"{user}/killed")
    head, before = api.repo_info(f"{user}/killed").sha, len(hub.uploads())
    hub.fail(lambda request: request in hub.uploads(), delay=5.0)
    script = f"from huggingface_hub import upload_folder; upload_folder(repo_id='{user}/killed', folder_path='out')"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(hub.uploads()) == before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL and len(hub.uploads()) == before + 1
    assert not hub.requests(f"{user}/killed/commit/") and api.repo_info(f"{user}/killed").sha == head
    api.upload_folder(repo_id=f"{user}/killed", folder_path=tmp_path / "out")
    assert hub.files(f"{user}/killed")["model.safetensors"] == content
    assert len(hub.commits(f"{user}/killed")) == 2
