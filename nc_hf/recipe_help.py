"""What can be set in a recipe, as text."""

from __future__ import annotations

import dataclasses
from typing import get_type_hints

from nc_hf.recipe_sections import SECTIONS, STAGES, Recipe, declared_types, type_name


def recipe_help() -> str:
    """Every setting with its type and default by section; of those that are transformers' own the changed ones."""
    recipe = dataclasses.asdict(Recipe(stage2={}))
    lines = ["Settings (type) and their defaults:", *_lines("", recipe)]
    for section, cls in SECTIONS.items():
        about = cls.__doc__.strip().splitlines()[0]
        if section in STAGES:
            optional = "Not run unless something of it is given. " if section == "stage2" else ""
            about = f"{optional}As nc_hf.{cls.__name__}, with any setting of transformers.TrainingArguments."
        lines += ["", f"{section}: {about}", *_lines(section, recipe[section])]
    return "\n".join(lines)


def _lines(section: str, defaults: dict[str, object]) -> list[str]:
    hints, prefix = get_type_hints(SECTIONS.get(section, Recipe)), f"{section}." if section else ""
    names = [name for name in declared_types(section) if name in defaults]
    return [f"  {prefix}{name} ({type_name(hints[name])}): {defaults[name]}" for name in names]
