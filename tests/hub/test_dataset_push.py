"""A long-tailed split on the Hub: parquet, facts, and a card that a person may add to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from datasets import load_dataset
from huggingface_hub import HfApi

from nc_hf import load_splits
from nc_hf.card_block import BEGIN
from nc_hf.dataset_card import push_splits

ROOT = Path(__file__).resolve().parents[2]


def test_the_command_pushes_a_split(hub, user, tmp_path):
    command = [sys.executable, str(ROOT / "recipes/publish.py"), "dataset"]
    command += [str(ROOT / "recipes/digits_lt/nc_drw_crt.yaml"), f"{user}/digits-lt", "--data.imbalance_ratio", "10"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{user}/digits-lt" in done.stdout
    back = load_dataset(f"{user}/digits-lt", "r10", cache_dir=str(tmp_path))
    ours = load_splits("digits", imbalance_ratio=10)
    for name in ("train", "test"):
        assert back[name]["label"][:] == ours[name]["label"][:]
        assert back[name]["index"][:] == ours[name]["index"][:]
        pairs = zip(back[name]["image"][:20], ours[name]["image"][:20], strict=True)
        assert all((np.asarray(a) == np.asarray(b)).all() for a, b in pairs)
    facts = json.loads(hub.files(f"{user}/digits-lt", kind="dataset")["r10/split.json"])
    assert facts["train_counts"] == np.bincount(ours["train"]["label"][:]).tolist()
    assert "seed 0" in facts["description"] and "sha256 of pixels" in facts["description"]


def test_a_second_configuration_and_a_persons_words_stay(hub, user, tmp_path):
    name = f"{user}/grown"
    push_splits(load_splits("digits", imbalance_ratio=20), name, config_name="r20", dataset="digits")
    text = hub.files(name, kind="dataset")["README.md"].decode()
    assert "license: cc-by-4.0" in text and "config_name: r20" in text and "- `r20`" not in text
    edited = text.replace(BEGIN, f"By hand.\n\n{BEGIN}")
    HfApi().upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id=name, repo_type="dataset")
    push_splits(load_splits("digits", imbalance_ratio=5), name, config_name="r5", dataset="digits")
    text = hub.files(name, kind="dataset")["README.md"].decode()
    assert "By hand." in text
    assert "* `r20`: " in text and "* `r5`: " in text
    assert "config_name: r20" in text and "config_name: r5" in text
    assert len(load_dataset(name, "r20", split="train", cache_dir=str(tmp_path))) < len(
        load_dataset(name, "r5", split="train", cache_dir=str(tmp_path))
    )
