"""Long-tailed splits on the Hub: parquet with a card that says what was drawn and how to check it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from huggingface_hub import CommitOperationAdd, DatasetCard, DatasetCardData, HfApi
from huggingface_hub.errors import HfHubHTTPError

from nc_hf.card_block import escaped, marked, merge_cards
from nc_hf.data.long_tail import class_counts
from nc_hf.data.provenance import LONG_TAIL_CITATION, PROVENANCE
from nc_hf.publishing import MOVED_ON
from nc_hf.recipe import DataConfig

TEMPLATE = Path(__file__).with_name("dataset_card_template.md")
FACTS = "split.json"
MOST_ROWS = 20  # of classes in a table; of more, the first and last ten
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def config_name_for(data: DataConfig) -> str:
    """The configuration's name on the Hub: `r100`, `r10-step`, `r100-seed1`, or `balanced`."""
    if data.imbalance_ratio is None:
        return "balanced"
    profile = "" if data.profile == "exponential" else f"-{data.profile}"
    return f"r{data.imbalance_ratio:g}{profile}" + (f"-seed{data.seed}" if data.seed else "")


def push_splits(
    splits: DatasetDict,
    repo_id: str,
    *,
    config_name: str,
    dataset: str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Push splits as parquet with a card; other configurations and a person's words in the README stay.

    Args:
        splits: of `load_splits`.
        repo_id: `"user/name"`.
        config_name: under which `load_dataset` finds these splits.
        dataset: name of the benchmark that they were drawn from, where it is one of ours.
        private: visibility of a new repository.
        revision: the branch; main when None.
        create_pr: open a pull request instead of committing to the branch.

    Returns:
        The URL of the data set, or of the pull request.
    """
    options = {"config_name": config_name, "private": private, "revision": revision, "create_pr": create_pr}
    try:
        commit = splits.push_to_hub(repo_id, **options)
    except HfHubHTTPError as error:
        if error.response.status_code != MOVED_ON:
            raise
        commit = splits.push_to_hub(repo_id, **options)  # somebody else was faster; the shards are there already
    api, revision = HfApi(), commit.pr_revision or revision
    place = {"repo_id": repo_id, "repo_type": "dataset", "revision": revision}
    facts = split_facts(splits, config_name)
    files = [name for name in api.list_repo_files(**place) if name.endswith(f"/{FACTS}")]
    known = [json.loads(Path(api.hf_hub_download(filename=name, **place)).read_text()) for name in files]
    every = sorted([facts, *(other for other in known if other["name"] != config_name)], key=lambda one: one["name"])
    readme = Path(api.hf_hub_download(filename="README.md", **place)).read_text(encoding="utf-8")
    card = merge_cards(dataset_card(every, repo_id, dataset), readme)
    operations = [
        CommitOperationAdd(f"{config_name}/{FACTS}", (json.dumps(facts, indent=1) + "\n").encode()),
        CommitOperationAdd("README.md", card.encode()),
    ]
    api.create_commit(operations=operations, commit_message=f"Card of {config_name}", **place)
    return commit.pr_url or str(commit.repo_url)


def dataset_card(facts: Sequence[Mapping[str, Any]], repo_id: str, dataset: str | None = None) -> str:
    """The README of a data set's repository.

    Args:
        facts: `split_facts` of each configuration.
        repo_id: `"user/name"`.
        dataset: name of the benchmark that they were drawn from, where it is one of ours.
    """
    known = PROVENANCE.get(dataset or "")
    largest = max(config["images"] for config in facts)
    data = DatasetCardData(
        pretty_name=repo_id.split("/")[-1],
        license=known.license if known else None,
        task_categories=["image-classification"],
        size_categories=[next((label for size, label in SIZES if largest < size), "n>1M")],
        source_datasets=[known.hub_id] if known and known.hub_id else None,
        tags=["long-tailed", "class-imbalance"],
    )
    card = DatasetCard.from_template(
        card_data=data,
        template_str=TEMPLATE.read_text(encoding="utf-8"),
        title=escaped(repo_id.split("/")[-1]),
        repo_id=repo_id,
        configs=[_with_rows(config) for config in facts],
        exponential=any("exponential" in config["description"] for config in facts),
        license=known.license if known else None,
        source_title=known.title if known else "their source",
        citations=[*([known.citation] if known else []), LONG_TAIL_CITATION],
    )
    return marked(str(card))


def split_facts(splits: DatasetDict, config_name: str) -> dict[str, Any]:
    """What is published beside the parquet files of a configuration: names, counts and how it was drawn.

    Args:
        splits: of `load_splits`.
        config_name: of the configuration.
    """
    train, test = splits["train"], splits.get("test")
    facts = {"name": config_name, "class_names": train.features["label"].names}
    facts |= {"train_counts": class_counts(train, "label").tolist(), "images": len(train)}
    if test is not None:
        facts |= {"test_counts": class_counts(test, "label").tolist(), "test_images": len(test)}
    facts["description"] = train.info.description or f"{len(train):,} training images"
    return facts | {"has_index": "index" in train.column_names}


def _with_rows(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts with what the template shows of them."""
    counts, names = facts["train_counts"], facts["class_names"]
    tests = facts.get("test_counts", ["–"] * len(names))
    rows = [
        {"name": escaped(name), "train": train, "test": test}
        for name, train, test in zip(names, counts, tests, strict=True)
    ]
    shown = rows if len(rows) <= MOST_ROWS else [*rows[: MOST_ROWS // 2], *rows[-MOST_ROWS // 2 :]]
    sizes = {"classes": len(names), "largest": max(counts), "smallest": min(counts)}
    return {**facts, **sizes, "rows": shown, "left_out": len(rows) - len(shown)}
