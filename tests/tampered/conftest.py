"""Honest folders of both libraries, for the tests to tamper with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tampering import SIZES
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from nc_hf import load_classifier, save_pretrained


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for kind in ("timm", "transformers"):
        if kind == "timm":
            model, _ = load_classifier("test_resnet", 4)
            heads = {"base": model.fc.state_dict()}
        else:
            model = ViTForImageClassification(ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=4))
            heads = {"base": model.classifier.state_dict()}
        processor = None if kind == "timm" else ViTImageProcessor(size={"height": 32, "width": 32})
        folder = tmp_path_factory.mktemp("honest") / kind
        folders[kind] = save_pretrained(model, folder, heads=heads, image_processor=processor)
    return folders


@pytest.fixture(params=["timm", "transformers"])
def folder(honest, request, tmp_path) -> Path:
    return Path(shutil.copytree(honest[request.param], tmp_path / "model"))


@pytest.fixture
def of_timm(honest, tmp_path) -> Path:
    return Path(shutil.copytree(honest["timm"], tmp_path / "model"))


@pytest.fixture
def of_transformers(honest, tmp_path) -> Path:
    return Path(shutil.copytree(honest["transformers"], tmp_path / "model"))


@pytest.fixture
def in_shards(of_transformers) -> Path:
    ViTForImageClassification.from_pretrained(of_transformers).save_pretrained(of_transformers, max_shard_size="8KB")
    (of_transformers / "model.safetensors").unlink(missing_ok=True)
    assert len(list(of_transformers.glob("model-*.safetensors"))) > 1
    return of_transformers
