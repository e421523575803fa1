"""The paper's tables beside our runs: which results count, and what is said of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stored_results import COUNTS, RECIPES, TABLE3, cells, finished_run, measured, plan_for, store

from nc_hf.paper_figures import FIGURES
from nc_hf.paper_tables import CIFAR10, CIFAR10_LT, CIFAR100_LT, Row
from nc_hf.recipe import load_recipe, recipe_digest
from nc_hf.reproduction import TABLES, collect_run, matching_precision, plan_of_run, plan_row
from nc_hf.reproduction_report import draw_paper_figure, protocol, render_table
from nc_hf.results import write_results

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
def test_every_row_has_a_recipe_that_loads_and_leaves_its_head(what):
    table = TABLES[what]
    assert table.rows.keys() >= table.printed.keys()
    for setting in table.settings:
        for name, row in table.rows.items():
            recipe = plan_row(setting, row, RECIPES, Path("results")).recipe()
            assert recipe is not None, (setting.title, name)
            heads = [] if recipe.stage2 is None else recipe.stage2["heads"]
            assert row.head in ["base", *heads], (setting.title, name)
            assert row.head != "base" or recipe.stage1 is not None


def test_one_recipe_has_one_folder_and_one_folder_one_recipe():
    """So that nothing is run twice, and a run fills every table that shows it."""
    folders, digests = {}, {}
    for table in TABLES.values():
        for setting in table.settings:
            for row in table.rows.values():
                plan = plan_row(setting, row, RECIPES, Path("results"), epochs=30)
                run = (setting.folder, recipe_digest(plan.recipe()))
                assert folders.setdefault(plan.folder, run) == run, plan.folder
                assert digests.setdefault(run, plan.folder) == plan.folder, plan.folder
    assert len(digests) > 80


def test_mislas_has_its_own_settings_at_each_ratio():
    found = {}
    for setting in TABLE3.settings:
        stage = plan_for("MiSLAS", Path("results"), setting=setting).recipe().stage2
        found[setting.folder] = (*stage["loss_settings"].values(), stage["lws_weight_factor"])
    assert found == {
        "cifar10_lt_r100": (0.3, 0.0, 0.5),
        "cifar10_lt_r10": (0.1, 0.0, 0.2),
        "cifar100_lt_r100": (0.4, 0.1, 0.2),
        "cifar100_lt_r10": (0.2, 0.0, 0.1),
    }


def test_methods_of_one_backbone_come_from_one_run_on_a_schedule_of_their_own(tmp_path):
    methods = TABLES["methods"]
    (short,) = methods.settings
    plans = {name: plan_for(name, tmp_path, methods, short) for name in ("CE-DRW + NC", "DRW-cRT + NC")}
    plan = plans["DRW-cRT + NC"]
    assert plan.folder == tmp_path / "cifar10_lt_r100_30_epochs" / "ce_drw_crt_nc"
    stage = plan.recipe().stage1
    assert [stage[name] for name in ("num_train_epochs", "warmup_epochs", "within_weight")] == [30, 5, 0.01]
    store(plan, measured(plan, 0, 0.7))
    assert [cells(render_table(methods, short, plans), name)[3] for name in plans] == ["70.0", "71.0"]
    assert plan_row(short, methods.rows["DRW-cRT + NC"], RECIPES, tmp_path, epochs=30) == plan


@pytest.mark.parametrize("name", ["CE", "RIDE (2 experts)"])
def test_what_nc_adds_is_said_of_every_table(tmp_path, name):
    methods, table5 = TABLES["methods"], TABLES["table5"]
    for table, setting, other in (
        (methods, methods.settings[0], f"{name} + NC"),
        (table5, CIFAR100_LT, "LDAM-DRW+NC" if name == "CE" else "RIDE+NC (2 experts)"),
    ):
        name = "LDAM-DRW" if other == "LDAM-DRW+NC" else name
        plans = {row: plan_for(row, tmp_path, table, setting) for row in (name, other)}
        for row, accuracy in zip(plans, (0.5, 0.54), strict=True):
            store(plans[row], measured(plans[row], 0, accuracy))
        assert re.search(
            rf"NC adds to {re.escape(name)} \(.*\): \+4.0 \(seed 0\)", render_table(table, setting, plans)
        )


def test_what_differs_between_recipes_is_part_of_the_protocol():
    told = protocol(load_recipe(RECIPES / "cifar100_lt/nc_drw_crt.yaml", ["--stage1.ghost_batch_size", "32"]))
    assert told["ghost"] == "ghost batches of 32"
    assert told["warmup"] == "warm-up up to 0.025 of the run" and told["terms"].endswith("from 0.5 of the run")


def test_a_run_in_other_batches_than_its_recipe_is_not_collected(tmp_path):
    plan, run = plan_for("CE-DRW", tmp_path / "results"), tmp_path / "run"
    finished_run(run, plan)
    for seed, (batch, processes) in enumerate([(128, 1), (512, 4)]):
        training = {"stage1": {"batch": batch, "processes": processes}}
        write_results(run / "results.json", measured(plan) | {"training": training})
        if processes == 1:
            collect_run(run, plan.target(seed))
        else:
            with pytest.raises(ValueError, match="in batches of 512 on 4 processes, and its recipe is of 128"):
                collect_run(run, plan.target(seed))
    assert plan.target(0).exists() and not plan.target(1).exists()


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
    assert "Within 1.0 of the paper or above it, of CE-DRW and the rows with NC: all of the 2 that were run." in text


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


def test_what_nc_adds_is_of_seeds_that_both_rows_have(tmp_path):
    table, names = TABLES["table6"], ("ResNet-32, CE", "ResNet-32, CE+NC")
    plans = {name: plan_for(name, tmp_path, table) for name in names}
    for name, seed, accuracy in ((names[0], 0, 0.75), (names[1], 0, 0.78), (names[1], 1, 0.9)):
        noise = {"std": [0.0], "scale": "normalized", "seed": 0, "accuracy": {"base": [accuracy]}}
        store(plans[name], measured(plans[name], seed, 0.5, noise=noise))
    text = render_table(table, CIFAR10_LT, plans)
    assert "NC adds to ResNet-32, CE (std 0): +3.0 (seed 0), in the paper +2.2." in text
    assert "NC adds" not in render_table(table, CIFAR10_LT, {names[0]: plans[names[0]]})
    plans[names[0]].target(0).unlink()
    assert "NC adds" not in render_table(table, CIFAR10_LT, plans)


# ---- Finished runs ----


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


def test_collecting_again_keeps_the_noise_of_the_same_recipe(tmp_path):
    plan = plan_for("CE-DRW", tmp_path / "results")
    finished_run(tmp_path / "run", plan)
    noise = {"std": [0.0], "scale": "normalized", "seed": 0, "accuracy": {"base": [0.7]}}
    store(plan, measured(plan, noise=noise))
    collect_run(tmp_path / "run", plan.target(0))
    assert plan.found()[0].results["noise"] == noise
    measured_again = {"split": "test", "noise": {**noise, "std": [0.1]}}
    (tmp_path / "run/noise.json").write_text(json.dumps(measured_again))
    collect_run(tmp_path / "run", plan.target(0))
    assert plan.found()[0].results["noise"]["std"] == [0.1]
    (tmp_path / "run/noise.json").unlink()
    store(plan, measured(plan, noise=noise, recipe_digest="0" * 16))
    collect_run(tmp_path / "run", plan.target(0))
    assert "noise" not in plan.found()[0].results


@pytest.mark.parametrize(
    ("split", "changes", "message"),
    [
        ("left_out", {}, "noise of left_out images, scale normalized, seed 0"),
        ("test", {"scale": "pixels"}, "noise of test images, scale pixels, seed 0"),
        ("test", {"seed": 7}, "seed 7; Table 6 is of test images, scale normalized, seed 0"),
    ],
)
def test_noise_of_other_images_scale_or_seed_is_not_collected(tmp_path, split, changes, message):
    plan = plan_for("CE-DRW", tmp_path / "results")
    finished_run(tmp_path / "run", plan)
    noise = {"std": [0.0], "scale": "normalized", "seed": 0, "accuracy": {"base": [0.7]}}
    store(plan, measured(plan, noise=noise))
    (tmp_path / "run/noise.json").write_text(json.dumps({"split": split, "noise": noise | changes}))
    with pytest.raises(ValueError, match=message):
        collect_run(tmp_path / "run", plan.target(0))
    assert plan.found()[0].results["noise"] == noise


def test_results_that_are_no_seed_of_the_row_do_not_count(tmp_path):
    """A copy under another name, and other bounds of many and few; images that could not be read are told."""
    plan = plan_for("CE-DRW", tmp_path)
    store(plan, measured(plan, skipped_images={"train": 9}))
    plan.target(0).with_name("seed0_copy.json").write_text(plan.target(0).read_text())
    bounds = measured(plan)["dataset"] | {"few_below": 900, "many_above": 1000}
    write_results(plan.target(1), measured(plan, 1, dataset=bounds))
    assert [one.path for one in plan.found()] == [plan.target(0)]
    row = cells(render_table(TABLE3, CIFAR10_LT, {"CE-DRW": plan}), "CE-DRW")
    assert "seed0_copy.json, seed1.json not used" in row[-1] and row[-1].endswith("9 images could not be read")
    plan.target(1).write_text('{"seed": ')
    with pytest.raises(ValueError, match=r"seed1\.json is not JSON"):
        plan.found()


def test_a_run_that_was_not_followed_leaves_the_others_their_course(tmp_path):
    plans = {name: plan_for(name, tmp_path / "results") for name in ("CE", "CE-DRW")}
    course = [{"epoch": 1.0, "nc1_variability_balanced": 0.5}]
    for name, records in (("CE", []), ("CE-DRW", course)):
        finished_run(tmp_path / name, plans[name])
        collect_run(tmp_path / name, plans[name].target(0))
        store(plans[name], measured(plans[name], geometry_course=records))
    lines = draw_paper_figure(FIGURES["collapse"], {name: [plan] for name, plan in plans.items()}, tmp_path / "figure")
    assert "CE: not followed over the epochs (evaluation.geometry_every)" in "\n".join(lines)
    assert (tmp_path / "figure.png").is_file()


def test_a_run_that_is_not_finished_replaces_nothing(tmp_path):
    plan = plan_for("NC-DRW-cRT", tmp_path / "results")
    with pytest.raises(FileNotFoundError, match="has no results.json. Let the run finish first"):
        collect_run(tmp_path, plan.target(0))
    store(plan, measured(plan))
    finished_run(tmp_path / "run", plan)
    stage_one = {"heads": {"base": {"accuracy": 0.5}}}
    write_results(tmp_path / "run/results.json", measured(plan) | stage_one)
    for collected in (
        lambda: collect_run(tmp_path / "run", plan.target(0)),
        lambda: plan_of_run(tmp_path / "run", RECIPES, tmp_path / "results"),
    ):
        with pytest.raises(FileNotFoundError, match="no results of its head crt. Let the run finish first"):
            collected()
    assert set(plan.found()[0].results["heads"]) == {"base", "crt"}
