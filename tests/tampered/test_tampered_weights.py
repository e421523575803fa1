"""Weights that are damaged, missing, misshapen or not finite are refused with the reason."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from tampering import SIZES, assert_refused, change, first_of_backbone, head_of
from transformers import ViTConfig, ViTModel

from nc_hf import load_classifier

DAMAGES = [
    *("truncated", "empty", "huge header", "header over 100 MB", "header longer than the file"),
    *("name twice", "offsets", "overlap", "shape", "type"),
]


def damaged(content: bytes, kind: str) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    if kind == "truncated":
        return content[:-10]
    if kind == "empty":
        return b""
    if kind == "huge header":
        return struct.pack("<Q", 2**60) + content[8:]
    if kind == "header over 100 MB":
        return struct.pack("<Q", 101_000_000) + b"{}" + b" " * 101_000_000
    if kind == "header longer than the file":
        return struct.pack("<Q", len(content)) + content[8:]
    if kind == "name twice":
        one, other = (json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [k, k + 1]}}) for k in (0, 1))
        header = f"{one[:-1]},{other[1:]}".encode()
        return struct.pack("<Q", len(header)) + header + b"xx"
    first = next(name for name in header if name != "__metadata__")
    if kind == "offsets":
        header[first]["data_offsets"] = [0, 2**40]
    if kind == "shape":
        header[first]["shape"] = [3, 1_000_000]
    if kind == "type":
        header[first]["dtype"] = "F1000"
    if kind == "overlap":
        header["extra"] = header[first]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


@pytest.mark.parametrize("file", ["model.safetensors", "nc_heads.safetensors"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_weights_are_refused(of_timm, file, kind):
    (of_timm / file).write_bytes(damaged((of_timm / file).read_bytes(), kind))
    assert_refused(of_timm, f"{file} is no whole safetensors file")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(folder, value):
    for file in ("model.safetensors", "nc_heads.safetensors"):
        good = load_file(folder / file)
        name = sorted(good)[-1]
        save_file({**good, name: torch.full_like(good[name], value)}, folder / file)
        assert_refused(folder, f"{file} has a tensor that is not finite: {name}")
        save_file(good, folder / file)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_odd_types_of_tensors_are_refused(folder, dtype):
    good = load_file(folder / "model.safetensors")
    name = sorted(good)[-1]
    save_file({**good, name: good[name].to(dtype)}, folder / "model.safetensors")
    assert_refused(folder, f"model.safetensors has a tensor of type {dtype}: {name}")


@pytest.mark.parametrize("tensor", [None, torch.zeros(1, 2, 3)])
@pytest.mark.parametrize("num_labels", [None, 4, 7])
def test_missing_and_misshapen_tensors_are_refused(folder, tensor, num_labels):
    name = first_of_backbone(folder)
    change(folder, {name: tensor})
    assert_refused(folder, name.replace(".", "[.]"))
    with pytest.raises(ValueError, match=name.replace(".", "[.]")):
        load_classifier(str(folder), num_labels)


@pytest.mark.parametrize("tensor", [None, torch.zeros(9)])
def test_a_head_without_its_weights_is_refused(folder, tensor):
    name = f"{head_of(folder)}.bias"
    change(folder, {name: tensor})
    assert_refused(folder, name)
    with pytest.raises(ValueError, match=name):
        load_classifier(str(folder), 4)


def test_a_backbone_of_transformers_gets_a_head_where_one_is_asked_for(tmp_path):
    ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=8)).save_pretrained(tmp_path)
    assert_refused(tmp_path, "lacks the weights of a head for its 2 classes: classifier.bias.* Give `num_labels`")
    for num_labels in (2, 5):
        assert load_classifier(str(tmp_path), num_labels)[0].classifier.weight.shape == (num_labels, 16)


def test_tensors_too_many_are_refused(folder):
    change(folder, {"evil.weight": torch.zeros(3)})
    assert_refused(folder, "evil.weight")
