"""`NCTrainer`: `transformers.Trainer` with the paper's feature terms and re-balancing, for any image classifier."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import PrinterCallback, Trainer

from nc_hf.collation import collate, spare_ready_batches
from nc_hf.error_notes import noted_errors
from nc_hf.labels import check_labels, counts_of, label_counts, labels_of, names_of
from nc_hf.measuring_trainer import MeasuringTrainer
from nc_hf.mixing import mix_batch
from nc_hf.objectives import build_task, num_outputs
from nc_hf.precision import allow_precision
from nc_hf.preflight import check_data, check_evaluated, check_told_labels, check_trainer, warn_of_unsavable
from nc_hf.run_log import RunLog, nonfinite_error
from nc_hf.sampling import EpochSampler, mix_seeds
from nc_hf.saving_trainer import SavingTrainer
from nc_hf.schedule import describe_schedule, epoch_scheduler, hold_constant, move_to_own_group
from nc_hf.task import ClassificationTask
from nc_hf.training_args import NCTrainingArguments, resolve_epoch

logger = logging.getLogger(__name__)


class NCTrainer(MeasuringTrainer, SavingTrainer):
    """A drop-in for `Trainer` on image classification, for any classifier of timm or transformers.

    The classifier is trained inside a `ClassificationTask`; `classifier` gives it back, and `save_model` writes a
    folder that timm and transformers open. Batches are dicts with `pixel_values` (B, 3, H, W) and `labels` (B,); other
    columns are not looked at.

    Args:
        model: the classifier; its last layer must be one linear layer. A `ClassificationTask` is taken as it is.
        args: `NCTrainingArguments`.
        class_counts: (K,) training images per class; read from the training set where it knows them.
        class_names: K names for saved models; read from the training set or the model's config where they know them.
        label_column: of a `datasets.Dataset` that has several columns of labels, or one of an unusual name.
        head: module path of the last layer, for a model whose head is not found.
        freeze_backbone: train the head alone, the backbone in eval mode.
        **kwargs: all other arguments of `Trainer`, except `compute_loss_func`.

    Raises:
        ValueError: for a model without a single linear head, a head of another size than the data's classes, settings
            that need class counts which nothing gives, and as `check_trainer`.
    """

    loss_is_scaled_for_ga = True  # the task divides by counts of the whole update
    _sampler: EpochSampler | None = None  # of the training images

    def __init__(
        self,
        model: nn.Module | None = None,
        args: NCTrainingArguments | None = None,
        *,
        class_counts: Sequence[int] | None = None,
        class_names: Sequence[str] | None = None,
        label_column: str | None = None,
        head: str | None = None,
        freeze_backbone: bool = False,
        **kwargs: Any,
    ) -> None:
        args = NCTrainingArguments() if args is None else args
        check_trainer(args, kwargs)
        model = uncompiled(model)
        train_dataset, self.label_column = kwargs.get("train_dataset"), label_column
        # What labels the data set tells beside its samples matters where something is made of them.
        self._trusts_labels = class_counts is None or args.sampler != "instance"
        if class_counts is None:
            class_counts = counts_of(train_dataset, label_column, num_outputs(model, head))
        self.class_counts = None if class_counts is None else np.asarray(class_counts, dtype=np.int64)
        self.class_names = class_names
        if class_names is None and (names := names_of(train_dataset, label_column)) is not None:
            self.class_names = names if class_counts is None or len(names) == len(class_counts) else None
        wrap = partial(
            build_task, args=args, class_counts=self.class_counts, head=head, freeze_backbone=freeze_backbone
        )
        if model_init := kwargs.pop("model_init", None):
            # `Trainer` looks at its signature to tell whether it takes the trial.
            kwargs["model_init"] = wraps(model_init)(lambda *trial: wrap(uncompiled(model_init(*trial))))
        if kwargs.get("data_collator") is None:
            kwargs["data_collator"] = collate
        if hasattr(kwargs.get("processing_class"), "data_config"):
            kwargs["processing_class"] = None  # a timm model's own config keeps these settings
        self.user_callbacks = kwargs.get("callbacks")
        task = model if model is None or isinstance(model, ClassificationTask) else wrap(model)
        allow_precision(args)
        super().__init__(model=task, args=args, **kwargs)
        if any(isinstance(callback, RunLog) for callback in self.callback_handler.callbacks):
            self.remove_callback(PrinterCallback)  # one line an epoch is enough
        warn_of_unsavable(self.classifier, self.processing_class)
        self.label_names = ["labels"]
        self.label_smoother = None  # label smoothing is part of the task's loss
        self._terms: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, device=args.device))
        self._spoken: dict[str, Tensor] = {}

    @property
    def task(self) -> ClassificationTask:
        """The module that is trained, without wrappers."""
        if isinstance(self.model, ClassificationTask):  # looking for wrappers takes a walk over all modules
            return self.model
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def classifier(self) -> nn.Module:
        """The plain timm or transformers classifier."""
        return self.task.classifier

    # ---- One update ----

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """The batches of the next update, each with the class counts of all of them and its mixup partners."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:  # a stream has ended
            return batches, None
        if not self.is_fsdp_enabled:  # which runs a model through its wrapper alone
            self.task.check_tap_once(batches[0]["pixel_values"])
        self._enter_epoch()
        counts = torch.zeros(self.task.num_classes, device=device)
        for batch in batches:
            check_labels(batch["labels"], self.task.num_classes)
            batch["labels"] = batch["labels"].long()
            counts += label_counts(self.task.counted_labels(batch["labels"]), self.task.num_classes)
        counts = self.accelerator.reduce(counts, "sum") / self.accelerator.num_processes
        for number, batch in enumerate(batches):
            batch["update_counts"], batch["update_batches"] = counts, len(batches)
            if self.args.mixes_images:
                mix_batch(
                    self.accelerator,
                    batch,
                    mixup_alpha=self.args.mixup_alpha,
                    cutmix_alpha=self.args.cutmix_alpha,
                    seed=mix_seeds(self.args.seed, self.state.global_step, number),
                )
        return batches, None

    def _enter_epoch(self) -> None:
        """Switch on what starts at this epoch."""
        epoch = math.floor((self.state.epoch or 0) + 1e-6)
        task, args, num_epochs = self.task, self.args, self.num_epochs
        task.progress.fill_(min(epoch / num_epochs, 1.0))
        task.weighting_active = args.drw_epoch is None or epoch >= resolve_epoch(args.drw_epoch, num_epochs)
        if task.collapse is None:
            return
        started = epoch >= resolve_epoch(args.start_epoch, num_epochs)
        task.collapse_active = started or args.replicate_leak
        task.collapse.frozen = not started
        if started and not task.centers_ready:
            from_data = args.center_init == "data" or (args.center_init == "auto" and args.start_epoch > 0)
            if from_data and task.collapse.mode != "batch" and not args.replicate_leak:
                logger.info("class centers start as class means of one pass over the training images")
                task.collapse.set_centers(*self.class_means(self.train_dataset, of_collapse=True))
            task.centers_ready.fill_(True)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """The task's loss; its terms are kept for the log."""
        outputs = model(**{**inputs, "pixel_values": self.lay_out(inputs["pixel_values"])})
        for name, value in outputs.items():
            if name.startswith("loss_"):
                value, spoken = value.detach(), (value != 0) | self._spoken.pop(name, False)
                # A term with nothing to say in an update is left out of its mean.
                self._terms[name] += torch.stack([value, (spoken & self.accelerator.sync_gradients).to(value)])
                if not self.accelerator.sync_gradients:
                    self._spoken[name] = spoken
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One batch forward and backward; stops all processes before the update if a loss is not finite."""
        with noted_errors():
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._finite = getattr(self, "_finite", True) & torch.isfinite(loss)
        if self.accelerator.sync_gradients:
            finite = self.accelerator.reduce(self._finite.float(), "sum") == self.accelerator.num_processes
            self._finite = True
            if not finite:
                raise nonfinite_error(
                    Path(self.args.output_dir) / f"nonfinite_rank{self.args.process_index}.json",
                    step=self.state.global_step + 1,
                    learning_rate=self._get_learning_rate(),
                    terms={name: sums[0].item() for name, sums in self._terms.items()},
                    images=inputs["pixel_values"],
                )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each term of the loss since the last log, unrounded."""
        if "loss" in logs:
            for name in sorted(self._terms):
                total, count = self.accelerator.reduce(self._terms[name], "mean").tolist()
                if count:
                    logs[name] = total / count
            self._terms.clear()
        super().log(logs, start_time)

    # ---- Data, optimizer, schedule ----

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        labels = labels_of(dataset, self.label_column)
        if labels is None:
            if self.args.sampler != "instance":
                raise ValueError(
                    f"`sampler: {self.args.sampler}` needs the labels of {type(dataset).__name__}. Give it an "
                    "attribute `labels` with one integer per image, or name the column of a `datasets.Dataset` by "
                    "NCTrainer's label_column."
                )
            return super()._get_train_sampler(dataset)
        with_draws = getattr(dataset, "accepts_draws", False)
        self._sampler = EpochSampler(
            labels,
            self.args.sampler,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            num_epochs=self.args.num_train_epochs if self.args.max_steps <= 0 else None,
            with_draws=with_draws,
            effective_number_beta=self.args.effective_number_beta,
        )
        return self._sampler

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:
        # accelerate does not tell the sampler where a resumed loader skips batches on several processes.
        if self._sampler is not None:
            self._sampler.set_epoch(epoch)
        super()._run_epoch(epoch=epoch, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """As in `Trainer`, but `dataloader_drop_last` is for training: an evaluation sees every image.

        Workers persist for the evaluation set alone: `Trainer` would take its loader for that of any other data set.
        """
        own = eval_dataset is None or isinstance(eval_dataset, str) or eval_dataset is self.eval_dataset
        return self._whole(super().get_eval_dataloader, eval_dataset, persistent=own)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        """As `get_eval_dataloader`: a prediction for every image."""
        return self._whole(super().get_test_dataloader, test_dataset, persistent=False)

    def _whole(self, make: Callable[[Any], DataLoader], dataset: Any, persistent: bool) -> DataLoader:
        """A data loader that drops nothing, with persistent workers only where that is asked for."""
        args, given = self.args, self.eval_dataset if dataset is None else dataset
        given = self.eval_dataset[dataset] if isinstance(dataset, str) else given
        check_evaluated(args, given, self.data_collator)
        before = args.dataloader_drop_last, args.dataloader_persistent_workers
        args.dataloader_drop_last, args.dataloader_persistent_workers = False, before[1] and persistent
        try:
            return make(dataset)
        finally:
            args.dataloader_drop_last, args.dataloader_persistent_workers = before

    def set_initial_training_values(self, args: NCTrainingArguments, dataloader: Any) -> tuple:
        """As in `SavingTrainer`; looks at the data first, and says in one line what the run will be.

        Raises:
            ValueError: as `check_data` and `check_told_labels`.
        """
        check_data(args, dataloader, self.eval_dataset, self.data_collator)
        if self._trusts_labels:
            check_told_labels(self.train_dataset, labels_of(self.train_dataset, self.label_column), self.data_collator)
        self._terms.clear()  # of an earlier training
        self._spoken.clear()
        values = super().set_initial_training_values(args, dataloader)
        if args.max_steps > 0:
            args.warn_about_late_epochs(self.num_epochs)
        logger.info("%s", describe_schedule(args, self.num_epochs, self.updates_per_epoch, self._train_batch_size))
        return values

    def _get_collator_with_removed_columns(self, data_collator: Callable, description: str | None = None) -> Callable:
        removing = super()._get_collator_with_removed_columns(data_collator, description)
        return removing if removing is data_collator else spare_ready_batches(data_collator, removing)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: NCTrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        """As in `Trainer`, with momentum for SGD."""
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if cls is torch.optim.SGD:
            kwargs.setdefault("momentum", args.momentum)
        return cls, kwargs

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """All names with `decay_all_parameters`, as the authors' code; else those of `Trainer`."""
        if self.args.decay_all_parameters:
            return [name for name, _ in model.named_parameters()]
        return super().get_decay_parameter_names(model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in `Trainer`, with learned centers in a group of plain SGD."""
        fresh, centers = self.optimizer is None, self.task.learned_centers
        optimizer = super().create_optimizer(model)
        if fresh and centers is not None:
            rate = self.args.centers_learning_rate
            move_to_own_group(optimizer, centers, lr=rate, momentum=0.0, weight_decay=0.0)
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule by epochs where one is set, else that of `Trainer`; centers keep their learning rate."""
        if self.lr_scheduler is None:
            optimizer = self.optimizer if optimizer is None else optimizer
            if self.args.lr_milestones or self.args.lr_cosine:
                self.lr_scheduler = epoch_scheduler(optimizer, self.args, self.num_epochs, self.updates_per_epoch)
                self._created_lr_scheduler = True
            else:
                super().create_scheduler(num_training_steps, optimizer)
            if self.task.learned_centers is not None:
                hold_constant(self.lr_scheduler, group=-1)
        return self.lr_scheduler

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        network = [p for p in model.parameters() if p is not self.task.learned_centers]
        return self.accelerator.clip_grad_norm_(network, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Any:
        return None if grad_norm is None else super()._get_grad_norm(model, grad_norm)


def uncompiled(model: nn.Module | None) -> nn.Module | None:
    """A model as it was before `torch.compile`."""
    if hasattr(model, "_orig_mod"):
        logger.info("the model is taken as it was before torch.compile; torch_compile=True compiles the training")
        return model._orig_mod
    return model
