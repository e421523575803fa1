"""Noise on test images: of the asked strength and scale, and the same however the images are read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image
from hypothesis import given, settings
from hypothesis import strategies as st

from nc_hf import ImageTransform, load_classifier, load_images, save_pretrained
from nc_hf.measuring_trainer import MeasuringTrainer
from nc_hf.robustness import NoisyImages, noise_table

ROOT = Path(__file__).resolve().parents[1]
STD = (0.2, 0.25, 0.5)


@pytest.fixture(scope="module")
def images():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
    columns = {"image": [PIL.Image.fromarray(image) for image in pixels], "label": [k % 4 for k in range(24)]}
    features = Features({"image": Image(), "label": ClassLabel(names=list("abcd"))})
    transform = ImageTransform((32, 32), mean=(0.5, 0.4, 0.3), std=STD, augmentation="none")
    return load_images(Dataset.from_dict(columns, features=features), transform)


def noise_of(images, std: float, scale: str, indices: list[int], seed: int = 0) -> torch.Tensor:
    noisy = NoisyImages(images, std, scale, seed).__getitems__(indices)["pixel_values"]
    return noisy - images.__getitems__(indices)["pixel_values"]


@pytest.mark.parametrize(("scale", "divisors"), [("normalized", (1, 1, 1)), ("pixels", STD)])
def test_the_noise_has_the_asked_deviation(images, scale, divisors):
    noise = noise_of(images, 0.3, scale, list(range(24)))
    for channel, divisor in enumerate(divisors):
        values = noise[:, channel] * divisor
        # 24,576 draws: the standard error of their deviation is 0.0014, that of their mean 0.0019.
        assert values.std().item() == pytest.approx(0.3, abs=0.007)
        assert values.mean().item() == pytest.approx(0, abs=0.01)


@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(24)), size=st.integers(1, 24))
def test_the_noise_of_an_image_does_not_depend_on_its_batch(images, order, size):
    whole = NoisyImages(images, 0.2).__getitems__(list(range(24)))
    noisy = NoisyImages(images, 0.2)
    for start in range(0, 24, size):
        indices = order[start : start + size]
        batch = noisy.__getitems__(list(indices))
        assert torch.equal(batch["pixel_values"], whole["pixel_values"][list(indices)])
        assert torch.equal(batch["labels"], whole["labels"][list(indices)])


def test_images_seeds_and_strengths(images):
    noise = noise_of(images, 0.1, "normalized", [0, 1])
    assert not torch.allclose(noise[0], noise[1], atol=0.1)
    assert not torch.allclose(noise, noise_of(images, 0.1, "normalized", [0, 1], seed=1), atol=0.1)
    assert torch.allclose(noise_of(images, 0.2, "normalized", [0, 1]), 2 * noise, atol=1e-5)
    assert torch.equal(noise_of(images, 0.0, "pixels", [0, 1]), torch.zeros_like(noise))


def test_an_expected_value(images):
    """Of image 5 with seed 3: what numpy's generator of (3, 5) draws first."""
    first = np.random.default_rng((3, 5)).standard_normal(dtype=np.float32)
    noise = noise_of(images, 1.0, "pixels", [5], seed=3)
    assert noise[0, 0, 0, 0].item() == pytest.approx(first / STD[0], abs=1e-5)


def test_an_image_set_with_noise_keeps_its_labels_and_gives_single_images(images):
    noisy = NoisyImages(images, 0.1)
    assert len(noisy) == 24
    assert noisy.labels.tolist() == [k % 4 for k in range(24)]
    assert (noisy.class_counts.tolist(), list(noisy.class_names)) == ([6] * 4, list("abcd"))
    assert torch.equal(noisy[7]["pixel_values"], noisy.__getitems__([7])["pixel_values"][0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--noise-std", "-0.1"], "must be 0 or more, got -0.1"),
        (["--noise-std", "0", "nan"], "must be 0 or more, got nan"),
        (["--noise-std", "0.1", "--noise-seed", "-1"], "seed of the noise must be 0 or more, got -1"),
    ],
)
def test_noise_that_means_nothing_is_refused_before_a_model_is_read(script, words, message):
    with pytest.raises(ValueError, match=message):
        script("evaluate").main(["no/such/model", *words])


@pytest.mark.parametrize(
    "words",
    [["--noise-std", "a lot"], ["--noise-std"], ["--noise-scale", "loud"], ["--noise-scale", "pixels"], []],
)
def test_a_command_line_that_cannot_be_read_is_refused(script, words, capsys):
    with pytest.raises(SystemExit):
        script("evaluate").main(["no/such/model", *words] if words else [])
    assert "usage:" in capsys.readouterr().err


def test_an_unknown_scale_is_refused(images):
    with pytest.raises(ValueError, match="must be one of pixels, normalized, got 'loud'"):
        NoisyImages(images, 0.1, "loud")


def test_settings_from_a_command_line(script):
    words = ["m", "r.yaml", "--noise-std", "0", ".1", "--data.seed=3", "--seed", "-1"]
    options, overrides = script("evaluate").parse(words)
    assert (options.noise_std, options.noise_scale, options.noise_seed) == ([0.0, 0.1], "normalized", 0)
    assert overrides == ["r.yaml", "--data.seed=3", "--seed", "-1"]
    options, _ = script("evaluate").parse(["m", "--noise-std", "1", "--noise-scale=pixels", "--noise-seed", "4"])
    assert (options.noise_std, options.noise_scale, options.noise_seed) == ([1.0], "pixels", 4)


def test_the_table_has_a_column_a_deviation():
    table = noise_table({"std": [0.0, 0.25], "scale": "pixels", "seed": 0, "accuracy": {"base": [0.5, 0.125]}})
    header, row = (line.split() for line in table.splitlines())
    assert header == ["noise", "std", "(pixels)", "0", "0.25"]
    assert row == ["base", "50.00", "12.50"]


def test_evaluate_measures_noise_beside_the_rest(tmp_path, script, capsys):
    torch.manual_seed(0)
    model, _ = load_classifier("resnet20_cifar", 10, [str(k) for k in range(10)], image_size=16)
    save_pretrained(model, tmp_path / "model", heads={"base": model.fc.state_dict()}, class_counts=[10] * 10)
    command = [str(tmp_path / "model"), str(ROOT / "recipes/digits_lt/nc_drw_crt.yaml")]
    command += ["--noise-std", "0", "0.5", "--noise-seed=2", "--json", str(tmp_path / "found.json")]
    script("evaluate").main([*command, "--data.cache_dir", str(tmp_path / "cache")])
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    noise = found["noise"]
    assert (noise["std"], noise["scale"], noise["seed"]) == ([0.0, 0.5], "normalized", 2)
    clean, noisy = noise["accuracy"]["base"]
    assert clean == found["heads"]["base"]["accuracy"]
    assert 0 <= noisy <= 1 and f"{100 * noisy:.2f}" in shown


def test_heads_of_one_backbone_see_each_image_once(tmp_path, script, monkeypatch, capsys):
    torch.manual_seed(0)
    model, _ = load_classifier("resnet20_cifar", 10, [str(k) for k in range(10)], image_size=16)
    heads = {"base": model.fc.state_dict(), "crt": torch.nn.Linear(64, 10).state_dict()}
    save_pretrained(model, tmp_path / "model", heads=heads, class_counts=[10] * 10)
    passes, read = [], MeasuringTrainer._from_images
    monkeypatch.setattr(MeasuringTrainer, "_from_images", lambda *given: passes.append(1) or read(*given))
    command = [str(tmp_path / "model"), str(ROOT / "recipes/digits_lt/nc_drw_crt.yaml"), "--noise-std", "0", "0.5"]
    command += ["--json", str(tmp_path / "found.json"), "--data.cache_dir", str(tmp_path / "cache")]
    script("evaluate").main(command)
    assert len(passes) == 2  # of the clean images, which are those of no noise too, and of those with noise
    noise = json.loads((tmp_path / "found.json").read_text())["noise"]["accuracy"]
    assert noise["base"] != noise["crt"]
