"""The real command line: a recipe from launch to results, interrupted and resumed, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nc_hf.doors import check_doors
from nc_hf.recipe import load_recipe
from nc_hf.stages import stage_arguments

ROOT = Path(__file__).resolve().parents[1]
ACCELERATE = str(Path(sys.executable).parent / "accelerate")
SHORT = ["--stage1.num_train_epochs", "3", "--stage2.num_train_epochs", "2"]


def command(*arguments: str, launcher: tuple[str, ...] = (ACCELERATE, "launch")) -> list[str]:
    return [*launcher, str(ROOT / "recipes/train.py"), *arguments]


def start(folder: Path, arguments: list[str]) -> subprocess.Popen:
    """In a process group of its own, so that the launcher and what it starts end together."""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_TOKEN_PATH": str(folder / "no-token")}
    environment.pop("HF_TOKEN", None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(arguments, cwd=folder, env=environment, start_new_session=True, **pipes)


def finish(process: subprocess.Popen, check: bool = True) -> subprocess.CompletedProcess:
    try:
        out, err = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0 or not check, out[-2000:] + err[-3000:]
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def straight(folder) -> dict:
    """The default recipe, shortened."""
    finish(start(folder, command(*SHORT, "--name", "straight")))
    return json.loads((folder / "out/straight/results.json").read_text())


def test_both_stages_are_trained_measured_and_saved(folder, straight):
    assert set(straight["heads"]) == {"base", "crt"}
    for metrics in straight["heads"].values():
        assert {"accuracy", "accuracy_many", "accuracy_few", "ece"} <= set(metrics)
        assert metrics["images"] == 500
        assert len(metrics["per_class_accuracy"]) == 10
    assert sum(straight["dataset"]["class_counts"]) == 444
    assert straight["geometry"]["base"]["train"]["nc2_min_angle"] > 0
    assert straight["training"]["stage1"]["images_per_second"] > 0
    for stage, head in (("stage1", "base"), ("stage2", "crt")):
        config = json.loads((folder / "out/straight" / stage / "config.json").read_text())
        assert config["nc_hf"]["active_head"] == head
        assert not list((folder / "out/straight" / stage).glob("*.bin"))
    records = [json.loads(line) for line in (folder / "out/straight/log.jsonl").read_text().splitlines()]
    assert {"stage1", "stage2"} == {record["stage"] for record in records}
    assert any("loss_within" in record and "loss_between" in record for record in records)


def test_a_run_leaves_a_folder_for_the_hub_with_a_card_to_read(folder, straight):
    release = folder / "out/straight/release"
    assert check_doors(release) == ["timm", "transformers", "pipeline", "nc_hf"]
    card = (release / "README.md").read_text()
    assert "digits-LT, imbalance ratio 20" in card
    assert f"| {100 * straight['heads']['crt']['accuracy']:.1f} |" in card
    pictures = {path.stem for path in (release / "figures").glob("*.png")}
    assert pictures == {"classes", "angles", "norms", "collapse"}
    assert all(f"figures/{picture}.png" in card for picture in pictures)
    for path in release.rglob("*"):
        assert path.suffix in ("", ".json", ".safetensors", ".md", ".yaml", ".png"), path
        if path.is_file():
            assert str(folder).encode() not in path.read_bytes(), path


@pytest.fixture
def train(folder, script, monkeypatch):
    """The function behind recipes/train.py, in this process, with the threads of a launched one."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return lambda *arguments: script("train").main([*arguments, "--data.cache_dir", str(folder / "cache")])


def test_a_push_that_cannot_succeed_is_refused_before_anything_is_trained(folder, train, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(SystemExit, match="cannot push to me/model: there is no token. Run `hf auth login` first."):
        train("--hub.repo_id", "me/model", "--name", "pushed")
    assert not (folder / "out/pushed").exists()


def test_the_same_command_again_shows_the_table_without_training(folder, straight, train, capsys, caplog):
    before = (folder / "out/straight/results.json").stat().st_mtime_ns
    with caplog.at_level("INFO"):
        train(*SHORT, "--name", "straight")
    assert "base" in capsys.readouterr().out
    assert "epochs of" not in caplog.text  # which tells of the schedule when training starts
    assert (folder / "out/straight/results.json").stat().st_mtime_ns == before


def test_stage_two_is_not_trained_on_another_network_than_stage_ones(folder, straight, train):
    half = folder / "out/half"
    shutil.copytree(folder / "out/straight", half, ignore=shutil.ignore_patterns("stage1", "stage2", "release"))
    results = json.loads((half / "results.json").read_text())
    del results["heads"]["crt"]
    (half / "results.json").write_text(json.dumps(results))
    with pytest.raises(SystemExit, match=r"half/stage1 is not there, the network of stage one that "):
        train(*SHORT, "--name", "half")


def test_another_recipe_in_the_same_folder_is_refused(straight, train):
    with pytest.raises(SystemExit, match=r"another recipe or other data.*; stage1.num_train_epochs 3.0 \(now 4.0\)\)"):
        train("--stage1.num_train_epochs", "4", "--stage2.num_train_epochs", "2", "--name", "straight")


def test_a_run_that_counts_updates_tells_its_own_epochs(folder, train):
    counted = ["--stage1.max_steps", "9", "--stage2.max_steps", "20", "--stage2.features", "cached"]
    train(*counted, "--name", "counted", "--model.name", "resnet20_cifar")
    told = json.loads((folder / "out/counted/results.json").read_text())["training"]
    batches = [-(-444 // told[stage]["batch"]) for stage in ("stage1", "stage2")]
    assert [told[stage]["epochs"] for stage in told] == [-(-9 // batches[0]), -(-20 // batches[1])]


def test_stage_two_runs_alone_from_a_folder(folder, straight, train, caplog):
    options = ["--model.name", "out/straight/stage1", "--model.image_size", "null", "--stage1", "null"]
    with caplog.at_level("INFO"):
        train(*options, "--stage2.heads", "[tau_norm, crt]", *SHORT[2:], "--name", "alone")
    assert "444 images, 10 classes of 128 to 6, ratio 21.33" in caplog.text
    assert "classes with many: 1, medium: 5, few: 4 training images" in caplog.text
    results = json.loads((folder / "out/alone/results.json").read_text())
    assert set(results["heads"]) == {"tau_norm", "crt"} and set(results["training"]) == {"stage2"}
    config = json.loads((folder / "out/alone/stage2/config.json").read_text())
    assert config["nc_hf"]["active_head"] == "tau_norm"


@pytest.mark.parametrize(("asked", "steps"), [("steps", [5, 10, 12]), ("no", [])])
def test_a_validation_split_is_measured_when_asked_for(folder, train, asked, steps):
    often = ["--stage1.eval_strategy", asked, "--stage1.eval_steps", "5", "--stage2", "null"]
    data = ["--data.validation_fraction", "0.2", "--stage1.num_train_epochs", "1"]
    train(*often, *data, "--name", f"validated_{asked}")
    records = [json.loads(line) for line in (folder / f"out/validated_{asked}/log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "eval_accuracy" in record] == steps


def test_a_killed_run_resumes_to_the_same_results(folder, straight, train, caplog):
    process = start(folder, command(*SHORT, "--name", "killed", launcher=(sys.executable,)))
    checkpoints = folder / "out/killed/checkpoints/stage1"
    deadline = time.monotonic() + 300
    while not list(checkpoints.glob("checkpoint-*/complete.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(checkpoints.glob("checkpoint-*/complete.json"))
    with pytest.raises(SystemExit, match="holds a run of another recipe"):
        train(*SHORT, "--name", "killed", "--seed", "1")
    with caplog.at_level("INFO"):
        train(*SHORT, "--name", "killed")
    assert "resuming from out/killed" in caplog.text
    resumed = json.loads((folder / "out/killed/results.json").read_text())
    for head, metrics in straight["heads"].items():
        assert resumed["heads"][head]["per_class_accuracy"] == metrics["per_class_accuracy"]
        assert resumed["heads"][head]["ece"] == metrics["ece"]


def test_evaluate_gives_what_the_run_gave(folder, straight, script, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # the bits of an evaluation depend on the threads
    script("evaluate").main(["out/straight/stage2", "--json", "again.json", "--data.cache_dir", str(folder / "cache")])
    again = json.loads((folder / "again.json").read_text())["heads"]
    for head, metrics in straight["heads"].items():
        assert again[head]["per_class_accuracy"] == metrics["per_class_accuracy"]


def test_another_number_of_processes_is_refused(folder, train):
    with pytest.raises(SystemExit, match=r"asks for 2 processes \(expected_processes\) but 1 started"):
        train("--stage1.expected_processes", "2", "--name", "waiting")
    assert not (folder / "out/waiting").exists()


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("expected_processes", "2", "`expected_processes` is 2 but 1 started"),
        ("bf16_full_eval", "true", "would cast the weights and not the images"),
        ("load_best_model_at_end", "true", "chooses on a validation split, which these data do not have"),
        ("eval_strategy", "epoch", "`stage2.eval_strategy` measures on a validation split, which these data do not"),
    ],
)
def test_a_stage_two_that_cannot_run_is_refused_before_stage_one(folder, train, setting, value, message):
    with pytest.raises(SystemExit, match=message):
        train(*SHORT, f"--stage2.{setting}", value, "--name", setting)
    assert not (folder / "out" / setting / "checkpoints").exists()


def test_what_stage_one_cannot_do_is_refused_in_a_sentence(folder, train):
    with pytest.raises(SystemExit, match="needs a cosine head of its scale.*.by model.head_type in a recipe"):
        train("--stage1.loss", "ldam", "--stage1.class_weighting", "none", "--stage1.drw_epoch", "null", "--name", "l")
    (folder / "file").write_text("")
    with pytest.raises(SystemExit, match="Not a directory"):
        train("--output_dir", "file", "--name", "run")


def test_classes_are_grouped_alike_in_one_table(folder, straight, train):
    before = (folder / "out/straight/recipe.yaml").read_text()
    with pytest.raises(SystemExit, match="is measured with .*'few_below': 20.* and this recipe has .*'few_below': 5"):
        train(*SHORT, "--name", "straight", "--evaluation.few_below", "5")
    assert (folder / "out/straight/recipe.yaml").read_text() == before


def test_the_best_epoch_is_looked_for_where_a_recipe_asks_for_it(tmp_path):
    settings = ["--stage1.load_best_model_at_end", "true", "--stage1.metric_for_best_model", "class_mean_accuracy"]
    assert stage_arguments("stage1", load_recipe(None, settings), tmp_path).eval_strategy == "epoch"


def test_a_recipe_with_a_mistake_fails_before_anything_is_loaded(train, monkeypatch):
    monkeypatch.setattr("nc_hf.processes.start_processes", lambda *_: pytest.fail("processes were started"))
    with pytest.raises(SystemExit, match="between_weight"):
        train("--stage1.between_wieght", "0.2")
