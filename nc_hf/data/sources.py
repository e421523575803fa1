"""Where the images of a benchmark come from: a folder with any of its usual files, or the Hub.

Files are recognised by what is in them, never by their names. Every source gives `{"train": …, "test": …}` with the
columns `image`, encoded as found, and `label`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Image, Value
from datasets.table import InMemoryTable

from nc_hf.data.columns import dataset_labels

CIFAR_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Benchmark:
    """What tells a benchmark's files from others.

    Args:
        name: for messages.
        hub_id: data set on the Hub.
        class_names: K names in label order.
        rows: images of the `train` and the `test` split.
        label_column: of parquet files.
        packs: row counts of thinned-out training files with a column `lt_rank`, by the smallest ratio they can give.
        record_labels: label bytes before the pixels of a binary CIFAR record; the last is the label.
        blocks: of training images that some sources have in another order than the official one: the first 16 digits
            of the sha256 of each block's labels as bytes, in the official order.
    """

    name: str
    hub_id: str
    class_names: tuple[str, ...]
    rows: dict[str, int]
    label_column: str = "label"
    packs: dict[int, float] = field(default_factory=dict)
    record_labels: int | None = None
    blocks: tuple[str, ...] = ()


def folder_source(benchmark: Benchmark, data_dir: Path) -> dict[str, Dataset]:
    """The splits of a benchmark from a folder of parquet files, official binary archives or IDX files.

    Raises:
        FileNotFoundError: when a split is not there; the message says what was looked for and what was found.
        ValueError: for a file that cannot be read.
    """
    if not data_dir.is_dir():
        raise FileNotFoundError(f"`data_dir` {data_dir} is no folder. It must hold the images of {benchmark.name}.")
    splits = _from_parquet(benchmark, data_dir)
    if set(splits) != set(benchmark.rows) and benchmark.record_labels is not None:
        splits = _from_binary_cifar(benchmark, data_dir) or splits
    if set(splits) != set(benchmark.rows) and benchmark.record_labels is None:
        splits = _from_idx(benchmark, data_dir) or splits
    missing = [split for split in benchmark.rows if split not in splits]
    if missing:
        wanted = " and ".join(f"{benchmark.rows[split]:,} images ({split})" for split in missing)
        other = "the official binary archive or its .bin files" if benchmark.record_labels is not None else "IDX files"
        found = ", ".join(sorted(path.name for path in data_dir.iterdir())[:12]) or "nothing"
        pickles = " The pickled archive is not read; use the binary one." if any(data_dir.glob("*python*")) else ""
        raise FileNotFoundError(
            f"{data_dir} does not have {benchmark.name}: looked for parquet files with a column "
            f"{benchmark.label_column!r} of {len(benchmark.class_names)} classes "
            f"({', '.join(benchmark.class_names[:3])}, …) and {wanted}, or {other}; found {found}.{pickles}"
        )
    return splits


def hub_source(benchmark: Benchmark, cache_dir: str | None) -> dict[str, Dataset]:
    """The splits of a benchmark from the Hub, with encoded images.

    Raises:
        FileNotFoundError: when the Hub cannot be reached and the data set is not in its cache.
    """
    from datasets import load_dataset

    try:
        loaded = load_dataset(benchmark.hub_id, cache_dir=cache_dir)
    except Exception as error:  # the client has many kinds of them; all mean that there are no images
        raise FileNotFoundError(
            f"the images of {benchmark.name} could not be had from {benchmark.hub_id!r} on the Hub "
            f"({type(error).__name__}: {str(error)[:200]}). With a copy of them, set data_dir to its folder."
        ) from error
    splits = {}
    for split in benchmark.rows:
        dataset = loaded[split]
        image = next(name for name, feature in dataset.features.items() if isinstance(feature, Image))
        dataset = dataset.select_columns([image, benchmark.label_column])
        splits[split] = dataset.rename_columns({image: "image", benchmark.label_column: "label"})
    return splits


def official_order(dataset: Dataset, blocks: tuple[str, ...]) -> Dataset:
    """A training set with its blocks in the official order; as it is where they are not recognised by their labels.

    The Hub's CIFAR-10 follows the order of the files in the archive, which is not that of their numbers.
    """
    if not blocks:
        return dataset
    labels = dataset_labels(dataset, "label")[0].astype(np.uint8)
    size = len(labels) // len(blocks)
    starts = range(0, len(blocks) * size, size)
    found = {hashlib.sha256(labels[start : start + size].tobytes()).hexdigest()[:16]: start for start in starts}
    if set(found) != set(blocks) or tuple(found) == blocks:
        return dataset
    return dataset.select(np.concatenate([np.arange(found[block], found[block] + size) for block in blocks]))


def make_dataset(images: pa.Array, labels: np.ndarray, class_names: list[str], **extra: np.ndarray) -> Dataset:
    """A data set of encoded images `struct<bytes, path>` with labels and further integer columns."""
    features = Features({"image": Image(), "label": ClassLabel(names=class_names)})
    for name in extra:
        features[name] = Value("int64")
    columns = {"image": images, "label": labels.astype(np.int64), **extra}
    table = pa.table(columns).cast(features.arrow_schema)
    return Dataset(InMemoryTable(table), info=DatasetInfo(features=features))


def encode_images(pixels: Iterator[np.ndarray]) -> pa.Array:
    """Lossless PNG of uint8 images (H, W) or (H, W, 3)."""
    rows = []
    for image in pixels:
        buffer = io.BytesIO()
        PIL.Image.fromarray(image).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    return pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))


def _from_parquet(benchmark: Benchmark, data_dir: Path) -> dict[str, Dataset]:
    """Splits among all parquet files below a folder; shards of one split lie side by side."""
    shards: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(data_dir.rglob("*.parquet")):
        try:
            features = Features.from_arrow_schema(pq.read_schema(path))
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} cannot be read: {error}. Is its download complete?") from error
        label = features.get(benchmark.label_column)
        if isinstance(label, ClassLabel) and _letters(label.names) == _letters(benchmark.class_names):
            shards[f"{path.parent}/{path.name.split('-00')[0]}"].append(path)
    splits = {}
    for paths in shards.values():
        rows = sum(pq.read_metadata(path).num_rows for path in paths)
        split = next((name for name, count in benchmark.rows.items() if count == rows), None)
        if split is None and rows in benchmark.packs and "lt_rank" in pq.read_schema(paths[0]).names:
            split = "train" if "train" not in splits else None
        if split is not None:
            splits[split] = _read_parquet(benchmark, paths)
    return splits


def _letters(names: Iterable[str]) -> list[str]:
    """Names without case, spaces and signs, in which copies of one data set differ."""
    return ["".join(letter for letter in name.lower() if letter.isalnum()) for name in names]


def _read_parquet(benchmark: Benchmark, paths: list[Path]) -> Dataset:
    table = pa.concat_tables([pq.read_table(path) for path in paths])
    features = Features.from_arrow_schema(table.schema)
    if "lt_rank" in features:
        table = table.sort_by("index")  # the official order, in which the whole data set would be thinned out
    image = next(name for name, feature in features.items() if isinstance(feature, Image))
    extra = {name: table.column(name).to_numpy() for name in ("lt_rank", "index") if "lt_rank" in table.column_names}
    labels = table.column(benchmark.label_column).to_numpy()
    return make_dataset(table.column(image).combine_chunks(), labels, list(benchmark.class_names), **extra)


def _from_binary_cifar(benchmark: Benchmark, data_dir: Path) -> dict[str, Dataset]:
    """Splits from records of label bytes and 3072 pixels, in `.bin` files or a `.tar.gz` of them."""
    files = {path.name: path.read_bytes() for path in sorted(data_dir.rglob("*.bin"))}
    if not files:
        for archive in sorted(data_dir.glob("*.tar.gz")):
            try:
                with tarfile.open(archive) as tar:
                    members = sorted((m for m in tar if m.isfile() and m.name.endswith(".bin")), key=lambda m: m.name)
                    files |= {Path(member.name).name: tar.extractfile(member).read() for member in members}
            except (tarfile.TarError, OSError, EOFError) as error:
                raise ValueError(f"{archive} cannot be read: {error}. Is its download complete?") from error
    record = benchmark.record_labels + CIFAR_PIXELS
    contents = {"train": b"", "test": b""}
    for name, content in files.items():
        if len(content) % record == 0:
            contents["test" if "test" in name else "train"] += content
    splits = {}
    for split, content in contents.items():
        if len(content) == benchmark.rows[split] * record:
            records = np.frombuffer(content, np.uint8).reshape(-1, record)
            pixels = records[:, benchmark.record_labels :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            labels = records[:, benchmark.record_labels - 1]
            splits[split] = make_dataset(encode_images(iter(pixels)), labels, list(benchmark.class_names))
    return splits


def _from_idx(benchmark: Benchmark, data_dir: Path) -> dict[str, Dataset]:
    """Splits from pairs of gzipped IDX files (the format of MNIST)."""
    images, labels, found = {}, {}, {}
    for path in sorted(data_dir.rglob("*.gz")):
        with gzip.open(path) as stream:
            content = stream.read(3)
            if content != b"\0\0\x08":  # the mark of bytes in IDX
                continue
            content += stream.read()
        shape = struct.unpack(f">{content[3]}I", content[4 : 4 + 4 * content[3]])
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)
        split = next((name for name, count in benchmark.rows.items() if count == shape[0]), None)
        if split is not None:
            of_kind = images if array.ndim == 3 else labels
            other = found.setdefault((split, array.ndim), path)
            if other != path and not np.array_equal(of_kind[split], array):
                raise ValueError(
                    f"{other} and {path} could both be the {split} split of {benchmark.name}: MNIST's files are of "
                    "the same form. Give the folder of one of them as data_dir."
                )
            of_kind[split] = array
    names = list(benchmark.class_names)
    return {s: make_dataset(encode_images(iter(images[s])), labels[s], names) for s in images if s in labels}
