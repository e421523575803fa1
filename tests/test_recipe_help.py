"""`recipes/train.py --help`: every setting of a recipe, and usage errors without a traceback."""

from __future__ import annotations

import dataclasses

import pytest
from transformers import TrainingArguments

from nc_hf.recipe_help import recipe_help
from nc_hf.recipe_sections import SECTIONS, STAGES, declared_types, defaults_of


def test_every_setting_of_ours_is_listed_with_its_default():
    text = recipe_help()
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    for section in SECTIONS:
        for name in declared_types(section):
            assert (f"  {section}.{name} (" in text) or (section in STAGES and name in theirs), (section, name)
    assert "  data.imbalance_ratio (float | None): None\n" in text
    assert f"  stage2.learning_rate (float): {defaults_of('stage2')['learning_rate']}\n" in text
    assert "stage1.adam_beta1" not in text  # transformers' own, as it is there


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_the_command_shows_it_and_does_nothing(script, capsys, tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    script("train").main([option])
    shown = capsys.readouterr().out
    assert "accelerate launch recipes/train.py" in shown and "  hub.repo_id (str | None): None" in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "message"), [(["no.yaml"], "no.yaml"), (["--seeed", "1"], "`seed`")])
def test_usage_errors_are_a_line(script, arguments, message):
    with pytest.raises(SystemExit, match=message):
        script("train").main(arguments)
