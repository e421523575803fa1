"""Long-tailed splits on the Hub: parquet with a card that says what was drawn and how to check it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import DatasetDict
from huggingface_hub import CommitInfo, CommitOperationAdd, DatasetCard, DatasetCardData, HfApi

from nc_hf.card_block import escaped, marked, merge_cards
from nc_hf.data.builders import STANDARD_PIXELS, pixel_checksum
from nc_hf.data.listed import ListedBuilder
from nc_hf.data.long_tail import class_counts
from nc_hf.data.provenance import LONG_TAIL_CITATION, PROVENANCE
from nc_hf.data.splits import BUILDERS
from nc_hf.metrics.long_tail_accuracy import FEW_BELOW, MANY_ABOVE, frequency_groups
from nc_hf.publishing import PushError, on_the_head, reason_of, retried
from nc_hf.recipe import DataConfig

TEMPLATE = Path(__file__).with_name("dataset_card_template.md")
FACTS = "split.json"
MOST_ROWS, SHOWN = 50, 5  # classes in a table; of more, the largest and the smallest
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
DRAW = re.compile(r", (\w+) profile, imbalance ratio (\S+), seed (\d+): ")  # in what our builders say of a subset


def config_name_for(data: DataConfig) -> str:
    """The configuration's name on the Hub: `r100`, `r10-step`, `r100-seed1`, or for all images `balanced`.

    Images that are not thinned out keep the name of their own configuration, or are the `default`.
    """
    builder = BUILDERS.get(data.dataset)
    whole, *presets = [config.name for config in builder.BUILDER_CONFIGS] if builder else ["default"]
    name = data.config_name or whole if data.imbalance_ratio is None else f"r{data.imbalance_ratio:g}"
    if data.imbalance_ratio is None and name not in presets:
        return name
    profile = "" if data.profile == "exponential" else f"-{data.profile}"
    return name + profile + (f"-seed{data.seed}" if data.seed else "")


def push_splits(
    splits: DatasetDict,
    repo_id: str,
    *,
    config_name: str,
    dataset: str | None = None,
    facts: Mapping[str, Any] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Push splits as parquet with a card; other configurations and a person's words in the README stay.

    Args:
        splits: of `load_splits`.
        repo_id: `"user/name"`.
        config_name: under which `load_dataset` finds these splits.
        dataset: name of the benchmark that they were drawn from, where it is one of ours.
        facts: see `split_facts`.
        private: visibility of a new repository; the account's default when None.
        revision: the branch; main when None.
        create_pr: open a pull request instead of committing to the branch.

    Returns:
        The URL of the data set, or of the pull request.

    Raises:
        ValueError: for a benchmark whose images may not be passed on.
        PushError: when it does not succeed; the same call again completes it.
    """
    if issubclass(BUILDERS.get(dataset, object), ListedBuilder):
        raise ValueError(
            f"the images of {PROVENANCE[dataset].title} may not be passed on, so they are not pushed to {repo_id}. "
            "Publish your list files; everybody has the images from their source."
        )
    facts = split_facts(splits, config_name, dataset, facts)
    options = {"config_name": config_name, "private": private, "revision": revision, "create_pr": create_pr}
    api = HfApi()
    try:
        commit = on_the_head(lambda: retried(lambda: splits.push_to_hub(repo_id, **options)))
        place = {"repo_id": repo_id, "repo_type": "dataset", "revision": commit.pr_revision or revision}
        opens = create_pr and commit.pr_revision is None  # the images are there already
        card = on_the_head(lambda: retried(lambda: _commit_card(api, place, facts, dataset, create_pr=opens)))
    except Exception as error:
        # Whatever a client raises here, the splits are as they were and the user is told how to go on.
        raise PushError(
            f"the push of {config_name} to {repo_id} failed: {reason_of(error)}\n"
            "Run it again; what has arrived is not sent twice."
        ) from error
    return commit.pr_url or card.pr_url or str(commit.repo_url)


def _commit_card(
    api: HfApi, place: Mapping[str, Any], facts: Mapping[str, Any], dataset: str | None, *, create_pr: bool
) -> CommitInfo:
    """Add the facts and a card of all configurations to the head that is read."""
    head = api.repo_info(**place).sha
    read = {**place, "revision": head}
    files = [name for name in api.list_repo_files(**read) if name.endswith(f"/{FACTS}")]
    known = [json.loads(Path(api.hf_hub_download(filename=name, **read)).read_text("utf-8")) for name in files]
    configs = [facts, *(other for other in known if other["name"] != facts["name"])]
    readme = Path(api.hf_hub_download(filename="README.md", **read)).read_text(encoding="utf-8")
    card = merge_cards(dataset_card(configs, place["repo_id"], dataset), readme)
    operations = [
        CommitOperationAdd(f"{facts['name']}/{FACTS}", (json.dumps(facts, indent=1) + "\n").encode()),
        CommitOperationAdd("README.md", card.encode()),
    ]
    settings = {"commit_message": f"Card of {facts['name']}", "parent_commit": head, "create_pr": create_pr}
    return api.create_commit(operations=operations, **settings, **place)


def split_facts(
    splits: DatasetDict,
    config_name: str,
    dataset: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What is published beside the parquet files of a configuration: how it was drawn, names, counts and checksum.

    Args:
        splits: of `load_splits`.
        config_name: of the configuration.
        dataset: name of the benchmark that they were drawn from, where it is one of ours.
        facts: `profile`, `imbalance_ratio` and `seed` of the draw; of a benchmark's splits they are known.

    Returns:
        JSON values: `name`; `profile`, `imbalance_ratio`, `seed` where known; `standard`, whether these are the
        literature's images, where those have a known checksum; `class_names`; `counts`, of each split those of the
        classes; `has_index`; `sha256` of the decoded training images.
    """
    train = splits["train"]
    found = {"name": config_name, "sha256": pixel_checksum(train), "has_index": "index" in train.column_names}
    if draw := DRAW.search(train.info.description or ""):
        found |= {"profile": draw[1], "imbalance_ratio": float(draw[2]), "seed": int(draw[3])}
    found |= facts or {}
    known = PROVENANCE.get(dataset or "")
    expected = STANDARD_PIXELS.get((known.title, found["imbalance_ratio"])) if known and "seed" in found else None
    if expected is not None and found["profile"] == "exponential" and found["seed"] == 0:
        found["standard"] = found["sha256"] == expected
    found["class_names"] = train.features["label"].names
    return found | {"counts": {name: class_counts(split, "label").tolist() for name, split in splits.items()}}


def dataset_card(configs: Sequence[Mapping[str, Any]], repo_id: str, dataset: str | None = None) -> str:
    """The README of a data set's repository; what is not known is left out.

    Args:
        configs: `split_facts` of each configuration.
        repo_id: `"user/name"`.
        dataset: name of the benchmark that they were drawn from, where it is one of ours.
    """
    known, name = PROVENANCE.get(dataset or ""), repo_id.split("/")[-1]
    configs = sorted(configs, key=lambda config: (config.get("imbalance_ratio", 0), config["name"]))
    profiles = {config["profile"] for config in configs if "profile" in config}
    images = sum(sum(counts) for config in configs for counts in config["counts"].values())
    uneven = any(len(set(config["counts"]["train"])) > 1 for config in configs)
    title = known.title + ("-LT" if profiles else "") if known else name
    data = DatasetCardData(
        pretty_name=title,
        license=known.license if known else None,
        task_categories=["image-classification"],
        size_categories=[next((label for size, label in SIZES if images < size), "10M<n<100M")],
        source_datasets=[known.hub_id] if known and known.hub_id else None,
        tags=["long-tailed", "class-imbalance"] if uneven else None,
    )
    card = DatasetCard.from_template(
        card_data=data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=escaped(title),
        repo_id=repo_id,
        example=configs[-1]["name"],  # the most imbalanced one
        configs=[_shown(config) for config in configs],
        profiles=profiles,
        standard=[f"`{config['name']}`" for config in configs if config.get("standard") is True],
        not_standard=[f"`{config['name']}`" for config in configs if config.get("standard") is False],
        bounds={"few_below": FEW_BELOW, "many_above": MANY_ABOVE},
        known=known,
        citations=[*([known.citation] if known else []), *([LONG_TAIL_CITATION] if profiles else [])],
    )
    return marked(str(card))


def _shown(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts with what the template shows of them."""
    counts, names = facts["counts"], facts["class_names"]
    order = np.argsort(-np.asarray(counts["train"]), kind="stable")
    shown = order if len(order) <= MOST_ROWS else [*order[:SHOWN], *order[-SHOWN:]]
    rows = [{"name": escaped(names[k]), "counts": [column[k] for column in counts.values()]} for k in shown]
    groups = {name: int(members.sum()) for name, members in frequency_groups(counts["train"]).items()}
    return {
        **facts,
        "images": {name: sum(column) for name, column in counts.items()},
        "largest": max(counts["train"]),
        "smallest": min(counts["train"]),
        "balanced_test": len(set(counts.get("test", []))) == 1,
        "groups": {name: size for name, size in groups.items() if size},
        "rows": rows,
        "left_out": len(order) - len(shown),
    }
