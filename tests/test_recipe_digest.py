"""Recipes: their stages, the resolved file, and the digest of what decides the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from nc_hf.models.saved_folder import weights_checksum
from nc_hf.recipe import (
    HubConfig,
    ModelConfig,
    Recipe,
    dump_recipe,
    load_recipe,
    recipe_digest,
)
from nc_hf.recipe_file import read_entries
from nc_hf.retraining_args import RetrainingArguments
from nc_hf.training_args import NCTrainingArguments

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_recipe(text: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_recipe


# ---- Stages, the resolved recipe ----


def test_stages_build_their_arguments(tmp_path: Path) -> None:
    recipe = load_recipe(None, ["--stage1.learning_rate", "0.3", "--stage2.cached_views", "2", "--stage1.use_cpu"])
    stage1 = NCTrainingArguments(**recipe.stage1, output_dir=str(tmp_path), seed=recipe.seed)
    stage2 = RetrainingArguments(**recipe.stage2, output_dir=str(tmp_path), seed=recipe.seed, use_cpu=True)
    assert stage1.learning_rate == 0.3 and stage2.cached_views == 2
    plain = NCTrainingArguments(output_dir=str(tmp_path), seed=recipe.seed, use_cpu=True, learning_rate=0.3)
    assert stage1.to_dict() == plain.to_dict()


def test_a_stage_keeps_what_was_given_even_where_it_is_a_default() -> None:
    """The default learning rate of TrainingArguments is 5e-5, that of stage two is 0.1."""
    recipe = load_recipe(None, ["--stage2.learning_rate", "5e-5", "--stage2.save_strategy", "steps"])
    assert recipe.stage2["learning_rate"] == 5e-5 and recipe.stage2["save_strategy"] == "steps"
    assert load_recipe(None, ["--stage2.head_init", "new"]).stage2["learning_rate"] == 0.1


def test_dump_says_our_defaults_and_not_those_of_training_arguments() -> None:
    lines = [line.strip() for line in dump_recipe(Recipe()).splitlines()]
    assert "centers: ema" in lines and "remove_unused_columns: false" in lines
    assert not [line for line in lines if line.startswith(("adam_beta1", "logging_steps", "hub_", "seed: 42"))]


plain_text = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=12)
awkward = st.sampled_from(
    ["null", "~", "", "yes", "0100", "1e-4", "12", "true", "2024-01-01", "a: b", "# x", "- x", "*x"]
)
texts = (plain_text | awkward).filter(lambda text: "${" not in text)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10) | st.floats(-1e9, 1e9) | texts,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(texts, children, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150)
@given(
    name=st.none() | texts,
    arguments=st.dictionaries(texts, values, max_size=3),
    rate=st.floats(0, 1e3),
    milestones=st.none() | st.lists(st.floats(0, 1), max_size=3),
)
def test_dump_round_trips(
    tmp_path_factory: pytest.TempPathFactory, name: str | None, arguments: dict, rate: float, milestones: list | None
) -> None:
    recipe = Recipe(
        name=name,
        model=ModelConfig(model_args=arguments),
        stage1={"learning_rate": rate, "lr_milestones": milestones, "lr_scheduler_kwargs": arguments},
        stage2={"weight_decay": rate},
        hub=HubConfig(repo_id=name),
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(path) == recipe


# ---- Digest ----


def digest(*overrides: str, checksum: str | None = None) -> str:
    base = ["--data.imbalance_ratio", "100", "--stage1.mixup_alpha", "0.2", "--stage2.head_init", "keep"]
    return recipe_digest(load_recipe(None, [*base, *overrides]), checksum)


@pytest.mark.parametrize(
    "overrides",
    [
        ("--seed", "1"),
        ("--data.seed", "1"),
        ("--data.imbalance_ratio", "10"),
        ("--data.dataset", "cifar10"),
        ("--data.augmentation", "crop"),
        ("--model.name", "resnet20_cifar"),
        ("--model.model_args", "{drop_rate: 0.1}"),
        ("--stage1.learning_rate", "0.2"),
        ("--stage1.precision", "fp32"),
        ("--stage1.dataloader_drop_last",),
        ("--stage2.learning_rate", "0.2"),
        ("--stage2", "null"),
        ("--stage1", "null"),
    ],
)
def test_digest_changes_with_what_changes_the_weights(overrides: tuple[str, ...]) -> None:
    assert digest(*overrides) != digest()


@pytest.mark.parametrize(
    "overrides",
    [
        ("--name", "other"),
        ("--output_dir", "elsewhere"),
        ("--data.data_dir", "/images"),
        ("--data.cache_dir", "/cache"),
        ("--data.title", "My birds"),
        ("--hub.repo_id", "me/model"),
        ("--evaluation.batch_size", "7"),
        ("--stage1.logging_steps", "7"),
        ("--stage1.save_strategy", "no"),
        ("--stage2.report_to", "tensorboard"),
        ("--stage1.dataloader_num_workers", "4"),
        ("--stage1.ddp_timeout", "60"),
        ("--stage1.within_weight", "0.1"),  # the default, written out
    ],
)
def test_digest_does_not_change_with_paths_hub_and_logging(overrides: tuple[str, ...]) -> None:
    assert digest(*overrides) == digest()


def test_digest_of_data() -> None:
    assert digest(checksum="a") != digest(checksum="b") != digest()
    one, other = digest("--data.dataset", "/home/a/birds"), digest("--data.dataset", "../b/birds")
    assert one == other != digest("--data.dataset", "/home/a/fish")
    assert len(one) == 16 and set(one) <= set("0123456789abcdef")


def test_digest_of_weights_that_lie_in_folders_of_one_name(tmp_path: Path) -> None:
    checksums = []
    for parent, value in (("a", 1.0), ("b", 2.0), ("c", 1.0)):
        (tmp_path / parent / "stage1").mkdir(parents=True)
        save_file({"weight": torch.full((2,), value)}, tmp_path / parent / "stage1" / "model.safetensors")
        checksums.append(weights_checksum(str(tmp_path / parent / "stage1")))
    assert checksums[0] == checksums[2] != checksums[1]
    recipe = load_recipe(None, ["--model.name", str(tmp_path / "a" / "stage1")])
    a, b, c = (recipe_digest(recipe, None, checksum) for checksum in checksums)
    assert a == c != b
    assert weights_checksum("resnet18") is None and weights_checksum("user/name") is None
    assert recipe_digest(recipe, None, None) == recipe_digest(recipe)


def test_a_new_setting_leaves_old_digests_alone() -> None:
    """Only what differs from a default counts, so the defaults of today may gain members."""
    recipe = load_recipe(None)
    without = dataclasses.replace(recipe)
    without.stage1 = {key: value for key, value in recipe.stage1.items() if key != "mixup_rule"}
    assert recipe_digest(without) == recipe_digest(recipe)


def test_entries_know_their_lines(write: Callable) -> None:
    path = write("# comment\nname: a\n\ndata:\n  seed: 1\n")
    entries = read_entries(path)
    assert entries["name"] == ("a", f"{path}:2")
    assert entries["data"].value["seed"] == ("1", f"{path}:5")


def test_when_weights_are_measured_matters_where_the_best_are_taken(write: Callable[..., Path]) -> None:
    text = "data: {dataset: digits_lt, validation_fraction: 0.1}\nstage1: {num_train_epochs: 2}\n"
    choosing = "--stage1.load_best_model_at_end", "true"
    by_epoch = ("--stage1.eval_strategy", "epoch", "--stage1.save_strategy", "epoch")
    by_steps = ("--stage1.eval_strategy", "steps", "--stage1.save_strategy", "steps", "--stage1.eval_steps", "50")
    by_steps += ("--stage1.save_steps", "50")
    path = write(text)
    assert len({recipe_digest(load_recipe(path, [*choosing, *when])) for when in (by_epoch, by_steps)}) == 2
    late = (*by_steps, "--stage1.eval_delay", "5")
    assert recipe_digest(load_recipe(path, [*choosing, *by_steps])) != recipe_digest(
        load_recipe(path, [*choosing, *late])
    )
    assert len({recipe_digest(load_recipe(path, list(when))) for when in (by_epoch, by_steps, late)}) == 1
