"""From a run folder to a repository folder: complete, without paths of this machine, and only from a finished run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from small_images import SmallImages

from nc_hf import build_release, load_classifier, save_pretrained
from nc_hf.doors import check_doors
from nc_hf.hub import load_heads
from nc_hf.models.saved_folder import weights_checksum
from nc_hf.publishing import PushError, push_folder
from nc_hf.recipe import dump_recipe, load_recipe
from nc_hf.release import _without_paths, public_name
from nc_hf.results import git_revision, write_results
from nc_hf.stages import start_results

ROOT = Path(__file__).resolve().parents[1]
NAMES = [f"class {k}" for k in range(10)]
COUNTS = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


@pytest.fixture
def without_pictures(monkeypatch):
    """Drawing takes a second or two, and most tests look at no picture."""
    monkeypatch.setattr("nc_hf.release._draw_figures", lambda *_: None)


def finished_run(folder: Path, *, seed: int = 0, method: str = "NC-DRW", accuracy: float = 0.8) -> Path:
    """What recipes/train.py leaves, with a network that was not trained."""
    folder.mkdir()
    torch.manual_seed(seed)
    model, _ = load_classifier("resnet20_cifar", 10, NAMES)
    heads = {"base": model.fc.state_dict()}
    for stage, head in (("stage1", "base"), ("stage2", "crt")):
        heads = heads | {head: model.fc.state_dict()}
        means = torch.randn(10, 64)
        save_pretrained(model, folder / stage, heads=heads, active_head=head, class_means=means, class_counts=COUNTS)
    name = "ce_drw_crt" if method == "CE-DRW" else "nc_drw_crt"
    recipe = load_recipe(ROOT / f"recipes/cifar10_lt/{name}.yaml", ["--data.data_dir", "/home/me/images"])
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    metrics = {
        "accuracy": accuracy,
        "class_mean_accuracy": accuracy,
        "per_class_accuracy": [accuracy] * 10,
        "ece": 0.1,
    }
    dataset = {"name": "cifar10", "imbalance_ratio": 100.0, "profile": "exponential"}
    course = [
        {"epoch": 10 * k, "nc1_variability_balanced": 1 / k, "nc2_angle_gap": 9 / k, "nc4_agreement": 0.9}
        for k in (1, 2)
    ]
    results = {
        "seed": seed,
        "model": "resnet20_cifar",
        "split": "test",
        "dataset": dataset | {"class_names": NAMES, "class_counts": COUNTS},
        "methods": {"base": method, "crt": f"{method}-cRT"},
        "heads": {"base": metrics, "crt": metrics},
        "geometry_course": course,
        "training": {},
    }
    write_results(folder / "results.json", results)
    return folder


def test_a_released_recipe_pushes_nowhere():
    recipe = load_recipe(None, ["--hub.repo_id", "me/model"])
    assert recipe.hub.repo_id == "me/model" and _without_paths(recipe).hub.repo_id is None


def test_a_release_has_all_that_a_visitor_wants(tmp_path):
    run = finished_run(tmp_path / "run")
    twin = finished_run(tmp_path / "twin", method="CE-DRW", accuracy=0.7)
    other = finished_run(tmp_path / "other", seed=1, accuracy=0.82)
    folder = build_release(run, tmp_path / "release", repo_id="me/model", twin=twin, seeds=[other], license="mit")
    assert check_doors(folder)
    assert set(load_heads(folder)[0]) == {"base", "crt"}
    assert {path.name for path in (folder / "figures").iterdir()} == {
        "angles.png", "classes.png", "collapse.png", "norms.png"
    }  # fmt: skip
    card = (folder / "README.md").read_text()
    assert "| CE-DRW: the same without the collapse terms, one run | 70.0 |" in card
    assert "| 81.0 ± 1.4 |" in card and "license: mit" in card
    assert "/home/me" not in (folder / "recipe.yaml").read_text() and "/home/me" not in card
    assert load_recipe(folder / "recipe.yaml").stage1 == load_recipe(run / "recipe.yaml").stage1
    (evaluation,) = (folder / ".eval_results").glob("*.yaml")
    entries = yaml.safe_load(evaluation.read_text())
    assert [entry["value"] for entry in entries] == [80.0, 80.0]
    assert {entry["dataset"]["id"] for entry in entries} == {"uoft-cs/cifar10"}


def test_a_release_built_anew_forgets_twin_and_seeds(without_pictures, tmp_path, script, capsys):
    run, folder = finished_run(tmp_path / "run"), tmp_path / "run" / "release"
    twin, other = finished_run(tmp_path / "twin", method="CE-DRW"), finished_run(tmp_path / "other", seed=1)
    script("publish").main(["release", str(run), str(folder), "--twin", str(twin), "--seeds", str(other)])
    assert capsys.readouterr().out.strip() == str(folder)
    assert "CE-DRW" in (folder / "README.md").read_text() and (folder / "seeds").is_dir()
    build_release(run)
    assert not (folder / "twin.json").exists() and not (folder / "seeds").exists()
    assert "CE-DRW" not in (folder / "README.md").read_text()


def test_a_release_can_be_built_again(tmp_path):
    run = finished_run(tmp_path / "run")
    first = {path: path.read_bytes() for path in build_release(run).rglob("*") if path.is_file()}
    assert {path: path.read_bytes() for path in build_release(run).rglob("*") if path.is_file()} == first


@pytest.mark.parametrize(
    ("seed", "override", "message"),
    [
        (1, ["--data.imbalance_ratio", "10"], "is of another recipe than .*: data differ"),
        (1, ["--model.name", "resnet20_cifar"], ": model differ"),
        (1, ["--stage1.within_weight", "0.5"], ": stage1 differ"),
        (0, [], "has the seed 0 as well"),
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_no_seeds(without_pictures, tmp_path, seed, override, message):
    run, other = finished_run(tmp_path / "run"), finished_run(tmp_path / "other", seed=seed)
    (other / "recipe.yaml").write_text(dump_recipe(load_recipe(other / "recipe.yaml", override)))
    with pytest.raises(ValueError, match=message):
        build_release(run, seeds=[other])
    good = finished_run(tmp_path / "good", seed=2)
    with pytest.raises(ValueError, match="has the seed 2 as well. Give one run of each seed"):
        build_release(run, seeds=[good, good])
    assert not (run / "release").exists()


def test_a_checkpoint_that_a_run_went_on_from_is_not_told(without_pictures, tmp_path):
    run = finished_run(tmp_path / "run")
    branch = ["--stage1.resume_from_checkpoint", str(tmp_path / "other/checkpoints/stage1/checkpoint-7")]
    (run / "recipe.yaml").write_text(dump_recipe(load_recipe(run / "recipe.yaml", branch)))
    assert str(tmp_path) not in (build_release(run) / "recipe.yaml").read_text()


def test_results_of_another_data_set_leave_no_evaluation(without_pictures, tmp_path):
    run = finished_run(tmp_path / "run")
    assert list((build_release(run) / ".eval_results").iterdir())
    results = json.loads((run / "results.json").read_text())
    write_results(run / "results.json", results | {"dataset": results["dataset"] | {"name": "my photos"}})
    assert not (build_release(run) / ".eval_results").exists()


def test_a_title_given_after_the_training_is_on_the_card(without_pictures, tmp_path):
    run = finished_run(tmp_path / "run")
    (run / "recipe.yaml").write_text(dump_recipe(load_recipe(run / "recipe.yaml", ["--data.title", "Ten things"])))
    folder = build_release(run)
    assert json.loads((folder / "results.json").read_text())["dataset"]["name"] == "Ten things"
    assert "Ten things" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/home/me/photos/", "photos"),
        ("~/runs/model", "model"),
        ("local-dir:runs/model", "model"),
        ("out/photos", "photos"),
        ("user/name", "user/name"),
        ("hf-hub:user/name", "hf-hub:user/name"),
        ("resnet50.a1_in1k", "resnet50.a1_in1k"),
        ("/home/me/resnet50", "resnet50 (a folder)"),
        ("/home/me/digits", "digits (a folder)"),
    ],
)
def test_of_a_folder_the_last_part_is_told(source, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/photos").mkdir(parents=True)
    assert public_name(source) == name


def test_results_name_no_folder_of_this_machine(tmp_path):
    """As recipes/train.py starts them, for a model and images in folders."""
    recipe = load_recipe(None, ["--model.name", f"local-dir:{tmp_path}/model", "--data.dataset", f"{tmp_path}/photos"])
    images = SmallImages()
    images.description, images.skipped = "", 0
    started = start_results(recipe, {"train": images}, "digest", ["base"])
    assert (started["model"], started["dataset"]["name"]) == ("model", "photos")
    assert str(tmp_path) not in json.dumps(started)
    run = finished_run(tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    named = {"model": started["model"], "dataset": results["dataset"] | {"name": started["dataset"]["name"]}}
    write_results(run / "results.json", results | named)
    folder = build_release(run, repo_id="me/model")
    told = [path for path in folder.rglob("*") if path.suffix in (".json", ".md", ".yaml")]
    assert told and not [path for path in told if str(tmp_path) in path.read_text()]
    assert "photos-LT, imbalance ratio 100" in (folder / "README.md").read_text()


def test_an_unfinished_run_is_refused(tmp_path):
    run = finished_run(tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    write_results(run / "results.json", results | {"heads": {}})
    with pytest.raises(FileNotFoundError, match="Let the run finish first"):
        build_release(run)
    assert not (run / "release").exists()


@pytest.mark.parametrize("other", ["twin", "seeds"])
def test_an_unfinished_twin_or_seed_is_refused_before_the_folder_is_touched(tmp_path, other):
    run, unfinished = finished_run(tmp_path / "run"), finished_run(tmp_path / "other", seed=1)
    folder = build_release(run)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (unfinished / "results.json").unlink()
    with pytest.raises(FileNotFoundError, match="other has no results.json. Let the run finish first"):
        build_release(run, **{other: unfinished if other == "twin" else [unfinished]})
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_without_a_model_is_not_pushed(tmp_path):
    with pytest.raises(PushError, match="has no config.json: it is not a saved classifier"):
        push_folder(tmp_path, "me/model")


def test_a_release_is_no_run_to_release(without_pictures, tmp_path):
    folder = build_release(finished_run(tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match="it is no folder of a run. Give out/<run>"):
        build_release(folder, tmp_path / "again")


@pytest.mark.parametrize("change", [["--data.title", "Ten things"], ["--stage1.save_steps", "7"]])
def test_what_decides_no_weight_may_differ_in_a_twin(without_pictures, tmp_path, change):
    run, twin = finished_run(tmp_path / "run"), finished_run(tmp_path / "twin", method="CE-DRW")
    (twin / "recipe.yaml").write_text(dump_recipe(load_recipe(twin / "recipe.yaml", change)))
    assert (build_release(run, twin=twin) / "twin.json").is_file()


def test_the_release_of_a_run_can_be_its_twin(without_pictures, tmp_path):
    twin = build_release(finished_run(tmp_path / "plain", method="CE-DRW"))
    folder = build_release(finished_run(tmp_path / "run"), twin=twin)
    assert json.loads((folder / "twin.json").read_text())["methods"]["base"] == "CE-DRW"


@pytest.mark.parametrize(
    ("setting", "value", "differing"),
    [
        ("data.imbalance_ratio", "10", "their data.imbalance_ratio differ"),
        ("model.name", "resnet20_cifar", "their model.name differ"),
        ("seed", "1", "their seed differ"),
        ("stage1.learning_rate", "9", "their stage1.learning_rate differ"),
        ("stage1.between_weight", "5", "it was trained with collapse terms"),
    ],
)
def test_a_run_that_differs_in_more_than_the_terms_is_no_twin(without_pictures, tmp_path, setting, value, differing):
    run, other = finished_run(tmp_path / "run"), finished_run(tmp_path / "other", method="CE-DRW")
    (other / "recipe.yaml").write_text(dump_recipe(load_recipe(other / "recipe.yaml", [f"--{setting}", value])))
    with pytest.raises(ValueError, match=f"is no twin of .*: {differing}"):
        build_release(run, twin=other)


def test_the_revision_is_that_of_a_repository_that_keeps_the_file(tmp_path):
    """A package in `.venv` of somebody's own repository has no revision of its own."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=me", "-c", "user.email=me@example.org"]
    installed, kept = tmp_path / ".venv" / "results.py", tmp_path / "results.py"
    installed.parent.mkdir()
    for path in (installed, kept):
        path.write_text("")
    for command in (["init", "-q"], ["add", "results.py"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert git_revision(kept) == head and git_revision(installed) is None


def test_no_setting_names_a_folder_of_this_machine(without_pictures, tmp_path):
    run = finished_run(tmp_path / "run")
    overrides = ["--model.model_args", "{pretrained_cfg_overlay: {file: /home/me/r50.safetensors}}"]
    overrides += ["--stage1.run_name", "~/notes/mine"]
    (run / "recipe.yaml").write_text(dump_recipe(load_recipe(run / "recipe.yaml", overrides)))
    told = (build_release(run) / "recipe.yaml").read_text()
    assert "file: r50.safetensors" in told and "run_name: mine" in told
    assert "/home/me" not in told and "~" not in told


def test_a_folder_called_as_what_was_asked_for_is_not_taken_for_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "resnet18"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"other weights")
        assert public_name(name) == name and public_name(f"./{name}") == f"{name} (a folder)"
    assert weights_checksum("resnet18") is None and weights_checksum("./resnet18") is not None
