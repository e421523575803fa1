"""What is exported by torch's own exporter answers as the classifier does, whatever its kind and head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nc_hf import load_pretrained
from nc_hf.hub import save_pretrained
from nc_hf.models.classifier import load_classifier, logits_of
from nc_hf.models.headed import replace_head

onnxruntime = pytest.importorskip("onnxruntime", reason="of the extra `dev`")


def cosine_network() -> tuple[nn.Module, Any]:
    model, processor = load_classifier("resnet20_cifar", 10)
    replace_head(model, "cosine")
    return model, processor


NETWORKS = {
    "stock": lambda: load_classifier("resnet10t", 10, image_size=32),
    "cosine head": cosine_network,
    "experts": lambda: load_classifier("resnet32_ride_cifar", 10),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_export_of_a_saved_model_gives_its_logits(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made, processor = NETWORKS[kind]()
    save_pretrained(made, tmp_path / "model", label_names=list("abcdefghij"), image_processor=processor)
    model, _ = load_pretrained(tmp_path / "model")
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (torch.zeros(2, 3, 32, 32),), path, dynamic_shapes=({0: "batch"},), verbose=False)
    session = onnxruntime.InferenceSession(path)
    images = torch.randn(5, 3, 32, 32)
    (answer,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.inference_mode():
        np.testing.assert_allclose(answer, logits_of(made.eval()(images)), rtol=1e-4, atol=1e-5)
