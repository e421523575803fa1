"""The sections of a recipe: their settings, types and defaults."""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from enum import Enum
from functools import cache, reduce
from operator import or_
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from transformers import TrainingArguments

from nc_hf.data.augment import Augmentation
from nc_hf.data.images import InputPath
from nc_hf.data.long_tail import Profile
from nc_hf.metrics.long_tail_accuracy import FEW_BELOW, MANY_ABOVE, frequency_groups
from nc_hf.models.normalized_heads import HeadKind
from nc_hf.retraining_args import RetrainingArguments
from nc_hf.training_args import NCTrainingArguments

Positive = Annotated[int, Field(ge=1)]


@dataclass
class ModelConfig:
    """The classifier: any timm name, Hub id or folder."""

    name: str = "resnet32_cifar"
    pretrained: bool = False
    head: str | None = None
    head_type: HeadKind = "linear"
    head_settings: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None
    image_size: Positive | None = None
    model_args: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataConfig:
    """The images: a name that nc_hf knows, a Hub id or a folder; long-tailed as they are, or made so."""

    dataset: str = "digits"
    title: str | None = None  # what cards call images of one's own
    data_dir: str | None = None
    config_name: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    imbalance_ratio: Annotated[float, Field(ge=1)] | None = None
    profile: Profile = "exponential"
    seed: int = 0
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    test_split: str | None = None
    augmentation: Augmentation = "crop_flip"
    input_path: InputPath = "auto"
    on_bad_image: Literal["error", "skip"] = "error"
    cache_dir: str | None = None

    def own_name(self, split: str) -> str:
        """What the data set itself calls a split of ours: `test_split`, where that is set, for `"test"`."""
        return self.test_split or split if split == "test" else split


@dataclass
class EvaluationConfig:
    """What is measured of each stage's classifier."""

    batch_size: Positive = 256
    few_below: Annotated[int, Field(ge=0)] = FEW_BELOW
    many_above: Annotated[int, Field(ge=0)] = MANY_ABOVE
    geometry: bool = True
    geometry_every: Annotated[int, Field(ge=0)] = 0  # epochs of stage one; 0 measures after it alone

    def __post_init__(self) -> None:
        """Refuse thresholds that overlap."""
        frequency_groups([], **self.bounds)

    @property
    def bounds(self) -> dict[str, int]:
        """The thresholds, as functions of `nc_hf.metrics` take them."""
        return {"few_below": self.few_below, "many_above": self.many_above}


@dataclass
class HubConfig:
    """Where a finished model is pushed; the token comes from `hf auth login`, never from here."""

    repo_id: str | None = None
    private: bool | None = None  # of a new repository; null leaves it to the account's or organization's default
    revision: str | None = None
    create_pr: bool = False


@dataclass
class Recipe:
    """All of a run.

    Stages are keyword arguments of `NCTrainingArguments` and `RetrainingArguments`, not instances, since building
    those sets up devices. They hold what was given and, beside it, the defaults that are ours and not those of
    `TrainingArguments`. The caller adds `output_dir` and `seed`. A stage that is None is not run.

    Raises:
        ValueError: for a stage setting that does not exist or has its place elsewhere, or when both stages are None.
    """

    name: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    output_dir: str = "out"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    stage1: dict[str, Any] | None = field(default_factory=dict)
    stage2: dict[str, Any] | None = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    hub: HubConfig = field(default_factory=HubConfig)

    def __post_init__(self) -> None:
        """Complete the stages."""
        if self.stage1 is None and self.stage2 is None:
            raise ValueError("both `stage1` and `stage2` are null, so nothing would be trained. Give one of them.")
        for stage in STAGES:
            if getattr(self, stage) is not None:
                setattr(self, stage, _completed(stage, getattr(self, stage)))


STAGES = {"stage1": NCTrainingArguments, "stage2": RetrainingArguments}
SECTIONS = {"model": ModelConfig, "data": DataConfig, **STAGES, "evaluation": EvaluationConfig, "hub": HubConfig}
ELSEWHERE = {
    "output_dir": "Set `output_dir` at the top level.",
    "seed": "Set `seed` at the top level.",
    "hub_token": "A token has no place in a recipe; log in with `hf auth login`.",
    "push_to_hub": "The section `hub` says what is pushed.",
    "hub_model_id": "Use `hub.repo_id`.",
    "hub_private_repo": "Use `hub.private`.",
    "hub_revision": "Use `hub.revision`.",
    "hub_strategy": "Models are pushed once, when they are done.",
    "hub_always_push": "Models are pushed once, when they are done.",
    "parallelism_config": "Use a configuration file of `accelerate launch`.",
}


def coerced(section: str, name: str, value: Any, where: str) -> Any:
    """A value as the type its key is declared with.

    Args:
        section: name of a section, or "" for the top level.
        name: of the setting.
        value: text, None, or lists and dicts of them.
        where: `file:line` or the option, for messages.

    Raises:
        ValueError: for a value of another type, or a section or setting that does not exist.
    """
    if section not in ("", *SECTIONS):
        stage, _, setting = section.partition(".")
        if setting in declared_types(stage):
            raise ValueError(
                f'{where}: settings of `{section}` are written together, as --{section} "{{{name}: {value}}}".'
            )
        nearest = difflib.get_close_matches(section, SECTIONS, n=1, cutoff=0)[0]
        raise ValueError(f"{where}: there is no section `{section}`. The nearest one is `{nearest}`.")
    declared = declared_types(section)
    if name not in declared:
        raise ValueError(f"{where}: {_unknown(section, name)}")
    adapter = TypeAdapter(declared[name], config=ConfigDict(allow_inf_nan=False))
    try:
        return adapter.dump_python(adapter.validate_python(value), mode="json")
    except ValidationError as error:
        expected = type_name(get_type_hints(SECTIONS.get(section, Recipe))[name])
        problem = error.errors()[0]["msg"]
        if isinstance(value, str) and "list" in expected:
            problem += f'; a list is written "[{value}]"'
        raise ValueError(
            f"{where}: `{_dotted(section, name)}` must be {expected}, got {value!r} ({problem})."
        ) from None


def type_name(hint: Any) -> str:
    """A declared type in words."""
    if isinstance(hint, type) and not get_args(hint):
        return hint.__name__
    return re.sub(r"Optional\[(.*)\]$", r"\1 | None", str(hint).replace("typing.", ""))


def _dotted(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def _unknown(section: str, name: str) -> str:
    if section in STAGES and name in ELSEWHERE:
        return f"`{_dotted(section, name)}` is not a setting of a stage. {ELSEWHERE[name]}"
    known = [*declared_types(section), *([] if section else [*SECTIONS, "extends"])]
    homes = [_dotted(home, name) for home in ("", *SECTIONS) if name in declared_types(home)]
    nearest = homes or [_dotted(section, near) for near in difflib.get_close_matches(name, known, n=1)]
    hint = f"The nearest one is `{nearest[0]}`." if nearest else "`train.py --help` lists them."
    return f"there is no setting `{_dotted(section, name)}`. {hint}"


@cache
def declared_types(section: str) -> dict[str, Any]:
    """Names and types of the settings of a section; "" is the top level."""
    cls = SECTIONS.get(section, Recipe)
    hints = get_type_hints(cls, include_extras=True)
    hidden = ELSEWHERE if section in STAGES else SECTIONS
    return {f.name: _closed(hints[f.name]) for f in dataclasses.fields(cls) if f.init and f.name not in hidden}


def _closed(hint: Any) -> Any:
    """An enumeration "or str" means the text of one of its members."""
    members = get_args(hint)
    if any(isinstance(member, type) and issubclass(member, Enum) for member in members):
        return reduce(or_, (member for member in members if member is not str))
    return hint


@cache
def defaults_of(stage: str) -> dict[str, Any]:
    """The default of each setting of a stage."""
    return {f.name: _default(f) for f in dataclasses.fields(STAGES[stage]) if f.name in declared_types(stage)}


def _default(setting: dataclasses.Field) -> Any:
    default = setting.default if setting.default_factory is dataclasses.MISSING else setting.default_factory()
    return default.value if isinstance(default, Enum) else default


def _completed(stage: str, given: dict[str, Any]) -> dict[str, Any]:
    """The given settings, and the defaults of ours that `TrainingArguments` does not have or has otherwise."""
    for name in given:
        if name not in declared_types(stage):
            raise ValueError(_unknown(stage, name))
    theirs = {f.name: _default(f) for f in dataclasses.fields(TrainingArguments)}
    missing = object()
    return {
        name: given.get(name, default)
        for name, default in defaults_of(stage).items()
        if name in given or default != theirs.get(name, missing)
    }
