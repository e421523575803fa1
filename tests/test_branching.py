"""A run that goes on from another run's checkpoint ends as one that was trained from its start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_images import SmallImages, network_without_batch_statistics

from nc_hf.branching import check_branch
from nc_hf.recipe import dump_recipe, load_recipe
from nc_hf.trainer import NCTrainer
from nc_hf.training_args import NCTrainingArguments

WEIGHTED = ("--stage1.class_weighting", "effective_number", "--stage1.drw_epoch", "0.5")
COLLAPSE = ("--stage1.within_weight", "0.01", "--stage1.between_weight", "0.1", "--stage1.start_epoch", "0.5")
PLAIN = ("--stage1.num_train_epochs", "10", "--stage1.within_weight", "0", "--stage1.between_weight", "0")


def saved(folder: Path, epoch: float, *overrides: str) -> Path:
    """A run's folder with a checkpoint of this epoch, as far as `check_branch` looks at it."""
    checkpoint = folder / "checkpoints/stage1/checkpoint-7"
    checkpoint.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(load_recipe(None, [*PLAIN, *overrides])))
    (checkpoint / "trainer_state.json").write_text(json.dumps({"epoch": epoch, "num_train_epochs": 10}))
    return checkpoint


@pytest.mark.parametrize("ours", [(), WEIGHTED, COLLAPSE, (*WEIGHTED, *COLLAPSE)])
@pytest.mark.parametrize("theirs", [(), WEIGHTED, COLLAPSE])
def test_what_starts_later_may_differ(tmp_path: Path, ours: tuple, theirs: tuple) -> None:
    recipe = load_recipe(None, [*PLAIN, *ours, "--stage2.num_train_epochs", "3", "--data.data_dir", "elsewhere"])
    early = saved(tmp_path / "early", 5.0, *theirs)
    if ours[-6:] == COLLAPSE and theirs != COLLAPSE:
        with pytest.raises(ValueError, match="a run with no class centers and this one has ema"):
            check_branch(recipe, early)
    else:
        check_branch(recipe, early)
    late = saved(tmp_path / "late", 6.0, *theirs)
    if ours == theirs:
        check_branch(recipe, late)
    else:
        with pytest.raises(ValueError, match="was trained otherwise"):
            check_branch(recipe, late)


def test_a_share_of_a_run_that_counts_updates_is_one_of_its_epochs(tmp_path: Path) -> None:
    """Half of the 10 epochs that the checkpoint tells of, whatever num_train_epochs says beside max_steps."""
    counted = ("--stage1.max_steps", "70", "--stage1.num_train_epochs", "2")
    recipe = load_recipe(None, [*PLAIN, *counted, *WEIGHTED])
    check_branch(recipe, saved(tmp_path / "early", 5.0, *counted))
    with pytest.raises(ValueError, match="was trained otherwise"):
        check_branch(recipe, saved(tmp_path / "late", 6.0, *counted))


@pytest.mark.parametrize(
    "override",
    [
        ("--seed", "1"),
        ("--stage1.learning_rate", "0.3"),
        ("--data.imbalance_ratio", "10"),
        ("--model.name", "resnet20_cifar"),
        ("--stage1.within_weight", "0.1", "--stage1.between_weight", "0.1"),  # the defaults, from the start
    ],
)
def test_other_differences_are_refused(tmp_path: Path, override: tuple) -> None:
    with pytest.raises(ValueError, match="was trained otherwise"):
        check_branch(load_recipe(None, [*PLAIN, *override]), saved(tmp_path, 1.0))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("learned", "ema"), ("ema", "learned"), ("learned", "no"), ("no", "learned"), ("ema", "batch")],
)
def test_class_centers_that_the_checkpoint_lacks_are_refused(tmp_path: Path, ours: str, theirs: str) -> None:
    def settings(centers: str) -> tuple[str, ...]:
        chosen = ("--stage1.centers", centers, "--stage1.feature_scale", "none")
        return () if centers == "no" else (*COLLAPSE, *chosen)

    with pytest.raises(ValueError, match=f"a run with {theirs} class centers and this one has {ours}"):
        check_branch(load_recipe(None, [*PLAIN, *settings(ours)]), saved(tmp_path, 1.0, *settings(theirs)))


@pytest.mark.parametrize("theirs", ["ema", "batch"])
def test_batch_centers_need_nothing_of_the_checkpoint(tmp_path: Path, theirs: str) -> None:
    checkpoint = saved(tmp_path, 1.0, *COLLAPSE, "--stage1.centers", theirs)
    refused = []
    for ours in ("ema", "learned", "batch"):
        settings = ("--stage1.centers", ours, "--stage1.feature_scale", "none")
        try:
            check_branch(load_recipe(None, [*PLAIN, *COLLAPSE, *settings]), checkpoint)
        except ValueError:
            refused.append(ours)
    assert refused == [ours for ours in ("ema", "learned") if ours != theirs]


def test_a_folder_that_is_no_checkpoint_of_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint"):
        check_branch(load_recipe(None, PLAIN), tmp_path / "a/b/c")


def test_a_branch_ends_in_the_bits_of_a_straight_run(tmp_path: Path) -> None:
    """CE-DRW from CE's middle, and CE from the middle of a run whose collapse terms start there."""
    images = SmallImages()

    def trained(name: str, settings: dict, **arguments) -> dict[str, torch.Tensor]:
        args = NCTrainingArguments(
            str(tmp_path / name),
            num_train_epochs=4,
            per_device_train_batch_size=36,
            optim="sgd",
            lr_milestones=[0.75],
            mixup_alpha=0.5,
            save_strategy="epoch",
            disable_tqdm=True,
            precision="fp32",
            **settings,
        )
        trainer = NCTrainer(network_without_batch_statistics(), args, train_dataset=images)
        trainer.train(**arguments)
        return trainer.classifier.state_dict()

    plain = {"within_weight": 0, "between_weight": 0}
    weighted = plain | {"class_weighting": "effective_number", "drw_epoch": 0.5}
    collapse = {"centers": "ema", "start_epoch": 0.5}
    ends = {name: trained(name, s) for name, s in (("ce", plain), ("drw", weighted), ("nc", collapse))}
    assert len({end["head.weight"].sum().item() for end in ends.values()}) == 3
    for name, settings, origin in (("drw", weighted, "ce"), ("ce", plain, "nc"), ("drw", weighted, "nc")):
        middle = str(tmp_path / origin / "checkpoint-6")
        branch = trained(
            f"{name}-of-{origin}", settings | {"resume_from_checkpoint": middle}, resume_from_checkpoint=True
        )
        assert all(torch.equal(branch[key], value) for key, value in ends[name].items())
