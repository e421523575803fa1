"""Recipes: strict reading, overrides, the resolved YAML and the digest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nc_hf.recipe import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    Recipe,
    load_recipe,
)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_recipe(text: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write_recipe


def refusal(path: Path) -> tuple[str, str]:
    """The place (file and line) that a failing load names, and all that it says."""
    with pytest.raises(ValueError) as error:
        load_recipe(path)
    said = str(error.value)
    return said.split(": ")[0], said


# ---- Values ----


def test_values_take_the_declared_type(write: Callable) -> None:
    recipe = load_recipe(
        write("""
name: 0100
seed: 7
model:
  revision: 2024-01-01
  pretrained: yes
  image_size: 0032
data:
  imbalance_ratio: 1e2
  dataset: no
  config_name: 1e-4
stage1:
  learning_rate: 1e-4
  per_device_train_batch_size: 128
  decay_all_parameters: on
  lr_milestones: [0.8, 9e-1]
  eval_strategy: no
  logging_strategy: epoch
  torch_compile_mode: null
  drw_epoch: ~
evaluation:
  geometry: off
""")
    )
    assert recipe.name == "0100" and recipe.seed == 7
    assert recipe.model == ModelConfig(revision="2024-01-01", pretrained=True, image_size=32)
    assert recipe.data == DataConfig(imbalance_ratio=100.0, dataset="no", config_name="1e-4")
    assert recipe.evaluation == EvaluationConfig(geometry=False)
    given = ("learning_rate", "per_device_train_batch_size", "decay_all_parameters", "lr_milestones")
    assert [recipe.stage1[key] for key in given] == [1e-4, 128, True, [0.8, 0.9]]
    assert type(recipe.stage1["learning_rate"]) is float and type(recipe.stage1["per_device_train_batch_size"]) is int
    assert recipe.stage1["eval_strategy"] == "no" and recipe.stage1["logging_strategy"] == "epoch"
    assert recipe.stage1["torch_compile_mode"] is None and recipe.stage1["drw_epoch"] is None


def test_untyped_mappings_read_numbers_but_nothing_else(write: Callable) -> None:
    recipe = load_recipe(
        write("""
model:
  model_args: {drop_rate: 1e-1, depth: 3, act: "1e-1", scale: 0100, deep: {flag: True}, none: null, ids: [1, x]}
""")
    )
    expected = {"drop_rate": 0.1, "depth": 3, "act": "1e-1", "scale": "0100"}
    assert recipe.model.model_args == expected | {"deep": {"flag": True}, "none": None, "ids": [1, "x"]}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("stage1:\n  learning_rate: fast\n", 2, "`stage1.learning_rate` must be float, got 'fast'"),
        ("stage1:\n  learning_rate: null\n", 2, "must be float, got None"),
        ("stage1:\n  learning_rate: .nan\n", 2, "must be float, got '.nan'"),
        ("stage1:\n  learning_rate: nan\n", 2, "must be float, got 'nan' (Input should be a finite number)"),
        ("stage1:\n  learning_rate: inf\n", 2, "must be float, got 'inf' (Input should be a finite number)"),
        ("stage1:\n  learning_rate: [0.1]\n", 2, "must be float, got ['0.1']"),
        ("stage1:\n  lr_milestones: 0.8\n", 2, "must be list[float] | None, got '0.8'"),
        ("stage1:\n  bf16: maybe\n", 2, "must be bool | None, got 'maybe'"),
        ("stage1:\n  centers: learnt\n", 2, "'learned'"),
        ("stage1:\n  optim: sdg\n", 2, "'sgd'"),
        ("data:\n  profile: exp\n", 2, "'exponential'"),
        ("data:\n\n  imbalance_ratio: 0.01\n", 3, "must be float | None, got '0.01' (Input should be greater than"),
        ("data:\n  validation_fraction: 1\n", 2, "less than 1"),
        ("model:\n  name: [resnet]\n", 2, "must be str"),
        ("seed: -1\n", 1, "`seed` must be int"),
        ("model: resnet32_cifar\n", 1, "`model` is a section"),
    ],
)
def test_wrong_types_name_line_key_value_and_type(write: Callable, text: str, line: int, message: str) -> None:
    path = write(text)
    place, said = refusal(path)
    assert place == f"{path}:{line}"
    assert message in said


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (
            "stage1:\n  learning_rte: 1\n",
            2,
            "no setting `stage1.learning_rte`. The nearest one is `stage1.learning_rate`",
        ),
        ("stage_1:\n  x: 1\n", 1, "no setting `stage_1`. The nearest one is `stage1`"),
        ("data:\n  imbalance_factor: 0.01\n", 2, "`data.imbalance_ratio`"),
        ("model:\n  imbalance_ratio: 100\n", 2, "The nearest one is `data.imbalance_ratio`"),
        ("env:\n  HOME: /tmp\n", 1, "no setting `env`"),
        ("stage1:\n  output_dir: x\n", 2, "top level"),
        ("stage2:\n  seed: 1\n", 2, "top level"),
        ("stage1:\n  push_to_hub: true\n", 2, "`hub`"),
        ("hub:\n  token: x\n", 2, "no setting `hub.token`"),
        ("stage1:\n  head_init: keep\n", 2, "`stage2.head_init`"),
        ("data:\n  seed: 1\n  dataset: a\n  seed: 2\n", 4, "`seed` is given twice, first in line 2"),
        ("data:\n  seed: 1\ndata:\n  dataset: a\n", 3, "`data` is given twice"),
        ("model:\n  model_args: {a: 1, a: 2}\n", 2, "`a` is given twice"),
    ],
)
def test_unknown_and_repeated_keys(write: Callable, text: str, line: int, message: str) -> None:
    path = write(text)
    place, said = refusal(path)
    assert place == f"{path}:{line}"
    assert message in said


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("name: ${HOME}\n", 1, "variables are not expanded"),
        ("data:\n  data_dir: '${HOME}/images'\n", 2, "variables are not expanded"),
        ("name: !!python/object/apply:os.system ['echo']\n", 1, "tags"),
        ("name: !env HOME\n", 1, "tags"),
        ("name: !!str 1\n", 1, "tags"),
        ("data: &d\n  seed: 1\nmodel: *d\n", 1, "anchors"),
        ("data:\n  <<: {seed: 1}\n", 2, "no setting `data.<<`"),
        ("name: [\n", 2, "not valid YAML"),
        ("name: a\n---\nname: b\n", 2, "not valid YAML"),
        ("data:\n\tseed: 1\n", 2, "not valid YAML"),
        ("- a\n", 1, "`key: value`"),
        ("? [a]\n: b\n", 1, "plain text"),
    ],
)
def test_only_plain_data_is_read(write: Callable, text: str, line: int, message: str) -> None:
    path = write(text)
    place, said = refusal(path)
    assert place == f"{path}:{line}"
    assert message in said


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"name: \xff\xfe\x00")
    assert "not valid YAML" in refusal(tmp_path / "recipe.yaml")[1]


def test_a_token_is_refused_and_never_echoed(write: Callable) -> None:
    token = "hf_" + 30 * "x"
    for path, overrides in [
        (write(f"stage1:\n  hub_token: {token}\n", "a.yaml"), ()),
        (write(f"name: {token}\n", "b.yaml"), ()),
        (write(f"model:\n  model_args: {{token: {token}}}\n", "c.yaml"), ()),
        (None, ("--hub.repo_id", token)),
        (None, (f"--stage1.hub_token={token}",)),
    ]:
        with pytest.raises(ValueError, match="hf auth login") as error:
            load_recipe(path, overrides)
        assert token not in str(error.value)
    with pytest.raises(ValueError, match="hf auth login"):
        Recipe(stage1={"hub_token": token})


def test_missing_file() -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        load_recipe("nowhere.yaml")


# ---- Sections, extends, overrides ----


def test_no_recipe_is_the_defaults(write: Callable) -> None:
    assert load_recipe(None) == Recipe() == load_recipe(write("# nothing\n"))
    assert Recipe().stage2 is None and Recipe().stage1 is not None


def test_empty_sections(write: Callable) -> None:
    recipe = load_recipe(write("model:\ndata: {}\nstage1: null\nstage2: {}\n"))
    assert (recipe.model, recipe.data, recipe.stage1) == (ModelConfig(), DataConfig(), None)
    assert recipe.stage2["sampler"] == "class_balanced"
    assert "both `stage1` and `stage2` are null" in refusal(write("stage1: null\n"))[1]


def test_extends_merges_key_by_key(write: Callable) -> None:
    write("name: grand\nseed: 3\nstage1:\n  learning_rate: 0.1\n  weight_decay: 5e-4\nstage2:\n", "grand.yaml")
    write("extends: ../grand.yaml\nname: parent\nstage1:\n  weight_decay: 0\nstage2: {}\n", "sub/parent.yaml")
    child = write("extends: sub/parent.yaml\nstage1:\n  mixup_alpha: 0.2\nstage2: null\n", "child.yaml")
    recipe = load_recipe(child)
    assert (recipe.name, recipe.seed, recipe.stage2) == ("parent", 3, None)
    settings = ("learning_rate", "weight_decay", "mixup_alpha")
    assert [recipe.stage1[key] for key in settings] == [0.1, 0.0, 0.2]
    assert load_recipe(child.parent / "sub/parent.yaml").stage2 is not None


def test_bad_extends(write: Callable) -> None:
    first = write("name: a\nextends: second.yaml\n", "first.yaml")
    second = write("extends: first.yaml\n", "second.yaml")
    with pytest.raises(ValueError, match="leads back") as error:
        load_recipe(first)
    assert f"{second}:1: " in str(error.value)
    place, said = refusal(write("extends: recipe.yaml\n"))
    assert place.endswith("recipe.yaml:1") and "leads back" in said
    place, said = refusal(write("extends: [a.yaml, b.yaml]\n"))
    assert place.endswith("recipe.yaml:1") and "one recipe" in said
    with pytest.raises(FileNotFoundError, match="recipe.yaml:2: there is no recipe"):
        load_recipe(write("\nextends: nowhere.yaml\n"))
    broken = write("stage1:\n  learning_rte: 1\n", "broken.yaml")
    with pytest.raises(ValueError, match="learning_rate") as error:
        load_recipe(write("extends: broken.yaml\n"))
    assert f"{broken}:2: " in str(error.value)


def test_overrides(write: Callable) -> None:
    path = write("name: a\nstage1:\n  learning_rate: 0.1\n  drw_epoch: 0.9\nstage2: {}\n")
    overrides = ["--stage1.learning_rate", "1e-2", "--stage1.learning-rate=2e-2", "--stage1.drw_epoch", "null"]
    overrides += ["--stage1.lr_milestones", "[0.5, 0.75]", "--model.pretrained", "--evaluation.geometry=no"]
    overrides += ["--model.model_args", "{drop_rate: 0.1}", "--seed", "5", "--name=b=c", "--stage2", "null"]
    recipe = load_recipe(path, overrides)
    assert (recipe.name, recipe.seed, recipe.stage2) == ("b=c", 5, None)
    assert recipe.stage1["learning_rate"] == 0.02 and recipe.stage1["drw_epoch"] is None
    assert recipe.stage1["lr_milestones"] == [0.5, 0.75]
    assert recipe.model == ModelConfig(pretrained=True, model_args={"drop_rate": 0.1})
    assert recipe.evaluation.geometry is False
    assert load_recipe(None, ["--stage2.head_init", "keep"]).stage2["head_init"] == "keep"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--stage1.learning_rte", "1"], "--stage1.learning_rte: there is no setting .*`stage1.learning_rate`"),
        (["--stage3.learning_rate", "1"], "no section `stage3`. The nearest one is `stage[12]`"),
        (["--stage1.lr", "0.1"], "no setting `stage1.lr`. `train.py --help` lists them"),
        (["--stage1.loss_settings.gamma", "2"], 'written together, as --stage1.loss_settings "{gamma: 2}"'),
        (["--learning_rate", "1"], "no setting `learning_rate`. The nearest one is `stage1.learning_rate`"),
        (["--stage1.learning_rate", "fast"], "--stage1.learning_rate: .* must be float, got 'fast'"),
        (["--stage1.learning_rate"], "must be float, got 'true'"),
        (["learning_rate", "1"], "'learning_rate' is no option"),
        (["--seed", "1", "2"], "'2' is no option"),
        (["--extends", "a.yaml"], "no setting `extends`"),
        (["--stage1", "x"], "`stage1` is a section. .*`--stage1.key value`, or leave the stage out"),
        (["--stage2"], "`stage2` is a section"),
        (["--model", "null"], "`model` is a section. Set its values by `--model.key value`.$"),
        (["--name", "${HOME}"], "variables are not expanded"),
        (["--stage1.lr_milestones", "[0.5"], "--stage1.lr_milestones:1: not valid YAML"),
        (["--stage1.lr_milestones", "[!!int 1]"], "tags"),
    ],
)
def test_bad_overrides(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(None, overrides)


def test_overlapping_thresholds_are_refused() -> None:
    with pytest.raises(ValueError, match="overlap"):
        load_recipe(None, ["--evaluation.few_below", "200"])


# ---- Places ----


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = [
        "--output_dir=~/out",
        "--data.data_dir",
        "~/photos",
        "--data.cache_dir=~",
        "--model.name=local-dir:~/model",
    ]
    recipe = load_recipe(None, given)
    assert (recipe.output_dir, recipe.data.data_dir, recipe.data.cache_dir) == (
        "/home/me/out",
        "/home/me/photos",
        "/home/me",
    )
    assert recipe.model.name == "local-dir:/home/me/model" and recipe.data.dataset == "digits"


def test_other_data_lose_the_title_of_a_recipe() -> None:
    path = Path(__file__).resolve().parents[1] / "recipes/caltech101/nc_drw_crt.yaml"
    own = ["--data.dataset", "imagefolder"]
    assert load_recipe(path).data.title == "Caltech-101"
    assert load_recipe(path, own).data.title is None
    assert load_recipe(path, [*own, "--data.title", "My photos"]).data.title == "My photos"


def test_a_list_is_shown_as_it_is_written() -> None:
    with pytest.raises(ValueError, match=r'a list is written "\[160,180\]"'):
        load_recipe(None, ["--stage1.lr_milestones", "160,180"])
