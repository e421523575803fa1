"""The README's Python blocks run as shown, but for what needs a network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from PIL import Image
from sklearn.datasets import load_digits

import nc_hf

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
LOAD, EXPORT, FINE_TUNE, PARTS = BLOCKS


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder of photographs (of digits) with one subfolder a class, the released models, and a photograph."""
    folder = tmp_path_factory.mktemp("readme")
    digits = load_digits(n_class=4)
    for k, count in enumerate((30, 20, 10, 5)):
        (folder / "my_photos" / f"digit{k}").mkdir(parents=True)
        for number, pixels in enumerate(digits.images[digits.target == k][:count]):
            image = Image.fromarray((pixels * 15).astype("uint8")).resize((64, 64))
            image.save(folder / "my_photos" / f"digit{k}" / f"{number}.png")
    (folder / "model_cards").symlink_to(ROOT / "model_cards")
    image.save(folder / "photo.jpg")
    return folder


def test_a_model_opens_in_a_fresh_process_without_nc_hf(folder):
    done = subprocess.run([sys.executable, "-c", LOAD], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'label'" in done.stdout and "'score'" in done.stdout


@pytest.mark.parametrize(
    ("block", "changes", "left"),
    [
        (EXPORT, {}, "model.onnx"),
        (
            FINE_TUNE,
            {"pretrained=True": "pretrained=False", "num_train_epochs=5": "max_steps=2"},  # no network, no 5 epochs
            "out/photos/model/model.safetensors",
        ),
    ],
    ids=["export", "fine-tune"],
)
def test_block_runs(folder, monkeypatch, block, changes, left):
    monkeypatch.chdir(folder)
    for shown, instead in changes.items():
        assert block.count(shown) == 1
        block = block.replace(shown, instead)
    exec(block, {})
    assert (folder / left).is_file()


def test_every_public_name_is_there():
    assert all(getattr(nc_hf, name) is not None for name in nc_hf.__all__)


def test_the_blocks_are_as_short_as_promised():
    load, export, fine_tune = (len([line for line in block.splitlines() if line.strip()]) for block in BLOCKS[:3])
    assert load <= 4
    assert export <= 4
    assert fine_tune <= 12


def test_the_parts_work_in_a_loop_of_ones_own():
    labels = [k for k in range(4) for _ in range(20)]
    features = Features({"label": ClassLabel(names=["a", "b", "c", "d"])})
    made = {"dataset": Dataset.from_dict({"label": labels}, features=features)}
    made |= {"images": torch.randn(8, 3, 64, 64), "labels": torch.arange(8) % 4}
    exec(PARTS, made)
    made["loss"].backward()
    assert made["counts"].tolist() == [20, 9, 4, 2] and len(list(made["sampler"])) == 35
    made["metric"].add_batch(predictions=made["logits"].argmax(1), references=made["labels"])
    assert 0 <= made["metric"].compute()["accuracy"] <= 1
