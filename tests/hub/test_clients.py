"""The unmodified clients against our server: what they push they read back, byte for byte."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from transformers import ViTConfig, ViTForImageClassification


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
    large = [request for request in hub.requests() if request.path.startswith(("/lfs-content/put", "/v1/xorbs"))]
    assert large and all("tok-alice" not in str(request.headers) for request in large)


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


def test_a_private_repository_is_for_its_owner(user, tmp_path):
    api = HfApi()
    api.create_repo(f"{user}/own", private=True)
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="a.json", repo_id=f"{user}/own")
    assert api.repo_exists(f"{user}/own")
    for token, error in (
        (False, RepositoryNotFoundError),
        ("tok-bob", RepositoryNotFoundError),
        ("tok-x", HfHubHTTPError),
    ):
        with pytest.raises(error):
            hf_hub_download(f"{user}/own", "a.json", token=token, cache_dir=tmp_path / str(token), etag_timeout=1)
    for token in ("tok-bob", "tok-read"):
        with pytest.raises(HfHubHTTPError):
            HfApi(token=token).upload_file(path_or_fileobj=b"", path_in_repo="b.json", repo_id=f"{user}/own")


def test_a_commit_on_an_old_head_is_refused(user):
    api = HfApi()
    api.create_repo(f"{user}/heads")
    old = api.repo_info(f"{user}/heads").sha
    for number in range(2):
        commit = {"commit_message": "x", "parent_commit": old}
        operations = [CommitOperationAdd("a.json", b"%d" % number)]
        if number == 0:
            api.create_commit(f"{user}/heads", operations, **commit)
        else:
            with pytest.raises(HfHubHTTPError) as caught:
                api.create_commit(f"{user}/heads", operations, **commit)
            assert caught.value.response.status_code == 412


def test_a_client_killed_in_mid_upload_leaves_the_head_and_can_push_again(hub, user, tmp_path):
    (tmp_path / "out").mkdir()
    content = np.random.default_rng(1).bytes(400_000)
    (tmp_path / "out" / "model.safetensors").write_bytes(content)
    api = HfApi()
    api.create_repo(f"{user}/killed")
    head = api.repo_info(f"{user}/killed").sha
    hub.fail(lambda request: request.path.startswith(("/lfs-content/put", "/v1/xorbs")), delay=8.0)
    script = f"from huggingface_hub import upload_folder; upload_folder(repo_id='{user}/killed', folder_path='out')"
    before = len(hub.requests("/lfs-content/put") + hub.requests("/v1/xorbs"))
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(hub.requests("/lfs-content/put") + hub.requests("/v1/xorbs")) == before and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert api.repo_info(f"{user}/killed").sha == head
    api.upload_folder(repo_id=f"{user}/killed", folder_path=tmp_path / "out")
    assert hub.files(f"{user}/killed")["model.safetensors"] == content
