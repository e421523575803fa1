"""Recipes: one YAML file that says all of a run, read strictly and checked before anything heavy starts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nc_hf.deciding_settings import decides_weights
from nc_hf.recipe_file import parse_text, read_entries, write_yaml
from nc_hf.recipe_sections import (
    SECTIONS,
    STAGES,
    DataConfig,
    EvaluationConfig,
    HubConfig,
    ModelConfig,
    Recipe,
    coerced,
    defaults_of,
)

__all__ = [
    "DataConfig",
    "EvaluationConfig",
    "HubConfig",
    "ModelConfig",
    "Recipe",
    "differences",
    "dump_recipe",
    "load_recipe",
    "recipe_digest",
]

# The digest leaves out what has its default value, so that a new setting leaves the digests of old results alone.
# Raise this when a default, or what a setting means, changes.
DIGEST_VERSION = 1
UNTOLD_DATA = ("data_dir", "cache_dir", "title", "on_bad_image")


# What may be a folder.
PATHS = {"": ("output_dir",), "data": ("dataset", "data_dir", "cache_dir"), "model": ("name",)}


class _Setting(NamedTuple):
    """One line of a recipe: `name` None stands for the section itself, given as a mapping (value {}) or as null."""

    section: str
    name: str | None
    value: Any


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, and the one it extends, and put the command line's overrides on top.

    Args:
        path: a YAML file with the sections of `Recipe` and, optionally, `extends: other.yaml` relative to it, whose
            sections are merged key by key; None for the defaults.
        overrides: `--section.key value`, `--section.key=value`, or a bare `--section.flag` for true; later ones win.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming file and line, or the option, for an unknown key (with the nearest one), a key given twice,
            a value of another type than declared, or YAML beyond plain data.
    """
    values: dict[str, dict[str, Any] | None] = {"": {}, **{section: {} for section in SECTIONS}, "stage2": None}
    settings = [] if path is None else _file_settings(Path(path))
    given = list(_override_settings(overrides))
    if any((section, name) == ("data", "dataset") for section, name, _ in given):
        settings.append(_Setting("data", "title", None))  # a file's title is of its own data set
    for section, name, value in [*settings, *given]:
        if name is not None:
            value = _expanded(value) if name in PATHS.get(section, ()) else value
            values[section] = (values[section] or {}) | {name: value}
        elif value is not None:
            values[section] = values[section] or {}
        elif section in STAGES:
            values[section] = None
    sections = {name: cls(**values[name]) for name, cls in SECTIONS.items() if name not in STAGES}
    return Recipe(**values[""], **sections, **{stage: values[stage] for stage in STAGES})


def dump_recipe(recipe: Recipe) -> str:
    """YAML of a recipe with nothing left to defaults that are ours; `load_recipe` reads it back to an equal recipe."""
    return write_yaml(dataclasses.asdict(recipe))


def recipe_digest(recipe: Recipe, data_checksum: str | None = None, model_checksum: str | None = None) -> str:
    """16 hexadecimal digits that change with the settings that decide a run's weights.

    They cover the data (and which split is measured), the model, both stages and the seed, but no folder, nothing of
    the Hub, nothing of logging, saving or evaluation, and no option of the stages that only makes the same computation
    faster. What the machine decides is not in a recipe: the number of processes, and the precision where it is auto.
    Put the resolved precision into the stages first where it must count.

    Args:
        recipe: of the run.
        data_checksum: of the training images, where known.
        model_checksum: of the weights to start from, where they lie in a folder, whose name says little.
    """
    data, model = _changed(recipe.data, DataConfig()), _changed(recipe.model, ModelConfig())
    for name in UNTOLD_DATA:
        data.pop(name, None)
    told: dict[str, Any] = {"version": DIGEST_VERSION, "seed": recipe.seed, "data_checksum": data_checksum}
    told["data"] = data | {"dataset": _without_folder(recipe.data.dataset)}
    told["model"] = model | {"name": _without_folder(recipe.model.name)}
    if model_checksum is not None:
        told["model"]["checksum"] = model_checksum
    for stage in STAGES:
        settings, defaults = getattr(recipe, stage), defaults_of(stage)
        told[stage] = settings and {
            name: value for name, value in _deciding(settings).items() if value != defaults[name]
        }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def differences(before: Recipe, now: Recipe) -> list[str]:
    """The settings in which two recipes differ and that decide weights, such as `"seed 0 (now 1)"`."""
    old, new = _flat(before), _flat(now)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name} {old.get(name)} (now {new.get(name)})" for name in names]


def _flat(recipe: Recipe) -> dict[str, Any]:
    """Settings that decide weights by `section.name`."""
    flat: dict[str, Any] = {"seed": recipe.seed}
    for section in ("model", "data"):
        settings = vars(getattr(recipe, section)).items()
        flat |= {f"{section}.{name}": value for name, value in settings if name not in UNTOLD_DATA}
    for stage in STAGES:
        if (settings := getattr(recipe, stage)) is not None:
            settings = _deciding({**defaults_of(stage), **settings})
            flat |= {f"{stage}.{name}": value for name, value in settings.items()}
    return flat


def _deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """Those settings of a stage that decide its weights."""
    chooses = bool(settings.get("load_best_model_at_end"))
    return {name: value for name, value in settings.items() if decides_weights(name, chooses)}


def _expanded(value: str | None) -> str | None:
    """A path with the home folder for ~; other names as they are."""
    prefix = "local-dir:" if value and value.startswith("local-dir:~") else ""
    is_path = value is not None and value.startswith(f"{prefix}~")
    return prefix + str(Path(value.removeprefix(prefix)).expanduser()) if is_path else value


def _changed(config: Any, default: Any) -> dict[str, Any]:
    values, defaults = dataclasses.asdict(config), dataclasses.asdict(default)
    return {name: value for name, value in values.items() if value != defaults[name]}


def _without_folder(name: str) -> str:
    return Path(name).name if name.removeprefix("local-dir:").startswith(("/", ".", "~")) else name


# ---- Files and options to settings ----


def _file_settings(path: Path, children: tuple[Path, ...] = ()) -> list[_Setting]:
    settings, entries = [], read_entries(path)
    if parent := entries.pop("extends", None):
        if not isinstance(parent.value, str):
            raise ValueError(f"{parent.where}: `extends` must be the path of one recipe, got {parent.value!r}.")
        parent_path, children = path.parent / parent.value, (*children, path.resolve())
        if parent_path.resolve() in children:
            raise ValueError(
                f"{parent.where}: `extends: {parent.value}` leads back to a recipe that extends this one."
            )
        if not parent_path.is_file():
            raise FileNotFoundError(f"{parent.where}: there is no recipe {str(parent_path)!r} to extend.")
        settings = _file_settings(parent_path, children)
    for key, (value, where) in entries.items():
        if key not in SECTIONS:
            settings.append(_Setting("", key, coerced("", key, value, where)))
        elif value is None:
            settings.append(_Setting(key, None, None))
        elif isinstance(value, dict):
            settings.append(_Setting(key, None, {}))
            settings += [_Setting(key, name, coerced(key, name, *entry)) for name, entry in value.items()]
        else:
            raise ValueError(f"{where}: `{key}` is a section and needs `key: value` lines below it, got {value!r}.")
    return settings


def _override_settings(arguments: Sequence[str]) -> Iterator[_Setting]:
    waiting = list(arguments)
    while waiting:
        option, equals, text = waiting.pop(0).partition("=")
        if not option.startswith("--") or option == "--":
            raise ValueError(f"{option!r} is no option. Settings are overridden by `--section.key value`.")
        if not equals:
            text = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "true"
        section, _, name = option.removeprefix("--").replace("-", "_").rpartition(".")
        value = parse_text(text, option)
        if section or name not in SECTIONS:
            yield _Setting(section, name, coerced(section, name, value, option))
        elif name in STAGES and value is None:
            yield _Setting(name, None, None)
        else:
            null = f", or leave the stage out by `--{name} null`" if name in STAGES else ""
            raise ValueError(f"{option}: `{name}` is a section. Set its values by `--{name}.key value`{null}.")
