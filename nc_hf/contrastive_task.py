"""`ContrastiveTask`: a classifier whose features are trained by FCL, KCL or TSC instead of by its head."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nc_hf.choices import check_choice
from nc_hf.losses.class_means import gather_with_gradient
from nc_hf.losses.collapse import NeuralCollapseLoss
from nc_hf.losses.contrastive import (
    assign_targets,
    queue_contrastive_loss,
    sample_positives,
    supervised_contrastive_loss,
    uniform_targets,
    update_centroids,
)
from nc_hf.losses.precision import unit_rows
from nc_hf.models.classifier import FeatureTap
from nc_hf.sampling import mix_seeds
from nc_hf.task import ClassificationTask, Update

ContrastiveMethod = Literal["fcl", "kcl", "tsc"]


@dataclass(frozen=True)
class ContrastiveSettings:
    """Settings of contrastive training; values of the code released with TSC where nothing else is said.

    Attributes:
        method: `"fcl"`: all other rows of the class in the batch; `"kcl"`: the own key and some keys of a queue;
            `"tsc"`: those and a target of the class.
        temperature: T > 0 of all three.
        dimension: D of the projected vectors.
        positives: k keys of the class drawn from the queue, 6 as in KCL's paper; 0 takes all.
        queue: number of keys kept. The papers' 65536 is for ImageNet-LT; 4096, ours, is about a third of CIFAR-LT with
            imbalance 100. Must hold the keys of one batch of all processes.
        momentum: m of the momentum encoder.
        target_weight: of the target part of TSC.
        assignment_interval: batches between two assignments of the targets; the assignment takes seconds from some
            thousand classes on.
        seed: of queue, centroids, targets and the drawn positives.

    Raises:
        ValueError: for a value out of range.
    """

    method: ContrastiveMethod
    temperature: float = 0.07
    dimension: int = 128
    positives: int = 6
    queue: int = 4096
    momentum: float = 0.999
    target_weight: float = 0.2
    assignment_interval: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values."""
        check_choice("method", self.method, get_args(ContrastiveMethod))
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {self.temperature}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"`momentum` must lie in [0, 1), got {self.momentum}.")
        lowest = {"dimension": 1, "positives": 0, "queue": 1, "target_weight": 0, "assignment_interval": 1}
        for name, bound in lowest.items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"`{name}` must be at least {bound}, got {getattr(self, name)}.")


class KeyQueue(nn.Module):
    """The latest keys and their labels, first in, first out (He et al. 2020, MoCo).

    An empty slot holds a random direction and the label -1, as in the authors' code: it is a negative of every query
    and never a positive. Such slots are gone after Q keys.

    Args:
        length: Q.
        dimension: D.
        generator: of the random directions.
    """

    def __init__(self, length: int, dimension: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("keys", unit_rows(torch.randn(length, dimension, generator=generator)))
        self.register_buffer("labels", torch.full((length,), -1))
        self.register_buffer("position", torch.tensor(0))

    @torch.no_grad()
    def push(self, keys: Tensor, labels: Tensor) -> None:
        """Replace the oldest entries.

        Args:
            keys: (N, D), N at most Q.
            labels: (N,) integers >= 0.

        Raises:
            ValueError: when there are more keys than slots.
        """
        length = len(self.keys)
        if len(keys) > length:
            raise ValueError(
                f"the queue has {length} slots but a batch of all processes has {len(keys)} keys: "
                f"set `queue` to at least {len(keys)}, better to many times that."
            )
        slots = (self.position + torch.arange(len(keys), device=keys.device)) % length
        self.keys[slots] = keys.to(self.keys.dtype)
        self.labels[slots] = labels
        self.position.copy_((self.position + len(keys)) % length)


class ClassTargets(nn.Module):
    """The targets of TSC, running class centroids, and which target is whose (Li et al. 2022).

    Args:
        num_classes: K.
        dimension: D.
        seed: of the targets.
        generator: of the random directions that centroids start from, as in the authors' code.
    """

    def __init__(self, num_classes: int, dimension: int, seed: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("vectors", uniform_targets(num_classes, dimension, seed))
        self.register_buffer("centroids", unit_rows(torch.randn(num_classes, dimension, generator=generator)))
        self.register_buffer("assigned", torch.arange(num_classes))

    @torch.no_grad()
    def update(self, queries: Tensor, labels: Tensor, *, assign: bool) -> None:
        """Move the centroids of the classes of a batch and, with `assign`, assign the targets anew.

        Args:
            queries: (N, D) of length 1, of all processes.
            labels: (N,) integers in [0, K).
            assign: whether to assign.
        """
        self.centroids.copy_(update_centroids(self.centroids, queries, labels))
        if assign:
            self.assigned.copy_(assign_targets(self.centroids, self.vectors))


class ContrastiveTask(ClassificationTask):
    """A classifier with a projection in place of its head while it is trained; the head waits for stage two.

    A training batch holds two augmented views of each image: view one in the even rows, view two in the odd rows.

    FCL contrasts all views of the batches of all processes. KCL and TSC encode view one (queries) by the classifier
    and view two (keys) by its momentum encoder, in train mode as in MoCo, whose weights follow those of the classifier
    before each batch; its norm layers keep statistics of their own. MoCo's exchange of images between processes, which
    hides what batch statistics tell of the partner, is left out: it changes nothing in one process, and here one
    process and several are to see the same. Keys of all processes enter the queue in the order of the ranks.

    The projection is linear (P, P), ReLU, linear (P, D), then length 1 (Chen et al. 2020, MoCo v2). The head's
    parameters get no gradient; in eval mode logits are those of the untouched head, and the loss is its cross entropy.

    Over accumulated batches losses are averaged, but each batch is contrasted with itself (FCL) or with the queue as
    it stands; the momentum encoder takes its one step an update in equal parts. Class weights do not apply: nothing
    is classified.

    Args:
        model: an image classifier, of timm or of transformers; kept as it is.
        head_name: module path of its last layer.
        num_classes: K.
        settings: of the method.
        feature_dim: P, the width of the head's input.
        collapse: the two feature terms, on the features of all views (FCL) or of view one, or None. From the start on
            they hold the contrastive loss where it begins; from half of the run on they help FCL and KCL
            (results/README.md).
    """

    def __init__(
        self,
        model: nn.Module,
        head_name: str,
        num_classes: int,
        *,
        settings: ContrastiveSettings,
        feature_dim: int,
        collapse: NeuralCollapseLoss | None = None,
    ) -> None:
        key_classifier = copy.deepcopy(model)  # before a tap is put on it
        super().__init__(model, head_name, num_classes, collapse=collapse)
        self.settings = settings
        hidden, last = nn.Linear(feature_dim, feature_dim), nn.Linear(feature_dim, settings.dimension)
        self.projector = nn.Sequential(hidden, nn.ReLU(), last)
        self.targets = None
        if settings.method == "fcl":
            return
        self.key_classifier = key_classifier.requires_grad_(False)
        self.key_projector = copy.deepcopy(self.projector).requires_grad_(False)
        self.key_tap = FeatureTap(self.key_classifier, head_name)
        generator = torch.Generator().manual_seed(settings.seed)
        self.queue = KeyQueue(settings.queue, settings.dimension, generator)
        if settings.method == "tsc":
            self.targets = ClassTargets(num_classes, settings.dimension, settings.seed, generator)
        self.register_buffer("batches_seen", torch.tensor(0))

    def training_terms(self, pixel_values: Tensor, labels: Tensor, update: Update) -> tuple[dict[str, Tensor], Tensor]:
        """The contrastive loss, TSC's targets, and the collapse terms.

        Args:
            pixel_values: (2B, 3, H, W), views of one image in neighboring rows.
            labels: (2B,) integers in [0, K).
            update: with the counts of all rows.

        Raises:
            ValueError: for mixed images, rows that are not pairs of one label, or more keys than the queue holds.
        """
        _check_pairs(labels, update.partners)
        share = len(labels) / update.counts.sum()
        if self.settings.method == "fcl":
            features, logits = self.features_and_logits(pixel_values)
            terms = {"contrastive": self._loss_of_all_views(features, labels)}
        else:
            features, logits = self.features_and_logits(pixel_values[0::2])
            labels, update = labels[0::2], update._replace(counts=update.counts / 2)
            self._follow(self.settings.momentum ** (1 / update.batches))
            terms = self._queue_terms(features, self._keys(pixel_values[1::2]), labels)
        terms = {name: share * term for name, term in terms.items()}
        # DDP must not take the head for a part of the loss, which it would conclude from logits with a graph.
        return terms | self.collapse_terms(features, labels, update), logits.detach()

    def _loss_of_all_views(self, features: Tensor, labels: Tensor) -> Tensor:
        vectors = gather_with_gradient(unit_rows(self.projector(features)))
        return supervised_contrastive_loss(
            vectors, gather_with_gradient(labels), self.settings.temperature, anchors=_own_rows(len(labels))
        )

    def _queue_terms(self, features: Tensor, keys: Tensor, labels: Tensor) -> dict[str, Tensor]:
        queries, batch = unit_rows(self.projector(features)), int(self.batches_seen)
        all_labels, own_rows = gather_with_gradient(labels), _own_rows(len(labels))
        # Drawn for the rows of all processes, so that a row's draw does not depend on how many there are.
        generator = torch.Generator(labels.device).manual_seed(mix_seeds(self.settings.seed, batch))
        positives = sample_positives(all_labels, self.queue.labels, self.settings.positives, generator)[own_rows]
        targets = assigned = None
        if self.targets is not None:
            assign = batch % self.settings.assignment_interval == 0
            self.targets.update(gather_with_gradient(queries.detach()), all_labels, assign=assign)
            targets, assigned = self.targets.vectors, self.targets.assigned[labels]
        terms = queue_contrastive_loss(
            queries, keys, self.queue.keys, positives, self.settings.temperature, targets=targets, assigned=assigned
        )
        if "targets" in terms:
            terms["targets"] = self.settings.target_weight * terms["targets"]
        self.queue.push(gather_with_gradient(keys), all_labels)
        self.batches_seen += 1
        return terms

    @torch.no_grad()
    def _keys(self, pixel_values: Tensor) -> Tensor:
        self.key_classifier(pixel_values)
        return unit_rows(self.key_projector(self.key_tap.read()))

    @torch.no_grad()
    def _follow(self, momentum: float) -> None:
        """One step of the momentum encoder: m times its weights plus 1 - m times those of the encoder."""
        pairs = [(self.key_classifier, self.classifier), (self.key_projector, self.projector)]
        for follower, leader in pairs:
            for average, current in zip(follower.parameters(), leader.parameters(), strict=True):
                average.lerp_(current, 1 - momentum)


def _check_pairs(labels: Tensor, partners: Tensor | None) -> None:
    if partners is not None:
        raise ValueError("mixed images have no one class to contrast them by: set mixup_alpha: 0 and cutmix_alpha: 0.")
    if len(labels) % 2 or not torch.equal(labels[0::2], labels[1::2]):
        raise ValueError(
            f"the {len(labels)} rows of the batch are not two views of each image in neighboring rows; their labels "
            f"start with {labels[:8].tolist()}. Set `sampler: two_views` and an even batch size."
        )


def _own_rows(number: int) -> slice:
    """Where this process's rows stand among those of all processes."""
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return slice(rank * number, (rank + 1) * number)
