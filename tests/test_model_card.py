"""Cards: everything from the folder's own files, nothing unknown, names escaped, a person's words kept."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import PIL.Image
import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from nc_hf.card_block import BEGIN, END, merge_cards
from nc_hf.hub import save_pretrained
from nc_hf.model_card import model_card, write_card
from nc_hf.models.classifier import load_classifier
from nc_hf.paper_results import paper_accuracy
from nc_hf.recipe import dump_recipe, load_recipe
from nc_hf.results import write_results

ROOT = Path(__file__).resolve().parents[1]
COUNTS = [500, 60, 30, 5]
NAMES = ["ant", "bee | <b>", "cat\nfish", "dog"]


def metrics(accuracy: float) -> dict:
    groups = {"accuracy_many": accuracy + 0.1, "accuracy_medium": accuracy, "accuracy_few": accuracy - 0.1}
    per_class = [accuracy + 0.1, accuracy, accuracy, accuracy - 0.1]
    means = {"accuracy": accuracy, "class_mean_accuracy": accuracy}
    return {**means, **groups, "per_class_accuracy": per_class, "ece": 0.05}


def results(seed: int = 0, **changes) -> dict:
    dataset = {"name": "cifar10", "imbalance_ratio": 100.0, "profile": "exponential", "description": "drawn with care"}
    geometry = {
        "nc1_variability_balanced": 0.5,
        "nc2_norm_cov": 0.1,
        "nc2_min_angle": 95.0,
        "nc2_best_angle": 96.38,
        "nc4_agreement": 0.9,
    }
    return {
        "seed": seed,
        "model": "resnet32_cifar",
        "split": "test",
        "dataset": dataset | {"class_names": NAMES, "class_counts": COUNTS},
        "methods": {"base": "NC-DRW", "crt": "NC-DRW-cRT"},
        "heads": {"base": metrics(0.8), "crt": metrics(0.82 + 0.01 * seed)},
        "geometry": {"base": {"train": geometry}},
        "training": {"stage1": {"seconds": 7200.0}},
        "versions": {"torch": "2.14.1"},
        "device": "a CPU",
    } | changes


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    model, _ = load_classifier("resnet20_cifar", 4)
    state = model.fc.state_dict()
    heads = {"base": state, "crt": state}
    folder = tmp_path_factory.mktemp("saved") / "model"
    return save_pretrained(model, folder, label_names=[*"abcd"], heads=heads, active_head="crt", class_counts=COUNTS)


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_results(tmp_path / "results.json", results())
    return tmp_path


def test_the_figures_stand_beside_the_papers(folder):
    card = model_card(folder, "user/name")
    assert "| NC-DRW: stage one (`base`) | 80.0 | 90.0 | 80.0 | 70.0 | 5.0 | 81.9 (-1.9) |" in card
    assert "| NC-DRW-cRT: stage two, re-trained head (`crt`) | 82.0 | 92.0 | 82.0 | 72.0 | 5.0 | 82.6 (-0.6) |" in card
    assert "one run, seed 0" in card
    assert "many (1), those with fewer than 20 few (1), the others medium (2)" in card
    assert "| NC2, smallest angle between them (degrees; at best 96.4) | 95 |" in card
    assert "drawn with care" in card and "@techreport{krizhevsky2009learning" in card
    assert "@inproceedings{he2016deep" in card and "32 × 32 pixels" in card


def test_metadata_is_what_the_hub_reads(folder):
    write_card(folder, "user/name", license="apache-2.0", tags=["mine"])
    metadata = metadata_load(folder / "README.md")
    assert metadata["pipeline_tag"] == "image-classification"
    assert metadata["library_name"] == "nc_hf"  # plain timm does not know this architecture
    assert metadata["license"] == "apache-2.0"
    assert metadata["datasets"] == ["uoft-cs/cifar10"]
    assert "mine" in metadata["tags"]
    evaluation = ModelCard.load(folder / "README.md").data.eval_results
    assert {entry.metric_type: entry.metric_value for entry in evaluation}["accuracy"] == 0.82
    assert {entry.dataset_type for entry in evaluation} == {"uoft-cs/cifar10"}


def test_library_of_a_stock_network_is_timm(tmp_path):
    model, _ = load_classifier("test_resnet", 2)
    save_pretrained(model, tmp_path, label_names=["a", "b"])
    write_results(tmp_path / "results.json", {"dataset": {"class_names": ["a", "b"], "class_counts": [5, 1]}})
    card = model_card(tmp_path, "user/name")
    assert "library_name: timm" in card
    assert 'timm.create_model("hf-hub:user/name", pretrained=True)' in card
    assert card.count("import nc_hf") == 1  # in our own door alone


def test_a_folder_whose_path_ends_like_its_hub_id_is_named_as_what_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _ = load_classifier("test_resnet", 2)
    folder = save_pretrained(model, Path("models/user/name"), label_names=["a", "b"])
    dataset = {"class_names": ["a", "b"], "class_counts": [5, 1]}
    write_results(folder / "results.json", {"dataset": dataset})
    assert '"hf-hub:user/name"' in model_card(folder, "user/name")
    local = model_card(folder)
    assert '"local-dir:models/user/name"' in local and "By class" not in local


def test_what_is_not_known_is_left_out(saved, tmp_path):
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_results(tmp_path / "results.json", {"dataset": {"class_names": [*"abcd"]}})
    card = model_card(tmp_path, "user/name")
    for word in ("None", "nan", "information needed", "Results", "Geometry", "Training", "undefined", "{{", "{%"):
        assert word not in card, word
    assert "model-index" not in card and "datasets" not in card


def test_seeds_become_mean_and_deviation(folder):
    (folder / "seeds").mkdir()
    write_results(folder / "seeds" / "seed2.json", results(seed=2))
    card = model_card(folder, "user/name")
    assert "mean ± standard deviation of 2 seeds" in card
    assert "| 83.0 ± 1.4 |" in card and "82.6 (+0.4)" in card
    assert "Versions: torch 2.14.1.\n" in card


def test_seeds_of_another_device_are_told(folder):
    (folder / "seeds").mkdir()
    elsewhere = {"device": "NVIDIA H200", "versions": {"torch": "2.11.0"}}
    write_results(folder / "seeds" / "seed2.json", results(seed=2, **elsewhere))
    card = model_card(folder, "user/name")
    assert "torch 2.14.1. That is of seed 0; further seeds: 2 on NVIDIA H200, torch 2.11.0.\n" in card


def test_a_twin_without_the_terms_stands_beside(folder):
    twin = results(methods={"base": "CE-DRW"}, heads={"base": metrics(0.7)})
    write_results(folder / "twin.json", twin)
    assert "| CE-DRW: the same without the collapse terms | 70.0 | 80.0 | 70.0 | 60.0 | 5.0 | 75.1 (-5.1) |" in (
        model_card(folder, "user/name")
    )


def test_a_figure_that_is_not_finite_is_refused(folder):
    broken = results()
    broken["heads"]["crt"]["ece"] = math.nan
    (folder / "results.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="results.json.heads.crt.ece is nan"):
        model_card(folder, "user/name")


def test_the_recipe_is_shown_with_the_settings_of_each_stage(folder):
    recipe = load_recipe(ROOT / "recipes/cifar10_lt/nc_drw_crt.yaml", ["--stage1.ghost_batch_size", "32"])
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    card = model_card(folder, "user/name")
    assert (
        "* Stage 1: 200 epochs of batches of 128 a process, SGD, learning rate 0.1 (times 0.1 after 160 and 180 "
        "epochs, warm-up over 5 epochs), weight decay 0.0005, batch norms over 32 images, mixup (alpha 1)"
    ) in card
    assert "0.01 L_W + 0.1 L_B" in card and "from epoch 180 on" in card and "2.0 hours" in card
    assert "Stage 2" not in card  # it was not run
    assert "test images, after the last epoch" in card
    assert "[recipe.yaml](recipe.yaml)" in card and "per_device_train_batch_size" not in card


def test_the_batch_is_that_of_all_processes(folder):
    recipe = load_recipe(None, ["--stage1.max_steps", "1500", "--stage1.load_best_model_at_end", "true"])
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    training = {"stage1": {"batch": 512, "processes": 4}}
    write_results(folder / "results.json", results(training=training))
    assert "after the last epoch" in model_card(folder, "user/name")  # the best was asked for, but none was loaded
    training["stage1"]["best_epoch"] = 7.0
    write_results(folder / "results.json", results(training=training))
    card = model_card(folder, "user/name")
    assert "* Stage 1: 1,500 updates of batches of 512 (4 processes)" in card
    assert "last epoch" not in card and "best on the validation images" in card


def test_a_deployed_head_that_is_worse_is_said_so(folder):
    assert "is better than" not in model_card(folder, "user/name")
    write_results(folder / "results.json", results(heads={"base": metrics(0.83), "crt": metrics(0.8)}))
    card = model_card(folder, "user/name")
    assert "`base` is better than `crt`" in card and "(83.0 against 80.0)" in card
    assert 'nc_hf.load_pretrained("user/name", head="base")' in card


def test_class_means_stand_in_the_table_where_they_differ(folder):
    even = {head: metrics(0.8) | {"images": 10} for head in ("base", "crt")}
    write_results(folder / "results.json", results(heads=even))
    card = model_card(folder, "user/name")
    assert "| class mean |" not in card and "10 test images, equally many of each class." in card
    uneven = {"base": even["base"] | {"class_mean_accuracy": 0.6}, "crt": even["crt"] | {"class_mean_accuracy": 0.7}}
    write_results(folder / "results.json", results(heads=uneven))
    card = model_card(folder, "user/name")
    assert "| | all | class mean | many | medium | few | ECE |" in card
    assert "(`base`) | 80.0 | 60.0 | 90.0 |" in card and "10 test images." in card
    assert "is better than" not in card  # by the mean of the classes, the deployed one is


def test_columns_without_a_figure_are_left_out(folder):
    few = {
        name: {key: value for key, value in metrics(0.8).items() if key != "accuracy_few"} for name in ("base", "crt")
    }
    write_results(folder / "results.json", results(heads=few, model="resnet18"))
    assert "| | all | many | medium | ECE |" in model_card(folder, "user/name")


def test_what_our_builders_say_of_the_data_becomes_sentences(folder):
    digest = 16 * "37ab"
    said = (
        "CIFAR-10, exponential profile, imbalance ratio 100, seed 0: 595 training images, 500 to 5 a class; sha256 of "
    )
    for ending, sentence in (
        ("the standard subset", "This is the standard subset: the very images"),
        ("not the standard subset", "This is not the standard subset"),
    ):
        description = f"{said}pixels {digest}, {ending}"
        heads = {head: metrics(0.8) | {"images": 10000} for head in ("base", "crt")}
        write_results(
            folder / "results.json",
            results(heads=heads, dataset=results()["dataset"] | {"description": description}),
        )
        data = model_card(folder, "user/name").split("## Data")[1].split("## ")[0]
        assert "Trained on 595 images of CIFAR-10 in 4 classes, 500 to 5 a class." in data
        assert "exponential profile and the imbalance ratio 100 (largest by smallest class), seed 0." in data
        assert sentence in data and f"sha256 of their pixels: `{digest}`" in data and description not in data
        assert "10,000 test images, equally many of each class" in data


def test_licence_and_calibration_are_in_the_text(folder):
    write_card(folder, "user/name", license="apache-2.0")
    write_card(folder, "user/name")  # the licence is kept
    card = (folder / "README.md").read_text()
    assert "The weights are under apache-2.0. The images of CIFAR-10 have the terms of their source." in card
    assert "`crt` they differ from the share of right answers by 5.0 points" in card
    assert "## Licence" not in model_card(folder, "user/name")


@pytest.mark.parametrize(("tags", "added"), [("mine", ["mine"]), (None, []), (["mine", "nc_hf"], ["mine"])])
def test_tags_are_one_or_several(folder, tags, added):
    write_card(folder, "user/name", tags=tags)
    ours = ["image-classification", "long-tailed", "class-imbalance", "neural-collapse", "nc_hf"]
    assert metadata_load(folder / "README.md")["tags"] == [*ours, *added]


def test_results_that_are_gone_leave_the_metadata(folder):
    write_card(folder, "user/name", license="mit")
    assert "model-index" in metadata_load(folder / "README.md")
    write_results(folder / "results.json", {"dataset": {"class_names": NAMES}})
    write_card(folder, "user/name")
    metadata = metadata_load(folder / "README.md")
    assert "model-index" not in metadata and metadata["license"] == "mit"


def native_vit(folder: Path) -> Path:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=4))
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    return save_pretrained(model, folder, label_names=[*"abcd"], image_processor=processor)


def timm_network(folder: Path) -> Path:
    model, _ = load_classifier("test_resnet", 4)
    return save_pretrained(model, folder, label_names=[*"abcd"], heads={"base": model.fc.state_dict()})


@pytest.mark.parametrize("kind", ["cifar", "timm", "native"])
def test_the_examples_run_as_they_stand_and_agree(folder, tmp_path, kind, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    PIL.Image.effect_noise((50, 40), 90).save("photo.jpg")  # grey, as some photographs are
    model = {"cifar": lambda _: folder, "timm": timm_network, "native": native_vit}[kind](tmp_path / "my_model")
    dataset = {"class_names": [*"abcd"], "class_counts": COUNTS}
    write_results(model / "results.json", {"dataset": dataset})
    source = Path(shutil.copytree(model, "made/model") if kind == "cifar" else "my_model")
    examples = re.findall(r"```python\n(.*?)```", model_card(source), re.DOTALL)
    assert len(examples) == (3 if kind == "native" else 4)
    *predicting, ours = examples
    answers = []
    for example in predicting:
        exec(example, {})
        printed = capsys.readouterr().out
        answers.append((re.search(r"[abcd]\b", printed)[0], float(re.search(r"\d\.\d+(e-\d+)?", printed)[0])))
    for label, score in answers[1:]:
        assert label == answers[0][0] and score == pytest.approx(answers[0][1], abs=1e-3)
    found: dict = {}
    exec(ours, found)
    assert found["model"] is not None


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(names=st.lists(st.text(min_size=1, max_size=30), min_size=4, max_size=4))
def test_no_name_breaks_tables_or_metadata(folder, names):
    dataset = results()["dataset"] | {"class_names": names, "name": names[0]}
    write_results(folder / "results.json", results(dataset=dataset))
    card = model_card(folder, "user/name")
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(head)["pipeline_tag"] == "image-classification"
    rows = [line for line in body.split("\n") if line.endswith("| 90.0 | 92.0 |")]
    assert len(rows) == 1
    assert rows[0].replace("\\|", "").count("|") == 5 and "<" not in rows[0]


def test_a_persons_words_are_kept(folder):
    write_card(folder, "user/name", license="mit")
    readme = folder / "README.md"
    theirs = readme.read_text().replace(BEGIN, f"# By hand\n\n{BEGIN}").replace(END, f"{END}\n\nBelow by hand.")
    theirs = theirs.replace("license: mit", "license: mit\nlanguage: en")
    readme.write_text(theirs.replace("82.0", "OUTDATED"))
    write_card(folder, "user/name")
    text = readme.read_text()
    assert "# By hand" in text and "Below by hand." in text and "OUTDATED" not in text
    assert metadata_load(readme)["language"] == "en" and metadata_load(readme)["license"] == "mit"


def test_a_readme_without_our_marks_keeps_its_body():
    ours = f"---\ntags:\n- a\nmetrics:\n- accuracy\n---\n\n{BEGIN}\nnew\n{END}\n"
    merged = merge_cards(ours, "---\ntags:\n- b\n---\n\nAll mine.\n")
    assert "All mine." in merged and "new" not in merged
    assert yaml.safe_load(merged.split("---")[1]) == {"tags": ["b", "a"], "metrics": ["accuracy"]}


def test_a_readme_whose_metadata_is_broken_is_refused():
    with pytest.raises(ValueError, match="cannot be read"):
        merge_cards(f"---\ntags:\n- a\n---\n{BEGIN}\n{END}\n", "---\ntags: [a\n---\ntext\n")


@pytest.mark.parametrize("change", [{"model": "resnet18"}, {"split": "validation"}, {"methods": {}}])
def test_no_figure_of_the_paper_stands_beside_something_else(change):
    assert paper_accuracy(results(), "crt") == 82.6
    assert paper_accuracy(results(**change), "crt") is None
