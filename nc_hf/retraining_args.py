"""Arguments of stage two: `RetrainingArguments`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from nc_hf.argument_checks import LEVELLING_SAMPLERS, PRIOR_LOSSES
from nc_hf.choices import check_choices
from nc_hf.sampling import SamplerName
from nc_hf.training_args import NCTrainingArguments

HeadName = Literal["crt", "lws", "tau_norm", "ncm", "least_squares", "logit_adjusted"]
TRAINED_HEADS = ("crt", "lws")  # the others are computed
OF_HEADS = {"tau": ("tau_norm", "logit_adjusted"), "lws_weight_factor": ("lws",)}  # settings of these heads alone
CORRECTING = (*LEVELLING_SAMPLERS, "bilateral")  # samplers after which the prior is another one


@dataclass
class RetrainingArguments(NCTrainingArguments):
    """Settings of stage two: new heads on a frozen backbone, classes drawn alike.

    Defaults: those of methods that made cRT work on CIFAR-LT (10 epochs of batches of 128, learning rate 0.1 with a
    cosine to 0, weight decay 5e-4, head drawn from N(0, 0.01), backbone in eval mode). No collapse terms, weights or
    mixup. The learning rate belongs to 128 images an update, over all processes: with fewer, lower it as much.

    Of `heads`, `crt` (a new linear layer) and `lws` (a factor for each class on stage one's logits) are trained, both
    Kang et al. 2020; `tau_norm` and `ncm` (same source; distances are those of the features as they are, there of unit
    features), `least_squares` (the paper's Proposition 1) and `logit_adjusted` (Menon et al. 2021) are computed.
    Stage two of MiSLAS (Zhong et al. 2021) is `lws` with `lws_weight_factor`, `loss: label_aware_smoothing` and
    `backbone_statistics: shifted`. Weight balancing (Alshammari et al. 2022) is `crt` with `head_init: keep`, a large
    `weight_decay` and `max_norm_threshold`. Kang et al. take 5 epochs for `lws` alone.
    """

    num_train_epochs: float = field(default=10.0, metadata={"help": "Epochs of re-training."})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "Images a batch on each device."})
    learning_rate: float = field(default=0.1, metadata={"help": "Initial learning rate, for 128 images an update."})
    optim: str = field(default="sgd", metadata={"help": "Optimizer."})
    weight_decay: float = field(default=5e-4, metadata={"help": "Weight decay of the head."})
    decay_all_parameters: bool = field(default=True, metadata={"help": "Weight decay on the bias too."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0 is off."})
    lr_cosine: bool = field(default=True, metadata={"help": "Cosine to 0 over the epochs."})
    sampler: SamplerName = field(default="class_balanced", metadata={"help": "Draw of training images."})
    within_weight: float = field(default=0.0, metadata={"help": "No feature is trained in stage two."})
    between_weight: float = field(default=0.0, metadata={"help": "No feature is trained in stage two."})
    heads: list[str] = field(
        default_factory=lambda: ["crt"],
        metadata={"help": "New heads; all are saved by name, and the model gets the first."},
    )
    head_init: Literal["new", "keep"] = field(
        default="new",
        metadata={"help": "Start of crt: new: drawn from N(0, 0.01), zero bias; keep: stage one's head."},
    )
    lws_weight_factor: float = field(
        default=0.0,
        metadata={"help": "lws: learning rate of the weights as a share (0 freezes them; MiSLAS 0.05 to 0.5)."},
    )
    max_norm_threshold: float | None = field(
        default=None,
        metadata={"help": "Keep the norms of the head's rows below min + threshold * range (MaxNorm; 0.1)."},
    )
    match_base_norm: bool = field(
        default=False,
        metadata={
            "help": "Scale a trained head to the norm of stage one's: the same predictions, with probabilities that a "
            "strong weight decay has not flattened."
        },
    )
    tau: float | None = field(
        default=None,
        metadata={"help": "Of tau_norm and logit_adjusted; None: chosen on the validation split, 1 without one."},
    )
    backbone_statistics: Literal["frozen", "shifted"] = field(
        default="frozen",
        metadata={"help": "Running statistics of batch norms; shifted: they follow the balanced draws."},
    )
    features: Literal["images", "cached"] = field(
        default="images",
        metadata={"help": "images: fresh augmentation each draw; cached: features computed once over several views."},
    )
    cached_views: int = field(default=4, metadata={"help": "Augmented views of each image (features: cached)."})

    def __post_init__(self) -> None:
        """Refuse what cannot act on a frozen backbone."""
        check_choices(self, RetrainingArguments)
        if self.within_weight or self.between_weight:
            raise ValueError(
                f"stage two trains the head alone, where the collapse terms have no gradient: got within_weight="
                f"{self.within_weight}, between_weight={self.between_weight}. Leave both at 0."
            )
        self._check_heads()
        if self.cached_views < 1:
            raise ValueError(f"`cached_views` must be at least 1, got {self.cached_views}.")
        if self.features == "cached" and self.mixes_images:
            raise ValueError("`features: cached` cannot mix images: leave mixup_alpha and cutmix_alpha at 0.")
        if self.features == "cached" and self.backbone_statistics == "shifted":
            raise ValueError("`features: cached` cannot move the backbone's statistics: set features: images.")
        if self.backbone_statistics == "shifted" and (len(self.heads) > 1 or self.heads[0] not in TRAINED_HEADS):
            raise ValueError(
                f"`backbone_statistics: shifted` moves the backbone with the training of one head, and other heads "
                f"would be measured on the moved one: got heads: {self.heads}. Give crt or lws alone."
            )
        if self.features == "cached" and (self.load_best_model_at_end or self.save_strategy == "best"):
            raise ValueError(
                "`features: cached` trains the head by itself, which is not evaluated on the way, so there is no best "
                "checkpoint: set load_best_model_at_end: false and another save_strategy, or features: images."
            )
        if self.loss in ("ldam", "dot_regression"):
            raise ValueError(
                f"stage two trains a linear head, and `loss: {self.loss}` needs one of unit weights. Set loss: ce."
            )
        if self.objective != "classification":
            raise ValueError(f"stage two trains the head by classification, got `objective: {self.objective}`.")
        if self.max_norm_threshold is not None and self.match_base_norm:
            raise ValueError("`match_base_norm` would undo `max_norm_threshold`: leave one of them out.")
        if self.max_norm_threshold is not None and self.head_init == "new":
            raise ValueError(
                "`max_norm_threshold` is relative to the norms that the head starts with, which are near 0 for a new "
                "one: set head_init: keep (weight balancing)."
            )
        super().__post_init__()

    @property
    def goes_on_from_stage_one(self) -> list[str]:
        """The settings that go on from stage one's head, such as `"heads: lws"`."""
        reused = [f"heads: {name}" for name in self.heads if name in ("lws", "tau_norm", "logit_adjusted")]
        reused += ["head_init: keep"] if "crt" in self.heads and self.head_init == "keep" else []
        return reused + ["match_base_norm"] * self.match_base_norm

    def _check_heads(self) -> None:
        unknown = [name for name in self.heads if name not in HeadName.__args__]
        if unknown or not self.heads or len(set(self.heads)) < len(self.heads):
            raise ValueError(f"`heads` must be some of {', '.join(HeadName.__args__)}, each once, got {self.heads}.")
        for name in ("lws_weight_factor", "max_norm_threshold", "tau"):
            if (value := getattr(self, name)) is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"`{name}` must be at least 0, got {value}.")
        for name, heads in OF_HEADS.items():
            if getattr(self, name) and not set(heads) & set(self.heads):
                raise ValueError(
                    f"`{name}` is {getattr(self, name)} and acts on {' and '.join(heads)} alone, got heads: "
                    f"{self.heads}. Leave it out, or add {' or '.join(heads)}."
                )


def check_stages(stage1: NCTrainingArguments, stage2: RetrainingArguments, has_validation: bool) -> None:
    """Refuse a stage two that cannot follow stage one.

    Args:
        stage1: of a recipe.
        stage2: of the same one.
        has_validation: whether there are images to choose tau on, which may then be anything from 0.

    Raises:
        ValueError: for heads that go on from stage one's where that was not trained, and for `logit_adjusted` after a
            stage one that corrects the prior, where nothing chooses a tau but 1.
    """
    if stage1.objective == "contrastive" and stage2.goes_on_from_stage_one:
        raise ValueError(
            f"`{stage2.goes_on_from_stage_one[0]}` goes on from stage one's head, which `stage1.objective: "
            "contrastive` does not train. Use crt with head_init: new, ncm or least_squares."
        )
    by = {"class_weighting": stage1.class_weighting != "none", "sampler": stage1.sampler in CORRECTING}
    by["loss"] = stage1.loss in PRIOR_LOSSES
    corrected = [name for name, corrects in by.items() if corrects]
    if "logit_adjusted" in stage2.heads and stage2.tau is None and not has_validation and corrected:
        name = corrected[0]
        raise ValueError(
            f"the head `logit_adjusted` takes the whole prior off (tau 1), which `stage1.{name}: "
            f"{getattr(stage1, name)}` has corrected already. Set stage2.tau, or data.validation_fraction to choose."
        )
