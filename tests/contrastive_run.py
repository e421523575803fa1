"""Contrastive runs, in one process or in the two of distributed_run.py."""

from __future__ import annotations

from pathlib import Path

import torch
from small_images import SmallImages, network_without_batch_statistics

from nc_hf.trainer import NCTrainer
from nc_hf.training_args import NCTrainingArguments

GLOBAL_BATCH = 36  # rows, so 18 images
METHODS = ("fcl", "kcl", "tsc")


def train(folder: Path, processes: int, method: str, *, resume: str | None = None, **options) -> NCTrainer:
    options = {"save_strategy": "no", **options}
    settings = {"method": method, "dimension": 6}
    settings |= {} if method == "fcl" else {"positives": 2, "queue": 50, "momentum": 0.9}
    args = NCTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        precision="fp32",
        optim="sgd",
        learning_rate=0.05,
        max_grad_norm=0,
        num_train_epochs=2,
        per_device_train_batch_size=GLOBAL_BATCH // processes,
        dataloader_drop_last=True,
        sampler="two_views",
        objective="contrastive",
        objective_settings=settings,
        centers="ema",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    run = NCTrainer(network_without_batch_statistics(), args, train_dataset=SmallImages())
    torch.rand(1 + run.args.process_index)  # ranks whose global generators differ
    run.train(resume_from_checkpoint=resume)
    return run


def summary(run: NCTrainer) -> dict:
    state = {name: tensor.flatten().tolist() for name, tensor in run.task.state_dict().items()}
    logs = [record for record in run.state.log_history if "loss" in record]
    return {"state": state, "logs": [{k: v for k, v in log.items() if k.startswith("loss")} for log in logs]}
