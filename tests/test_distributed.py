"""Two processes equal one with the same global batch, through the real launcher and gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import contrastive_run
import experts_run
import numpy as np
import pytest
from distributed_run import answers_of

HERE = Path(__file__).parent


def launch(folder: Path) -> list[dict]:
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = [str(HERE / "distributed_run.py"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command + script, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[dict, dict, dict]:
    folder = tmp_path_factory.mktemp("distributed")
    return answers_of(folder / "one", 1, 0), *launch(folder / "two")


@pytest.mark.parametrize("name", ["learned", "ema", "batch", "train_counts", *experts_run.METHODS])
def test_two_processes_train_as_one(runs, name):
    alone, first, second = (answers[name] for answers in runs)
    np.testing.assert_allclose(first["losses"], alone["losses"], rtol=1e-5)
    for key, values in alone["state"].items():
        np.testing.assert_allclose(first["state"][key], values, rtol=1e-4, atol=2e-6, err_msg=key)
        np.testing.assert_array_equal(first["state"][key], second["state"][key], err_msg=key)
    assert len(set(alone["losses"])) == len(alone["losses"])  # something was trained


@pytest.mark.parametrize("method", contrastive_run.METHODS)
def test_contrastive_stages_train_as_one(runs, method):
    alone, first, second = (answers[method] for answers in runs)
    assert len(alone["logs"]) == 12
    for log, log_alone in zip(first["logs"], alone["logs"], strict=True):
        assert log.keys() == log_alone.keys() >= {"loss", "loss_contrastive", "loss_within", "loss_between"}
        assert ("loss_targets" in log) == (method == "tsc")
        for name, value in log_alone.items():
            np.testing.assert_allclose(log[name], value, rtol=1e-4, err_msg=name)
    for key, values in alone["state"].items():
        np.testing.assert_allclose(first["state"][key], values, rtol=1e-4, atol=1e-5, err_msg=key)
        np.testing.assert_array_equal(first["state"][key], second["state"][key], err_msg=key)
    assert len({log["loss"] for log in alone["logs"]}) == 12  # something was trained


def test_a_run_resumed_within_an_epoch_goes_on_with_its_images(runs):
    for rank, answers in enumerate(runs):
        for key, values in answers["ema"]["state"].items():
            np.testing.assert_array_equal(answers["resumed"]["state"][key], values, err_msg=f"{key}, run {rank}")


def test_ghost_batches_train_a_network_with_batch_norm_as_two_processes_do(runs):
    alone, first, second = (answers["resnet"] for answers in runs)
    np.testing.assert_allclose(first["losses"][:4], alone["losses"][:4], rtol=1e-4)
    np.testing.assert_allclose(first["losses"], alone["losses"], rtol=0.02)  # rounding grows from update to update
    assert first["state"]["collapse.centers"] == second["state"]["collapse.centers"]
    assert first["state"]["classifier.fc.weight"] == second["state"]["classifier.fc.weight"]


@pytest.mark.parametrize("measure", ["evaluate", "features"])
def test_what_is_measured_is_the_model_of_the_first_process(runs, measure):
    """Which is the one that a checkpoint holds."""
    alone, first, second = (answers[measure] for answers in runs)
    assert first == second == alone and set(first) == {1.0}


def test_every_image_is_counted_once(runs):
    assert [answers["counted"] for answers in runs] == [[53, 30, 12, 6]] * 3


def test_the_geometry_of_two_processes_is_that_of_one(runs):
    alone, first, second = (answers["geometry"] for answers in runs)
    assert first == second
    assert first == pytest.approx(alone, rel=1e-5)
    assert alone["nc1_variability"] > 0 and "nc2_min_angle" in alone and "nc3_duality_gap" in alone


def test_a_bad_loss_on_one_process_stops_both(runs):
    alone, first, second = (answers["nonfinite"] for answers in runs)
    assert "(in loss_supervised, loss_within)" in second
    assert "in another process" in first
    assert "not finite at step 1" in alone
