"""How a model wants its images: `image_settings`."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import timm
from torch import nn

from nc_hf.data.augment import ImageTransform

INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # by PIL's numbers


def image_settings(model: nn.Module, image_processor: Any = None) -> dict[str, Any]:
    """Settings of a model's images, as `ImageTransform` takes them: from size (H, W) and mean to crop_mode.

    Args:
        model: of timm, or of transformers with its `image_processor`.
        image_processor: of the model; a timm model needs none.

    Raises:
        ValueError: for a transformers model without an image processor that tells them, or one that makes other images
            than these settings do.
    """
    model = getattr(model, "timm_model", model)
    if hasattr(model, "pretrained_cfg"):
        cfg = timm.data.resolve_model_data_config(model)
        keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
        return {"size": tuple(cfg["input_size"][1:]), **{key: cfg[key] for key in keys}}
    settings = _processor_settings(type(model).__name__, image_processor)
    _check_images(image_processor, settings)
    return settings


def _processor_settings(owner: str, image_processor: Any) -> dict[str, Any]:
    """`image_settings` from an image processor of transformers."""
    resized, cropped = (getattr(image_processor, key, None) or {} for key in ("size", "crop_size"))
    cropped = cropped if getattr(image_processor, "do_center_crop", False) else {}
    size = cropped or resized
    height, width = (size.get(key) or size.get("shortest_edge") for key in ("height", "width"))
    if not height or not width:
        raise ValueError(
            f"the size of the images of {owner} is not known: its image processor is "
            f"{type(image_processor).__name__} with size {dict(resized)}. Give one with height and width, or save it "
            "beside the model: ViTImageProcessor(size=...).save_pretrained(folder)."
        )
    resample = image_processor.resample
    if resample not in INTERPOLATIONS:
        raise ValueError(
            f"{type(image_processor).__name__} resizes with resample={resample!r}, and images are resized by "
            f"{', '.join(f'{key} ({name})' for key, name in INTERPOLATIONS.items())}. Set one of these on it."
        )
    squashed = "height" in resized or (hasattr(image_processor, "crop_pct") and height >= 384 and not cropped)
    mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if image_processor.do_normalize:
        mean, std = tuple(image_processor.image_mean), tuple(image_processor.image_std)
        if getattr(image_processor, "include_top", False):  # EfficientNet's divides twice
            std = tuple(value * value for value in std)
    return {
        "size": (height, width),
        "mean": mean,
        "std": std,
        "interpolation": INTERPOLATIONS[resample],
        "crop_pct": _crop_pct(image_processor, resized, cropped, height),
        "crop_mode": "squash" if squashed else "center",
    }


def _crop_pct(image_processor: Any, resized: dict[str, int], cropped: dict[str, int], height: int) -> float:
    """The share of a resized image that is left of it."""
    own = getattr(image_processor, "crop_pct", None) or 1.0
    if not cropped:  # ConvNeXT's resizes to size / crop_pct below 384 pixels, and crops
        return own if height < 384 else 1.0
    share = own * height / (resized.get("height") or resized.get("shortest_edge"))
    if type(image_processor).__name__.startswith("Levit"):  # resizes to 256 / 224 of the size that it names
        share *= 224 / 256
    return min(1.0, share)


def _check_images(image_processor: Any, settings: dict[str, Any]) -> None:
    """Make sure, on one smooth image, that the settings make the image that the processor makes."""
    height, width = settings["size"]
    across, down = np.meshgrid(np.linspace(0, 255, 3 * width), np.linspace(0, 255, 2 * height))
    image = PIL.Image.fromarray(np.stack([across, down, 255 - across], axis=-1).astype(np.uint8))
    transform = ImageTransform(**settings)
    ours = transform.normalize(transform.to_size(image)[None])
    theirs = image_processor(image, return_tensors="pt")["pixel_values"]
    spread = (ours.max() - ours.min()).item()
    if ours.shape != theirs.shape or (ours - theirs).abs().max() > 0.03 * spread:
        raise ValueError(
            f"{type(image_processor).__name__} makes other images than any ImageTransform: it may swap channels, "
            "shift values, or crop in a way of its own. Switch that off in the processor that you save with the "
            "model, or train on images that the processor itself has prepared."
        )
