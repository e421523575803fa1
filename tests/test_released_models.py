"""Every released folder opens through its doors to the logits of the day of its release.

After a release is rebuilt, `python tests/test_released_models.py` records its logits anew.
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from nc_hf import load_pretrained
from nc_hf.doors import check_doors
from nc_hf.hub import load_heads
from nc_hf.models.classifier import logits_of

ROOT = Path(__file__).resolve().parents[1]
RELEASED = sorted(path.parent for path in (ROOT / "model_cards").glob("*/config.json"))
LOGITS = Path(__file__).with_name("released_logits.json")


def logits_by_head(folder: Path) -> dict[str, list[float]]:
    """Logits of one fixed image with each head."""
    image = PIL.Image.fromarray(np.random.default_rng(7).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    logits = {}
    for head in sorted(load_heads(folder)[0]):
        model, processor = load_pretrained(folder, head)
        with torch.no_grad():
            answer = logits_of(model.eval()(processor(image, return_tensors="pt")["pixel_values"]))
        logits[head] = [round(value, 6) for value in answer[0].tolist()]
    return logits


def test_there_are_released_models():
    assert RELEASED


@pytest.mark.parametrize("folder", RELEASED, ids=lambda folder: folder.name)
def test_every_door_opens(folder):
    assert check_doors(folder)


@pytest.mark.parametrize("folder", RELEASED, ids=lambda folder: folder.name)
def test_logits_are_those_of_the_release(folder):
    recorded = json.loads(LOGITS.read_text())[folder.name]
    now = logits_by_head(folder)
    assert set(now) == set(recorded)
    for head, logits in recorded.items():
        torch.testing.assert_close(torch.tensor(now[head]), torch.tensor(logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("folder", RELEASED, ids=lambda folder: folder.name)
def test_the_folder_is_ready_for_the_hub(folder):
    card = (folder / "README.md").read_text()
    results = json.loads((folder / "results.json").read_text())
    assert set(results["heads"]) >= {"base", "crt"}
    seeds = [json.loads(path.read_text()) for path in (folder / "seeds").glob("*.json")]
    for head in results["heads"]:
        accuracies = [100 * run["heads"][head]["accuracy"] for run in (results, *seeds)]
        spread = f" ± {statistics.stdev(accuracies):.1f}" if seeds else ""
        assert f"| {statistics.mean(accuracies):.1f}{spread} |" in card
    for picture in ("classes", "angles", "norms", "collapse"):
        assert (folder / "figures" / f"{picture}.png").is_file() and f"figures/{picture}.png" in card
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 25e6
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".yaml", ".md"):
            assert not re.search(r"""[\s"'(:]/\w+/""", path.read_text()), f"{path} names a folder of some machine"


if __name__ == "__main__":
    LOGITS.write_text(json.dumps({folder.name: logits_by_head(folder) for folder in RELEASED}, indent=1) + "\n")
