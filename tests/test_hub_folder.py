"""Saved folders: the same weights and logits through every door, and nothing that needs pickle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from nc_hf.doors import check_doors
from nc_hf.hub import load_heads, load_pretrained, save_pretrained
from nc_hf.models.classifier import find_head, load_classifier, logits_of

NAMES = ["ant", "bee", "cat <é>", "dog"]


def tiny_vit() -> tuple[nn.Module, object]:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=4)
    return ViTForImageClassification(config), ViTImageProcessor(size={"height": 32, "width": 32})


def tiny_convnext() -> tuple[nn.Module, object]:
    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=4)
    return ConvNextForImageClassification(config), ConvNextImageProcessor(size={"shortest_edge": 32})


def wrapper() -> tuple[nn.Module, object]:
    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture="test_resnet", num_labels=4)), None


def resized_vit() -> tuple[nn.Module, object]:
    return load_classifier("test_vit", 4, image_size=64)


def averaging_vit() -> tuple[nn.Module, object]:
    return load_classifier("test_vit", 4, global_pool="avg")


def with_reset_head() -> tuple[nn.Module, object]:
    model = timm.create_model("test_convnext", num_classes=9)
    model.reset_classifier(4)
    return model, None


TIMM = {
    "test_resnet": lambda: load_classifier("test_resnet", 4),
    "test_vit": lambda: load_classifier("test_vit", 4),
    "test_efficientnet": lambda: load_classifier("test_efficientnet", 4),
    "vit of another image size": resized_vit,
    "vit with mean of tokens": averaging_vit,
    "convnext with another head": with_reset_head,
    "transformers wrapper": wrapper,
}
CIFAR = {"resnet32_cifar": lambda: load_classifier("resnet32_cifar", 4)}
NATIVE = {"transformers ViT": tiny_vit, "transformers ConvNeXt": tiny_convnext}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, Path]]:
    """Each kind of model, unlike any freshly made one, and its folder."""
    torch.manual_seed(0)
    out = {}
    for number, (kind, make) in enumerate({**TIMM, **CIFAR, **NATIVE}.items()):
        model, processor = make()
        if kind != "transformers wrapper":
            model.to(memory_format=torch.channels_last)  # as the trainer leaves it
        with torch.no_grad():
            for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
                tensor.add_(0.02 * torch.rand_like(tensor))
        folder = tmp_path_factory.mktemp("saved") / str(number)
        counts, centers = [40, 10, 5, 1], torch.randn(4, 8)
        out[kind] = (
            model.eval(),
            save_pretrained(
                model, folder, label_names=NAMES, image_processor=processor, class_counts=counts, centers=centers
            ),
        )
    return out


def images_for(folder: Path, model: nn.Module) -> torch.Tensor:
    """Two random images of the size that the folder's image processor makes."""
    processor = AutoImageProcessor.from_pretrained(folder)
    rng = np.random.default_rng(0)
    images = [PIL.Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(2)]
    return processor(images, return_tensors="pt")["pixel_values"]


def assert_same(model: nn.Module, opened: nn.Module, pixels: torch.Tensor) -> None:
    """Bit-equal weights and buffers, and logits within 1e-6."""
    before, after = (getattr(m, "timm_model", m).state_dict() for m in (model, opened))
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        expected, logits = logits_of(model(pixels)), logits_of(opened.eval()(pixels))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6 * max(1, expected.abs().max().item()))


@pytest.mark.parametrize("kind", [*TIMM, *CIFAR])
def test_door_of_timm(saved, kind):
    model, folder = saved[kind]
    opened = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert_same(model, opened, images_for(folder, model))
    assert opened.pretrained_cfg["label_names"] == NAMES
    renewed = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3)
    assert find_head(renewed, 3)[1].weight.shape[0] == 3


@pytest.mark.parametrize("kind", [*TIMM, *CIFAR, *NATIVE])
def test_doors_of_transformers(saved, kind):
    model, folder = saved[kind]
    opened = AutoModelForImageClassification.from_pretrained(folder)
    assert_same(model, opened, images_for(folder, model))
    assert opened.config.id2label == dict(enumerate(NAMES))
    assert opened.config.label2id == {name: k for k, name in enumerate(NAMES)}
    assert opened.config.nc_hf["class_counts"] == [40, 10, 5, 1]
    renewed = AutoModelForImageClassification.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)
    assert find_head(renewed)[1].weight.shape[0] == 3


@pytest.mark.parametrize("kind", [*TIMM, *CIFAR, *NATIVE])
def test_door_of_the_pipeline(saved, kind):
    model, folder = saved[kind]
    image = PIL.Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    answers = {answer["label"]: answer["score"] for answer in pipeline("image-classification", str(folder))(image)}
    pixels = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = logits_of(model(pixels)).softmax(1)[0]
    assert answers == {name: pytest.approx(expected[k].item(), abs=1e-6) for k, name in enumerate(NAMES)}


@pytest.mark.parametrize("kind", [*TIMM, *CIFAR, *NATIVE])
def test_our_door(saved, kind):
    model, folder = saved[kind]
    opened, processor = load_pretrained(folder)
    assert type(opened) is type(getattr(model, "timm_model", model))
    assert_same(model, opened, images_for(folder, model))
    image = PIL.Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    expected = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(image, return_tensors="pt")["pixel_values"], expected)


def test_doors_open_where_nc_hf_is_not_imported(saved):
    folders = {kind: str(folder) for kind, (_, folder) in saved.items()}
    script = f"""
import sys, timm, torch
from transformers import AutoModelForImageClassification
folders, native, cifar = {folders!r}, {[*NATIVE]!r}, {[*CIFAR]!r}
for kind, folder in folders.items():
    doors = [] if kind in native else [lambda: timm.create_model(f"local-dir:{{folder}}", pretrained=True)]
    doors.append(lambda: AutoModelForImageClassification.from_pretrained(folder))
    for number, door in enumerate(doors):
        try:
            door()
        except (RuntimeError, ImportError):
            assert kind in cifar
        else:
            assert kind not in cifar
assert not any(name.startswith("nc_hf") for name in sys.modules)
print("all doors tried")
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=300)
    assert "all doors tried" in done.stdout, done.stderr


@pytest.mark.parametrize("kind", [*TIMM, *CIFAR, *NATIVE])
def test_folder_has_no_pickle_and_no_path(saved, kind):
    _, folder = saved[kind]
    names = {path.name for path in folder.iterdir()}
    extra = {"preprocessor_config.json"} if kind in NATIVE else set()
    assert names == {"model.safetensors", "nc_heads.safetensors", "config.json"} | extra
    config = json.loads((folder / "config.json").read_text())
    assert config["nc_hf"] == {"format": 1, "active_head": "base", "heads": [], "class_counts": [40, 10, 5, 1]}
    assert str(folder.parent) not in (folder / "config.json").read_text()
    if kind not in NATIVE:
        assert "num_classes" not in config["model_args"] and config["num_classes"] == 4
        assert config["label_names"] == NAMES and config["pretrained_cfg"]["input_size"]
    assert all(
        path.stat().st_mode & 0o777 == (folder / "config.json").stat().st_mode & 0o777 for path in folder.iterdir()
    )


def test_a_folder_can_be_saved_again(saved, tmp_path):
    for kind, (model, folder) in saved.items():
        opened, processor = load_pretrained(folder)
        again = save_pretrained(opened, tmp_path / kind, image_processor=processor)
        first, second = (json.loads((path / "config.json").read_text()) for path in (folder, again))
        first.pop("nc_hf"), second.pop("nc_hf")
        assert first == second
        assert_same(model, load_pretrained(again)[0], images_for(again, model))


@pytest.mark.parametrize("kind", ["test_resnet", "transformers ViT", "dla46_c"])
def test_every_head_is_kept_by_name(kind, tmp_path):
    model = {**TIMM, **NATIVE, "dla46_c": lambda: load_classifier("dla46_c", 4)}[kind]()[0].eval()
    _, head = find_head(model)
    crt = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    base = {name: torch.randn_like(tensor) for name, tensor in crt.items()}
    tensors = {"centers": torch.randn(4, 8), "class_means": torch.randn(4, 8).T.contiguous().T}
    save_pretrained(
        model,
        tmp_path / "out",
        heads={"base": base, "crt": crt},
        active_head="crt",
        class_counts=torch.tensor([4, 3, 2, 1]),
        metadata={"stage": "stage2"},
        **tensors,
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())["nc_hf"]
    expected = {"format": 1, "active_head": "crt", "heads": ["base", "crt"], "stage": "stage2"}
    assert config == expected | {"class_counts": [4, 3, 2, 1]}
    heads, others = load_heads(tmp_path / "out")
    for name, state in {"base": base, "crt": crt}.items():
        assert all(torch.equal(heads[name][key], tensor) for key, tensor in state.items())
        opened, _ = load_pretrained(tmp_path / "out", head=name)
        found = find_head(opened)[1].state_dict()
        assert list(found) == list(state) and all(torch.equal(found[key], state[key]) for key in state)
    assert set(others) == {"centers", "class_means", "class_counts"}
    assert all(torch.equal(others[name], tensor) for name, tensor in tensors.items())
    deployed = find_head(load_pretrained(tmp_path / "out")[0])[1].state_dict()
    assert all(torch.equal(deployed[key], tensor) for key, tensor in crt.items())
    with pytest.raises(ValueError, match="out has no head 'lws'; it has base, crt"):
        load_pretrained(tmp_path / "out", head="lws")


def test_names_default_to_the_models_own_then_to_numbers(tmp_path):
    model, _ = load_classifier("test_resnet", 4)
    save_pretrained(model, tmp_path / "numbers")
    assert json.loads((tmp_path / "numbers/config.json").read_text())["label_names"] == ["0", "1", "2", "3"]
    model, _ = load_classifier("test_resnet", 4, NAMES)
    save_pretrained(model, tmp_path / "own")
    assert json.loads((tmp_path / "own/config.json").read_text())["label_names"] == NAMES
    with pytest.raises(ValueError, match="2 label names were given for a model with 4 classes"):
        save_pretrained(model, tmp_path / "own", label_names=["a", "b"])


def test_a_model_of_neither_library_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Sequential is neither a timm model nor a transformers one"):
        save_pretrained(nn.Sequential(nn.Linear(2, 3)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_save_that_fails_leaves_what_was_saved(tmp_path, monkeypatch):
    model, _ = load_classifier("test_resnet", 4, NAMES)
    folder = save_pretrained(model, tmp_path / "out")
    (folder / "README.md").write_text("by hand")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*arguments: object, **settings: object) -> None:
        raise OSError(28, "No space left on device")

    nn.init.zeros_(model.fc.weight)
    monkeypatch.setattr("nc_hf.hub.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    save_pretrained(model, folder)
    assert (folder / "README.md").read_text() == "by hand"
    assert load_file(folder / "model.safetensors")["fc.weight"].abs().sum() == 0


def test_a_timm_model_saved_over_one_of_transformers_is_alone_there(saved, tmp_path):
    """transformers would read the earlier model's image settings and shards with it."""
    model, folder = saved["transformers ViT"]
    processor = load_pretrained(folder)[1]
    there = save_pretrained(model, tmp_path / "out", image_processor=processor)
    for name in ("model.safetensors.index.json", "model-00001-of-00002.safetensors", "model_card.md"):
        (there / name).write_text("{}")
    assert (there / "preprocessor_config.json").exists()
    save_pretrained(load_classifier("test_resnet", 4, NAMES)[0], there)
    names = {path.name for path in there.iterdir()}
    assert names == {"config.json", "model.safetensors", "nc_heads.safetensors", "model_card.md"}
    assert check_doors(there)
    save_pretrained(model, there, image_processor=processor)
    save_pretrained(model, there)  # whose processor, saved by itself, is its own
    assert (there / "preprocessor_config.json").exists()


@pytest.mark.parametrize("arguments", [{"block_args": {"attn_layer": "eca"}}, {"channels": [8, 16, 24]}])
def test_nested_arguments_of_an_architecture_are_saved_with_it(tmp_path, arguments):
    name = "resnet18" if "block_args" in arguments else "test_resnet"
    model, _ = load_classifier(name, 4, **arguments)
    again, _ = load_pretrained(save_pretrained(model, tmp_path / "out"))
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_an_argument_that_no_folder_keeps_is_refused_at_once():
    with pytest.raises(ValueError, match=r"norm_layer=<class .*could not be saved.*the name that timm has for it"):
        load_classifier("resnet18", 4, norm_layer=nn.BatchNorm2d)


def test_a_folder_whose_parent_is_another_disk_can_be_saved_to(tmp_path, monkeypatch):
    """As a mount point of a container is."""
    replace, folder = os.replace, tmp_path / "mounted"

    def on_one_disk(source: Path, target: Path) -> None:
        assert folder in Path(source).parents, "Invalid cross-device link"
        replace(source, target)

    monkeypatch.setattr(os, "replace", on_one_disk)
    model, _ = load_classifier("test_resnet", 4, NAMES)
    save_pretrained(model, folder)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_head_that_does_not_fit_is_refused(tmp_path):
    model, _ = load_classifier("test_resnet", 4)
    folder = save_pretrained(model, tmp_path / "out", heads={"base": model.fc.state_dict()})
    save_file({"heads.base.weight": torch.zeros(4, 96)}, folder / "nc_heads.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        load_pretrained(folder, head="base")
