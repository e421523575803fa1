"""A strict subset of YAML: plain data whose every value knows the line it came from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yaml.tokens import AliasToken, AnchorToken, TagToken

NULLS = ("", "~", "null", "Null", "NULL")
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


class Entry(NamedTuple):
    """A value and the place it was written at, as `file:line`."""

    value: Any
    where: str


def read_entries(path: Path) -> dict[str, Entry]:
    """The top level of a YAML file; a mapping there is a section, a dict of entries of its own.

    Scalars stay text, whatever they look like, for the declared type of their key to read; an unquoted null is None.
    Only inside a mapping that is itself a value of a section, where no type is declared, unquoted numbers and
    true / false are read as such.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming file and line, for text that is not YAML, a key given twice, anchors, aliases and tags,
            `${...}`, and what looks like a Hub token.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {str(path)!r}. Give the path of a YAML file.")
    return {
        key: Entry(_section(node, path) if isinstance(node, yaml.MappingNode) else _value(node, path), where)
        for key, node, where in _items(_compose(path.read_bytes(), path), path)
    }


def parse_text(text: str, source: str) -> Any:
    """A value given on the command line: a list or mapping in YAML's flow style, null, or text.

    Args:
        text: of the value.
        source: the option, for messages.

    Raises:
        ValueError: as `read_entries`.
    """
    if text.startswith(("[", "{")):
        return _value(_compose(text, source), source)
    return None if text == "null" else _checked(text, source)


def write_yaml(document: dict[str, Any]) -> str:
    """YAML text that `read_entries` reads back to the same values, keys in their order."""
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _compose(text: str | bytes, source: Path | str) -> yaml.Node:
    try:
        for token in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(token, AnchorToken | AliasToken | TagToken):
                raise ValueError(
                    f"{source}:{token.start_mark.line + 1}: anchors, aliases and tags (&, *, !) are refused. "
                    "Write the value out, or in quotes; settings are shared with `extends`."
                )
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{source}{line}: not valid YAML: {error.problem or error.context}.") from None
    except yaml.reader.ReaderError as error:
        raise ValueError(f"{source}: not valid YAML: {error.reason} at character {error.position}.") from None
    return yaml.MappingNode("tag:yaml.org,2002:map", []) if node is None else node


def _items(node: yaml.Node, source: Path | str) -> Iterator[tuple[str, yaml.Node, str]]:
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{source}:{node.start_mark.line + 1}: needs `key: value` lines here.")
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, line = key_node.value, key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ValueError(f"{source}:{line}: a key must be plain text.")
        if key in lines:
            raise ValueError(f"{source}:{line}: `{key}` is given twice, first in line {lines[key]}. Keep one.")
        lines[key] = line
        yield key, value_node, f"{source}:{line}"


def _section(node: yaml.Node, source: Path | str) -> dict[str, Entry]:
    return {key: Entry(_value(child, source), where) for key, child, where in _items(node, source)}


def _value(node: yaml.Node, source: Path | str, *, typed: bool = True) -> Any:
    if isinstance(node, yaml.MappingNode):
        return {key: _value(child, source, typed=False) for key, child, _ in _items(node, source)}
    if isinstance(node, yaml.SequenceNode):
        return [_value(child, source, typed=typed) for child in node.value]
    text = _checked(node.value, f"{source}:{node.start_mark.line + 1}")
    if node.style is not None:  # quoted
        return text
    return None if text in NULLS else text if typed else _guess(text)


def _checked(text: str, where: str) -> str:
    if "${" in text:
        raise ValueError(f"{where}: {text!r} has `${{`, but variables are not expanded in a recipe. Write it out.")
    if HUB_TOKEN.search(text):
        raise ValueError(f"{where}: this looks like a Hub token. Log in with `hf auth login`, never in a recipe.")
    return text


def _guess(text: str) -> Any:
    """The number or truth value that unquoted text of no declared type stands for."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return json.loads(text, parse_constant=str)
    except ValueError:
        return text


class _Dumper(yaml.SafeDumper):
    """Quotes all text that would be read as something else."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    ambiguous = text in NULLS or not isinstance(_guess(text), str)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if ambiguous else None)


_Dumper.add_representer(str, _represent_text)
