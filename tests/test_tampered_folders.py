"""Folders that somebody tampered with are refused with the reason, and none of their code is run."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTModel

from nc_hf import load_classifier, load_pretrained, save_pretrained
from nc_hf.models.saved_folder import WEIGHTS

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for kind in ("timm", "transformers"):
        if kind == "timm":
            model, _ = load_classifier("test_resnet", 4)
            heads = {"base": model.fc.state_dict()}
        else:
            model = ViTForImageClassification(ViTConfig(**SIZES, image_size=32, patch_size=8, num_labels=4))
            heads = {"base": model.classifier.state_dict()}
        processor = None if kind == "timm" else ViTImageProcessor(size={"height": 32, "width": 32})
        folder = tmp_path_factory.mktemp("honest") / kind
        folders[kind] = save_pretrained(model, folder, heads=heads, image_processor=processor)
    return folders


@pytest.fixture(params=["timm", "transformers"])
def folder(honest, request, tmp_path) -> Path:
    return Path(shutil.copytree(honest[request.param], tmp_path / "model"))


@pytest.fixture
def of_timm(honest, tmp_path) -> Path:
    return Path(shutil.copytree(honest["timm"], tmp_path / "model"))


@pytest.fixture
def of_transformers(honest, tmp_path) -> Path:
    return Path(shutil.copytree(honest["transformers"], tmp_path / "model"))


@pytest.fixture
def in_shards(of_transformers) -> Path:
    ViTForImageClassification.from_pretrained(of_transformers).save_pretrained(of_transformers, max_shard_size="8KB")
    (of_transformers / "model.safetensors").unlink(missing_ok=True)
    assert len(list(of_transformers.glob("model-*.safetensors"))) > 1
    return of_transformers


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def assert_refused(folder: Path, message: str, error: type[Exception] = ValueError) -> None:
    for load in (load_classifier, load_pretrained):
        with pytest.raises(error, match=message):
            load(str(folder))


def head_of(folder: Path) -> str:
    return "fc" if "architecture" in json.loads((folder / "config.json").read_text()) else "classifier"


def test_honest_folders_open(folder):
    assert load_classifier(str(folder)) and load_pretrained(folder, head="base")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.pth", "model.pth", "weights.bin"])
def test_pickled_weights_are_not_opened(folder, tmp_path, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "made")))
    assert_refused(folder, r"Weights in a pickle file are not loaded.* convert it: safetensors.torch.save_file")
    assert not (tmp_path / "made").exists()


def test_an_index_does_not_make_timm_take_the_pickle(of_timm, tmp_path):
    (of_timm / "model.safetensors").rename(of_timm / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"fc.bias": "model-00001-of-00001.safetensors"}}
    (of_timm / "model.safetensors.index.json").write_text(json.dumps(index))
    (of_timm / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "made")))
    assert_refused(of_timm, "has no model.safetensors. Weights in a pickle file are not loaded")
    assert not (tmp_path / "made").exists()


def test_a_pickle_beside_good_weights_is_left_alone(folder, tmp_path):
    expected = load_classifier(str(folder))[0].state_dict()
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt"):
        (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "made")))
    for load in (load_classifier, load_pretrained):
        found = load(str(folder))[0].state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not (tmp_path / "made").exists()


def test_code_of_a_repository_is_never_run(folder, tmp_path):
    (folder / "modeling_evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'made')!r})\nEvil = object")
    names = ("AutoConfig", "AutoModelForImageClassification", "AutoImageProcessor")
    code = {"auto_map": {name: "modeling_evil.Evil" for name in names}}
    edit(folder, lambda config: config.update(code))
    if (settings := folder / "preprocessor_config.json").exists():
        settings.write_text(json.dumps(json.loads(settings.read_text()) | code))
    assert load_classifier(str(folder)) and load_pretrained(str(folder))
    edit(folder, lambda config: config.update(model_type="evil") or config.pop("architecture", None))
    assert_refused(folder, "of the type 'evil', which this transformers does not know, and code .* is not run")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "entry",
    [
        {"transformers_weights": "adapter_model.bin"},
        {"transformers_weights": "other.safetensors"},
        {"configuration_files": ["config.4.0.0.json"]},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"attn_implementation": "evil/kernel"},
        {"_attn_implementation": "evil/kernel@main:attention"},
        {"backbone_config": {"sub": [{"experts_implementation": "evil/kernel"}]}},
    ],
)
def test_entries_that_lead_to_other_files_or_code_are_refused(folder, entry):
    edit(folder, lambda config: config.update(entry))
    assert_refused(folder, "config.json has .* not accepted")


def test_an_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/model"}))
    assert_refused(folder, "holds an adapter, which names a model of its own. Merge it")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pretrained", True),
        ("pretrained_cfg", "x"),
        ("pretrained_strict", False),
        ("pretrained_file", "/etc/passwd"),
        ("pretrained_cfg_overlay", {"file": "/etc/passwd"}),
        ("checkpoint_path", "/tmp/evil.pth"),
        ("cache_dir", "/tmp"),
        ("scriptable", True),
        ("device", "meta"),
        ("features_only", True),
        ("model_cfg", "x"),
        ("act_layer", {"module": "os"}),
        ("block_args", [{"a": 1}]),
        ("img_size", [[32, 32]]),
    ],
)
def test_odd_model_arguments_are_refused(of_timm, name, value):
    edit(of_timm, lambda config: config["model_args"].update({name: value}))
    assert_refused(of_timm, f"has the model argument {name}=.* not accepted")


@pytest.mark.parametrize("name", ["url", "hf_hub_id", "file", "custom_load", "evil"])
def test_arguments_that_the_architecture_does_not_have_are_refused(of_timm, name):
    edit(of_timm, lambda config: config["model_args"].update({name: "evil/model"}))
    assert_refused(of_timm, f"timm does not open .* as test_resnet: .*{name}")


@pytest.mark.parametrize("key", ["model_args", "pretrained_cfg"])
@pytest.mark.parametrize("value", ["x", [], [1]])
def test_settings_that_are_no_object_are_refused(folder, key, value):
    edit(folder, lambda config: config.update({key: value}))
    assert_refused(folder, f"must have an object as {key}, found")


@pytest.mark.parametrize("name", ["custom_load", "state_dict"])
def test_odd_settings_of_weights_are_refused(of_timm, name):
    edit(of_timm, lambda config: config["pretrained_cfg"].update({name: "x"}))
    assert_refused(of_timm, f"has pretrained_cfg.{name}, which is not accepted")


def test_other_places_of_weights_are_not_followed(of_timm):
    expected = load_classifier(str(of_timm))[0].state_dict()
    settings = {"file": "/nowhere.pth", "url": "http://127.0.0.1:9/x", "hf_hub_id": "evil/model", "source": "url"}
    edit(of_timm, lambda config: config["pretrained_cfg"].update(settings))
    found = load_classifier(str(of_timm))[0].state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "must hold one JSON object, found list"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"nc_hf": {"format": 99}}', "written by a newer nc_hf .format 99.. Upgrade nc_hf"),
        ('{"nc_hf": [1]}', "key nc_hf of another shape"),
        ('{"a": ' + "[" * 50 + "]" * 50 + "}", "nested deeper than 32 levels"),
        ('{"a": ' + '{"a": ' * 50 + "1" + "}" * 51, "nested deeper than 32 levels"),
        ("\0", "cannot be read as JSON"),
    ],
)
def test_a_config_that_is_none_is_refused(folder, content, message):
    (folder / "config.json").write_text(content)
    assert_refused(folder, message)


def test_a_huge_config_is_not_read(folder):
    with (folder / "config.json").open("a") as file:
        file.write(" " * 10 * 2**20)
    assert_refused(folder, "bytes, more than any config. It is not read")


def test_settings_of_images_are_checked_too(of_transformers):
    (of_transformers / "preprocessor_config.json").write_text("[" * 100_000)
    assert_refused(of_transformers, "preprocessor_config.json cannot be read as JSON")


@pytest.mark.parametrize("key", ["num_classes", "num_labels"])
@pytest.mark.parametrize("value", [-1, 1_000_001, True, "4", 4.5])
def test_absurd_numbers_of_classes_are_refused(folder, key, value):
    edit(folder, lambda config: config.update({key: value}))
    assert_refused(folder, f"has {key}=.*; it must be from 0 to 1,000,000")


@pytest.mark.parametrize("names", [{"label_names": [1, 2, 3, 4]}, {"label_names": {"a": "b"}}, {"id2label": {"0": 1}}])
def test_names_of_classes_that_are_no_strings_are_refused(folder, names):
    edit(folder, lambda config: config.update(names))
    assert_refused(folder, f"of strings as {next(iter(names))}")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/secret.safetensors", "sub/x.safetensors", "model.bin", 7, ["x"], ""]
)
def test_an_index_that_leads_elsewhere_is_refused(in_shards, name):
    (in_shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert_refused(in_shards, "names the file .* not accepted")


@pytest.mark.parametrize("name", ["gone.safetensors", "a\0b.safetensors"])
def test_an_index_of_files_that_are_not_there_is_refused(in_shards, name):
    (in_shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert_refused(in_shards, "which is not there. Download it again")


def test_shards_open_and_each_is_checked(in_shards, honest):
    found, expected = (load_classifier(str(path))[0].state_dict() for path in (in_shards, honest["transformers"]))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    last = max(in_shards.glob("model-*.safetensors"))
    save_file({name: tensor / 0 for name, tensor in load_file(last).items()}, last, metadata={"format": "pt"})
    assert_refused(in_shards, f"{last.name} has a tensor that is not finite")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "nc_heads.safetensors"])
def test_a_link_out_of_the_folder_is_refused(folder, name):
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to("../elsewhere")
    assert_refused(folder, f"{name} is a link out of its folder, to .*elsewhere. Copy the file")


def test_a_link_within_the_folder_opens(folder):
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert load_pretrained(str(folder))


def test_a_snapshot_of_the_hub_opens_at_its_commit(folder, monkeypatch, caplog):
    snapshot = folder.parent / "models--user--name" / "snapshots" / "0123abcd"
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    shared = folder.parent / "blobs" / "8b"  # of all repositories
    shared.mkdir(parents=True)
    (blobs / WEIGHTS).rename(shared / "8bad07")
    (blobs / WEIGHTS).symlink_to("../../blobs/8b/8bad07")
    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **settings: asked.append((name, settings)) or str(snapshot)
    )
    with caplog.at_level(logging.INFO, logger="nc_hf"):
        assert load_pretrained("user/name", revision="v1") and load_classifier("hf-hub:user/name@v1")
    assert [(name, settings["revision"]) for name, settings in asked] == [("user/name", "v1")] * 2
    assert caplog.messages.count("user/name at commit 0123abcd") == 2
    patterns = asked[0][1]["allow_patterns"]
    assert not any(Path(name).match(pattern) for pattern in patterns for name in ("a.py", "model.bin", "model.pt"))
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to("../../../elsewhere")
    shutil.copy(shared / "8bad07", folder.parent / "elsewhere")
    with pytest.raises(ValueError, match="is a link out of its folder"):
        load_classifier("user/name")


@pytest.mark.parametrize("name", ["a\0b", "user/na\0me", "../../etc/passwd", "user/../name"])
def test_odd_names_are_refused(name):
    with pytest.raises(ValueError, match="no timm architecture, no folder|Repo id"):
        load_classifier(name)


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


def first_of_backbone(folder: Path) -> str:
    names = load_file(folder / WEIGHTS)
    return next(name for name in sorted(names) if name.endswith("weight") and not name.startswith(head_of(folder)))


def change(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Put tensors into the weights of a folder, or take them out."""
    tensors = load_file(folder / WEIGHTS) | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


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


def test_arguments_for_another_number_of_classes_are_refused(of_timm):
    edit(of_timm, lambda config: config["model_args"].update(num_classes=5))
    change(of_timm, {first_of_backbone(of_timm): None})  # timm alone would not say so
    assert_refused(of_timm, "has 4 classes, and model arguments for 5")


def test_an_unknown_architecture_is_named(of_timm):
    edit(of_timm, lambda config: config.update(architecture="evil_net"))
    assert_refused(of_timm, "Unknown model 'evil_net' in .* Import the package that has it", error=RuntimeError)
    for elsewhere in ("hf-hub:evil/net", "local-dir:evil"):
        edit(of_timm, lambda config, name=elsewhere: config.update(architecture=name, model_args=None))
        assert_refused(of_timm, f"has the architecture '{elsewhere}'. It must be a name")
    edit(of_timm, lambda config: config.update(architecture=["evil_net"]))
    assert_refused(of_timm, "has the architecture .'evil_net'.. It must be a name")


def test_a_model_that_is_no_classifier_of_images_is_refused(of_transformers):
    edit(of_transformers, lambda config: config.update(model_type="bert"))
    assert_refused(of_transformers, "BertConfig")
