"""The README's Python blocks run as shown, but for what needs a network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


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


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(folder, number):
    block = BLOCKS[number].replace("pretrained=True", "pretrained=False").replace("num_train_epochs=5", "max_steps=2")
    done = subprocess.run([sys.executable, "-c", block], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    if "my_photos" in block:
        assert (folder / "out/photos/model/model.safetensors").is_file()


def test_the_blocks_are_as_short_as_promised():
    load, export, fine_tune = (len([line for line in block.splitlines() if line.strip()]) for block in BLOCKS)
    assert load <= 4
    assert export <= 4
    assert fine_tune <= 12
