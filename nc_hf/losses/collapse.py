"""The two feature terms of "Inducing Neural Collapse in Deep Long-tailed Learning" (AISTATS 2023).

    L_W = sum_k sum_{i: y_i = k} 1/n_k ||h_i - mu_k||^2                              (Eq. 13)
    L_B = -1/K sum_k min_{j != k} angle(mu_k - mu_C, mu_j - mu_C),  mu_C = mean mu   (Eq. 15)

Where the paper's text and the code that gave its results differ, L_W follows the code: n_k counts the images of class
k in the batch, and the sum over classes is a mean over all K. Centers can be parameters with a learning rate of their
own, as in that code (`centers="learned"`); the default are running means.

Two things are better here than in that code. The angle is 2 atan2(||a - b||, ||a + b||), which has no clamp, so
nearly coinciding centers are still pushed apart. And L_B needs O(K P) memory, never the K x K matrix of cosines.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from nc_hf.choices import check_choice
from nc_hf.labels import check_labels, label_counts
from nc_hf.losses.class_means import class_means, gather_with_gradient
from nc_hf.losses.nearest_angle import NearestAngles, gram_norm
from nc_hf.losses.precision import at_least_float32

CenterMode = Literal["learned", "batch", "ema"]
BetweenObjective = Literal["mean", "min", "gram"]
Reduction = Literal["mean", "sum", "images"]
FeatureScale = Literal["none", "rms"]


def within_class_loss(
    features: Tensor,
    labels: Tensor,
    centers: Tensor,
    *,
    reduction: Reduction = "mean",
    class_counts: Tensor | None = None,
) -> Tensor:
    """L_W of Eq. 13: squared distance of each feature to its class center, each class counted alike.

    Args:
        features: (B, P) floating point; computed in at least float32.
        labels: (B,) integers in [0, K).
        centers: (K, P).
        reduction: `"mean"` divides by K, as the authors' code does and as the paper's weights assume; `"sum"` is
            Eq. 13 as printed; `"images"` is center loss (Wen et al. 2016), in which every image counts alike and so
            frequent classes dominate.
        class_counts: (K,) the n_k to divide by; the counts in this batch when None. Pass the training-set counts for
            the paper's "inverse class size", or the counts of a whole update when the batch is a part of it.

    Returns:
        A scalar. Absent classes add nothing; an empty batch gives a zero that is connected to the graph.

    Raises:
        ValueError: if `reduction` is not one of the three, for shapes that do not fit, and for labels that are not one
            integer an image; outside [0, K) on a CPU, where looking at them costs nothing.
    """
    check_choice("reduction", reduction, Reduction.__args__)
    _check_batch(features, labels, centers.shape)
    features, centers = at_least_float32(features), at_least_float32(centers)
    counts = label_counts(labels, len(centers)) if class_counts is None else class_counts
    squared_distances = (features - centers[labels]).square().sum(dim=1)
    if reduction == "images":
        return squared_distances.sum() / counts.sum().clamp(min=1)
    total = (squared_distances / counts[labels]).sum()
    return total / len(centers) if reduction == "mean" else total


def center_loss(features: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
    """Center loss (Wen et al. 2016) in the scale of the authors' code: the mean squared distance to the class center.

    Args:
        features: (B, P).
        labels: (B,) integers in [0, K).
        centers: (K, P).
    """
    return within_class_loss(features, labels, centers, reduction="images")


def between_class_loss(
    centers: Tensor, *, objective: BetweenObjective = "mean", present: Tensor | None = None
) -> Tensor:
    """L_B: minus the angle between each centered class center and its nearest other one, in radians.

    Args:
        centers: (K, P) floating point; computed in at least float32.
        objective: `"mean"` over classes is Eq. 15; `"min"`, the single worst pair, is Eq. 14; `"gram"` is the third
            variant of the authors' code, the Frobenius norm of the off-diagonal cosines with a constant -1/(K-1)
            diagonal. It pulls cosines to 0, not to -1/(K-1).
        present: (K,) bool, the classes that take part; all when None.

    Returns:
        A scalar in [-pi, 0] (`"gram"`: at least 1/sqrt(K-1)). With fewer than two classes a zero, with two a constant,
        both connected to the graph with a zero gradient. Centers that coincide exactly, and a center that equals the
        mean of all, get a zero gradient.

    Raises:
        ValueError: if `objective` is not one of the three.
    """
    check_choice("objective", objective, ("mean", "min", "gram"))
    centers = at_least_float32(centers)
    if present is None:
        present = torch.ones(len(centers), dtype=torch.bool, device=centers.device)
    count = present.sum().clamp(min=1)
    with torch.autocast(centers.device.type, enabled=False):  # a mean of all rounded to bfloat16 would turn directions
        if objective == "gram":
            return torch.where(count >= 2, gram_norm(centers, present, count), centers.sum() * 0)
        angles = NearestAngles.apply(centers, present, count)
        if objective == "mean":
            return angles.sum() / -count
        worst = torch.where(present, angles, torch.inf).amin()
        return torch.where(count >= 2, -worst, angles.sum() * 0)


class NeuralCollapseLoss(nn.Module):
    """The weighted terms lambda_1 L_W and lambda_2 L_B of Eq. 16 over one of three kinds of class centers.

    * `"learned"`: parameters, as in the code that gave the paper's results. Both terms see
      sg(mu) + (mu - sg(mu)) / lambda_1, so a plain SGD step on `centers` is the authors' center update whatever
      lambda_1 is. L_B reaches the features only through the centers. Give `centers` an SGD group of its own (learning
      rate 0.5, no momentum, no weight decay); `NCTrainer` does.
    * `"ema"`: running class means. L_W pulls to them; L_B pushes the batch's own means against all of them. No
      second optimizer, and the safe choice for fine-tuning.
    * `"batch"`: means of the batch over all processes. Good for few classes and large batches; with many classes most
      are alone in a batch and L_W says nothing about them.

    The geometry is computed in float32 with autocast off. Args follow the paper's Table 1 for CIFAR-10. In a loop of
    one's own, for a classifier of timm whose head is one linear layer:

        collapse = NeuralCollapseLoss(num_classes=10, feature_dim=model.head_hidden_size)
        features = model.forward_head(model.forward_features(images), pre_logits=True)  # (B, P), the head's input
        logits = model.get_classifier()(features)
        loss = F.cross_entropy(logits, labels) + sum(collapse(features, labels).values())

    Args:
        num_classes: K, at least 2.
        feature_dim: P.
        within_weight: lambda_1 >= 0; 0 removes L_W.
        between_weight: lambda_2 >= 0; 0 removes L_B. The paper takes 0.1 for 10 classes, 0.5 for 100, 1.0 for 1000.
        centers: see above.
        between_objective: see `between_class_loss`.
        within_reduction: see `within_class_loss`.
        feature_scale: `"none"` leaves L_W in squared units of the features, as the paper; `"rms"` divides it by the
            mean squared norm of the features at hand (no gradient flows through that), so that lambda_1 means the
            same for a ResNet and for the LayerNorm outputs of a transformer. Not with learned centers.
        momentum: of the running means, of one update.
        class_counts: (K,) training images per class; with learned centers, classes without any are left out of L_B and
            of the mean center. The other kinds know a class from its first image on.
        num_experts: E, whose features stand side by side in P (RIDE). Each has terms of its own, which are averaged,
            and a step on learned centers moves each expert's as far as it would if that expert were alone.

    Raises:
        ValueError: for a negative weight, an unknown choice, K < 2, class counts that are not K numbers, a momentum
            outside [0, 1), features that cannot be split among the experts, or learned centers without L_W (L_B alone
            would never reach the features) or with `feature_scale="rms"`.
    """

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        within_weight: float = 0.01,
        between_weight: float = 0.1,
        centers: CenterMode = "ema",
        *,
        between_objective: BetweenObjective = "mean",
        within_reduction: Reduction = "mean",
        feature_scale: FeatureScale = "none",
        momentum: float = 0.9,
        class_counts: Tensor | None = None,
        num_experts: int = 1,
    ) -> None:
        super().__init__()
        check_choice("centers", centers, ("learned", "batch", "ema"))
        check_choice("between_objective", between_objective, ("mean", "min", "gram"))
        check_choice("within_reduction", within_reduction, Reduction.__args__)
        check_choice("feature_scale", feature_scale, ("none", "rms"))
        for name, value in (("within_weight", within_weight), ("between_weight", between_weight)):
            if not value >= 0:
                raise ValueError(f"`{name}` must be at least 0, got {value}. Use 0 to switch the term off.")
        if num_classes < 2:
            raise ValueError(f"the collapse terms need at least 2 classes, got num_classes={num_classes}.")
        if not 0 <= momentum < 1:
            raise ValueError(f"`momentum` must lie in [0, 1), got {momentum}.")
        if centers == "learned" and within_weight == 0:
            raise ValueError(
                'centers="learned" needs within_weight > 0: L_B reaches the features only through L_W. '
                'Use centers="ema" or "batch" for L_B alone.'
            )
        if centers == "learned" and feature_scale == "rms":
            raise ValueError(
                'centers="learned" follow the features by steps in their own units: use feature_scale="none", or '
                'centers="ema" or "batch".'
            )
        if num_experts < 1 or feature_dim % num_experts:
            raise ValueError(f"feature_dim={feature_dim} cannot be split among num_experts={num_experts}.")
        self.num_classes, self.feature_dim, self.mode = num_classes, feature_dim, centers
        self.num_experts = num_experts
        self.feature_scale = feature_scale
        self.within_weight, self.between_weight, self.momentum = within_weight, between_weight, momentum
        self.between_objective, self.within_reduction = between_objective, within_reduction
        self.frozen = False  # learned centers held still: the authors' code did so before the terms start
        present = torch.ones(num_classes) if class_counts is None else torch.as_tensor(class_counts)
        if present.shape != (num_classes,):
            raise ValueError(f"`class_counts` must be {num_classes} numbers, one a class, got {tuple(present.shape)}.")
        if centers == "learned":
            self.centers = nn.Parameter(torch.randn(num_classes, feature_dim))
            self.register_buffer("seen", present > 0)
        elif centers == "ema":
            self.register_buffer("centers", torch.zeros(num_classes, feature_dim))
            self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))

    def extra_repr(self) -> str:
        """The settings, for `print(model)`."""
        return (
            f"{self.num_classes}, {self.feature_dim}, within_weight={self.within_weight}, "
            f'between_weight={self.between_weight}, centers="{self.mode}"'
        )

    @torch.no_grad()
    def set_centers(self, means: Tensor, counts: Tensor) -> None:
        """Start from given class means.

        Args:
            means: (K, P).
            counts: (K,) the images behind each mean; a class without any is left out until it is seen.
        """
        if self.mode != "batch":
            self.centers.copy_(means)
            self.seen.copy_(counts > 0)

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        partner_labels: Tensor | None = None,
        mixing: float | Tensor = 1.0,
        class_counts: Tensor | None = None,
        batches: int = 1,
    ) -> dict[str, Tensor]:
        """The weighted terms of one batch.

        Args:
            features: (B, P), the input of the head.
            labels: (B,) integers in [0, K).
            partner_labels: (B,) the second labels of mixed-up images: L_W becomes
                mixing * L_W(labels) + (1 - mixing) * L_W(partner_labels), and means weigh images alike.
            mixing: the mixup coefficient lambda in [0, 1].
            class_counts: (K,) the n_k of L_W; see `within_class_loss`.
            batches: accumulated in the update; running means take their one step an update in equal parts.

        Returns:
            `{"within": lambda_1 L_W, "between": lambda_2 L_B}`, scalars; a term of weight 0 is left out.

        Raises:
            ValueError: as `within_class_loss`.
        """
        shape = (self.num_classes, self.feature_dim)
        for given in (labels,) if partner_labels is None else (labels, partner_labels):
            _check_batch(features, given, shape)
        assignments = [(labels, 1.0)] if partner_labels is None else [(labels, mixing), (partner_labels, 1 - mixing)]
        with torch.autocast(features.device.type, enabled=False):
            features = at_least_float32(features)
            pull, push, present = self._centers(features, assignments, batches)
            terms = {}
            if self.within_weight:
                pairs = zip(self._by_expert(features), self._by_expert(pull), strict=True)
                losses = [self._within(h, mu, assignments, class_counts) for h, mu in pairs]
                terms["within"] = _mean(losses)
            if self.between_weight:
                options = {"objective": self.between_objective, "present": present}
                losses = [between_class_loss(mu, **options) for mu in self._by_expert(push)]
                terms["between"] = self.between_weight * _mean(losses)
        return terms

    def _by_expert(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.chunk(self.num_experts, dim=1)

    def _within(
        self,
        features: Tensor,
        centers: Tensor,
        assignments: list[tuple[Tensor, float | Tensor]],
        class_counts: Tensor | None,
    ) -> Tensor:
        """lambda_1 L_W of one expert."""
        options = {"reduction": self.within_reduction, "class_counts": class_counts}
        loss = sum(weight * within_class_loss(features, y, centers, **options) for y, weight in assignments)
        return self._within_factor(features) * loss

    def _within_factor(self, features: Tensor) -> float | Tensor:
        """The factor of L_W; the same on all processes."""
        if self.feature_scale == "none":
            return self.within_weight
        squares = gather_with_gradient(features.detach().square().sum(dim=1))
        return self.within_weight / (squares.sum() / max(1, len(squares))).clamp(min=1e-12)

    def _centers(
        self, features: Tensor, assignments: list[tuple[Tensor, float | Tensor]], batches: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Centers for L_W, centers for L_B, and which classes take part in L_B."""
        if self.mode == "learned":
            fixed = self.centers.detach()
            if self.frozen:
                return fixed, fixed, self.seen
            # The mean over experts must not slow their centers down.
            scaled = fixed + self.num_experts * (self.centers - fixed) / self.within_weight
            return scaled, scaled, self.seen
        means, present = class_means(features, assignments, self.num_classes)
        if self.mode == "batch":
            return means, means, present
        if self.training:
            self._update(means.detach(), present, self.momentum ** (1 / batches))
        # The classes are a copy, since the buffer changes in place at the next step.
        centers = self.centers.to(means.dtype)  # a module in half precision keeps them so
        return centers, centers + (means - means.detach()), self.seen.clone()

    @torch.no_grad()
    def _update(self, means: Tensor, present: Tensor, momentum: float) -> None:
        present = present & (means.abs().amax(dim=1) < torch.inf)  # one overflow must not stay for good
        centers = self.centers.to(means.dtype)
        updated = torch.where(self.seen[:, None], torch.lerp(centers, means, 1 - momentum), means)
        self.centers.copy_(torch.where(present[:, None], updated, centers))
        self.seen.logical_or_(present)


def _mean(losses: list[Tensor]) -> Tensor:
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def _check_batch(features: Tensor, labels: Tensor, centers_shape: tuple[int, ...]) -> None:
    """Refuse what would broadcast, wrap around or fail far from here."""
    num_classes, feature_dim = centers_shape
    if features.ndim != 2 or features.shape[1] != feature_dim or labels.shape != features.shape[:1]:
        raise ValueError(
            f"features must be (B, {feature_dim}), the input of the head, with one label each, got "
            f"{tuple(features.shape)} and labels of {tuple(labels.shape)}."
        )
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels must be int64 or int32, got {labels.dtype}. Convert them by `labels.long()`.")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would wait for the device
        check_labels(labels, num_classes)
