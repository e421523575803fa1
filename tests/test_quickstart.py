"""The notebook runs as shown, with fewer epochs, and is kept with what it gave."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from nc_hf import load_pretrained
from nc_hf.hub import load_heads

NOTEBOOK = json.loads((Path(__file__).resolve().parents[1] / "recipes" / "quickstart.ipynb").read_text())
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
MAGIC = "%matplotlib inline\n"


def test_every_cell_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join("".join(cell["source"]) for cell in CELLS)
    for shown, instead in {MAGIC: "", '"num_train_epochs": 20, "warmup_epochs": 2': '"num_train_epochs": 3'}.items():
        assert code.count(shown) == 1
        code = code.replace(shown, instead)
    made: dict = {}
    exec(code, made)
    assert list(made["measured"]) == ["CE", "NC", "NC-DRW", "NC-DRW-cRT"]
    assert all(0.1 < values["accuracy"] <= 1 for values in made["measured"].values())
    assert not torch.equal(made["means"]["CE"], made["means"]["NC"])
    model, _ = load_pretrained("out/notebook/model")
    assert torch.equal(model.get_classifier().weight, made["second"].heads["crt"]["weight"])
    assert set(load_heads("out/notebook/model")[0]) == {"base", "crt"}


def test_it_was_run_from_top_to_bottom_and_shows_two_pictures():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
