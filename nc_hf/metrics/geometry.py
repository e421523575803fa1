"""Neural collapse in numbers: NC1-NC4 (Papyan, Han and Donoho 2020) from two streaming passes over features.

Conventions. mu_k is the mean of class k, and m_k = mu_k minus the unweighted mean of the class means. With
Sigma_W = 1/N sum_i (h_i - mu_y)(h_i - mu_y)^T over images and Sigma_B = 1/K sum_k m_k m_k^T over classes, NC1 is
tr(Sigma_W Sigma_B^+) / K. The authors' code leaves out that division, and its `myNC1` also takes sums over images and
squared class sizes; on balanced data that is K^2 / N times ours, so it shrinks as the data grow.

Variances are over n_k images, not n_k - 1, as in the papers, which makes those of the smallest classes look small.

Classes without images are left out of everything, and those with one image, which have no spread, out of NC1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from nc_hf.metrics.angles import angle_statistics, best_angle, pair_blocks, pairwise_angles

__all__ = ["best_angle", "class_means", "measure_geometry", "pairwise_angles"]

RELATIVE_FLOOR = 1e-6  # eigenvalues of Sigma_B below this share of the largest count as zero

Reduce = Callable[[Tensor], Tensor]
Batches = Iterable[tuple[Tensor, ...]]


def _one_process(tensor: Tensor) -> Tensor:
    return tensor


def class_means(
    batches: Batches,
    num_classes: int,
    feature_dim: int,
    *,
    device: torch.device | str = "cpu",
    reduce: Reduce = _one_process,
) -> tuple[Tensor, Tensor]:
    """Class means and sizes of a stream of features.

    Args:
        batches: of features (B, P) and labels (B,); further elements are ignored.
        num_classes: K.
        feature_dim: P.
        device: where sums are kept; it must have float64.
        reduce: sums a tensor over processes that see different images.

    Returns:
        Means (K, P) float64, zero for classes without images, and counts (K,) int64.

    Raises:
        ValueError: for labels outside [0, K), or features that are not finite or of another width.
    """
    sums = torch.zeros(num_classes, feature_dim, dtype=torch.float64, device=device)
    counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
    for features, labels, _ in _checked(batches, num_classes, feature_dim, sums.device):
        sums.index_add_(0, labels, features)
        counts += torch.bincount(labels, minlength=num_classes)
    sums, counts = reduce(sums), reduce(counts)
    return sums / counts.clamp(min=1)[:, None], counts


def measure_geometry(
    batches_factory: Callable[[], Batches],
    head_weight: Tensor,
    head_bias: Tensor | None,
    num_classes: int,
    *,
    means_and_counts: tuple[Tensor, Tensor] | None = None,
    reduce: Reduce = _one_process,
) -> dict[str, float]:
    """NC1-NC4 of features and a linear head.

    Sums are kept in float64, in O(K P) memory; features never lie in memory together, and no P x P matrix is made
    when K < P. Take features in eval mode without augmentation, and say of which split they are.

    Args:
        batches_factory: gives a new stream of batches each time it is called, twice in all: features (B, P), labels
            (B,) and, for a classifier that is not this linear head alone, its logits (B, K).
        head_weight: (K, P); the work is done on its device.
        head_bias: (K,), or None.
        num_classes: K.
        means_and_counts: what `class_means` gave for the same data, which saves the first pass.
        reduce: sums a tensor over processes; leave it out when every process sees all batches.

    Returns:
        Floats. A quantity that these data do not define (angles of one class, NC1 where no class has two images, or
        a division by zero) is absent.

        * `nc1_variability`: tr(Sigma_W Sigma_B^+) / K; `nc1_variability_balanced`: the same with each class counted
          alike in Sigma_W, which frequent classes dominate otherwise; `nc1_quotient`: tr Sigma_W / tr Sigma_B;
          `nc1_cdnv`: mean over pairs of (v_k + v_j) / (2 ||mu_k - mu_j||^2) (Galanti et al. 2022).
        * `nc2_norm_cov`: unbiased standard deviation of ||m_k|| over their mean; `nc2_etf_error`: distance of the
          normalised Gram matrix of m_k to that of a simplex ETF; and those of `angle_statistics`.
        * `nc3_duality_gap`: ||W/||W|| - M/||M|| ||, Frobenius norms; `nc3_etf_error`: as in NC2, of W M^T;
          `nc3_head_norm_cov`: as in NC2, of the rows of W.
        * `nc4_agreement`: share of images whose nearest class mean is the predicted class.
        * `classes_absent`, `classes_with_one_image`: how many were left out.

    Raises:
        ValueError: for no images, a head, labels or features of another size than K and P, a head or features that
            are not finite, or a second pass over other images than the first.
    """
    if head_weight.ndim != 2 or len(head_weight) != num_classes:
        raise ValueError(f"`head_weight` must be ({num_classes}, P), got shape {tuple(head_weight.shape)}.")
    if not all(parameter.isfinite().all() for parameter in (head_weight, head_bias) if parameter is not None):
        raise ValueError("the head has parameters that are not finite. Check that training did not diverge.")
    # Apple's GPUs have no float64.
    device = torch.device("cpu") if head_weight.device.type == "mps" else head_weight.device
    width = head_weight.shape[1]
    head_weight = head_weight.detach().to(device).double()
    head_bias = None if head_bias is None else head_bias.detach().to(device).double()
    if means_and_counts is None:
        means_and_counts = class_means(batches_factory(), num_classes, width, device=device, reduce=reduce)
    means, counts = means_and_counts[0].to(device).double(), means_and_counts[1].to(device)
    present, spread = counts > 0, counts > 1
    if not present.any():
        raise ValueError("there is no image to measure: every class is empty. Check the data set's split.")
    whitening = _whitening(_center(means[spread])) if spread.sum() > 1 else means.new_zeros(width, 0)
    scatter, agreeing = _second_pass(
        _checked(batches_factory(), num_classes, width, device),
        means,
        counts,
        whitening,
        head_weight,
        head_bias,
        reduce,
    )
    metrics: dict[str, float] = {}
    if spread.sum() > 1:
        metrics |= _nc1(means[spread], counts[spread], scatter[:, spread])
    if present.sum() > 1:
        centered = _center(means[present])
        metrics |= _nc2_and_nc3(centered, head_weight[present])
    metrics["nc4_agreement"] = agreeing / counts.sum().item()
    metrics["classes_absent"] = float((~present).sum())
    metrics["classes_with_one_image"] = float((counts == 1).sum())
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _checked(
    batches: Batches, num_classes: int, feature_dim: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    for features, labels, *logits in batches:
        if features.ndim != 2 or features.shape[1] != feature_dim:
            raise ValueError(f"features must be (B, {feature_dim}), as the head takes, got {tuple(features.shape)}.")
        if len(labels) and not (labels.min() >= 0 and labels.max() < num_classes):
            raise ValueError(f"labels must lie in [0, {num_classes}), got {labels.min()} to {labels.max()}.")
        if not features.isfinite().all():
            row = int(features.isfinite().all(dim=1).logical_not().nonzero()[0])
            raise ValueError(f"row {row} of a batch of features is not finite. Check that training did not diverge.")
        yield features.detach().to(device, torch.float64), labels.to(device), logits[0].to(device) if logits else None


def _second_pass(
    batches: Iterable[tuple[Tensor, Tensor, Tensor | None]],
    means: Tensor,
    counts: Tensor,
    whitening: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    reduce: Reduce,
) -> tuple[Tensor, float]:
    """Per class the sums of squared deviations from the mean, plain and whitened (2, K); images that agree in NC4."""
    num_classes = len(means)
    scatter, seen = means.new_zeros(2, num_classes), torch.zeros_like(counts)
    agreeing = means.new_zeros(())
    # The nearest mean has the largest h mu - ||mu||^2 / 2; that of an absent class is out of reach.
    offsets = torch.where(counts > 0, -means.square().sum(dim=1) / 2, -math.inf)
    for features, labels, logits in batches:
        deviations = features - means[labels]
        squares = [deviations.square().sum(dim=1), (deviations @ whitening).square().sum(dim=1)]
        scatter.index_add_(1, labels, torch.stack(squares))
        seen += torch.bincount(labels, minlength=num_classes)
        logits = linear(features, head_weight, head_bias) if logits is None else logits
        agreeing += (linear(features, means, offsets).argmax(dim=1) == logits.argmax(dim=1)).sum()
    scatter, seen, agreeing = reduce(scatter), reduce(seen), reduce(agreeing)
    if not torch.equal(seen, counts):
        raise ValueError(
            f"the class means are of {counts.sum()} images, but the pass after them gave {seen.sum()}, or others. "
            "`batches_factory` must give the same images each time."
        )
    return scatter, agreeing.item()


def _center(means: Tensor) -> Tensor:
    return means - means.mean(dim=0)


def _whitening(centered: Tensor) -> Tensor:
    """A matrix (P, R) with tr(S Sigma_B^+) = tr(whitening^T S whitening), R the rank of Sigma_B."""
    _, singular_values, directions = torch.linalg.svd(centered / math.sqrt(len(centered)), full_matrices=False)
    # ">=": where all means coincide NC1 becomes infinite, not 0.
    kept = singular_values.square() >= RELATIVE_FLOOR * singular_values[0].square()
    return (directions[kept] / singular_values[kept, None]).T


def _nc1(means: Tensor, counts: Tensor, scatter: Tensor) -> dict[str, float]:
    num_classes, num_images = len(means), counts.sum()
    (variances, whitened), centered = scatter / counts, _center(means)
    cdnv, norms = means.new_zeros(()), centered.square().sum(dim=1)
    for rows, later in pair_blocks(num_classes, means.device):
        columns = slice(rows.start, None)
        distances = norms[rows, None] + norms[columns] - 2 * centered[rows] @ centered[columns].T
        cdnv += ((variances[rows, None] + variances[columns]) / (2 * distances.clamp(min=0)))[later].sum()
    return {
        "nc1_variability": (scatter[1].sum() / num_images / num_classes).item(),
        "nc1_variability_balanced": (whitened.mean() / num_classes).item(),
        "nc1_quotient": (scatter[0].sum() / num_images / norms.mean()).item(),
        "nc1_cdnv": cdnv.item() / (num_classes * (num_classes - 1) / 2),
    }


def _nc2_and_nc3(centered: Tensor, head_weight: Tensor) -> dict[str, float]:
    gap = head_weight / head_weight.norm() - centered / centered.norm()
    return {
        "nc2_norm_cov": _variation(centered),
        "nc2_etf_error": _simplex_distance(centered, centered),
        **angle_statistics(centered),
        "nc3_duality_gap": gap.norm().item(),
        "nc3_etf_error": _simplex_distance(head_weight, centered),
        "nc3_head_norm_cov": _variation(head_weight),
    }


def _variation(rows: Tensor) -> float:
    norms = rows.norm(dim=1)
    return (norms.std() / norms.mean()).item()


def _simplex_distance(left: Tensor, centered: Tensor) -> float:
    """||S/||S|| - (I - 11^T/K)/sqrt(K - 1)|| for S = left centered^T (Kothapalli 2023).

    Both matrices have norm 1, and the rows of `centered` sum to zero, so only tr S and ||S|| are needed, and these
    without a K x K matrix when K > P.
    """
    if len(left) > left.shape[1]:
        norm = ((left.T @ left) * (centered.T @ centered)).sum().sqrt()
    else:
        norm = (left @ centered.T).norm()
    cosine = (left * centered).sum() / (norm * math.sqrt(len(left) - 1))
    return (2 - 2 * cosine).clamp(min=0).sqrt().item()
