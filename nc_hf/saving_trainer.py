"""`SavingTrainer`: checkpoints that resume exactly, and models saved and pushed as plain folders."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy, SaveStrategy, has_length, rotate_checkpoints

from nc_hf.checkpoints import (
    MARKER,
    check_agreement,
    check_disk_space,
    check_names,
    check_resume,
    mark_complete,
    newest_complete,
)
from nc_hf.hub import label_names_of, save_pretrained
from nc_hf.interruption import SaveOnSignal
from nc_hf.model_card import ACCURACIES, card_metadata, write_card
from nc_hf.models.saved_folder import separate_tensors
from nc_hf.models.saved_heads import forget_stage_one
from nc_hf.processes import share_buffers
from nc_hf.publishing import PushError, check_access, check_folder, push_folder
from nc_hf.results import environment, write_results
from nc_hf.task import ClassificationTask

logger = logging.getLogger(__name__)

HUB_FOLDER = "hub"  # in the output folder: what is pushed, and nothing else


class SavingTrainer(Trainer):
    """The part of `NCTrainer` that writes: it keeps the whole task in checkpoints and gives away the classifier alone.

    What goes to the Hub is a folder of its own, `hub` in the output folder, with the model, its card and no file that
    needs pickle. A push in the background that fails is logged at once. One of the training is tried again at its end,
    and a last save that was left out, for a push still under way, is pushed then; if that fails too, `train` raises
    `PushError` after everything has been saved.
    """

    task: ClassificationTask
    class_names: Any
    class_counts: Any
    num_epochs: float
    updates_per_epoch: int
    active_head: str = "base"  # name of the present head, beside others in a saved folder
    other_heads: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({})  # state dicts by name, saved with it
    _counts_epochs: bool  # not on a stream without a length
    _resumed: Path | None = None
    _limit: int | None = None  # of checkpoints, while one is written
    keeps_stage_one: bool = False  # the head that a model remembers beside a later one
    _pusher: ThreadPoolExecutor | None = None
    _push: Future | None = None  # the last one
    _others_evaluations: int = 0  # so many first entries of the log history are of other weights
    _left_out: bool = False  # the last save is not pushed: the push before was still running

    # ---- Checkpoints ----

    def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, **kwargs: Any) -> Any:
        """As in `Trainer`; `resume_from_checkpoint=True` takes the newest complete checkpoint of this run.

        Where there is none, it takes the one that the arguments name, or starts afresh.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_complete(self.args.output_dir) or self.args.resume_from_checkpoint
            logger.info("resuming from %s", resume_from_checkpoint or "nothing: no complete checkpoint yet")
        self._resumed = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        if trial is not None:  # `Trainer` makes the model before it sets the arguments of the trial
            self._hp_search_setup(trial)
        try:
            output = super().train(resume_from_checkpoint=resume_from_checkpoint, trial=trial, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, SaveOnSignal):
                    callback.give_back()
        share_buffers(self.task)
        if self._push is not None and (self._left_out or self._push.exception() is not None):
            self.push_to_hub()
        return output

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        share_buffers(self.task)  # running means of each process may differ in the last bits, as GPUs add in any order
        if (centers := self.task.learned_centers) is not None:
            check_agreement(self.accelerator, centers.detach())
        runs = Path(self._get_output_dir(trial))
        folder = runs / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / MARKER).unlink(missing_ok=True)  # of an earlier run
        self._limit, self.args.save_total_limit = self.args.save_total_limit, None  # none goes before this is complete
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
                error.add_note(f"{folder} could not be written and is removed; complete ones before it are kept.")
            raise
        finally:
            limit, self._limit = self._limit, None
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder, self._run_facts())
            rotate_checkpoints(str(runs), limit, self.state.best_model_checkpoint, use_mtime=True)

    def _run_facts(self) -> dict[str, Any]:
        """What a checkpoint is compared by when a run goes on from it."""
        return {
            "class_counts": None if self.class_counts is None else self.class_counts.tolist(),
            "updates_per_epoch": self.updates_per_epoch if self._counts_epochs else None,
            "processes": self.args.world_size,
            "arguments": json.loads(json.dumps(self.args.to_dict(), default=str)),
        }

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> tuple:
        """Also keeps the number of epochs and of updates an epoch, and looks whether checkpoints fit and this one may.

        Raises:
            ValueError: as `check_resume`.
            OSError: as `check_disk_space`.
        """
        if not self.keeps_stage_one:
            forget_stage_one(self.task.head)
        values = super().set_initial_training_values(args, dataloader)
        self.num_epochs, self.updates_per_epoch = values[0], values[1]
        self._counts_epochs = has_length(dataloader)
        if args.save_strategy != SaveStrategy.NO and args.should_save:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            kept, weights_only = args.save_total_limit or 1, args.save_only_model
            check_disk_space(Path(args.output_dir), self.task, kept, weights_only=weights_only)
        if self._resumed is not None:
            same_run = self._resumed.resolve().parent == Path(args.output_dir).resolve()
            check_resume(self._resumed, self._run_facts(), same_run)
        return values

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        state = separate_tensors(self.task.state_dict() if state_dict is None else state_dict)
        token, limit = self.args.hub_token, self.args.save_total_limit
        # `Trainer` writes the arguments down: not the token, but the limit that `_save_checkpoint` holds back.
        self.args.hub_token, self.args.save_total_limit = None, limit or self._limit
        try:
            super()._save(output_dir, state)
        finally:
            self.args.hub_token, self.args.save_total_limit = token, limit

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        check_names(Path(resume_from_checkpoint), self.task.state_dict())
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    # ---- Models ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the plain classifier as a folder that timm and transformers open; checkpoints keep the whole task."""
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        self.export(output_dir or self.args.output_dir)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save")

    def export(self, folder: str, **extra: Any) -> None:
        """Write the classifier's folder, from the main process.

        Args:
            folder: where to.
            **extra: further arguments of `nc_hf.hub.save_pretrained`, such as `class_means` and `metadata`.
        """
        if not self.args.should_save:
            return
        task = self.task
        centers = task.collapse.centers if task.collapse is not None and task.collapse.mode != "batch" else None
        if centers is not None:
            extra.setdefault("centers", centers.detach())
        save_pretrained(
            task.classifier,
            folder,
            label_names=self.class_names,
            image_processor=self.processing_class,
            heads={**self.other_heads, self.active_head: task.head.state_dict()},
            active_head=self.active_head,
            class_counts=self.class_counts,
            **extra,
        )

    # ---- The Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make sure that a push can succeed, before anything is trained; the first push makes the repository.

        Raises:
            PushError: when it cannot.
        """
        inner = getattr(self.classifier, "timm_model", self.classifier)
        if not hasattr(inner, "pretrained_cfg") and self.processing_class is None:  # timm's own configs have it all
            raise PushError(
                f"{type(inner).__name__} cannot be pushed without its image processor, which others need to open it. "
                "Give NCTrainer the one that load_classifier returns beside the model, as processing_class."
            )
        if self.is_world_process_zero():
            name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            self.hub_model_id = check_access(name, token=token or self.args.hub_token)

    def create_model_card(self, **metadata: Any) -> None:
        """Write the model with our card into the folder that is pushed; a README in the output folder is left alone.

        Args:
            **metadata: entries of the card's metadata, such as `license`, `language` and `tags`. Of `Trainer`'s own,
                `finetuned_from` becomes `base_model` and `dataset` or `dataset_tags` becomes `datasets`; the card has
                the others from the run.
        """
        if self.is_world_process_zero():
            folder = self._hub_folder()
            self.export(str(folder))
            dataset = {"class_names": self.task_label_names(), **getattr(self.compute_metrics, "bounds", {})}
            if self.class_counts is not None:
                dataset["class_counts"] = self.class_counts.tolist()
            results = {"dataset": dataset, "seed": self.args.seed, **self._last_evaluation(), **environment()}
            write_results(folder / "results.json", results)
            write_card(folder, getattr(self, "hub_model_id", None), **card_metadata(metadata))

    def task_label_names(self) -> list[str]:
        """The K names of the classes: those given, those of the model, or numbers."""
        return label_names_of(self.task.classifier, self.class_names)

    def _last_evaluation(self) -> dict[str, Any]:
        """Accuracies of the weights that are saved now, if `evaluate` was told to measure any of them."""
        history, step = self.state.log_history, self.state.global_step
        trained = next((k for k, log in enumerate(history) if "train_runtime" in log), len(history))
        if self.args.load_best_model_at_end and trained < len(history):
            step = self.state.best_global_step
        own = enumerate(history[self._others_evaluations :], self._others_evaluations)
        of_these = [log for k, log in own if k > trained or log["step"] == step]
        last = next((log for log in reversed(of_these) if "eval_accuracy" in log), {})
        names = (*ACCURACIES, "class_mean_accuracy", "ece")
        metrics = {name: last[f"eval_{name}"] for name in names if f"eval_{name}" in last}
        if not metrics:
            return {}
        epoch = next((log["epoch"] for log in history if log["step"] == step and "epoch" in log), None)
        return {"split": "evaluation", "epoch": epoch if step else None, "heads": {self.active_head: metrics}}

    def forget_evaluations(self) -> None:
        """Keep what was measured so far, of weights that are others now, out of the card."""
        self._others_evaluations = len(self.state.log_history)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> str | Future | None:
        """Save the classifier with its card in `<output_dir>/hub`, and push that folder in one commit.

        Args:
            commit_message: title of the commit.
            blocking: wait for the end of the upload. One that is not waited for logs its failure, and the future that
                is returned raises it.
            token: the one of the arguments, or else of `hf auth login`, when None.
            revision: the branch; `hub_revision` of the arguments when None.
            private: visibility of a new repository; `hub_private_repo` of the arguments when None.
            **kwargs: `create_pr`, and entries of the card's metadata as for `create_model_card`.

        Returns:
            The URL (a future of it when not blocking); None on other processes than the main one.

        Raises:
            PushError: when it does not succeed; the folder is complete, and the message says how to push it later.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if getattr(self, "hub_model_id", None) is None:
            self.init_hf_repo(token=token, private=private)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        place = {"private": private, "revision": revision, "create_pr": kwargs.pop("create_pr", False)}
        push = self._start_push(commit_message, kwargs, token=token, **place)
        if blocking:
            return push.result()
        push.add_done_callback(_log_failure)
        return push

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push the model in the background after a save (`hub_strategy="every_save"`)."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self._push is not None and not self._push.done():
            if not self.args.hub_always_push:
                logger.info("the push before is still running; this save is not pushed, unless it is the last")
                self._left_out = True
                return
            self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        try:
            push = self._start_push(f"Training in progress, step {self.state.global_step}")
        except Exception as error:  # what is trained and saved does not depend on it
            logger.warning("this save is not pushed: %r", error)
        else:
            push.add_done_callback(_log_failure)

    def _start_push(
        self,
        commit_message: str | None,
        metadata: dict[str, Any] | None = None,
        token: str | None = None,
        **place: Any,
    ) -> Future:
        """Write the folder and push it from another thread; the future says what went wrong.

        The doors are opened in this one: from another, they would draw random numbers of the training beside them.
        """
        self.create_model_card(**(metadata or {}))
        defaults = {"private": self.args.hub_private_repo, "revision": self.args.hub_revision}
        place = defaults | {name: value for name, value in place.items() if value is not None}
        try:
            check_folder(self._hub_folder(), self.hub_model_id, **place)
        except PushError as error:
            self._push = Future()
            self._push.set_exception(error)
            return self._push
        if self._pusher is None:
            self._pusher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")
        options = {"token": token or self.args.hub_token, "commit_message": commit_message, "check": False}
        self._push = self._pusher.submit(push_folder, self._hub_folder(), self.hub_model_id, **options, **place)
        self._left_out = False
        return self._push

    def _finish_current_push(self) -> None:
        if self._push is not None:
            wait([self._push])

    def _hub_folder(self) -> Path:
        return Path(self.args.output_dir) / HUB_FOLDER


def _log_failure(push: Future) -> None:
    if error := push.exception():
        logger.warning("in the background, %s", error if isinstance(error, PushError) else repr(error))
