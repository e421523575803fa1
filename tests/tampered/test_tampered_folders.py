"""Folders that somebody tampered with are refused with the reason, and none of their code is run."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tampering import assert_refused, change, edit, first_of_backbone

from nc_hf import load_classifier, load_pretrained
from nc_hf.models.saved_folder import WEIGHTS


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


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
        ("act_layer", {"module": {"name": "os"}}),
        ("block_args", {"pretrained": True}),
        ("block_args", {"checkpoint_path": "/tmp/evil.pth"}),
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


def test_arguments_for_another_number_of_classes_are_refused(of_timm):
    edit(of_timm, lambda config: config["model_args"].update(num_classes=5))
    change(of_timm, {first_of_backbone(of_timm): None})  # timm alone would not say so
    assert_refused(of_timm, "has 4 classes, and model arguments for 5")


def test_an_unknown_architecture_is_named(of_timm):
    edit(of_timm, lambda config: config.update(architecture="evil_net"))
    assert_refused(of_timm, "Unknown model 'evil_net' in .* Import the package that has it")
    for elsewhere in ("hf-hub:evil/net", "local-dir:evil"):
        edit(of_timm, lambda config, name=elsewhere: config.update(architecture=name, model_args=None))
        assert_refused(of_timm, f"has the architecture '{elsewhere}'. It must be a name")
    edit(of_timm, lambda config: config.update(architecture=["evil_net"]))
    assert_refused(of_timm, "has the architecture .'evil_net'.. It must be a name")


def test_a_model_that_is_no_classifier_of_images_is_refused(of_transformers):
    edit(of_transformers, lambda config: config.update(model_type="bert"))
    assert_refused(of_transformers, "BertConfig")
