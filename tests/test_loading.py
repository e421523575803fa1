"""Classifiers from names, folders and Hub ids, and what is refused."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import sweep_feature_tap
import timm
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    CLIPImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    EfficientNetImageProcessor,
    LevitImageProcessor,
    MobileViTImageProcessor,
    PoolFormerImageProcessor,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from nc_hf.data.augment import ImageTransform
from nc_hf.labels import check_class_order
from nc_hf.models.classifier import find_head, load_classifier
from nc_hf.models.image_settings import image_settings

TINY_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}


def tiny_vit(num_labels: int = 5) -> nn.Module:
    return ViTForImageClassification(ViTConfig(**TINY_VIT, num_labels=num_labels))


def wrapped() -> nn.Module:
    return TimmWrapperForImageClassification(TimmWrapperConfig(architecture="resnet20_cifar", num_labels=5))


# ---- Loading ----


def test_architecture_by_name_is_plain_timm_with_its_own_weights():
    torch.manual_seed(3)
    expected = timm.create_model("test_resnet", num_classes=3).state_dict()
    torch.manual_seed(3)
    model, processor = load_classifier("test_resnet", label_names=["a", "b", "c"])
    assert type(model) is type(timm.create_model("test_resnet")) and model.num_classes == 3
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert model.pretrained_cfg["label_names"] == ["a", "b", "c"]
    assert processor.data_config["input_size"] == (3, 160, 160)


def test_image_size_builds_the_network_and_its_images():
    vit, processor = load_classifier("test_vit", 5, image_size=64)
    assert vit(torch.zeros(1, 3, 64, 64)).shape == (1, 5) and processor.data_config["input_size"] == (3, 64, 64)
    assert image_settings(vit)["size"] == (64, 64)
    resnet, processor = load_classifier("test_resnet", 5, image_size=64)
    assert processor.data_config["input_size"] == (3, 64, 64) and image_settings(resnet)["size"] == (64, 64)


def test_image_settings():
    settings = image_settings(load_classifier("resnet32_cifar", 10)[0])
    assert settings == {
        "size": (32, 32),
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2023, 0.1994, 0.2010),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    vit = tiny_vit()
    assert image_settings(vit, ViTImageProcessor(size={"height": 48, "width": 32})) == {
        "size": (48, 32),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    convnext = ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875)
    assert image_settings(vit, convnext)["size"] == (224, 224) and image_settings(vit, convnext)["crop_pct"] == 0.875
    assert image_settings(vit, ConvNextImageProcessor(size={"shortest_edge": 384}))["crop_pct"] == 1.0
    clip = CLIPImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
    assert image_settings(vit, clip)["size"] == (224, 224) and image_settings(vit, clip)["crop_pct"] == 0.875
    with pytest.raises(ValueError, match="its image processor is NoneType"):
        image_settings(vit)
    with pytest.raises(ValueError, match=r"ViTImageProcessor resizes with resample=4, and .* 3 \(bicubic\)"):
        image_settings(vit, ViTImageProcessor(size={"height": 48, "width": 48}, resample=4))


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(size={"height": 64, "width": 64}),
        DeiTImageProcessor(size={"height": 73, "width": 73}, crop_size={"height": 64, "width": 64}),
        CLIPImageProcessor(size={"shortest_edge": 73}, crop_size={"height": 64, "width": 64}),
        ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875),
        ConvNextImageProcessor(size={"shortest_edge": 384}),
        EfficientNetImageProcessor(size={"height": 64, "width": 64}),
        LevitImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
        PoolFormerImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
        ViTImageProcessor(size={"height": 64, "width": 64}, do_normalize=False),
    ],
    ids=[
        "ViT",
        "DeiT",
        "CLIP",
        "ConvNeXT below 384",
        "ConvNeXT from 384",
        "EfficientNet",
        "LeViT",
        "PoolFormer",
        "not normalized",
    ],
)
def test_images_are_those_of_the_image_processor(processor):
    across, down = np.meshgrid(np.linspace(0, 255, 180), np.linspace(0, 255, 120))
    image = PIL.Image.fromarray(np.stack([across, down, 255 - across], axis=-1).astype(np.uint8))
    transform = ImageTransform(**image_settings(tiny_vit(), processor))
    ours = transform.normalize(transform.to_size(image)[None])
    theirs = processor(image, return_tensors="pt")["pixel_values"]
    assert ours.shape == theirs.shape
    spread = theirs.max() - theirs.min()
    assert (ours - theirs).abs().max() < 0.03 * spread


def test_an_image_processor_that_swaps_channels_is_refused():
    with pytest.raises(ValueError, match="MobileViTImageProcessor makes other images"):
        image_settings(tiny_vit(), MobileViTImageProcessor())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("resnet32_cifra",), ValueError, "no timm architecture, no folder and no Hub id"),
        (("resnet32_cifar", 3, ["a", "b"]), ValueError, "2 label names were given for num_labels=3"),
    ],
)
def test_names_that_do_not_fit_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        load_classifier(*arguments)


def test_pretrained_without_released_weights_is_refused():
    with pytest.raises(ValueError, match="timm has no released weights of 'resnet32_cifar'"):
        load_classifier("resnet32_cifar", 10, pretrained=True)


def test_unreadable_hub_id(monkeypatch):
    import huggingface_hub

    def refuse(repo_id: str, **settings: object) -> str:
        assert repo_id == "user/model" and settings["revision"] == "v2"
        assert not any(Path("pytorch_model.bin").match(pattern) for pattern in settings["allow_patterns"])
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    for name in ("user/model@v2", "hf-hub:user/model@v2"):
        with pytest.raises(FileNotFoundError, match="no folder here, and not readable on the Hub: offline"):
            load_classifier(name)


@pytest.fixture
def timm_folder(tmp_path: Path) -> Path:
    """A folder as timm itself writes it."""
    from timm.models import save_for_hf

    model = timm.create_model("test_resnet", num_classes=4)
    save_for_hf(model, str(tmp_path / "saved"), safe_serialization=True, model_config={"label_names": list("wxyz")})
    return tmp_path / "saved"


@pytest.fixture
def transformers_folder(tmp_path: Path) -> Path:
    """A folder as transformers itself writes it."""
    model = tiny_vit(4)
    model.config.id2label, model.config.label2id = dict(enumerate("wxyz")), {c: k for k, c in enumerate("wxyz")}
    model.save_pretrained(tmp_path / "saved")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_timm_folder(timm_folder):
    saved = load_file(timm_folder / "model.safetensors")
    for name in (str(timm_folder), f"local-dir:{timm_folder}"):
        model, _ = load_classifier(name)
        assert model.pretrained_cfg["label_names"] == list("wxyz")
        assert all(torch.equal(tensor, saved[key]) for key, tensor in model.state_dict().items())


def test_transformers_folder(transformers_folder):
    expected = ViTForImageClassification.from_pretrained(transformers_folder).eval()
    model, processor = load_classifier(str(transformers_folder))
    x = torch.randn(2, 3, 32, 32)
    assert type(model) is ViTForImageClassification and processor.size == {"height": 32, "width": 32}
    assert torch.equal(model.eval()(x).logits, expected(x).logits) and model.config.id2label[1] == "x"
    model, _ = load_classifier(str(transformers_folder), hidden_dropout_prob=0.5)
    assert model.config.hidden_dropout_prob == 0.5
    with pytest.raises(ValueError, match="ViTConfig has no entry drop_rate"):
        load_classifier(str(transformers_folder), drop_rate=0.5)
    with pytest.raises(ValueError, match="`image_size` is for timm models"):
        load_classifier(str(transformers_folder), image_size=64)
    (transformers_folder / "preprocessor_config.json").unlink()
    assert load_classifier(str(transformers_folder))[1] is None


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_names_in_another_order_than_the_saved_ones_are_refused(kind, request):
    folder = str(request.getfixturevalue(f"{kind}_folder"))
    load_classifier(folder, label_names=list("wxyz"))
    load_classifier(folder, label_names=list("zyxwv"))  # a new head, so any order
    with pytest.raises(ValueError, match="in another order: its class 1 is 'x', and that of the data is 'y'"):
        load_classifier(folder, label_names=list("wyxz"))


def test_a_renamed_class_that_shifts_others_is_refused():
    own = ["Amsel", "Zebra", "großer Hund"]
    with pytest.raises(ValueError, match="its class 1 is 'Zebra', and that of the data is 'Hund'") as error:
        check_class_order("me/model", own, ["Amsel", "Hund", "Zebra"])
    assert "'Zebra' is class 1 of the model and 2 of the data" in str(error.value)
    check_class_order("me/cranes", ["crane", "yak", "crane"], ["crane", "yak", "crane (machine)"])


def test_other_names_in_the_same_places_are_warned_of_once(caplog):
    for _ in range(2):
        check_class_order("me/birds", ["Amsel", "Hund"], ["Amsel", "großer Hund"])
    assert [record.getMessage() for record in caplog.records] == [
        "me/birds and the data name 1 of 2 classes differently: 'Hund' and 'großer Hund'. Make sure that they are the "
        "same classes, or train the model on the data."
    ]
    caplog.clear()
    check_class_order("me/imagenet", [f"bird {k}" for k in range(9)], [f"n0{k}" for k in range(9)])
    assert "9 of 9 classes differently: 'bird 0' and 'n00', " in caplog.text
    assert "'bird 4' and 'n04' and 4 more." in caplog.text and "bird 5" not in caplog.text


@pytest.mark.parametrize("own", [["0", "1", "2"], ["LABEL_0", "LABEL_1", "LABEL_2"]])
def test_placeholders_are_no_names(own, caplog):
    for names in (["ant", "bee", "cat"], ["1", "2", "3"], own):
        check_class_order("me/model", own, names)
        check_class_order("me/model", names, own)
    assert not caplog.records
    with pytest.raises(ValueError, match="another order"):
        check_class_order("me/model", own, own[::-1])


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_head_of_another_size_is_drawn_anew_and_said_once(kind, request, caplog):
    folder = request.getfixturevalue(f"{kind}_folder")
    with caplog.at_level(logging.INFO, logger="nc_hf"):
        model, _ = load_classifier(str(folder), 7, image_size=None)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("nc_hf")]
    assert len(said) == 1 and "has 4 outputs; one with 7 is drawn anew" in said[0]
    head_name, head = find_head(model)
    assert head.weight.shape[0] == 7 and head.weight.abs().sum() > 0
    before = load_classifier(str(folder))[0].state_dict()
    backbone = [name for name in model.state_dict() if not name.startswith(f"{head_name}.")]
    assert len(backbone) > 10 and all(torch.equal(model.state_dict()[name], before[name]) for name in backbone)
    if kind == "timm":
        assert model.pretrained_cfg["label_names"] is None
    else:
        assert model.config.id2label == {k: str(k) for k in range(7)}
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="nc_hf"):
        same, _ = load_classifier(str(folder), 4, list("wxyz"))
    assert not [record for record in caplog.records if record.name.startswith("nc_hf")]
    assert all(torch.equal(tensor, before[name]) for name, tensor in same.state_dict().items())


def test_folder_of_transformers_wrapper_around_timm_gives_the_timm_model(tmp_path):
    model = wrapped()
    model.config.id2label = dict(enumerate("vwxyz"))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"] is None
    loaded, processor = load_classifier(str(tmp_path))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x).logits)
    assert loaded.pretrained_cfg["label_names"] == list("vwxyz")
    assert processor.data_config["input_size"] == (3, 32, 32)


def test_folder_without_config(tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        load_classifier(str(tmp_path))


def table_of_the_sweep() -> dict[str, dict[str, str]]:
    with sweep_feature_tap.TABLE.open() as file:
        return {row["model"]: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("name", ["test_convnext", "mobilenetv3_small_050", "levit_128s", "crossvit_tiny_240"])
def test_table_of_the_sweep_is_as_today_for_timm(name):
    written = table_of_the_sweep()[name]
    result, detail, _ = sweep_feature_tap.timm_head(name)
    assert (result, str(detail)) == (written["result"], written["feature_width"] or written["why"])


@pytest.mark.parametrize("name", ["ResNetForImageClassification", "SwiftFormerForImageClassification"])
def test_table_of_the_sweep_is_as_today_for_transformers(name):
    written = table_of_the_sweep()[name]
    today = sweep_feature_tap.transformers_row(written["family"], name)
    assert {column: str(value) for column, value in today.items()} == written


def test_table_of_the_sweep_covers_every_family():
    families = {row["family"] for row in table_of_the_sweep().values() if row["library"] == "timm"}
    own = {name for name in timm.list_modules() if _first_model(name).__module__.startswith("nc_hf.")}
    assert families >= set(timm.list_modules()) - own


def _first_model(module: str):
    return timm.model_entrypoint(timm.list_models(module=module)[0])
