"""One folder, four doors, each in a fresh process: bit-equal weights and equal logits for every kind of model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BitImageProcessor,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    Dinov2Config,
    Dinov2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from nc_hf.doors import OPENERS, check_doors, doors_of, needs_nc_hf
from nc_hf.hub import save_pretrained
from nc_hf.models.classifier import load_classifier
from nc_hf.models.saved_folder import separate_tensors

NAMES = ["ant", "bee", "cat", "dog", "é | <b>"]
STOCK = ["resnet18", "vit_tiny_patch16_224", "convnext_femto", "mobilenetv3_small_100"]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SQUARE = ViTImageProcessor(size={"height": 64, "width": 64})
NATIVE = {
    "ViT": (ViTForImageClassification, ViTConfig(**SIZES, image_size=64, patch_size=16, num_labels=5), SQUARE),
    "ConvNeXt": (
        ConvNextForImageClassification,
        ConvNextConfig(hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], num_labels=5),
        ConvNextImageProcessor(size={"shortest_edge": 64}),
    ),
    "Swin": (
        SwinForImageClassification,
        SwinConfig(image_size=64, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=5),
        SQUARE,
    ),
    "DINOv2": (
        Dinov2ForImageClassification,
        Dinov2Config(**SIZES, image_size=56, patch_size=14, num_labels=5),
        BitImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
    ),
}  # fmt: skip
MODELS = [*STOCK, *NATIVE, "resnet32_cifar"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A saved folder of each model, with an image in it."""
    parent, out = tmp_path_factory.mktemp("doors"), {}
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    for name in MODELS:
        torch.manual_seed(len(out))
        if name in NATIVE:
            cls, config, processor = NATIVE[name]
            model = cls(config)
        else:
            model, processor = load_classifier(name, 5)
        with torch.no_grad():  # unlike what a library would draw
            for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
                tensor.add_(0.02 * torch.rand_like(tensor))
        out[name] = save_pretrained(model, parent / name, label_names=NAMES, image_processor=processor)
        PIL.Image.fromarray(image).save(out[name] / "image.png")
    return out


@pytest.fixture(scope="module")
def seen(folders, tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    """What a fresh process sees through each door."""
    parent, out = tmp_path_factory.mktemp("seen"), {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for door in ("timm", "transformers", "pipeline", "nc_hf"):
        through = [str(folder) for name, folder in folders.items() if door in doors_of(folder)]
        script = [sys.executable, str(Path(__file__).with_name("doors_run.py")), door, str(parent / door), *through]
        done = subprocess.run(script, capture_output=True, text=True, env=environment, cwd="/", timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        out[door] = load_file(parent / door)
    return out


@pytest.mark.parametrize("name", MODELS)
def test_every_door_gives_the_same_classifier(folders, seen, name):
    doors = doors_of(folders[name])
    assert ("timm" in doors) == (name not in NATIVE)
    expected = seen["nc_hf"]
    for door in doors:
        assert torch.equal(seen[door][f"{name}/weights"], expected[f"{name}/weights"]), door
        for key in ("logits", "scores"):
            if f"{name}/{key}" in seen[door]:
                close = {"rtol": 0, "atol": 1e-6 * max(1, expected[f"{name}/{key}"].abs().max().item())}
                torch.testing.assert_close(seen[door][f"{name}/{key}"], expected[f"{name}/{key}"], **close)


@pytest.mark.parametrize("name", ["resnet18", "Swin", "resnet32_cifar"])
def test_the_check_before_a_push_passes_and_leaves_no_trace_in_random_numbers(folders, name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert check_doors(folders[name]) == doors_of(folders[name])
    assert torch.equal(before, torch.get_rng_state())
    assert needs_nc_hf(folders[name]) == (name == "resnet32_cifar")


def test_the_check_names_a_door_that_gives_something_else(folders, monkeypatch):
    name = "ConvNeXt"
    model = NATIVE[name][0](NATIVE[name][1])
    monkeypatch.setitem(OPENERS, "transformers", lambda _: model)
    with pytest.raises(RuntimeError, match="ConvNeXt through transformers has another .* than through nc_hf"):
        check_doors(folders[name])


def test_classes_of_one_name_are_no_hindrance(tmp_path, monkeypatch):
    names = ["ant", "bee", "ant", "bee"]
    model, _ = load_classifier("test_resnet", 4)
    folder = save_pretrained(model, tmp_path / "twins", label_names=names)
    assert check_doors(folder)
    other = save_pretrained(load_classifier("test_resnet", 4)[0], tmp_path / "others", label_names=names)
    open_pipeline = OPENERS["pipeline"]
    monkeypatch.setitem(OPENERS, "pipeline", lambda _: open_pipeline(other))
    with pytest.raises(RuntimeError, match="twins gives other scores through pipeline"):
        check_doors(folder)


@pytest.mark.parametrize("name", ["test_resnet", "ViT"])
def test_a_model_in_bfloat16_passes_the_check(tmp_path, name):
    model, processor = load_classifier(name, 5) if name not in NATIVE else (NATIVE[name][0](NATIVE[name][1]), SQUARE)
    folder = save_pretrained(model.to(torch.bfloat16), tmp_path / "half", image_processor=processor)
    assert check_doors(folder) == doors_of(folder)


def test_tensors_that_share_memory_are_saved_apart(tmp_path):
    model, _ = load_classifier("test_resnet", 4)
    twin = model.layer1[0]
    model.layer1.append(twin)  # as networks that use one module twice
    assert len({t.data_ptr() for t in model.parameters()}) < len(model.state_dict())
    state = separate_tensors({"whole": torch.arange(6.0), "again": (t := torch.ones(4)), "part": t[1:], "t": t})
    save_file(state, tmp_path / "state.safetensors")
    assert torch.equal(load_file(tmp_path / "state.safetensors")["part"], torch.ones(3))
    save_file(separate_tensors(model.state_dict()), tmp_path / "model.safetensors")
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_the_check_names_a_door_that_does_not_open(folders, tmp_path):
    folder = tmp_path / "half"
    folder.mkdir()
    for path in folders["resnet18"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    state = load_file(folder / "model.safetensors")
    state.pop("fc.bias")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(RuntimeError, match='half does not open through timm: .*Missing key.*"fc.bias"'):
        check_doors(folder)
