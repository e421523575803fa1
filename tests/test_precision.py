"""The precision of a run: what was said is kept, what was not said is chosen."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from transformers import HfArgumentParser

from nc_hf.recipe import dump_recipe, load_recipe, recipe_digest
from nc_hf.training_args import NCTrainingArguments


@pytest.fixture(autouse=True)
def cpu_with_bf16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)


def arguments(folder, **settings) -> NCTrainingArguments:
    return NCTrainingArguments(str(folder), use_cpu=True, report_to="none", **settings)


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        ({}, "bf16"),
        ({"bf16": False}, "fp32"),
        ({"fp16": False}, "bf16"),
        ({"bf16": False, "fp16": False}, "fp32"),
        ({"bf16": True}, "bf16"),
        ({"bf16": True, "fp16": False, "precision": "bf16"}, "bf16"),
        ({"precision": "fp32"}, "fp32"),
        ({"precision": "fp32", "bf16": False, "fp16": False}, "fp32"),
    ],
)
def test_what_was_said_of_the_precision_is_kept(tmp_path, settings, precision):
    args = arguments(tmp_path, **settings)
    assert args.precision == precision
    assert (args.bf16, args.fp16) == (precision == "bf16", precision == "fp16")
    assert type(args.bf16) is type(args.fp16) is bool
    assert args.channels_last == (precision != "fp32" or args.device.type == "cpu")


@pytest.mark.parametrize(
    ("settings", "precision"), [({}, "fp16"), ({"fp16": False}, "bf16"), ({"precision": "fp32"}, "fp32")]
)
def test_the_launcher_chooses_where_the_arguments_do_not(tmp_path, monkeypatch, settings, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    args = arguments(tmp_path, **settings)
    assert args.precision == precision
    assert args.mixed_precision == ("no" if precision == "fp32" else precision)


@pytest.mark.parametrize("settings", [{}, {"precision": "fp32"}, {"bf16": False}])
def test_resolved_arguments_can_be_copied(tmp_path, settings):
    args = arguments(tmp_path, **settings)
    fields = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.init}
    for again in (
        copy.copy(args),
        dataclasses.replace(args, seed=3),
        NCTrainingArguments(**fields),
        NCTrainingArguments(**{name: args.to_dict()[name] for name in ("output_dir", "precision", "bf16", "fp16")}),
    ):
        assert [getattr(again, name) for name in ("precision", "bf16", "fp16", "channels_last")] == [
            getattr(args, name) for name in ("precision", "bf16", "fp16", "channels_last")
        ]


@pytest.mark.parametrize(
    ("options", "precision"),
    [([], "bf16"), (["--bf16"], "bf16"), (["--bf16", "False"], "fp32"), (["--bf16=1"], "bf16")],
)
def test_the_command_line_of_transformers_says_it_too(tmp_path, options, precision):
    parser = HfArgumentParser(NCTrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none", *options]
    )
    assert args.precision == precision


def test_a_recipe_says_it_by_name_and_the_default_leaves_its_digest_alone():
    plain, off = load_recipe(None), load_recipe(None, ["--stage1.bf16", "false"])
    assert plain.stage1["bf16"] is None and off.stage1["bf16"] is False
    assert recipe_digest(plain) != recipe_digest(off)
    without = dataclasses.replace(plain)
    without.stage1 = {name: value for name, value in plain.stage1.items() if name not in ("bf16", "fp16")}
    assert recipe_digest(without) == recipe_digest(plain)
    assert "bf16: null" in dump_recipe(plain)
