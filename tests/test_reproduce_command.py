"""recipes/reproduce.py: what it refuses, what it runs, and what it shows and keeps."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from stored_results import RECIPES, cells, finished_run, measured, plan_for, store

from nc_hf.paper_figures import FIGURES
from nc_hf.paper_tables import CIFAR10_LT, IMAGENET_LT, Row, Setting, Table
from nc_hf.reproduction import TABLES, Plan, plan_row
from nc_hf.results import write_results


@pytest.fixture
def script():
    """recipes/reproduce.py as a module."""
    spec = importlib.util.spec_from_file_location("reproduce_script", RECIPES / "reproduce.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_runs_that_are_no_row_or_not_finished_are_not_collected(tmp_path, script):
    plan = plan_for("CE-DRW", tmp_path / "results")
    finished_run(tmp_path / "run", plan)
    write_results(tmp_path / "run/results.json", measured(plan, recipe_digest="0" * 16))
    command = ["collect", str(tmp_path / "run"), "--results", str(tmp_path / "results")]
    with pytest.raises(SystemExit, match="is no run of a recipe of the paper's tables"):
        script.main(command)
    (tmp_path / "run/results.json").unlink()
    with pytest.raises(FileNotFoundError, match="Let the run finish first"):
        script.main(command)


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
    whole = tmp_path / "out/table3-cifar10_lt-r100.md"
    command += ["--output", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    script.main(command)
    assert not runner.commands and "Nothing was trained." in capsys.readouterr().out
    written = whole.read_text()
    assert [path.name for path in whole.parent.iterdir()] == [whole.name]
    command += ["--rows", "CE-DRW"]
    script.main([*command, "--no-train"])
    assert not runner.commands
    with pytest.raises(SystemExit, match="failed, see above; the same command resumes it"):
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
    assert whole.read_text() == written  # single rows replace no table
    script.main([*command[: command.index("--rows")], "--no-train"])
    assert cells(whole.read_text(), "CE-DRW")[2] == "77.5 ± 3.5"


def test_runs_at_a_time_have_cores_of_their_own_and_do_not_fail_together(tmp_path, script, monkeypatch, capsys):
    plan, together, cores = plan_for("CE-DRW", tmp_path / "results"), threading.Barrier(2, timeout=60), []
    gpus = set()

    def run(command: list[str], stdout, stderr, env) -> subprocess.CompletedProcess:
        options = dict(zip(command, command[1:], strict=False))
        folder = Path(options["--output_dir"]) / options["--name"]
        assert stderr == subprocess.STDOUT and stdout.name == f"{folder}.log"
        if options["--seed"] in "01":  # these wait for each other, so they are at a time or the test fails
            together.wait()
            cores.append(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set())
            gpus.add(env["CUDA_VISIBLE_DEVICES"])
        if options["--seed"] == "0":
            return subprocess.CompletedProcess(command, 1)
        folder.mkdir(parents=True)
        finished_run(folder, plan, int(options["--seed"]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(script.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    command = ["table3", "--dataset", "cifar10_lt", "--ratio", "100", "--rows", "CE-DRW", "--seeds", "3"]
    command += ["--jobs", "2", "--output", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    with pytest.raises(SystemExit, match=r"ce_drw-seed0-\w+: failed, see .*ce_drw-seed0-\w+\.log; the same command"):
        script.main(command)
    assert "3 of 3 run(s) ended, 1 of them with an error" in capsys.readouterr().out
    assert [plan.target(seed).is_file() for seed in range(3)] == [False, True, True]
    if own:
        assert os.sched_getaffinity(0) == own == cores[0] | cores[1]
        assert len(own) == 1 or not cores[0] & cores[1]
    assert gpus == {"3", "5"}


def test_a_run_that_goes_wrong_does_not_stop_the_others(tmp_path, script, monkeypatch):
    plan = plan_for("CE-DRW", tmp_path / "results")

    def run(command: list[str], stdout, stderr, env) -> subprocess.CompletedProcess:
        options = dict(zip(command, command[1:], strict=False))
        folder = Path(options["--output_dir"]) / options["--name"]
        if options["--seed"] == "2":
            raise OSError(28, "No space left on device")
        folder.mkdir(parents=True)
        finished_run(folder, plan, int(options["--seed"]))
        if options["--seed"] == "0":
            results = json.loads((folder / "results.json").read_text())
            results["training"] = {"stage1": {"batch": 7, "processes": 1}}
            (folder / "results.json").write_text(json.dumps(results))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(script.subprocess, "run", run)
    command = ["table3", "--dataset", "cifar10_lt", "--ratio", "100", "--rows", "CE-DRW", "--seeds", "4"]
    command += ["--jobs", "2", "--output", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    with pytest.raises(SystemExit, match="was trained in batches of 7 on 1 processes") as told:
        script.main(command)
    assert "seed2.json: OSError: [Errno 28] No space left on device" in str(told.value)
    assert [plan.target(seed).is_file() for seed in range(4)] == [False, True, False, True]


def test_a_model_that_is_gone_is_not_trained_again_for_its_noise(tmp_path, script, monkeypatch):
    name = "ResNet-32, CE+NC"
    plan = plan_for(name, tmp_path / "results", TABLES["table6"])
    store(plan, measured(plan))
    monkeypatch.setattr(script.subprocess, "run", lambda command: pytest.fail(f"ran {command}"))
    command = ["table6", "--dataset", "cifar10_lt", "--rows", name, "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="takes the model, which is not in") as refused:
        script.main([*command, "--results", str(tmp_path / "results")])
    assert "resumes" not in str(refused.value) and str(plan.target(0)) in str(refused.value)


@pytest.mark.parametrize(
    ("scale", "std", "missing"),
    [
        ("normalized", [0.0, 0.1, 0.2, 0.3, 0.4], False),
        ("normalized", [0.0, 0.1], True),
        ("pixels", [0.0, 0.1, 0.2, 0.3, 0.4], True),
    ],
)
def test_noise_counts_where_it_is_all_of_the_table(tmp_path, script, capsys, scale, std, missing):
    name = "ResNet-32, CE+NC"
    plan = plan_for(name, tmp_path / "results", TABLES["table6"])
    noise = {"std": std, "scale": scale, "seed": 0, "accuracy": {"base": [0.5] * len(std)}}
    store(plan, measured(plan, noise=noise))
    script.main(
        ["table6", "--dataset", "cifar10_lt", "--rows", name, "--no-train", "--output", str(tmp_path / "out")]
        + ["--results", str(tmp_path / "results")]
    )
    assert ("1 run(s) missing: cifar10_lt_r100/nc_drw_crt seed 0" in capsys.readouterr().out) == missing


def test_a_run_of_more_processes_than_devices_is_not_started(tmp_path, script, monkeypatch):
    monkeypatch.setattr(script.subprocess, "run", lambda command: pytest.fail(f"ran {command}"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    command = ["table4", "--rows", "CE", "--output", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    with pytest.raises(SystemExit, match="expects more processes than the 1 device.*--stage1.expected_processes 1"):
        script.main(command)
    plan = plan_row(IMAGENET_LT, Row("ce"), RECIPES, tmp_path)
    for devices in (0, 4, 8):
        monkeypatch.setattr(torch.accelerator, "device_count", lambda devices=devices: devices)
        assert script.obstacle(plan, 0, tmp_path / "run", of_noise=False) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table9"], "invalid choice: 'table9'"),
        (["table3", "--rows", "NC-DWR"], "table3 has no row NC-DWR; its rows are CE, CE-RS"),
        (["table3", "--ratio", "50"], "its columns are --dataset cifar10_lt --ratio 100, --dataset cifar10_lt"),
        (["table3", "--seeds", "0"], "must be more than 0, got 0"),
        (["table3", "--jobs", "0"], "--jobs must be 1 or more, got 0"),
        (["table3", "out/run"], "folders of runs go with collect"),
        (["collect"], "folders of runs go with collect"),
        (["figure2", "--rows", "CE"], "--rows are for tables and change nothing of figure2"),
        (["figure3", "--seeds", "1", "--epochs", "9"], "--seeds, --epochs are for tables"),
        (["figure2", "--dataset", "cifar10_lt", "--ratio", "10"], "--dataset, --ratio are for tables"),
    ],
)
def test_commands_that_mean_nothing_are_refused(script, capsys, arguments, message):
    with pytest.raises(SystemExit):
        script.main(arguments)
    assert message in capsys.readouterr().err


def test_figures_are_drawn_from_the_panels_that_are_there(tmp_path, script, capsys):
    (short,), methods = TABLES["methods"].settings, TABLES["methods"].rows
    runs = [(CIFAR10_LT, Row("ce")), (CIFAR10_LT, Row("nc_drw_crt"))]
    runs += [(short, methods["CE"]), (short, methods["CE + NC"])]
    for seed, (setting, row) in enumerate(runs):
        plan = plan_row(setting, row, RECIPES, tmp_path / "results")
        store(plan, measured(plan))
        means = torch.randn(10, 64, generator=torch.Generator().manual_seed(seed))
        save_file({"class_means": means}, plan.target(0).with_suffix(".safetensors"))
    for what in FIGURES:
        script.main([what, "--output", str(tmp_path / "out"), "--results", str(tmp_path / "results")])
        shown = capsys.readouterr().out
        name = "NC-DRW" if what in ("collapse", "classes") else "NC"
        run = "cifar10_lt_r100_30_epochs/ce_crt_nc" if what.endswith("_30_epochs") else "cifar10_lt_r100/nc_drw_crt"
        assert f"{name}: {tmp_path}/results/{run}/seed0.json" in shown
        assert "not run (cifar10_lt/ce" in shown
        assert {f"{what}.png", f"{what}.svg"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_committed_results_are_shown_without_the_training_code(tmp_path):
    command = [sys.executable, "-X", "importtime", str(RECIPES / "reproduce.py"), "table3", "--dataset", "cifar10_lt"]
    command += ["--ratio", "100", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert cells(done.stdout, "NC-DRW-cRT")[1] == "82.6"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "nc_hf.recipe" in imported
    assert not {"nc_hf.trainer", "nc_hf.retraining", "nc_hf.image_sets", "nc_hf.models.classifier"} & imported


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    command = [sys.executable, str(RECIPES / "reproduce.py"), "table3", "--output", str(tmp_path)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    writer.stdout.close()
    assert "Traceback" not in writer.stderr.read()
    assert writer.wait(300) == 0


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


def test_the_home_folder_may_hold_the_images(tmp_path, script):
    folders = ["--data_dir=~/images", "--output", str(tmp_path), "--results", str(tmp_path)]
    options = script.parse(["table3", "--dataset", "cifar10_lt", "--ratio", "100", "--rows", "CE", *folders])
    ((plan,),) = ([*rows.values()] for rows in options.plans.values())
    (command,) = script.commands(options, plan, 0)
    assert command[command.index("--data.data_dir") + 1] == str(Path.home() / "images")


TRAINING = """
import signal, sys, time
from pathlib import Path
def save(number, frame):
    Path("saved").touch()
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
Path("begun").touch()
time.sleep(300)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM that a process can handle")
def test_runs_stop_with_the_command_that_started_them(tmp_path):
    launched = [sys.executable, "-c", TRAINING]
    launcher = [sys.executable, "-c", f"import subprocess; subprocess.run({launched!r})"]
    folders = ["--output", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    command = ["table3", "--dataset", "cifar10_lt", "--ratio", "100", "--rows", "CE", "CE-DRW", *folders]
    (tmp_path / "driver.py").write_text(
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('reproduce_script', {str(RECIPES / 'reproduce.py')!r})\n"
        "script = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(script)\n"
        f"script.commands = lambda *run: [{launcher!r}]\n"
        f"script.main({command!r})\n"
    )
    process = subprocess.Popen([sys.executable, "driver.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "begun").exists() and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert (tmp_path / "saved").exists()
    assert "ce, seed 0" in output and "ce_drw, seed 0" not in output  # the second run was not begun
