"""What a card says of data and training is true of unusual runs, too."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import metadata_load

from nc_hf.card_block import END, marked, merge_cards
from nc_hf.card_citations import citations
from nc_hf.card_facts import dataset_facts, origin, stages
from nc_hf.card_tables import accuracy_table
from nc_hf.data.splits import preset_ratio
from nc_hf.hub import save_pretrained
from nc_hf.model_card import write_card
from nc_hf.models.classifier import load_classifier
from nc_hf.recipe import dump_recipe, load_recipe
from nc_hf.results import write_results

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
PIXELS = "CIFAR-10, exponential profile, imbalance ratio 100, seed 0: 12406 training images, 5000 to 50 a class; "
PIXELS += f"sha256 of pixels {'0' * 64}, the standard subset"
METRICS = {"accuracy": 0.5, "class_mean_accuracy": 0.5, "per_class_accuracy": [0.5, 0.5], "ece": 0.1}


def results(head: str = "base", **changes) -> dict:
    dataset = {"name": "cifar10", "description": PIXELS, "class_names": ["ant", "bee"], "class_counts": [30, 10]}
    trained = {stage: {"batch": 128, "processes": 1} for stage in ("stage1", "stage2")}
    return {"seed": 0, "split": "test", "dataset": dataset, "heads": {head: METRICS}, "training": trained} | changes


@pytest.fixture(scope="module")
def card_of(tmp_path_factory):
    """The card of a run of a recipe of CIFAR-10-LT, and its tags."""
    folder = tmp_path_factory.mktemp("model")
    model, _ = load_classifier("resnet20_cifar", 2)

    def make(recipe: str, *overrides: str, seeds: tuple[int, ...] = (), twin: bool = False) -> tuple[str, list[str]]:
        loaded = load_recipe(RECIPES / "cifar10_lt" / f"{recipe}.yaml", overrides)
        head = loaded.stage2["heads"][0] if loaded.stage2 else "base"
        save_pretrained(model, folder, heads={head: model.fc.state_dict()}, active_head=head)
        (folder / "recipe.yaml").write_text(dump_recipe(loaded))
        write_results(folder / "results.json", results(head))
        (folder / "seeds").mkdir(exist_ok=True)
        for seed in seeds:
            write_results(folder / "seeds" / f"{seed}.json", results(head, seed=seed))
        if twin:
            write_results(folder / "twin.json", results())
        (folder / "README.md").unlink(missing_ok=True)
        write_card(folder, "user/name")
        return (folder / "README.md").read_text(), metadata_load(folder / "README.md")["tags"]

    return make


def test_what_others_cannot_run_is_not_said_to_train_again(card_of):
    assert (
        "recipe.yaml --data.data_dir <folder of the images>` in nc_hf's source\ntrains it again"
        in card_of("ce_drw")[0]
    )
    digits = card_of("ce_drw", "--data.dataset", "digits")[0]
    assert "recipe.yaml` in nc_hf's source\ntrains it again" in digits
    assert "trains it again" not in card_of("ce_drw", "--data.dataset", "birds", "--data.imbalance_ratio", "null")[0]
    on_hub = card_of("ce_drw", "--data.dataset", "me/birds", "--data.imbalance_ratio", "null")[0]
    assert "recipe.yaml` in nc_hf's source\ntrains it again" in on_hub


@pytest.mark.parametrize("name", ["me/model@v1", "hf-hub:me/model", "hf-hub:me/model@refs/pr/1"])
def test_a_base_model_is_named_without_its_revision(name):
    assert origin(dump_recipe(load_recipe(None, ["--model.name", name]))) == "me/model"


def test_keywords_of_a_card_may_be_those_that_it_has(card_of, tmp_path):
    model, _ = load_classifier("resnet20_cifar", 2)
    save_pretrained(model, tmp_path)
    write_results(tmp_path / "results.json", results())
    write_card(tmp_path, "user/name", library_name="mine", metrics=["f1"])
    assert metadata_load(tmp_path / "README.md")["library_name"] == "mine"


def test_a_run_that_counts_updates_is_told_with_its_own_epochs():
    given = ["--stage1.max_steps", "1500", "--stage1.lr_milestones", "[0.8, 0.9]", "--stage1.start_epoch", "0.5"]
    recipe = load_recipe(RECIPES / "cifar10_lt/nc_drw_crt.yaml", given)  # 200 epochs beside max_steps
    (stage,) = stages(results(training={"stage1": {"epochs": 16.0}}), dump_recipe(recipe))
    assert (stage["schedule"].partition(",")[0], stage["start"]) == ("times 0.1 after 12 and 14 epochs", 8)


@pytest.mark.parametrize("change", [{"validation_fraction": 0.1}, {}])
def test_a_part_of_the_standard_subset_is_not_called_it(change):
    whole = results()
    facts = dataset_facts(whole | {"dataset": whole["dataset"] | change})
    assert (facts["standard"], facts["sha256"]) == ((None, None) if change else ("the standard subset", "0" * 64))
    skipped = dataset_facts(whole | {"skipped_images": {"train": 2}})
    assert skipped["standard"] is skipped["sha256"] is None


def test_the_checksum_of_a_users_files_is_not_shown():
    own = results()["dataset"] | {"description": f"sha256 of names {'1' * 64}"}
    facts = dataset_facts(results(dataset=own))
    assert facts["sha256"] is facts["description"] is None


def test_a_tail_that_is_longer_than_asked_for_is_said_so():
    own = results()["dataset"] | {"name": "my photos", "imbalance_ratio": 10, "class_counts": [790, 21]}
    assert dataset_facts(results(dataset=own))["larger_ratio"] == "37.6"
    assert "larger_ratio" not in dataset_facts(results(dataset=own | {"class_counts": [210, 20]}))


def test_a_file_format_is_no_name_of_images():
    facts = dataset_facts(results(dataset=results()["dataset"] | {"name": "imagefolder"}))
    assert (facts["name"], facts["source"], facts["hub_id"]) == ("own images", None, None)
    assert dataset_facts(results(dataset=results()["dataset"] | {"name": "me/birds"}))["hub_id"] == "me/birds"


@pytest.mark.parametrize(("name", "ratio"), [("r100", 100), ("balanced", None), (None, None)])
def test_the_ratio_of_a_preset_is_known(name, ratio):
    assert preset_ratio("cifar10", name) == ratio
    assert preset_ratio("me/birds", name) is None


def test_classes_without_a_test_image_are_named(card_of, monkeypatch):
    monkeypatch.setitem(METRICS, "images", 70)
    assert "in none of them" not in card_of("ce")[0]
    monkeypatch.setitem(METRICS, "per_class_accuracy", [0.5, None])
    assert "measured on 70 test images. Without a test image, and so in none of them: bee.\n" in card_of("ce")[0]
    whole = results()
    empty = dataset_facts(whole | {"dataset": whole["dataset"] | {"class_counts": [30, 0]}})
    assert (empty["empty"], empty["untested"]) == (["bee"], [])


def test_heads_that_are_computed_are_not_called_trained(card_of):
    card, _ = card_of("ce_crt", "--stage2.heads", "[tau_norm, ncm]")
    assert "* Stage 2: nothing is trained; computed from the training features: tau_norm, ncm\n" in card
    card, _ = card_of("ce_crt", "--stage2.heads", "[crt, ncm]")
    assert "* Stage 2: 10 epochs of the head alone, on the frozen backbone, in batches of 128" in card
    assert "; computed from the training features: ncm\n" in card
    card, _ = card_of("ce_crt", "--stage2.heads", "[crt]")
    assert "* Stage 2: 10 epochs" in card and "computed from" not in card


def test_center_loss_is_called_so_and_the_start_of_the_terms_is_told(card_of):
    card, tags = card_of("center_loss_between")
    assert "; center loss (0.01) + 0.1 L_B, class centers ema" in card and "neural-collapse" in tags
    card, _ = card_of("nc", "--stage1.start_epoch", "0.5")
    assert "; collapse terms 0.01 L_W + 0.1 L_B from epoch 100 on, class centers ema" in card


def test_a_model_without_the_terms_is_not_tagged_with_them(card_of):
    assert card_of("ce")[1] == ["image-classification", "long-tailed", "class-imbalance", "nc_hf"]


def test_what_is_of_one_seed_says_so_among_several(card_of):
    card, _ = card_of("nc_drw_crt", seeds=(1, 2), twin=True)
    assert "mean ± standard deviation of 3 seeds" in card and "the same without the collapse terms, one run" in card
    assert "<summary>By class (seed 0)</summary>" in card
    assert "average, on the test images (seed 0)." in card


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("resnet32_cifar", ["he2016deep"]),
        ("resnet32_ride_cifar", ["he2016deep", "wang2021longtailed"]),
        ("resnext50_ride", ["xie2017aggregated", "wang2021longtailed"]),
        ("resnet32_bbn_cifar", ["he2016deep", "zhou2020bbn"]),
        ("resnet10t", ["he2016deep", "rw2019timm"]),
        ("convnext_atto", ["rw2019timm"]),
        (None, []),
    ],
)
def test_the_network_is_cited(architecture, keys):
    cited = citations({"architecture": architecture}, {"dataset": {"name": "my photos"}})
    assert [entry.partition("{")[2].partition(",")[0] for entry in cited] == keys


@pytest.mark.parametrize(
    ("overrides", "origin", "repeatable"),
    [
        ((), None, True),
        (("--model.name", "resnet18", "--model.pretrained", "true"), "resnet18", True),
        (("--model.name", "somebody/net"), "somebody/net", True),
        (("--model.name", "stage1"), "stage1", False),
    ],
)
def test_what_the_weights_started_from_is_said(card_of, overrides, origin, repeatable):
    card, _ = card_of("ce", *overrides)
    assert (f"started from the weights of {origin};" in card) == (origin is not None) == ("started from" in card)
    assert ("base_model: somebody/net" in card) == (origin == "somebody/net") == ("base_model" in card)
    assert ("trains it again" in card) == repeatable


def test_a_title_is_escaped_for_markdown_alone(tmp_path):
    model, _ = load_classifier("resnet20_cifar", 2)
    save_pretrained(model, tmp_path)
    own = results()
    own["dataset"] = own["dataset"] | {"name": "My | photos_1", "description": None}
    write_results(tmp_path / "results.json", own)
    write_card(tmp_path)
    index = metadata_load(tmp_path / "README.md")["model-index"]
    assert index[0]["results"][0]["dataset"]["name"] == "My | photos_1"
    assert "My \\| photos\\_1" in (tmp_path / "README.md").read_text()


def test_a_mark_without_its_end_and_a_byte_order_mark_are_no_second_card(caplog):
    ours = marked("---\nlicense: mit\n---\nnew words")
    cut = marked("---\nlicense: mit\n---\nold words").replace(END, "")
    assert "old words" in merge_cards(ours, cut) and "new words" not in merge_cards(ours, cut)
    assert "without <!-- nc_hf:end --> after it" in caplog.text
    merged = merge_cards(ours, "\ufeff" + marked("---\nlicense: mit\n---\nold words"))
    assert merged.count("---\n") == 2 and "new words" in merged and "old words" not in merged


@pytest.mark.parametrize(
    ("split", "words"), [("test", " (chosen on validation images)"), ("validation", " (chosen on these images)")]
)
def test_a_tau_is_told_with_the_images_it_was_chosen_on(split, words):
    run = results("tau_norm", split=split, taus={"tau_norm": 0.6}, taus_chosen_on="validation")
    ((label, _),) = accuracy_table([run], None)["rows"]
    assert label.endswith(f"(`tau_norm`), tau 0.6{words}")
    ((label, _),) = accuracy_table([run | {"taus_chosen_on": None}], None)["rows"]
    assert label.endswith("tau 0.6")
