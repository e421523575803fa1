"""What the defaults of `NCTrainer` do to a stock network: plain `Trainer` beside it, the same data, steps and seeds.

    python recipes/fine_tuning.py --data_dir <folder with train/ and test/> --models resnet10t convnext_atto

Both trainers see the same images and the same optimizer. Written are, for each network, trainer and seed, the
accuracies on the test split and, for `NCTrainer`, the size of each term of the loss in the last epoch. Without
`--pretrained` the networks start from random weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Python puts this folder first, where evaluate.py would stand in for the library `evaluate`.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]


def main(arguments: list[str]) -> None:
    """Run every network with both trainers and all seeds, and write what came out."""
    options = parse(arguments)
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "data_dir", "threads")}
    runs = earlier_runs(options.out, settings)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    import torch

    from nc_hf import load_splits

    if options.threads:
        torch.set_num_threads(options.threads)
    splits = load_splits(options.dataset, data_dir=options.data_dir)
    train, test = (photographs(splits[name], options.image_size, name == "train") for name in ("train", "test"))
    for name in options.models:
        for seed in range(options.seeds):
            for trainer in ("Trainer", "NCTrainer"):
                key = {"model": name, "trainer": trainer, "seed": seed}
                if not any(key.items() <= run.items() for run in runs):
                    runs.append(key | fine_tune(trainer, name, seed, train, test, options))
                    options.out.write_text(json.dumps({"settings": settings, "runs": runs}, indent=1) + "\n")
                    print(json.dumps(runs[-1]), flush=True)
    print(table(runs))


def earlier_runs(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that a file has already; further networks and seeds join them, all else must be as it was.

    Raises:
        SystemExit: when they had other settings.
    """
    if not path.is_file():
        return []
    earlier = json.loads(path.read_text())
    theirs = earlier["settings"]
    differing = [f"{name} was {theirs.get(name)!r}" for name in settings if settings[name] != theirs.get(name)]
    if differing := [text for text in differing if not text.startswith(("models ", "seeds "))]:
        raise SystemExit(f"{path} has runs of other settings: {', '.join(differing)}. Give another --out.")
    settings["models"] = list(dict.fromkeys([*theirs["models"], *settings["models"]]))
    settings["seeds"] = max(theirs["seeds"], settings["seeds"])
    return earlier["runs"]


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="imagefolder", help="imagefolder, parquet or a Hub id")
    parser.add_argument("--data_dir", help="folder of the images")
    parser.add_argument("--models", nargs="+", default=["resnet10t", "convnext_atto"], help="names of timm")
    parser.add_argument("--pretrained", action="store_true", help="start from timm's released weights")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=float, default=15)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true", help="both trainers in bfloat16 instead of float32")
    parser.add_argument("--threads", type=int, default=0, help="of torch; its own choice when 0")
    parser.add_argument("--out", type=Path, default=Path("fine_tuning.json"))
    return parser.parse_args(arguments)


def photographs(split: Any, size: int, augmented: bool) -> Any:
    """A plain torch data set that both trainers take: squares of `size` pixels, cropped and flipped for training."""
    import numpy as np
    import torch
    from torchvision.transforms import v2

    shrink = v2.Compose([v2.Resize(size + size // 8), v2.CenterCrop(size + size // 8), v2.PILToTensor()])
    vary = [v2.RandomCrop(size), v2.RandomHorizontalFlip()] if augmented else [v2.CenterCrop(size)]
    mean_and_std = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]  # of ImageNet, as timm's networks take them
    finish = v2.Compose([*vary, v2.ToDtype(torch.float32, scale=True), v2.Normalize(*mean_and_std)])

    class Photographs(torch.utils.data.Dataset):
        labels = np.asarray(split["label"][:])
        class_counts = np.bincount(labels, minlength=split.features["label"].num_classes)
        images = [shrink(image.convert("RGB")) for image in split["image"]]

        def __len__(self) -> int:
            return len(self.labels)

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"pixel_values": finish(self.images[index]), "labels": int(self.labels[index])}

    return Photographs()


def fine_tune(kind: str, name: str, seed: int, train: Any, test: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Train one network with one of the trainers: accuracies, and the mean terms of the last epoch."""
    import torch
    from transformers import Trainer, TrainingArguments, set_seed
    from transformers.models.timm_wrapper import TimmWrapperConfig, TimmWrapperForImageClassification

    from nc_hf import NCTrainer, NCTrainingArguments, load_classifier
    from nc_hf.metrics import compute_metrics_for

    set_seed(seed)
    model, _ = load_classifier(name, len(train.class_counts), pretrained=options.pretrained)
    if kind == "Trainer":
        config = TimmWrapperConfig(architecture=name, num_labels=len(train.class_counts))
        wrapper = TimmWrapperForImageClassification(config)
        wrapper.timm_model.load_state_dict(model.state_dict())
        model = wrapper
    settings = {
        "output_dir": "out/fine_tuning",
        "seed": seed,
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": 256,
        "learning_rate": options.learning_rate,
        "weight_decay": 0.05,
        "lr_scheduler_type": "cosine",
        "logging_strategy": "epoch",
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "bf16": options.bf16,
        "use_cpu": not torch.accelerator.is_available(),
    }
    if kind == "NCTrainer" and not options.bf16:
        settings["precision"] = "fp32"
    arguments = TrainingArguments if kind == "Trainer" else NCTrainingArguments
    metrics = compute_metrics_for(train.class_counts, test_counts=test.class_counts)
    parts = {"train_dataset": train, "eval_dataset": test, "compute_metrics": metrics}
    trainer = (Trainer if kind == "Trainer" else NCTrainer)(model, arguments(**settings), **parts)
    trainer.train()
    last = next(log for log in reversed(trainer.state.log_history) if "loss" in log)
    scores = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items() if "accuracy" in key}
    return scores | {key: value for key, value in last.items() if key.startswith("loss")}


def table(runs: list[dict[str, Any]]) -> str:
    """Means over the seeds, one row a network and trainer."""
    columns = ("class_mean_accuracy", "accuracy", "loss_supervised", "loss_within", "loss_between")
    lines = ["| network | trainer | " + " | ".join(columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for model, kind in dict.fromkeys((run["model"], run["trainer"]) for run in runs):
        chosen = [run for run in runs if (run["model"], run["trainer"]) == (model, kind)]
        cells = []
        for column in columns:
            values = [run[column] for run in chosen if column in run]
            cells.append(f"{statistics.mean(values):.4f}" if values else "–")
        lines.append(f"| {model} | {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
