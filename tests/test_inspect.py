"""A look into classifiers that nc_hf did not train: numbers, figures, and data that cannot be theirs."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from nc_hf import save_pretrained
from nc_hf.image_sets import image_sets, read_splits
from nc_hf.inspect import (
    check_classes,
    draw_figures,
    geometry_table,
    inspect_classifier,
    main,
    recipe_for,
    trainers_of,
)
from nc_hf.models.classifier import find_head, load_classifier
from nc_hf.models.headed import replace_head
from nc_hf.models.image_settings import image_settings
from nc_hf.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ["--data.imbalance_ratio", "20", "--stage1.precision", "fp32", "--evaluation.batch_size", "300"]


@pytest.fixture(scope="module")
def images():
    """Digits-LT at the size of the stock model."""
    recipe = load_recipe(None, DIGITS)
    model = stock_model()
    return image_sets(recipe, read_splits(recipe), image_settings(model))


def stock_model() -> nn.Module:
    """Of timm alone."""
    return timm.create_model("test_resnet", num_classes=10, pretrained_cfg_overlay={"input_size": (3, 16, 16)})


@pytest.fixture(scope="module")
def stock(images, tmp_path_factory) -> Path:
    """Fine-tuned for some steps by plain torch, saved by timm."""
    torch.manual_seed(0)
    model = stock_model().train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for start in range(0, 440, 40):
        batch = images["train"].__getitems__(list(range(start % 7, 444, 11)))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"]).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("stock") / "digits"
    save_for_hf(model, str(folder), safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def inspected(stock) -> tuple:
    return inspect_classifier(str(stock), load_recipe(None, DIGITS))


def test_the_numbers_are_those_of_the_features_in_memory(stock, images, inspected):
    model = timm.create_model(f"local-dir:{stock}", pretrained=True).eval()
    results, means = inspected
    for name in ("train", "test"):
        batch = images[name].__getitems__(list(range(len(images[name]))))
        with torch.inference_mode():
            features = model.forward_head(model.forward_features(batch["pixel_values"]), pre_logits=True).double()
            logits = model(batch["pixel_values"])
        labels = batch["labels"]
        own = torch.stack([features[labels == k].mean(dim=0) for k in range(10)])
        torch.testing.assert_close(means[name], own, rtol=1e-4, atol=1e-4)
        centered = nn.functional.normalize(own - own.mean(dim=0), dim=1)
        cosines = (centered @ centered.T)[~torch.eye(10, dtype=torch.bool)]
        geometry = results["geometry"]["head"][name]
        assert geometry["nc2_min_angle"] == pytest.approx(math.degrees(math.acos(cosines.max())), abs=0.05)
        assert geometry["nc2_best_angle"] == pytest.approx(math.degrees(math.acos(-1 / 9)))
        nearest = torch.cdist(features, own).argmin(dim=1)
        agreement = (nearest == logits.argmax(dim=1)).double().mean().item()
        assert geometry["nc4_agreement"] == pytest.approx(agreement, abs=2.5 / len(labels))
    metrics = results["heads"]["head"]
    right = (logits.argmax(dim=1) == labels).double()
    assert metrics["accuracy"] == pytest.approx(right.mean().item(), abs=2.5 / len(labels))
    assert {"accuracy_many", "accuracy_medium", "accuracy_few"} & set(metrics)


def test_the_command_prints_and_draws_for_a_model_of_timm(stock, inspected, tmp_path):
    command = [sys.executable, "-m", "nc_hf.inspect", str(stock), "--data", "digits", *DIGITS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "inspect-digits/results.json").read_text())
    assert results["heads"]["head"]["per_class_accuracy"] == inspected[0]["heads"]["head"]["per_class_accuracy"]
    smallest = inspected[0]["geometry"]["head"]["train"]["nc2_min_angle"]
    (line,) = [line for line in done.stdout.splitlines() if "smallest angle of two means" in line]
    assert line.split()[-2] == f"{smallest:.1f}°"
    assert "96.4°" in done.stdout and "many" in done.stdout
    pictures = {path.name for path in (tmp_path / "inspect-digits").iterdir()} - {"results.json"}
    assert pictures == {f"{name}.{kind}" for name in ("classes", "angles", "norms") for kind in ("png", "svg")}
    assert PIL.Image.open(tmp_path / "inspect-digits/angles.png").width == 1600
    assert str(stock) not in (tmp_path / "inspect-digits/results.json").read_text()


def test_each_head_of_a_folder_of_ours_is_measured(tmp_path):
    torch.manual_seed(0)
    model, heads = stock_model(), {}
    for head in ("base", "crt"):
        heads[head] = {"weight": torch.randn_like(model.fc.weight), "bias": torch.randn_like(model.fc.bias)}
    save_pretrained(model, tmp_path / "two", heads=heads, active_head="base")
    results, means = inspect_classifier(str(tmp_path / "two"), load_recipe(None, DIGITS))
    assert set(results["heads"]) == set(results["geometry"]) == {"base", "crt"}
    assert results["heads"]["base"]["per_class_accuracy"] != results["heads"]["crt"]["per_class_accuracy"]
    gaps = {name: results["geometry"][name]["train"]["nc3_duality_gap"] for name in heads}
    assert gaps["base"] != gaps["crt"]
    assert set(means) == {"train", "test"}


def test_data_that_cannot_be_the_models_are_refused():
    model = stock_model()
    with pytest.raises(ValueError, match="me/model has 10 classes, and the data have 3"):
        check_classes(model, ["a", "b", "c"], "me/model")
    names = [str(k) for k in range(10)]
    model.pretrained_cfg = model.pretrained_cfg | {"label_names": names}
    check_classes(model, names, "me/model")
    check_classes(model, [f"digit {name}" for name in names], "me/model")
    with pytest.raises(ValueError, match="another order: its class 0 is '0', and that of the data is '9'"):
        check_classes(model, names[::-1], "me/model")


def test_a_command_without_a_model_says_how_to_use_it(capsys):
    with pytest.raises(SystemExit):
        main(["--data", "digits"])
    assert "python -m nc_hf.inspect" in (shown := capsys.readouterr().err) and "required: source" in shown


def test_the_data_are_those_of_the_recipe_that_is_nearest(tmp_path):
    stage = tmp_path / "run/stage1"
    stage.mkdir(parents=True)
    with pytest.raises(ValueError, match="stage1 has no recipe.yaml, so its data are not known.*--data.dataset"):
        recipe_for(str(stage), ["--data.imbalance_ratio", "3"])
    named = recipe_for(str(stage), ["--data.dataset=cifar100", "--data.imbalance_ratio", "3"])
    assert (named.data.dataset, named.data.imbalance_ratio) == ("cifar100", 3)
    (tmp_path / "run/recipe.yaml").write_text("data: {dataset: cifar10, imbalance_ratio: 50}")
    beside = recipe_for(str(stage), ["--data.imbalance_ratio", "3"])
    assert (beside.data.dataset, beside.data.imbalance_ratio) == ("cifar10", 3)
    (stage / "recipe.yaml").write_text("data: {dataset: fashion_mnist}")
    assert recipe_for(f"local-dir:{stage}", []).data.dataset == "fashion_mnist"
    given = recipe_for(str(stage), [str(ROOT / "recipes/digits_lt/nc_drw_crt.yaml"), "--data.imbalance_ratio", "3"])
    assert (given.data.dataset, given.data.imbalance_ratio) == ("digits", 3)


def test_the_recipe_of_a_hub_id_is_that_of_the_asked_revision(tmp_path, monkeypatch):
    """Not the revision in that recipe: it is of the model that training started from."""
    theirs = (
        "model: {name: timm/resnet18, revision: older}\ndata: {dataset: cifar10, data_dir: /etc, cache_dir: /root}"
    )
    (tmp_path / "recipe.yaml").write_text(theirs)
    asked = []
    monkeypatch.setattr("nc_hf.models.classifier.local_folder", lambda *names: asked.append(names) or tmp_path)
    assert recipe_for("me/model", []).model.revision is None
    recipe = recipe_for("me/model", ["--model.revision", "v2"])
    assert recipe.model.revision == "v2" and recipe.data.dataset == "cifar10"
    assert recipe.data.data_dir is recipe.data.cache_dir is None
    assert recipe_for("me/model", ["--data.data_dir", "mine"]).data.data_dir == "mine"
    assert asked == [("me/model", None), ("me/model", "v2"), ("me/model", None)]
    (tmp_path / "recipe.yaml").write_text("extends: ../../secrets.yaml")
    with pytest.raises(ValueError, match="from the Hub and extends another file"):
        recipe_for("me/model", [])


def test_evaluate_refuses_a_model_of_unknown_data(tmp_path):
    spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "recipes/evaluate.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with pytest.raises(ValueError, match="Give a recipe after it, or name the data by --data.dataset"):
        script.main([str(tmp_path), "--noise-std", "0.1"])


def test_geometry_that_the_data_do_not_define_is_a_dash():
    table = geometry_table({"train": {"nc4_agreement": 0.5, "nc2_min_angle": 60.04}, "test": {"nc4_agreement": 1.0}})
    header, angle, agreement = (line.split() for line in table.splitlines())
    assert header == ["train", "test"]
    assert angle[-2:] == ["60.0°", "-"]
    assert agreement[-4:] == ["50.0", "%", "100.0", "%"]


@pytest.mark.parametrize("kind", ["experts", "two branches", "fixed head"])
def test_networks_of_other_objectives_are_measured_as_they_are(kind, tmp_path):
    name = {"experts": "resnet32_ride_cifar", "two branches": "resnet32_bbn_cifar"}.get(kind, "resnet20_cifar")
    model, processor = load_classifier(name, 10, image_size=16)
    if kind == "fixed head":
        replace_head(model, "etf")
    save_pretrained(model, tmp_path, heads={"base": find_head(model)[1].state_dict()}, active_head="base")
    recipe = load_recipe(None, DIGITS)
    results, means = inspect_classifier(str(tmp_path), recipe)
    images = image_sets(recipe, read_splits(recipe), image_settings(model, processor))["test"]
    batch = images.__getitems__(list(range(len(images))))
    with torch.inference_mode():
        right = (model.eval()(batch["pixel_values"]).argmax(dim=1) == batch["labels"]).float().mean()
    assert results["heads"]["base"]["accuracy"] == pytest.approx(right.item())
    assert means["train"].shape == (10, find_head(model)[1].weight.shape[1])


def test_a_split_that_lacks_a_class_has_no_panel(inspected, tmp_path, monkeypatch, caplog):
    """Its angles would be others than those of the table, of fewer classes."""
    results, means = inspected
    means = {"train": means["train"], "test": means["test"].clone()}
    means["test"][3] = 0
    shown = []
    for figure in ("angle_figure", "norm_figure"):
        monkeypatch.setattr(f"nc_hf.figures.{figure}", lambda panels, counts, names: shown.append([*panels, counts]))
    monkeypatch.setattr("nc_hf.figures.save_figure", lambda *_, **__: None)
    draw_figures(tmp_path, results, means)
    assert shown == 2 * [["train images", results["dataset"]["class_counts"]]]
    assert "the test images lack 1 classes" in caplog.text


@pytest.mark.parametrize(("capabilities", "precision"), [({}, "fp32"), ({"amx_bf16": True}, "bf16")])
def test_a_run_at_bf16_is_measured_at_fp32_where_bf16_is_slow(stock, monkeypatch, capabilities, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    recipe = load_recipe(None, [*DIGITS, "--stage1.precision", "bf16"])
    _, trainer, _ = next(trainers_of(str(stock), recipe))
    assert trainer.args.precision == precision


def test_a_transformers_folder_with_its_image_processor_is_not_said_to_have_none(tmp_path, caplog):
    size = {"height": 16, "width": 16}
    model = ViTForImageClassification(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, num_labels=10)
    )
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size=size).save_pretrained(tmp_path)
    with caplog.at_level("WARNING", logger="nc_hf"):
        _, trainer, _ = next(trainers_of(str(tmp_path), load_recipe(None, DIGITS)))
    assert trainer.processing_class is not None
    assert "image processor" not in caplog.text
