"""Image files that cannot be read: located, left out where that is asked for, and met before the training."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, Features, Image
from small_images import png

from nc_hf.data.augment import ImageTransform
from nc_hf.data.images import load_images
from nc_hf.data.splits import load_splits
from nc_hf.image_sets import image_sets
from nc_hf.recipe import load_recipe

SMALL = ImageTransform((16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def bomb() -> bytes:
    """A PNG of 20,000 x 20,000 pixels in its header."""
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + png()[33:]


BAD_FILES = {"empty": b"", "text": b"this is no image", "truncated": png()[:300], "bomb": bomb()}


def with_bad_file(tmp_path: Path, content: bytes | None) -> Dataset:
    rows = []
    for i in range(5):
        path = tmp_path / f"{i}.png"
        if i != 3:
            path.write_bytes(png(i))
        elif content is not None:
            path.write_bytes(content)
        rows.append({"bytes": None, "path": str(path)})
    features = Features({"image": Image(), "label": ClassLabel(3)})
    return Dataset.from_dict({"image": rows, "label": [0, 1, 2, 0, 1]}, features=features)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", [*BAD_FILES, "missing"])
@pytest.mark.parametrize("path", ["resident", "streamed"])
def test_bad_file_is_an_error_or_left_out(
    kind: str, path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = with_bad_file(tmp_path, BAD_FILES.get(kind))
    with pytest.raises(ValueError, match=r"image in row 3 \(.*3\.png\) cannot be read: .*on_bad_image: skip") as error:
        load_images(dataset, SMALL, input_path=path).__getitems__([0, 3])
    assert ("more than" in str(error.value) or "exceeds limit" in str(error.value)) == (kind == "bomb")
    images = load_images(dataset, SMALL, input_path=path, on_bad_image="skip")
    assert (len(images), images.skipped) == (4, 1)
    assert images.labels.tolist() == [0, 1, 2, 1]
    assert images.class_counts.tolist() == [1, 2, 1]
    expected = load_images(dataset.select([0, 1, 2, 4]), SMALL, input_path=path)
    assert (images[3]["pixel_values"] == expected[3]["pixel_values"]).all()
    assert expected.skipped == 0
    assert "1 unreadable image is left out" in caplog.text and "3.png" in caplog.text


def test_bad_bytes_are_located_by_row() -> None:
    features = Features({"image": Image(), "label": ClassLabel(3)})
    images = [{"bytes": png(), "path": None}, {"bytes": b"no", "path": None}, None]
    dataset = Dataset.from_dict({"image": images, "label": [0, 1, 2]}, features=features)
    for row, words in ((1, "cannot identify"), (2, "there is none")):
        with pytest.raises(ValueError, match=f"the image in row {row} cannot be read: {words}"):
            load_images(dataset, SMALL, input_path="streamed")[row]


@pytest.mark.parametrize("error", [EOFError("no more"), struct.error("unpack requires 4 bytes")])
def test_whatever_a_decoder_raises_names_the_file(error, tmp_path, monkeypatch):
    dataset = with_bad_file(tmp_path, png(3))
    opened = PIL.Image.open

    def damaged(source, *arguments):
        image = opened(source, *arguments)
        if np.asarray(image).tobytes() == np.asarray(opened(io.BytesIO(png(3)))).tobytes():
            raise error
        return image

    monkeypatch.setattr(PIL.Image, "open", damaged)
    assert load_images(dataset, SMALL, input_path="resident", on_bad_image="skip").skipped == 1
    with pytest.raises(ValueError, match=r"image in row 3 \(.*3\.png\) cannot be read"):
        load_images(dataset, SMALL, input_path="resident")


def test_images_to_evaluate_on_are_read_before_the_training(tmp_path):
    splits = {"train": with_bad_file(tmp_path, None).select([0, 1, 2, 4]), "test": with_bad_file(tmp_path, b"no")}
    recipe = load_recipe(None, ["--data.input_path", "streamed"])
    settings = {"size": (4, 4), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    with pytest.raises(ValueError, match=r"image in row 3 \(.*3\.png\) cannot be read"):
        image_sets(recipe, splits, settings)
    with pytest.raises(ValueError, match="none of 1 images can be read"):
        load_images(splits["test"].select([3]), SMALL, on_bad_image="skip")


def test_a_file_that_is_no_parquet_is_said(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(FileNotFoundError, match="'parquet'.*could not be loaded: ArrowInvalid: .*Parquet"):
        load_splits("parquet", data_dir=str(tmp_path), cache_dir=str(tmp_path.parent / "cache"))
