"""Checkpoints: whether they will fit on the disk is known before the first of them is due."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest
from torch import nn

from nc_hf.checkpoints import check_disk_space


def test_a_full_disk_is_refused_before_training(tmp_path, monkeypatch):
    model = nn.Linear(1000, 1000, bias=False)  # 4 MB; three numbers a weight, two checkpoints and one being written
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=36_000_000))
    check_disk_space(tmp_path, model, kept=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=35_999_999))
    with pytest.raises(OSError, match="may take 0.0 GB and 0.0 GB are free. Make room"):
        check_disk_space(tmp_path, model, kept=2)
