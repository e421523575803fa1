"""The paper's tables beside our runs: which results count, what is run, and what is said of both."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nc_hf import load_classifier, save_pretrained
from nc_hf.paper_tables import CIFAR10, CIFAR10_LT, FIGURES, Row, Setting, Table
from nc_hf.recipe import dump_recipe, load_recipe, recipe_digest
from nc_hf.reproduction import TABLES, Plan, collect_run, matching_precision, plan_of_run, plan_row
from nc_hf.reproduction_report import render_table
from nc_hf.results import write_results

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
COUNTS = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
DESCRIPTION = "CIFAR-10, some images, the standard subset"
TABLE3 = TABLES["table3"]


@pytest.fixture
def script():
    """recipes/reproduce.py as a module."""
    spec = importlib.util.spec_from_file_location("reproduce_script", RECIPES / "reproduce.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(plan: Plan, seed: int = 0, accuracy: float = 0.8, precision: str = "bf16", **changed) -> dict:
    """What a run of a plan's recipe would have written."""
    recipe = plan.recipe(seed)
    for stage in filter(None, (recipe.stage1, recipe.stage2)):
        stage["precision"] = precision
    metrics = {"accuracy": accuracy, "per_class_accuracy": [accuracy] * 10}
    return {
        "recipe_digest": recipe_digest(recipe, DESCRIPTION),
        "seed": seed,
        "split": "test",
        "dataset": {"name": "cifar10", "description": DESCRIPTION, "class_counts": COUNTS},
        "heads": {"base": metrics, "crt": {**metrics, "accuracy": accuracy + 0.01}},
        "training": {"stage1": {"seconds": 2400.0}, "stage2": {"seconds": 120.0}},
    } | changed


def plan_for(name: str, results: Path, table: Table = TABLE3, setting: Setting = CIFAR10_LT, **options) -> Plan:
    return plan_row(setting, table.rows[name], RECIPES, results, **options)


def store(plan: Plan, results: dict) -> None:
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_results(plan.target(results["seed"]), results)


def cells(text: str, name: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


# ---- The data ----


def test_printed_numbers_are_the_papers(shared):
    paper = json.loads((shared / "paper_tables.json").read_text())
    names = ["table2_balanced_top1", "table3_cifar_lt_top1", "table4_imagenet_lt_top1", "table5_plug_in_top1"]
    for name in [*names, "table7_ablation_top1_DRW"]:
        printed = TABLES[name.split("_")[0]].printed
        rows = {row: list(cells) for row, cells in paper[name]["rows"].items()}
        assert {
            row: list(cell[0]) if name.startswith("table4") else list(cell) for row, cell in printed.items()
        } == rows
    noise = paper["table6_noise_robustness_top1"]
    assert [float(key.split()[1]) for key in TABLES["table6"].metrics] == noise["noise_std"]
    for network in ("ResNet-32", "ResNet-18"):
        for dataset, number in (("CIFAR10", 0), ("CIFAR10-LT", 1), ("CIFAR100", 2), ("CIFAR100-LT", 3)):
            for loss, row in (("CE", "CE"), ("CE+", "CE+NC")):
                cell = TABLES["table6"].printed[f"{network}, {row}"][number]
                assert list(cell) == noise[network][dataset][loss]


@pytest.mark.parametrize("what", TABLES)
def test_every_recipe_of_a_table_loads_and_leaves_the_head_of_its_row(what):
    table = TABLES[what]
    assert table.rows.keys() >= table.printed.keys()
    for setting in table.settings:
        for name, row in table.rows.items():
            recipe = plan_row(setting, row, RECIPES, Path("results")).recipe()
            if recipe is not None:
                heads = [] if recipe.stage2 is None else recipe.stage2["heads"]
                assert row.head in ["base", *heads], (setting.title, name)
                assert row.head != "base" or recipe.stage1 is not None


def test_two_rows_of_one_folder_have_one_recipe():
    folders = {}
    for table in TABLES.values():
        for setting in table.settings:
            for row in table.rows.values():
                plan = plan_row(setting, row, RECIPES, Path("results"))
                run = (plan.recipe_path, tuple(plan.overrides(0)))
                assert folders.setdefault(plan.folder, run) == run, plan.folder


def test_balanced_data_have_results_of_their_own():
    plan = plan_for("ResNet-32, CE", Path("results"), TABLES["table6"], CIFAR10)
    assert plan.folder == Path("results/cifar10/ce")
    assert plan.recipe().data.imbalance_ratio is None
    assert plan_for("ResNet-32, CE", Path("results"), TABLES["table6"]).folder == Path(
        "results/cifar10_lt_r100/ce_drw"
    )


# ---- Which results count ----


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_precision_of_a_run_is_found(tmp_path, precision):
    plan = plan_for("NC-DRW", tmp_path)
    assert matching_precision(plan.recipe(2), measured(plan, 2, precision=precision)) == precision


@pytest.mark.parametrize(
    "change",
    [
        {"recipe_digest": "0123456789abcdef"},
        {"seed": 1},
        {"split": "validation"},
        {"dataset": {"description": "other images"}},
        {"heads": {"crt": {"accuracy": 0.9}}},
    ],
)
def test_results_of_something_else_are_not_used(tmp_path, change):
    plan = plan_for("NC-DRW", tmp_path)
    store(plan, measured(plan))
    assert [one.seed for one in plan.found()] == [0]
    plan.target(0).unlink()
    store(plan, measured(plan) | change)
    assert plan.found() == []
    row = cells(render_table(TABLE3, CIFAR10_LT, {"NC-DRW": plan}), "NC-DRW")
    assert row[2] == "not run" and row[4] == "-"
    assert f"seed{change.get('seed', 0)}.json not used" in row[-1]


def test_runs_of_another_length_are_kept_apart(tmp_path):
    plan, short = plan_for("CE-DRW", tmp_path), plan_for("CE-DRW", tmp_path, epochs=30)
    assert short.folder.name == "ce_drw_30_epochs"
    assert short.recipe().stage1["num_train_epochs"] == 30
    store(short, measured(short))
    assert len(short.found()) == 1 and plan.found() == []
    assert plan_for("CE-DRW", tmp_path, epochs=200) == plan


# ---- The text ----


def test_a_table_has_the_papers_column_beside_ours(tmp_path):
    plans = {name: plan_for(name, tmp_path) for name in ("CE", "NC-DRW", "NC-DRW-cRT")}
    for seed, accuracy in ((0, 0.81), (1, 0.82)):
        store(plans["NC-DRW"], measured(plans["NC-DRW"], seed, accuracy))
    text = render_table(TABLE3, CIFAR10_LT, plans)
    assert cells(text, "NC-DRW")[:8] == ["NC-DRW", "81.9", "81.5 ± 0.7", "-0.4", "0, 1", "200", "bf16", "40 min"]
    assert cells(text, "NC-DRW-cRT")[:8] == [
        "NC-DRW-cRT",
        "82.6",
        "82.5 ± 0.7",
        "-0.1",
        "0, 1",
        "200",
        "bf16",
        "42 min",
    ]
    assert cells(text, "CE")[:8] == ["CE", "70.4", "not run", "-", "-", "200", "-", "-"]
    stage = plans["NC-DRW"].recipe().stage1
    terms = f"L_W {stage['within_weight']:g}, L_B {stage['between_weight']:g}, {stage['centers']} centers"
    weights = f"effective_number weights from {stage['drw_epoch']:g} of the run"
    assert cells(text, "NC-DRW")[-1] == f"cifar10_lt/nc_drw_crt.yaml, {weights}, {terms}"
    assert "Order CE < CE-DRW < NC-DRW <= NC-DRW-cRT: holds (without CE, CE-DRW)." in text
    assert "Within 1.0 of the paper or above it: all of the 2 that were run." in text


def test_what_the_paper_claims_and_we_do_not_find_is_said(tmp_path):
    plans = {name: plan_for(name, tmp_path) for name in ("CE", "CE-DRW", "NC-DRW")}
    for name, accuracy in (("CE", 0.72), ("CE-DRW", 0.72), ("NC-DRW", 0.7)):
        store(plans[name], measured(plans[name], 0, accuracy))
    text = render_table(TABLE3, CIFAR10_LT, plans)
    assert ": fails: CE 72.0, CE-DRW 72.0; CE-DRW 72.0, NC-DRW 70.0 (without NC-DRW-cRT)." in text
    assert "all but CE-DRW, NC-DRW of the 3 that were run" in text


def test_a_row_that_the_paper_does_not_have_is_compared_with_nothing(tmp_path):
    plan = plan_for("NC-DRW", tmp_path)
    store(plan, measured(plan))
    text = render_table(TABLE3, CIFAR10_LT, {"NC-DRW, otherwise": plan})
    assert cells(text, "NC-DRW, otherwise")[1:4] == ["-", "80.0", "-"]
    assert "Within" not in text


def test_a_row_without_a_recipe_or_a_known_wall_time(tmp_path):
    plan = plan_row(CIFAR10_LT, Row("nobody"), RECIPES, tmp_path)
    text = render_table(TABLE3, CIFAR10_LT, {"BBN": plan})
    assert cells(text, "BBN") == ["BBN", "79.9", "not run", *["-"] * 5, "there is no recipe cifar10_lt/nobody.yaml"]
    resumed = plan_for("CE", tmp_path)
    odd = {"name": "cifar10", "description": "elsewhere, not the standard subset", "class_counts": COUNTS}
    digest = recipe_digest(load_recipe(resumed.recipe_path, ["--stage1.precision", "fp32"]), odd["description"])
    store(resumed, measured(resumed, recipe_digest=digest, dataset=odd, training={"stage1": {}}))
    row = cells(render_table(TABLE3, CIFAR10_LT, {"CE": resumed}), "CE")
    assert row[6:8] == ["fp32", "-"] and row[-1].endswith("not the standard subset")


def test_noise_is_shown_where_it_was_measured_on_the_papers_scale(tmp_path):
    table, name = TABLES["table6"], "ResNet-32, CE+NC"
    plan = plan_for(name, tmp_path, table)
    noise = {"std": [0.0, 0.1], "scale": "normalized", "seed": 0, "accuracy": {"base": [0.8, 0.7525]}}
    store(plan, measured(plan, noise=noise))
    row = cells(render_table(table, CIFAR10_LT, {name: plan}), name)
    assert row[1:4] == ["80.0 / 79.2 (+0.8)", "75.2 / 75.5 (-0.2)", "not run / 63.2"]
    store(plan, measured(plan, noise={**noise, "scale": "pixels"}))
    row = cells(render_table(table, CIFAR10_LT, {name: plan}), name)
    assert row[1] == "not run / 79.2" and "without this measurement" in row[-1]


# ---- Finished runs ----


def finished_run(run: Path, plan: Plan, seed: int = 0) -> None:
    """What recipes/train.py leaves, with a network that was not trained."""
    model, _ = load_classifier("resnet20_cifar", 10)
    means = torch.randn(10, 64, generator=torch.Generator().manual_seed(seed))
    save_pretrained(model, run / "stage1", heads={"base": model.fc.state_dict()}, class_means=means)
    (run / "recipe.yaml").write_text(dump_recipe(plan.recipe(seed)))
    write_results(run / "results.json", measured(plan, seed))


def test_a_finished_run_joins_the_results(tmp_path):
    plan = plan_for("CE-DRW", tmp_path / "results", epochs=30)
    finished_run(tmp_path / "run", plan, seed=1)
    assert plan_of_run(tmp_path / "run", RECIPES, tmp_path / "results") == (plan, 1)
    noise = {"std": [0.0], "scale": "normalized", "seed": 0, "accuracy": {"base": [0.8]}}
    (tmp_path / "run/noise.json").write_text(json.dumps({"heads": {}, "noise": noise}))
    collect_run(tmp_path / "run", plan.target(1))
    (found,) = plan.found()
    assert found.results["noise"] == noise and found.results["heads"] == measured(plan, 1)["heads"]
    expected = torch.randn(10, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(load_file(found.means_path)["class_means"], expected)
    assert str(tmp_path) not in plan.target(1).read_text()


def test_runs_that_are_no_row_or_not_finished_are_refused(tmp_path, script):
    plan = plan_for("CE-DRW", tmp_path / "results")
    finished_run(tmp_path / "run", plan)
    write_results(tmp_path / "run/results.json", measured(plan, recipe_digest="0" * 16))
    with pytest.raises(SystemExit, match="is no run of a recipe of the paper's tables"):
        script.main(["collect", str(tmp_path / "run"), "--results", str(tmp_path / "results")])
    with pytest.raises(FileNotFoundError, match="Let the run finish first"):
        collect_run(tmp_path, plan.target(0))


# ---- The command ----


class Runner:
    """Stands in for the processes of training; the first is cut off."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.commands = plan, []

    def __call__(self, command: list[str]) -> subprocess.CompletedProcess:
        self.commands.append(command)
        if len(self.commands) == 1:
            return subprocess.CompletedProcess(command, 1)
        options = dict(zip(command, command[1:], strict=False))
        run = Path(options["--output_dir"]) / options["--name"]
        run.mkdir(parents=True)
        finished_run(run, self.plan, int(options["--seed"]))
        return subprocess.CompletedProcess(command, 0)


def test_what_is_missing_is_run_resumed_and_then_shown(tmp_path, script, monkeypatch, capsys):
    plan = plan_for("CE-DRW", tmp_path / "results")
    store(plan, measured(plan, 1, 0.75))
    runner = Runner(plan)
    monkeypatch.setattr(script.subprocess, "run", runner)
    command = ["table3", "--dataset", "cifar10_lt", "--ratio", "100", "--seeds", "2", "--data_dir", "images"]
    command += ["--output", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    script.main(command)
    assert not runner.commands and "Nothing was trained." in capsys.readouterr().out
    command += ["--rows", "CE-DRW"]
    script.main([*command, "--no-train"])
    assert not runner.commands
    with pytest.raises(SystemExit, match="failed, see above; the same command resumes"):
        script.main(command)
    script.main(command)
    first, second = runner.commands
    assert first == second and first[first.index("--seed") + 1] == "0"
    assert first[first.index("--data.data_dir") + 1] == str(Path("images").resolve())
    assert first[first.index("--num_processes") + 1] == "1"
    shown = capsys.readouterr().out
    assert cells(shown[shown.rindex("## Table 3") :], "CE-DRW")[2:5] == ["77.5 ± 3.5", "+2.4", "0, 1"]
    script.main(command)
    assert len(runner.commands) == 2
    assert "77.5 ± 3.5" in (tmp_path / "out/table3.md").read_text()


def test_a_model_that_is_gone_is_not_trained_again_for_its_noise(tmp_path, script, monkeypatch, capsys):
    name = "ResNet-32, CE+NC"
    plan = plan_for(name, tmp_path / "results", TABLES["table6"])
    store(plan, measured(plan))
    monkeypatch.setattr(script.subprocess, "run", lambda command: pytest.fail(f"ran {command}"))
    with pytest.raises(SystemExit, match="failed, see above"):
        script.main(
            ["table6", "--dataset", "cifar10_lt", "--rows", name, "--output", str(tmp_path / "out")]
            + ["--results", str(tmp_path / "results")]
        )
    assert "so nothing more is measured of it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table9"], "invalid choice: 'table9'"),
        (["table3", "--rows", "NC-DWR"], "table3 has no row NC-DWR; its rows are CE, CE-RS"),
        (["table3", "--ratio", "50"], "its columns are --dataset cifar10_lt --ratio 100, --dataset cifar10_lt"),
        (["table3", "--seeds", "0"], "must be more than 0, got 0"),
        (["table3", "out/run"], "folders of runs go with collect"),
        (["collect"], "folders of runs go with collect"),
    ],
)
def test_commands_that_mean_nothing_are_refused(script, capsys, arguments, message):
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert message in capsys.readouterr().err


def test_figures_are_drawn_from_the_panels_that_are_there(tmp_path, script, capsys):
    for row, seed in ((Row("ce"), 0), (Row("nc_drw_crt"), 1)):
        plan = plan_row(CIFAR10_LT, row, RECIPES, tmp_path / "results")
        store(plan, measured(plan))
        means = torch.randn(10, 64, generator=torch.Generator().manual_seed(seed))
        save_file({"class_means": means}, plan.target(0).with_suffix(".safetensors"))
    for what in FIGURES:
        script.main([what, "--output", str(tmp_path / "out"), "--results", str(tmp_path / "results")])
        shown = capsys.readouterr().out
        assert f"NC: {tmp_path}/results/cifar10_lt_r100/nc_drw_crt/seed0.json" in shown
        assert "not run (cifar10_lt/ce" in shown
        assert {f"{what}.png", f"{what}.svg"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_committed_results_are_shown_without_the_training_code(tmp_path):
    command = [sys.executable, "-X", "importtime", str(RECIPES / "reproduce.py"), "table3", "--dataset", "cifar10_lt"]
    command += ["--ratio", "100", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert cells(done.stdout, "NC-DRW-cRT")[1] == "82.6"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "nc_hf.recipe" in imported
    assert not {"nc_hf.trainer", "nc_hf.retraining", "nc_hf.image_sets", "nc_hf.models.classifier"} & imported


def test_from_nothing_to_a_table_with_real_runs(tmp_path, script, monkeypatch, capfd):
    """Trained, measured under noise, collected and shown; the second time from the results alone."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    digits = Setting("digits-LT", "digits", None, "digits_lt")
    row = Row("short", recipe="nc_drw_crt", overrides=("--stage2", "null", "--stage1.drw_epoch", "null"))
    table = Table("Digits", (digits,), {"NC": row}, {"NC": ((99.0, None),)}, {"accuracy": "all", "noise 0.4": "noise"})
    monkeypatch.setitem(TABLES, "table6", table)
    command = ["table6", "--rows", "NC", "--epochs", "1", "--output", str(tmp_path / "out")]
    command += ["--results", str(tmp_path / "results"), "--cache_dir", str(tmp_path / "cache")]
    script.main(command)
    stored = json.loads((tmp_path / "results/digits/short_1_epochs/seed0.json").read_text())
    assert stored["noise"]["std"] == [0.0, 0.1, 0.2, 0.3, 0.4] and str(tmp_path) not in json.dumps(stored)
    assert (tmp_path / "results/digits/short_1_epochs/seed0.safetensors").is_file()
    shown = capfd.readouterr().out
    accuracy, noisy = 100 * stored["heads"]["base"]["accuracy"], 100 * stored["noise"]["accuracy"]["base"][-1]
    row = cells(shown[shown.rindex("## Digits") :], "NC")
    assert row[1:3] == [f"{accuracy:.1f} / 99.0 ({accuracy - 99:+.1f})", f"{noisy:.1f} / -"]
    monkeypatch.setattr(script.subprocess, "run", lambda command: pytest.fail(f"ran {command}"))
    script.main(command)
    assert "missing" not in capfd.readouterr().out
