"""The part of a README that is ours: what a person wrote around it on the Hub stays."""

from __future__ import annotations

import html
import logging
import re
from typing import Any

from huggingface_hub import RepoCard

logger = logging.getLogger(__name__)

BEGIN, END = "<!-- nc_hf:begin -->", "<!-- nc_hf:end -->"
OUR_BLOCK = re.compile(f"{BEGIN}.*?{END}", re.DOTALL)


def marked(card: str) -> str:
    """A rendered card with its body between the marks that `merge_cards` looks for, and no gaps of empty lines."""
    head, _, text = card.removeprefix("---\n").partition("\n---\n")
    text = re.sub("\n{3,}", "\n\n", text).strip()
    return f"---\n{head}\n---\n\n{BEGIN}\n{text}\n{END}\n"


def escaped(text: Any) -> str:
    """A name as it may stand in a table or heading."""
    text = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text)


def metadata_of(readme: str) -> dict[str, Any]:
    """The metadata at the top of a README.

    Raises:
        ValueError: when it cannot be read.
    """
    return _parsed(readme).data.to_dict()


def _parsed(readme: str) -> RepoCard:
    try:
        return RepoCard(readme.removeprefix("\ufeff"))
    except Exception as error:  # of the YAML parser
        raise ValueError(f"the metadata of the README cannot be read ({error}). Mend it there.") from error


def merge_cards(ours: str, theirs: str) -> str:
    """A README on the Hub brought up to date.

    Args:
        ours: a new card, its body between the marks.
        theirs: the README on the Hub.

    Returns:
        `theirs` with our block replaced and our metadata keys set; results (model-index) that `ours` does not have
        go. Where a person took the marks out, the body stays as it is; an empty one becomes ours.

    Raises:
        ValueError: when the metadata of `theirs` cannot be read.
    """
    new, old = RepoCard(ours), _parsed(theirs)
    if "model-index" not in new.data:
        old.data.pop("model-index")
    for key, value in new.data.to_dict().items():
        old.data[key] = _union(old.data.get(key), value) if key == "tags" else value
    block = OUR_BLOCK.search(new.text)
    if not old.text.strip():
        old.text = new.text
    elif BEGIN in old.text and OUR_BLOCK.search(old.text) is None:
        logger.warning("the README has our mark %s without %s after it, so its text is left as it is", BEGIN, END)
    elif block is not None:
        old.text = OUR_BLOCK.sub(lambda _: block[0], old.text, count=1)
    return str(old)


def _union(old: Any, new: list[str]) -> list[str]:
    return list(dict.fromkeys([*([old] if isinstance(old, str) else old or []), *new]))
