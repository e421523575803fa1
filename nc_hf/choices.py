"""Settings that are one of a few words."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse a word that is none of the choices.

    Args:
        name: of the setting, for the message.
        value: of the setting.
        choices: what it can be.

    Raises:
        ValueError: naming the choices and the value.
    """
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")


def check_choices(settings: Any, cls: type) -> None:
    """`check_choice` of every field that a dataclass declares as one of a few words, those of its bases left out.

    Args:
        settings: whose values are checked.
        cls: its class, or one that it is derived from.

    Raises:
        ValueError: as `check_choice`; None is a value where the declaration has it.
    """
    hints = get_type_hints(cls)
    for name in cls.__annotations__:
        hint = hints[name]
        alternatives = (hint, *get_args(hint))
        choices = [word for kind in alternatives if get_origin(kind) is Literal for word in get_args(kind)]
        value = getattr(settings, name, None)
        if choices and not (value is None and type(None) in alternatives):
            check_choice(name, value, choices)
