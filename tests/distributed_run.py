"""Known-answer runs for one or several processes, which test_distributed.py starts through torchrun."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import contrastive_run
import experts_run
import torch
import torch.distributed as dist
from small_images import SmallImages, network_without_batch_statistics
from transformers import TrainerCallback, set_seed

from nc_hf.evaluation import geometry_of
from nc_hf.models.classifier import load_classifier
from nc_hf.trainer import NCTrainer
from nc_hf.training_args import NCTrainingArguments

GLOBAL_BATCH = 36
USED = {"ddp_find_unused_parameters": False}  # DDP then waits for a gradient of every parameter
RUNS = {
    "learned": {"centers": "learned", "mixup_alpha": 0.3, "class_weighting": "inverse", "start_epoch": 0.5, **USED},
    "ema": {"centers": "ema", "sampler": "class_balanced"},
    "batch": {"centers": "batch", "mixup_alpha": 0.3},
    "train_counts": {"centers": "learned", "within_counts": "train", "within_weight": 0.5},
}


def trainer(folder: Path, processes: int, model: torch.nn.Module, **settings) -> NCTrainer:
    if settings["centers"] == "learned":
        settings = {"within_weight": 0.01, "feature_scale": "none", **settings}
    args = NCTrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        precision="fp32",
        optim="sgd",
        learning_rate=0.05,
        max_grad_norm=0,
        num_train_epochs=4,
        per_device_train_batch_size=GLOBAL_BATCH // processes,
        per_device_eval_batch_size=7,
        dataloader_drop_last=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    return NCTrainer(model, args, train_dataset=SmallImages())


def summary(run: NCTrainer) -> dict:
    state = {name: tensor.flatten().tolist() for name, tensor in run.task.state_dict().items()}
    return {"state": state, "losses": [record["loss"] for record in run.state.log_history if "loss" in record]}


class StopAt(TrainerCallback):
    """Ends a run after an update, with a checkpoint; running means differ by then as sums of other order do."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, model, **kwargs):
        control.should_training_stop = control.should_save = state.global_step == self.step
        if control.should_save:
            getattr(model, "module", model).collapse.centers += 1e-6 * args.process_index


def resumed_within_an_epoch(folder: Path, processes: int) -> NCTrainer:
    """The run `ema`, stopped in its second epoch and resumed by a new trainer."""
    stopped, resumed = (trainer(folder, processes, network_without_batch_statistics(), **RUNS["ema"]) for _ in "ab")
    stopped.add_callback(StopAt(len(stopped.train_dataset) // GLOBAL_BATCH + 1))
    stopped.train()
    resumed.train(resume_from_checkpoint=True)
    return resumed


def answers_of(folder: Path, processes: int, rank: int) -> dict:
    answers = {method: experts_run.train(method, rank, processes) for method in experts_run.METHODS}
    for method in contrastive_run.METHODS:
        answers[method] = contrastive_run.summary(contrastive_run.train(folder, processes, method))
    for name, settings in RUNS.items():
        run = trainer(folder, processes, network_without_batch_statistics(), **settings)
        torch.rand(1 + run.args.process_index)  # ranks whose global generators differ
        run.train()
        answers[name] = summary(run)
    answers["resumed"] = summary(resumed_within_an_epoch(folder / "stopped", processes))
    odd = SmallImages(counts=(53, 30, 12, 6))  # 101 images, a number that no batch divides
    labels = torch.cat([labels for _, _, labels in run.iterate_features(odd)])
    answers["counted"] = torch.bincount(labels).tolist()
    fresh = trainer(folder, processes, network_without_batch_statistics(), centers="ema")
    with fresh.keeping_features():
        answers["geometry"] = geometry_of(fresh, odd, fresh.class_means(odd))
    set_seed(0)
    halves = {"ghost_batch_size": GLOBAL_BATCH // 2}  # what each of two processes sees by itself
    run = trainer(folder, processes, load_classifier("resnet20_cifar", 4)[0], centers="learned", **halves)
    run.train()
    answers["resnet"] = summary(run)
    norm = run.classifier.bn1
    for name, measure in (("evaluate", run.evaluate), ("features", lambda data: list(run.iterate_features(data)))):
        norm.running_mean.fill_(1 + run.args.process_index)  # as after an update, whose batches differ
        measure(odd)
        answers[name] = norm.running_mean.tolist()
    run = trainer(folder, processes, network_without_batch_statistics(), centers="learned")
    if run.args.process_index == processes - 1:  # one process alone meets the bad image
        run.train_dataset.images[:] = float("nan")
    try:
        run.train()
    except FloatingPointError as error:
        answers["nonfinite"] = str(error)
    return answers


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(answers_of(folder, dist.get_world_size(), rank)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
