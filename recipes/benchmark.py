"""Speed as ratios measured in one run: the trainer against a bare loop, the collapse terms, and the memory of L_B.

    python recipes/benchmark.py [--steps 30] [--rounds 3] [--model resnet32_cifar] [--batch-size 128]

A bare loop is forward, backward and SGD step on tensors already in memory, with the precision and memory format that
the trainer chose. Rounds alternate between the contenders, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from typing import Any

import datasets
import numpy as np
import timm
import torch
import torch.nn.functional as F
from transformers import TrainerCallback

from nc_hf.data.augment import ImageTransform
from nc_hf.data.images import load_images
from nc_hf.losses.collapse import between_class_loss
from nc_hf.models.classifier import load_classifier
from nc_hf.models.image_settings import image_settings
from nc_hf.trainer import NCTrainer
from nc_hf.training_args import NCTrainingArguments

WARMUP = 5


class StepClock(TrainerCallback):
    """Wall time of each update, input work included."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *arguments: Any, **kwargs: Any) -> None:
        """Take the time."""
        self.times.append(time.perf_counter())


def synthetic_images(count: int, size: tuple[int, int], num_classes: int) -> Any:
    """A resident set of random images with crop and flip, as CIFAR training has."""
    generator = np.random.default_rng(0)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(k) for k in range(num_classes)])}
    )
    pixels = generator.integers(0, 256, (count, *size, 3), dtype=np.uint8)
    columns = {"image": list(pixels), "label": generator.integers(0, num_classes, count).tolist()}
    return datasets.Dataset.from_dict(columns, features=features)


def bare_steps(options: argparse.Namespace, args: NCTrainingArguments) -> float:
    """Median seconds of a step of the bare loop."""
    model = timm.create_model(options.model, num_classes=options.classes).to(args.device)
    size = image_settings(model)["size"]
    images = torch.randn(options.batch_size, 3, *size, device=args.device)
    if args.channels_last:
        model, images = (part.to(memory_format=torch.channels_last) for part in (model, images))
    labels = torch.randint(options.classes, (options.batch_size,), device=args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.precision]
    times = [time.perf_counter()]
    for _ in range(options.steps):
        with torch.autocast(args.device.type, dtype=dtype, enabled=args.precision != "fp32"):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        times.append(time.perf_counter())
    return statistics.median(np.diff(times)[WARMUP:])


class AlternatingTrainer(NCTrainer):
    """Has the collapse terms in every second update, so that what slows the machine slows both kinds alike."""

    def _enter_epoch(self) -> None:
        super()._enter_epoch()
        self.task.collapse_active = self.state.global_step % 2 == 1


def trainer_steps(options: argparse.Namespace, images: Any) -> tuple[float, float]:
    """Median seconds of an update of `NCTrainer` without and with the collapse terms."""
    model, _ = load_classifier(options.model, options.classes)
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(options, output_dir=folder, max_steps=2 * options.steps, centers="learned")
        AlternatingTrainer(model, args, train_dataset=images, callbacks=[clock]).train()
    seconds = np.diff(clock.times)  # of the updates 1, 2, …
    return statistics.median(seconds[2 * WARMUP + 1 :: 2]), statistics.median(seconds[2 * WARMUP :: 2])


def arguments(options: argparse.Namespace, **settings: Any) -> NCTrainingArguments:
    """Settings of the authors' code for CIFAR but the learning rate, without saving."""
    return NCTrainingArguments(
        per_device_train_batch_size=options.batch_size,
        optim="sgd",
        learning_rate=0.01,
        weight_decay=5e-4,
        decay_all_parameters=True,
        max_grad_norm=0,
        mixup_alpha=0.2,
        within_weight=0.01,
        feature_scale="none",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1000,
        **settings,
    )


def dense_between_class_loss(centers: torch.Tensor) -> torch.Tensor:
    """L_B through the whole K x K matrix of cosines and autograd."""
    unit = F.normalize(centers - centers.mean(dim=0))
    cosines = unit @ unit.T
    cosines = cosines - 2 * torch.diag(torch.diag(cosines))
    return -torch.acos(cosines.max(dim=1).values.clamp(-0.99999, 0.99999)).mean()


def memory_and_time(function: Any, centers: torch.Tensor) -> tuple[float, float, torch.Tensor]:
    """Peak MiB beyond the input, seconds, and gradient of one forward and backward on the CPU."""
    centers = centers.clone().requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function(centers).backward()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    started = time.perf_counter()
    function(centers).backward()
    return peak / 2**20, time.perf_counter() - started, centers.grad / 2


def between_report(num_classes: int, width: int) -> dict[str, float]:
    """L_B against its dense form at the size of iNaturalist 2018 with a ResNet-50."""
    centers = torch.randn(num_classes, width, generator=torch.Generator().manual_seed(0)).abs_()
    ours, dense = (memory_and_time(function, centers) for function in (between_class_loss, dense_between_class_loss))
    return {
        "between_mib": ours[0],
        "between_dense_mib": dense[0],
        "between_memory_ratio": ours[0] / dense[0],
        "between_seconds": ours[1],
        "between_dense_seconds": dense[1],
        "between_gradient_difference": ((ours[2] - dense[2]).abs().max() / dense[2].abs().max()).item(),
    }


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="resnet32_cifar")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    settings = image_settings(load_classifier(options.model, options.classes)[0])
    rows = synthetic_images(options.batch_size * 100, settings["size"], options.classes)
    images = load_images(rows, ImageTransform(**settings, augmentation="crop_flip"), input_path="resident")
    args = arguments(options)
    seconds: dict[str, list[float]] = {"bare": [], "plain": [], "collapse": []}
    for _ in range(options.rounds):
        seconds["bare"].append(bare_steps(options, args))
        plain, collapse = trainer_steps(options, images)
        seconds["plain"].append(plain)
        seconds["collapse"].append(collapse)
    bare, plain, collapse = (statistics.median(values) for values in seconds.values())
    report = {
        "model": options.model,
        "batch_size": options.batch_size,
        "precision": args.precision,
        "channels_last": args.channels_last,
        "threads": torch.get_num_threads(),
        "bare_images_per_second": options.batch_size / bare,
        "trainer_images_per_second": options.batch_size / collapse,
        "throughput_ratio": bare / collapse,
        "collapse_cost": collapse / plain - 1,
        "rounds": seconds,
    }
    print(json.dumps(report | between_report(8142, 2048), indent=1))


if __name__ == "__main__":
    main()
