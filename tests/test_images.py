"""Image sets and their transforms: equal pixels on every path, and no trace in the global random generators."""

from __future__ import annotations

import io
import logging
import random
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import timm.data
import torch
from datasets import ClassLabel, Dataset, Features, Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from nc_hf.data import images as images_module
from nc_hf.data.augment import ImageTransform, _scramble, cutout, draw_uniform, seeded
from nc_hf.data.images import ResidentImages, StreamedImages, decode_image, load_images

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def pixels(size: tuple[int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def labelled(rows: list[dict], labels: list[int] | None = None, num_classes: int = 3) -> Dataset:
    labels = [i % num_classes for i in range(len(rows))] if labels is None else labels
    features = Features({"image": Image(), "label": ClassLabel(num_classes=num_classes)})
    return Dataset.from_dict({"image": rows, "label": labels}, features=features)


def random_images(count: int = 12, sizes: tuple = ((32, 32),)) -> Dataset:
    rows = [encoded(PIL.Image.fromarray(pixels(sizes[i % len(sizes)], i))) for i in range(count)]
    return labelled(rows)


def transform(augmentation: str = "crop_flip", size: tuple[int, int] = (32, 32), **settings) -> ImageTransform:
    return ImageTransform(size, MEAN, STD, augmentation=augmentation, **settings)


def test_scramble_is_splitmix64() -> None:
    # The first outputs of the reference C code of SplitMix64 for the seed 1234567.
    state, gamma = 1234567, 0x9E3779B97F4A7C15
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    states = np.array([(state + i * gamma) % 2**64 for i in range(3)], dtype=np.uint64)
    assert _scramble(states).tolist() == expected


def test_draws_are_uniform_and_unrelated() -> None:
    draws, indices = np.meshgrid(np.arange(100), np.arange(100))
    numbers = draw_uniform(0, draws.ravel(), indices.ravel(), 3)
    assert numbers.shape == (10_000, 3)
    assert len(np.unique(numbers)) == numbers.size
    assert ((numbers >= 0) & (numbers < 1)).all()
    frequency = np.stack([np.histogram(column, 10, (0, 1))[0] for column in numbers.T])
    assert np.abs(frequency - 1000).max() < 150  # five standard deviations
    swapped = draw_uniform(0, indices.ravel(), draws.ravel(), 3)
    assert (swapped != numbers).any(axis=1).sum() == 9900  # all but where draw and index are equal
    for a, b in ((numbers[:, 0], numbers[:, 1]), (numbers[:-1, 0], numbers[1:, 0]), (numbers[:, 0], swapped[:, 0])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.05
    assert (draw_uniform(1, draws.ravel(), indices.ravel(), 3) != numbers).all()


@pytest.mark.parametrize("augmentation", ["none", "crop", "crop_flip"])
def test_batched_augmentation_equals_a_loop_over_pixels(augmentation: str) -> None:
    height, width, seed = 16, 24, 5
    source = np.stack([pixels((height, width), i) for i in range(6)])
    draws, indices = np.array([3, 14, 15, 92, 65, 35]), np.array([8, 9, 7, 9, 3, 2])
    actual = transform(augmentation, (height, width)).augment_batch(torch.from_numpy(source), seed, draws, indices)
    expected = source.copy()
    for i, (top, left, flip) in enumerate(draw_uniform(seed, draws, indices, 3)):
        if augmentation == "none":
            continue
        shift_y, shift_x = int(top * 5) - 2, int(left * 7) - 3  # an eighth of each side
        for y in range(height):
            for x in range(width):
                column = width - 1 - x if augmentation == "crop_flip" and flip < 0.5 else x
                inside = 0 <= y + shift_y < height and 0 <= column + shift_x < width
                expected[i, y, x] = source[i, y + shift_y, column + shift_x] if inside else 0
    assert np.array_equal(actual.numpy(), expected)


def test_crops_reach_every_offset_and_half_are_flipped() -> None:
    source = torch.arange(8 * 8, dtype=torch.uint8).view(1, 8, 8, 1).expand(2000, 8, 8, 3).contiguous() + 1
    views = transform("crop_flip", (8, 8)).augment_batch(source, 0, np.arange(2000), np.zeros(2000, dtype=np.int64))
    distinct, counts = np.unique(views.numpy().reshape(2000, -1), axis=0, return_counts=True)
    assert len(distinct) == 3 * 3 * 2
    assert counts.min() > 60 and counts.max() < 170  # 111 expected


@pytest.mark.parametrize("augmentation", ["none", "crop", "crop_flip"])
def test_streamed_equals_resident(augmentation: str) -> None:
    dataset = random_images(9, ((32, 32), (40, 56), (20, 16)))
    sets = [cls(dataset, transform(augmentation), seed=7) for cls in (ResidentImages, StreamedImages)]
    for keys in ([(4, 1), (2, 7), (8, 0), (2, 8)], [1, 5], [(0, 3), 0, (0, 4)]):
        resident, streamed = (images.__getitems__(keys) for images in sets)
        assert torch.equal(resident["pixel_values"], streamed["pixel_values"])
        assert torch.equal(resident["labels"], streamed["labels"])


@pytest.mark.parametrize("path", ["resident", "streamed"])
def test_batches_are_ready_for_the_model(path: str) -> None:
    dataset = labelled([encoded(PIL.Image.fromarray(pixels((32, 32), i))) for i in range(5)], [0, 2, 2, 3, 0], 5)
    images = load_images(dataset, transform("none"), input_path=path)
    assert len(images) == 5
    assert images.accepts_draws
    assert images.labels.tolist() == [0, 2, 2, 3, 0] and images.labels.dtype == np.int64
    assert images.class_counts.tolist() == [2, 0, 2, 1, 0] and images.class_counts.dtype == np.int64
    assert images.class_names == ["0", "1", "2", "3", "4"]
    batch = images.__getitems__([3, (1, 9)])
    assert batch["pixel_values"].shape == (2, 3, 32, 32) and batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"].is_contiguous(memory_format=torch.channels_last)
    assert batch["labels"].tolist() == [3, 2] and batch["labels"].dtype == torch.int64
    for row, index in enumerate((3, 1)):
        expected = (pixels((32, 32), index) / 255 - np.array(MEAN)) / np.array(STD)
        torch.testing.assert_close(
            batch["pixel_values"][row].permute(1, 2, 0), torch.from_numpy(expected).float(), rtol=0, atol=2e-6
        )
    one = images[3]
    assert one["pixel_values"].shape == (3, 32, 32)
    assert torch.equal(one["pixel_values"], batch["pixel_values"][0])
    assert one["labels"].shape == () and one["labels"] == 3
    assert images.collate(batch) is batch


@pytest.mark.parametrize("augmentation", ["crop_flip", "auto_augment", "resized_crop", "rand_augment"])
def test_augmentation_is_a_function_of_seed_draw_and_index(augmentation: str) -> None:
    dataset = random_images(6, ((40, 48),))
    images = StreamedImages(dataset, transform(augmentation), seed=1)
    keys = [(2, 10), (5, 11), (0, 12)]
    together = images.__getitems__(keys)["pixel_values"]
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    alone = torch.stack([images[key]["pixel_values"] for key in reversed(keys)]).flip(0)
    assert torch.equal(together, alone)
    assert not torch.equal(images[(2, 10)]["pixel_values"], images[(2, 11)]["pixel_values"])
    other = StreamedImages(dataset, transform(augmentation), seed=2)
    assert not torch.equal(other.__getitems__(keys)["pixel_values"], together)
    assert torch.equal(other.__getitems__([2, 5])["pixel_values"], images.__getitems__([2, 5])["pixel_values"])


@pytest.mark.parametrize("augmentation", ["crop_flip", "auto_augment", "rand_augment"])
def test_global_generators_are_left_alone(augmentation: str) -> None:
    def states() -> tuple:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    dataset = random_images(4)
    before = states()
    images = StreamedImages(dataset, transform(augmentation))
    images.__getitems__([(0, 1), 2, (3, 5)])
    assert states() == before
    with pytest.raises(RuntimeError), seeded(0):
        random.random()
        raise RuntimeError
    assert states() == before


def test_workers_give_the_same_batches() -> None:
    images = StreamedImages(random_images(8, ((40, 48),)), transform("rand_augment"), seed=3)
    keys = [[(i, i + 5), (7 - i, i)] for i in range(4)]
    here = [images.__getitems__(batch) for batch in keys]
    there = list(DataLoader(images, batch_sampler=keys, num_workers=2, collate_fn=images.collate))
    assert len(there) == 4
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a["pixel_values"], b["pixel_values"])
        assert torch.equal(a["labels"], b["labels"])


@pytest.mark.parametrize("size", [(32, 32), (48, 32)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_equals_timm(size: tuple[int, int], crop_pct: float, interpolation: str) -> None:
    image = PIL.Image.fromarray(pixels((70, 51), 0))
    expected = timm.data.create_transform(
        (3, *size), interpolation=interpolation, mean=MEAN, std=STD, crop_pct=crop_pct
    )(image)
    chosen = transform("none", size, crop_pct=crop_pct, interpolation=interpolation)
    actual = chosen.normalize(chosen.to_size(image)[None])[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("augmentation", ["resized_crop", "rand_augment"])
def test_large_scale_augmentations_follow_the_paper(augmentation: str) -> None:
    steps = [type(step).__name__ for step in transform(augmentation, (224, 224))._training.transforms]
    assert steps[:2] == ["RandomResizedCrop", "RandomHorizontalFlip"]
    if augmentation == "resized_crop":
        jitter = transform(augmentation)._training.transforms[2]
        assert steps[2:] == ["ColorJitter"]
        assert jitter.brightness == jitter.contrast == jitter.saturation == (0.6, 1.4) and jitter.hue is None
        return
    assert steps[2:] == ["RandomApply", "RandomGrayscale", "RandAugment"]
    _, _, apply, gray, rand_augment = transform(augmentation, (224, 224))._training.transforms
    assert (apply.p, gray.p, rand_augment.num_layers) == (0.8, 0.2, 2)
    for op in rand_augment.ops:
        assert (op.magnitude, op.magnitude_std) == (10, 0.5)
        assert (op.hparams["translate_const"], op.hparams["img_mean"]) == (100, (124, 116, 104))


def test_unknown_augmentation_is_refused() -> None:
    with pytest.raises(ValueError, match="crop_flip.*'flip'"):
        transform("flip")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    if mode == "I;16":
        image = PIL.Image.fromarray(gray.astype(np.uint16) * 257)
        assert image.mode == mode
    else:
        image = PIL.Image.fromarray(gray).convert("RGB").convert(mode)
    dataset = labelled([encoded(image, "TIFF" if mode == "CMYK" else "PNG")])
    for path in ("resident", "streamed"):
        images = load_images(dataset, transform("none", (16, 16)), input_path=path)
        actual = images._images(np.array([0]), np.array([-1]))[0].numpy()
        assert actual.shape == (16, 16, 3)
        expected = (gray > 127) * 255 if mode == "1" else gray
        error = np.abs(actual.astype(int) - expected[..., None].astype(int))
        # One bit is dithered and a palette coarse, so only their level is compared.
        assert error.mean() < (100 if mode == "1" else 30 if mode == "P" else 1)


def test_a_gray_map_of_16_bits_is_scaled_and_an_image_of_16_bits_is_turned() -> None:
    gray = np.arange(32 * 8, dtype=np.uint16).reshape(16, 16) * 256 + 200
    gray_map = {"bytes": b"P5 16 16 65535\n" + gray.astype(">u2").tobytes(), "path": None}
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    turned = encoded(PIL.Image.fromarray(gray), exif=exif)
    pixels = ResidentImages(labelled([gray_map, turned]), transform("none", (16, 16))).pixels
    assert np.array_equal(pixels[0, ..., 0], gray >> 8)
    assert np.array_equal(pixels[1, ..., 0], np.rot90(gray >> 8, -1))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_32_bits_are_refused(dtype: type) -> None:
    file = io.BytesIO()
    PIL.Image.fromarray(np.full((16, 16), 0.5, dtype)).save(file, "TIFF")
    with pytest.raises(ValueError, match="32-bit numbers .mode [IF]. of no known range; save it with 8 bits"):
        ResidentImages(labelled([{"bytes": file.getvalue(), "path": None}]), transform("none", (16, 16)))


def test_images_of_16_bits_are_scaled_and_told(caplog: pytest.LogCaptureFixture) -> None:
    images_module._tell_of_16_bits.cache_clear()
    gray = np.arange(256, dtype=np.uint16).reshape(16, 16) * 256 + 200
    row = encoded(PIL.Image.fromarray(gray))
    pixels = ResidentImages(labelled([row] * 20), transform("none", (16, 16))).pixels
    assert (pixels[..., 1].numpy() == gray // 256).all()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) < 20  # at most once by each of the threads
    assert "16 bits are scaled down to 8" in told[0] and "clip" in told[0]


def test_images_are_turned_as_their_exif_says() -> None:
    image = PIL.Image.fromarray(pixels((16, 16), 1))
    exif = PIL.Image.Exif()
    exif[0x0112] = 3  # upside down
    images = ResidentImages(labelled([encoded(image, exif=exif), encoded(image)]), transform("none", (16, 16)))
    assert torch.equal(images.pixels[0], images.pixels[1].flip(0, 1))


def test_columns_can_be_named() -> None:
    names = Features({"img": Image(), "fine": ClassLabel(num_classes=5), "coarse": ClassLabel(num_classes=2)})
    images = [encoded(PIL.Image.fromarray(pixels((8, 8), i))) for i in range(3)]
    dataset = Dataset.from_dict({"img": images, "fine": [4, 0, 2], "coarse": [1, 0, 1]}, features=names)
    with pytest.raises(ValueError, match="found fine, coarse. Name it by `label_column`"):
        load_images(dataset, transform("none", (8, 8)))
    found = load_images(dataset, transform("none", (8, 8)), label_column="coarse")
    assert found.labels.tolist() == [1, 0, 1] and len(found.class_names) == 2
    assert load_images(dataset, transform("none", (8, 8)), label_column="fine").labels.tolist() == [4, 0, 2]


def test_images_in_an_archive_are_read_where_they_are(tmp_path: Path) -> None:
    image = PIL.Image.fromarray(pixels((5, 7), 1))
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("owl/1.png", encoded(image)["bytes"])
    path = f"zip://owl/1.png::{tmp_path / 'train.zip'}"  # as `datasets` names it
    assert np.array_equal(decode_image({"bytes": None, "path": path}, "row 0"), image)
    with pytest.raises(ValueError, match="the image in row 0 .*owl/2.png.* cannot be read"):
        decode_image({"bytes": None, "path": path.replace("1.png", "2.png")}, "row 0")


def test_one_pixel_is_enough() -> None:
    images = ResidentImages(labelled([encoded(PIL.Image.new("RGB", (1, 1), (10, 20, 30)))]), transform("none"))
    assert images.pixels.unique(dim=2).flatten().unique().tolist() == [10, 20, 30]


def test_path_is_chosen_by_size_and_augmentation(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = random_images(4)
    with caplog.at_level(logging.INFO, "nc_hf"):
        assert isinstance(load_images(dataset, transform("crop_flip")), ResidentImages)
        assert "input path resident (chosen by size and augmentation): 4 images" in caplog.text
        assert isinstance(load_images(dataset, transform("auto_augment")), ResidentImages)
        assert isinstance(load_images(dataset, transform("rand_augment")), StreamedImages)
        assert isinstance(load_images(dataset, transform("crop_flip"), input_path="streamed"), StreamedImages)
        assert "input path streamed (as asked for)" in caplog.text
    needed = 4 * 32 * 32 * 3
    cases = [
        ("1", 4, ResidentImages),
        ("1", 3.99, StreamedImages),
        ("2", 8, ResidentImages),
        ("2", 7.99, StreamedImages),
    ]
    for processes, times, expected in cases:  # processes of this machine, which share its memory
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        memory = type("Memory", (), {"available": int(times * needed)})
        monkeypatch.setattr(images_module.psutil, "virtual_memory", lambda memory=memory: memory)
        assert isinstance(load_images(dataset, transform("crop")), expected)


def test_resident_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="resident.*'rand_augment'.*streamed"):
        load_images(random_images(2), transform("rand_augment"), input_path="resident")
    with pytest.raises(ValueError, match="`input_path`.*'disk'"):
        load_images(random_images(2), transform(), input_path="disk")
    with pytest.raises(ValueError, match="`on_bad_image`.*'ignore'"):
        load_images(random_images(2), transform(), on_bad_image="ignore")


def test_cutout_paints_one_square_black() -> None:
    generator = np.random.default_rng(0)
    painted = cutout(torch.full((200, 32, 40, 3), 255, dtype=torch.uint8), generator.random((200, 2)))
    areas, centers = set(), set()
    for image in painted:
        black = image.numpy().sum(axis=2) == 0
        rows, columns = np.flatnonzero(black.any(axis=1)), np.flatnonzero(black.any(axis=0))
        assert black.sum() == len(rows) * len(columns)
        assert rows[-1] - rows[0] + 1 == len(rows) <= 16 and columns[-1] - columns[0] + 1 == len(columns) <= 16
        areas.add(int(black.sum()))
        centers |= {int(columns[0]) + 8} if len(columns) == 16 else set()
    assert max(areas) == 16 * 16 and min(areas) <= 9 * 9  # whole in the middle, a quarter in a corner
    assert max(centers) > 30  # along the longer side too


def test_auto_augment_is_crop_flip_policy_cutout() -> None:
    images = torch.stack([torch.from_numpy(pixels((32, 32), i)) for i in range(20)])
    draws, indices = np.arange(20), np.arange(20)
    augmented = transform("auto_augment").augment_batch(images.clone(), 5, draws, indices)
    numbers, policy = draw_uniform(5, draws, indices, 6), v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    cropped = transform("crop_flip").augment_batch(images.clone(), 5, draws, indices)
    changed = []
    for image, number in zip(cropped, numbers, strict=True):
        with seeded(int(number[3] * 2**32)):
            changed.append(torch.from_numpy(np.array(policy(PIL.Image.fromarray(image.numpy())))))
    assert sum(torch.equal(one, other) for one, other in zip(changed, cropped, strict=True)) < 10
    assert torch.equal(augmented, cutout(torch.stack(changed), numbers[:, 4:]))
