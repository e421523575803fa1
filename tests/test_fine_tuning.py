"""The comparison of both trainers on photographs: same data, seeds and steps, resumed where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def photographs(tmp_path) -> Path:
    """Digits as pictures: a long tail to train on, five of each to test on."""
    digits = load_digits(n_class=3)
    for k, count in enumerate((24, 12, 6)):
        pictures = digits.images[digits.target == k]
        for split, chosen in (("train", pictures[:count]), ("test", pictures[-5:])):
            folder = tmp_path / "photographs" / split / f"digit{k}"
            folder.mkdir(parents=True)
            for number, pixels in enumerate(chosen):
                Image.fromarray((pixels * 15).astype("uint8")).resize((40, 48)).save(folder / f"{number}.png")
    return tmp_path / "photographs"


def test_both_trainers_are_compared_and_nothing_is_run_twice(script, photographs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "runs.json"
    command = ["--data_dir", str(photographs), "--models", "test_resnet", "--seeds", "2", "--epochs", "1"]
    command += ["--image_size", "32", "--batch_size", "14", "--out", str(out)]
    script("fine_tuning").main(command)
    stored = json.loads(out.read_text())
    assert [(run["trainer"], run["seed"]) for run in stored["runs"]] == [
        ("Trainer", 0), ("NCTrainer", 0), ("Trainer", 1), ("NCTrainer", 1)
    ]  # fmt: skip
    for run in stored["runs"]:
        assert run["class_mean_accuracy"] == pytest.approx(run["accuracy"])  # five test images of each class
        assert ("loss_within" in run and "loss_between" in run) == (run["trainer"] == "NCTrainer")
    assert str(tmp_path) not in json.dumps(stored)
    shown = capsys.readouterr().out
    assert shown.count("| test_resnet |") == 2
    monkeypatch.setattr(script("fine_tuning"), "fine_tune", lambda *args: pytest.fail("ran again"))
    script("fine_tuning").main(command)
    with pytest.raises(SystemExit, match="runs of other settings: epochs was 1.0. Give another --out"):
        script("fine_tuning").main([*command, "--epochs", "3"])
    constant = {"class_mean_accuracy": 0.5, "accuracy": 0.5}
    monkeypatch.setattr(script("fine_tuning"), "fine_tune", lambda *args: constant)
    script("fine_tuning").main([*command, "--seeds", "1", "--models", "resnet10t"])  # another network joins
    joined = json.loads(out.read_text())
    assert joined["runs"][:4] == stored["runs"] and len(joined["runs"]) == 6
    assert joined["settings"] == stored["settings"] | {"models": ["test_resnet", "resnet10t"]}
