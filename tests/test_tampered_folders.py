"""Folders that somebody tampered with are refused with the reason, and none of their code is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from nc_hf import load_classifier, load_pretrained, save_pretrained
from nc_hf.models import saved_folder

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


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
        folders[kind] = save_pretrained(model, tmp_path_factory.mktemp("honest") / kind, heads=heads)
    return folders


@pytest.fixture(params=["timm", "transformers"])
def folder(honest, request, tmp_path) -> Path:
    return Path(shutil.copytree(honest[request.param], tmp_path / "model"))


@pytest.fixture
def of_timm(honest, tmp_path) -> Path:
    return Path(shutil.copytree(honest["timm"], tmp_path / "model"))


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def assert_refused(folder: Path, message: str, error: type[Exception] = ValueError) -> None:
    for load in (load_classifier, load_pretrained):
        with pytest.raises(error, match=message):
            load(str(folder))


def test_honest_folders_open(folder):
    assert load_classifier(str(folder)) and load_pretrained(folder, head="base")


def test_pickled_weights_are_not_opened(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "made")))
    assert_refused(folder, "Weights in a pickle file are not loaded; convert them with safetensors")
    assert not (tmp_path / "made").exists()


def test_a_pickle_beside_good_weights_is_left_alone(folder, tmp_path):
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "made")))
    load_classifier(str(folder))
    assert not (tmp_path / "made").exists()


def test_code_of_a_repository_is_never_run(folder, tmp_path):
    (folder / "modeling_evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'made')!r})\nEvil = object")
    names = ("AutoConfig", "AutoModelForImageClassification", "AutoImageProcessor")
    edit(folder, lambda config: config.update(auto_map={name: "modeling_evil.Evil" for name in names}))
    load_classifier(str(folder))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pretrained", True),
        ("pretrained_cfg", "x"),
        ("pretrained_cfg_overlay", {"file": "/etc/passwd"}),
        ("checkpoint_path", "/tmp/evil.pth"),
        ("cache_dir", "/tmp"),
        ("scriptable", True),
        ("act_layer", {"module": "os"}),
        ("block_args", [{"a": 1}]),
    ],
)
def test_odd_model_arguments_are_refused(of_timm, name, value):
    edit(of_timm, lambda config: config["model_args"].update({name: value}))
    assert_refused(of_timm, f"has the model argument {name}=.* not accepted")


@pytest.mark.parametrize("name", ["custom_load", "state_dict"])
def test_odd_settings_of_weights_are_refused(of_timm, name):
    edit(of_timm, lambda config: config["pretrained_cfg"].update({name: "x"}))
    assert_refused(of_timm, f"has pretrained_cfg.{name}, which is not accepted")


def test_other_places_of_weights_are_not_followed(of_timm):
    expected = load_classifier(str(of_timm))[0].state_dict()
    settings = {"file": "/nowhere.pth", "url": "http://127.0.0.1:9/x", "hf_hub_id": "evil/model", "source": "url"}
    edit(of_timm, lambda config: config["pretrained_cfg"].update(settings))
    found = load_classifier(str(of_timm))[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "must hold one JSON object, found list"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"nc_hf": {"format": 99}}', "written by a newer nc_hf .format 99.. Upgrade nc_hf"),
        ('{"nc_hf": [1]}', "key nc_hf of another shape"),
    ],
)
def test_a_config_that_is_none_is_refused(folder, content, message):
    (folder / "config.json").write_text(content)
    assert_refused(folder, message)


def test_a_huge_config_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(saved_folder, "LARGEST_JSON", 100)
    assert_refused(folder, "more than any config. It is not read")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "model.bin", 7])
def test_an_index_that_leads_elsewhere_is_refused(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert_refused(folder, "names the file .* not accepted")


def damaged(content: bytes, kind: str) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    if kind == "truncated":
        return content[:-10]
    if kind == "empty":
        return b""
    if kind == "huge header":
        return struct.pack("<Q", 2**60) + content[8:]
    first = next(name for name in header if name != "__metadata__")
    if kind == "offsets":
        header[first]["data_offsets"] = [0, 2**40]
    if kind == "shape":
        header[first]["shape"] = [3, 1_000_000]
    if kind == "type":
        header[first]["dtype"] = "F1000"
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


@pytest.mark.parametrize("file", ["model.safetensors", "nc_heads.safetensors"])
@pytest.mark.parametrize("kind", ["truncated", "empty", "huge header", "offsets", "shape", "type"])
def test_damaged_weights_are_refused(of_timm, file, kind):
    (of_timm / file).write_bytes(damaged((of_timm / file).read_bytes(), kind))
    assert_refused(of_timm, f"{file} is no whole safetensors file")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(folder, value):
    for file in ("model.safetensors", "nc_heads.safetensors"):
        good = load_file(folder / file)
        name = sorted(good)[-1]
        save_file({**good, name: torch.full_like(good[name], value)}, folder / file)
        assert_refused(folder, f"{file} has a tensor that is not finite: {name}")
        save_file(good, folder / file)


def test_missing_and_misshapen_tensors_are_refused(folder):
    good = load_file(folder / "model.safetensors")
    name = next(name for name in good if "weight" in name and "fc" not in name and "classifier" not in name)
    without = {key: tensor for key, tensor in good.items() if key != name}
    for changed in (without, {**good, name: torch.zeros(1, 2, 3)}):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        assert_refused(folder, ".", error=(ValueError, RuntimeError))


def test_an_unknown_architecture_is_named(of_timm):
    edit(of_timm, lambda config: config.update(architecture="evil_net"))
    assert_refused(of_timm, "evil_net", error=(ValueError, RuntimeError))
