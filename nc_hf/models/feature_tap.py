"""Features in the same forward pass: what enters a classifier's head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class FeatureTap:
    """Keeps what enters a classifier's head in each forward pass.

    Make it before the model is compiled for the first time: later hooks never fire. Under dropout before the head the
    features are those after it.

    Args:
        model: the classifier.
        head_name: module path of its head, from `find_head`.
    """

    def __init__(self, model: nn.Module, head_name: str) -> None:
        self._features: Tensor | None = None
        self._handle = model.get_submodule(head_name).register_forward_pre_hook(self._keep)

    def __getstate__(self) -> dict[str, Any]:
        # Features that nobody read are part of a graph, which cannot be copied with the model.
        return self.__dict__ | {"_features": None}

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0]

    def read(self) -> Tensor:
        """Features (B, P) of the last forward pass, which are then forgotten.

        Raises:
            RuntimeError: when the head was not run since the last reading.
            ValueError: when its input is not one vector per image.
        """
        features, self._features = self._features, None
        if features is None:
            raise RuntimeError("the head did not run: the tap must be made before the model is compiled.")
        if features.ndim == 4 and features.shape[2:] == (1, 1):
            features = features.flatten(1)
        if features.ndim != 2:
            raise ValueError(
                f"the head's input has shape {tuple(features.shape)}, not one vector per image. "
                "Name another layer by `head: <module path>`."
            )
        return features

    def remove(self) -> None:
        """Take the tap off the model."""
        self._handle.remove()


def logits_of(output: Any) -> Tensor:
    """Logits (B, K) from what a classifier returns: a tensor, or an output of transformers.

    Raises:
        ValueError: when it has none.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model returns {type(output).__name__} without `logits`: it is no classifier.")
    return logits


def apply_head(head: nn.Module, features: Tensor) -> Tensor:
    """Logits (B, K) of features (B, P), by a head that is a layer or a 1x1 convolution."""
    return head(features[..., None, None] if isinstance(head, nn.Conv2d) else features).flatten(1)


def check_tap(model: nn.Module, head_name: str, pixel_values: Tensor) -> None:
    """Make sure, on one batch in eval mode, that the logits come from the tapped features and gradients reach them.

    Args:
        model: a classifier with floating-point weights.
        head_name: module path of its head.
        pixel_values: (B, 3, H, W).

    Raises:
        ValueError: when the head's input is not one vector per image, or its output is not the model's, or no
            gradient flows from the features to a backbone that is to be trained.
    """
    was_training, tap = model.training, FeatureTap(model, head_name)
    try:
        with torch.enable_grad():
            logits = logits_of(model.eval()(pixel_values)).detach().float()
        features, head = tap.read(), model.get_submodule(head_name)
        again = apply_head(head, features.detach()).detach().float()
    finally:
        tap.remove()
        model.train(was_training)
    name, tolerance = type(model).__name__, 1e-4 if head.weight.dtype == torch.float32 else 1e-2
    if logits.shape != again.shape or not torch.allclose(logits, again, tolerance, tolerance, equal_nan=True):
        raise ValueError(
            f"{name}: the output of {head_name!r} is not the model's logits, so it cannot be its head. "
            "Name another layer by `head: <module path>`."
        )
    trained = any(p.requires_grad for path, p in model.named_parameters() if not path.startswith(f"{head_name}."))
    if trained and not features.requires_grad:
        raise ValueError(f"{name}: the input of {head_name!r} has no gradient, so its features cannot be trained.")
