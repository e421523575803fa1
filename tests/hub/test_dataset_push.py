"""A long-tailed split on the Hub: parquet, facts, and a card that a person may add to."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from nc_hf import load_splits, publishing
from nc_hf.card_block import BEGIN
from nc_hf.dataset_card import push_splits
from nc_hf.publishing import PushError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(publishing, "WAITS", (0, 0, 0))


@pytest.fixture(scope="module")
def digits():
    return load_splits("digits", imbalance_ratio=20)


def readme(hub, name: str, revision: str = "main") -> str:
    return hub.files(name, revision, kind="dataset")["README.md"].decode()


def add(hub, name: str, path: str, content: bytes) -> None:
    """A file that somebody adds through the Hub's page."""
    HfApi().upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=name, repo_type="dataset")


def test_the_command_pushes_a_split(hub, user, tmp_path, script, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["dataset", str(ROOT / "recipes/digits_lt/nc_drw_crt.yaml"), f"{user}/digits-lt"]
    command += ["--data.imbalance_ratio", "10"]
    script("publish").main(command)
    assert f"{user}/digits-lt" in capsys.readouterr().out
    back = load_dataset(f"{user}/digits-lt", "r10", cache_dir=str(tmp_path))
    ours = load_splits("digits", imbalance_ratio=10)
    for name in ("train", "test"):
        assert back[name]["label"][:] == ours[name]["label"][:]
        assert back[name]["index"][:] == ours[name]["index"][:]
        pairs = zip(back[name]["image"][:20], ours[name]["image"][:20], strict=True)
        assert all((np.asarray(a) == np.asarray(b)).all() for a, b in pairs)
    facts = json.loads(hub.files(f"{user}/digits-lt", kind="dataset")["r10/split.json"])
    assert facts["counts"]["train"] == np.bincount(ours["train"]["label"][:]).tolist()
    assert (facts["profile"], facts["imbalance_ratio"], facts["seed"]) == ("exponential", 10, 0)
    with pytest.raises(SystemExit, match="Leave them out."):
        script("publish").main([*command, "--data.validation_fraction", "0.1"])


def test_the_examples_of_the_card_run_as_they_stand(hub, user, digits, tmp_path, monkeypatch, capsys):
    name = f"{user}/examples"
    push_splits(digits, name, config_name="r20", dataset="digits")
    card = readme(hub, name)
    use, with_nc_hf, check = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for example in (use, with_nc_hf):
        found: dict = {}
        exec(example, found)
        assert found["splits"]["train"]["label"][:] == digits["train"]["label"][:]
        assert found["splits"]["train"]["index"][:] == digits["train"]["index"][:]
    capsys.readouterr()
    exec(check, {})
    assert f"| `r20` | `{capsys.readouterr().out.strip()}` |" in card


def test_a_second_configuration_and_a_persons_words_stay(hub, user, digits, tmp_path):
    name = f"{user}/grown"
    push_splits(digits, name, config_name="r20", dataset="digits")
    text = readme(hub, name)
    assert "license: cc-by-4.0" in text and "config_name: r20" in text and "| `r20` | exponential" in text
    add(hub, name, "README.md", text.replace(BEGIN, f"By hand.\n\n{BEGIN}").encode())
    push_splits(load_splits("digits", imbalance_ratio=5), name, config_name="r5", dataset="digits")
    text = readme(hub, name)
    assert "By hand." in text and text.count(BEGIN) == 1
    assert "| `r20` | exponential" in text and "| `r5` | exponential" in text
    assert "config_name: r20" in text and "config_name: r5" in text
    small, large = (load_dataset(name, config, split="train", cache_dir=str(tmp_path)) for config in ("r20", "r5"))
    assert set(small["index"][:]) < set(large["index"][:])


def test_a_push_of_the_same_again_changes_no_file(hub, user, digits):
    name = f"{user}/again"
    push_splits(digits, name, config_name="r20", dataset="digits")
    before = hub.files(name, kind="dataset")
    push_splits(digits, name, config_name="r20", dataset="digits")
    assert hub.files(name, kind="dataset") == before


def test_private_branch_and_pull_request(hub, user, digits):
    name = f"{user}/hidden"
    push_splits(digits, name, config_name="r20", dataset="digits", private=True, revision="trial")
    assert HfApi().dataset_info(name).private
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token="tok-bob").dataset_info(name)
    assert "r20/split.json" in hub.files(name, "trial", kind="dataset") and BEGIN in readme(hub, name, "trial")
    before = hub.files(name, kind="dataset")
    url = push_splits(digits, name, config_name="r20", dataset="digits", create_pr=True)
    assert url.endswith("/discussions/1")
    assert hub.files(name, kind="dataset") == before
    assert "r20/split.json" in hub.files(name, "refs/pr/1", kind="dataset") and BEGIN in readme(hub, name, "refs/pr/1")


def test_a_pull_request_of_known_images_holds_the_card_alone(hub, user, digits):
    name = f"{user}/known"
    push_splits(digits, name, config_name="r20", dataset="digits")
    before = hub.files(name, kind="dataset")
    changed = before["README.md"].replace(b"| class |", b"| Class |")
    hub.commit(name, {"README.md": changed}, "somebody else", kind="dataset")
    url = push_splits(digits, name, config_name="r20", dataset="digits", create_pr=True)
    assert url.endswith("/discussions/1")
    assert hub.files(name, kind="dataset")["README.md"] == changed != before["README.md"]
    assert hub.files(name, "refs/pr/1", kind="dataset") == before


@pytest.mark.parametrize("commit", [1, 2], ids=["of the images", "of the card"])
def test_a_commit_by_somebody_else_in_between_is_kept(hub, user, digits, commit):
    name, seen = f"{user}/raced{commit}", []
    HfApi().create_repo(name, repo_type="dataset")

    def race(request) -> bool:
        if f"{name}/commit/" in request.path:
            seen.append(request)
            if len(seen) == commit:
                text = hub.files(name, kind="dataset").get("README.md", b"").decode()
                words = {"notes.txt": b"first", "README.md": f"{text}\n\nBy hand.\n".encode()}
                hub.commit(name, words, "somebody else", kind="dataset")
        return False

    hub.fail(race, status=500, times=1)
    push_splits(digits, name, config_name="r20", dataset="digits")
    hub.heal()
    files = hub.files(name, kind="dataset")
    assert len(seen) == 3
    assert files["notes.txt"] == b"first" and "By hand." in readme(hub, name)
    assert "config_name: r20" in readme(hub, name) and "r20/split.json" in files


def test_a_fault_of_the_moment_is_retried_and_a_lasting_one_said(hub, user, digits):
    name = f"{user}/faulty"
    hub.fail(lambda request: "/commit/" in request.path, status=503, times=2)
    push_splits(digits, name, config_name="r20", dataset="digits")
    before = hub.files(name, kind="dataset")
    hub.fail(lambda request: f"{name}/commit/" in request.path, status=403, times=1000)
    with pytest.raises(PushError, match=f"the push of r5 to {name} failed.*403") as caught:
        push_splits(load_splits("digits", imbalance_ratio=5), name, config_name="r5", dataset="digits")
    hub.heal()
    assert hub.token not in str(caught.value)
    assert hub.files(name, kind="dataset") == before
    push_splits(load_splits("digits", imbalance_ratio=5), name, config_name="r5", dataset="digits")
    assert "r5/split.json" in hub.files(name, kind="dataset")
