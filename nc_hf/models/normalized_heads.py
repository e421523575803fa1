"""Heads on unit features: cosine (LDAM) and a fixed simplex (ETF), and how to put one into a classifier."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nc_hf.heads import LinearHead, simplex_directions
from nc_hf.losses.classification import SupervisedLoss
from nc_hf.losses.precision import at_least_float32

HeadKind = Literal["linear", "cosine", "etf"]


def unit_or_zero(tensor: Tensor) -> Tensor:
    """Rows (N, P) of length 1; a row of zeros has no direction, stays zero and gets no gradient."""
    norms = tensor.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, tensor / norms.clamp(min=1e-12), 0.0)


class CosineHead(nn.Module):
    """Logits s cos(h, w_k), without bias: what LDAM trains on (Cao et al. 2019).

    The logits are already scaled, as `nc_hf.losses.long_tail.ldam` expects them. Directions start uniform in [-1, 1]
    and of length 1, as in the authors' code.

    Args:
        in_features: P.
        num_classes: K.
        scale: s, above 0; 30 in the authors' code.

    Raises:
        ValueError: for a scale that is not above 0.
    """

    bias = None

    def __init__(self, in_features: int, num_classes: int, scale: float = 30.0) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"`scale` of a cosine head must be above 0, got {scale}. LDAM takes 30.")
        self.in_features, self.out_features, self.scale = in_features, num_classes, scale
        self.weight = nn.Parameter(torch.empty(num_classes, in_features))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the directions anew."""
        self.weight.copy_(unit_or_zero(self.weight.uniform_(-1, 1)))

    def extra_repr(self) -> str:
        """The shape, for `print(model)`."""
        return f"in_features={self.in_features}, num_classes={self.out_features}, scale={self.scale}"

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, P) to logits (B, K) in [-s, s], in at least float32."""
        with torch.autocast(features.device.type, enabled=False):
            features = at_least_float32(features)
            return self.scale * F.linear(unit_or_zero(features), unit_or_zero(self.weight.to(features.dtype)))


class ETFHead(nn.Module):
    """Logits h m_k of unit features on the K directions of a fixed simplex, without bias (Yang et al. 2022).

    The directions have length 1 and all angles between them are equal, the largest that K directions can have. They
    are a buffer: saved, moved with the model, never trained. The logits lie in [-1, 1], which suits dot regression
    and is too narrow for cross entropy.

    Args:
        in_features: P, at least K - 1. The authors, who need P >= K, train CIFAR-100 with a twice as wide network.
        num_classes: K.
        seed: of the rotation of the simplex.
        norm: `"batch"`: batch norm before features are brought to length 1, as the authors' CIFAR head; `"none"`.

    Raises:
        ValueError: where there is no simplex of K directions in P dimensions, or for another `norm`.
    """

    bias = None

    def __init__(
        self, in_features: int, num_classes: int, seed: int = 0, norm: Literal["batch", "none"] = "batch"
    ) -> None:
        super().__init__()
        if norm not in ("batch", "none"):
            raise ValueError(f"`norm` of an ETF head must be batch or none, got {norm!r}.")
        self.in_features, self.out_features, self.seed = in_features, num_classes, seed
        self.norm = nn.BatchNorm1d(in_features) if norm == "batch" else None
        self.register_buffer("weight", simplex_directions(num_classes, in_features, seed).float())

    def extra_repr(self) -> str:
        """The shape, for `print(model)`."""
        return f"in_features={self.in_features}, num_classes={self.out_features}, seed={self.seed}"

    def unit_features(self, features: Tensor) -> Tensor:
        """Features (B, P) after the norm and of length 1, in at least float32."""
        if self.norm is not None:
            features, norm = features.to(self.norm.weight.dtype), self.norm
            if len(features) > 1:
                features = norm(features)
            else:  # one image, as the last batch of an epoch may be, has no statistics of its own
                features = F.batch_norm(
                    features, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
                )
        return unit_or_zero(at_least_float32(features))

    def forward(self, features: Tensor) -> Tensor:
        """Features (B, P) to logits (B, K) in [-1, 1], in at least float32."""
        with torch.autocast(features.device.type, enabled=False):
            features = self.unit_features(features)
            return F.linear(features, self.weight.to(features.dtype))


HEADS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "linear": (nn.Linear, ()),
    "cosine": (CosineHead, ("scale",)),
    "etf": (ETFHead, ("seed", "norm")),
}
REPLACEABLE_HEADS = tuple(head_class for head_class, _ in HEADS.values())


def set_head(model: nn.Module, head_name: str, kind: HeadKind, **settings: Any) -> nn.Module:
    """Replace a classifier's last layer by a new one of the same size, device and type of numbers.

    Do it before the model is wrapped, tapped or compiled, and before an optimizer is made.

    Args:
        model: of timm or transformers, changed in place.
        head_name: module path of its head, from `find_head`.
        kind: `"linear"`, `"cosine"` or `"etf"`.
        **settings: `scale` of a cosine head; `seed` and `norm` of an ETF head.

    Returns:
        The new head.

    Raises:
        ValueError: for an unknown kind or setting, a head that is a convolution or of several experts, or features
            too narrow for a simplex.
    """
    if kind not in HEADS:
        raise ValueError(f"the kind of a head must be one of {', '.join(HEADS)}, got {kind!r}.")
    head_class, known = HEADS[kind]
    if unknown := sorted(set(settings) - set(known)):
        raise ValueError(
            f"a {kind} head has no setting {', '.join(unknown)}. Its settings: {', '.join(known) or 'none'}."
        )
    old = model.get_submodule(head_name)
    if not isinstance(old, REPLACEABLE_HEADS):
        raise ValueError(
            f"{head_name!r} of {type(model).__name__} is {type(old).__name__}; only a linear, cosine or ETF head "
            "can be replaced. Choose a model that ends in a linear layer."
        )
    num_classes, width = old.weight.shape
    head = head_class(width, num_classes, **settings).to(device=old.weight.device, dtype=old.weight.dtype)
    model.set_submodule(head_name, head.train(old.training))
    return head


def equivalent_linear(head: nn.Module) -> LinearHead:
    """The affine head on unnormalized features with the same predictions in eval mode, for geometry.

    Its logits are the head's for a linear layer, a 1x1 convolution or an `ExpertsHead`. For a cosine or ETF head they
    are the head's times the length of the feature (after the batch norm), a positive factor that changes no argmax.

    Args:
        head: the last layer of a classifier.

    Returns:
        Weight (K, P) and bias (K,), detached.
    """
    weight = head.weight.detach().flatten(1)
    bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias.detach()
    if isinstance(head, CosineHead):
        weight = head.scale * unit_or_zero(weight)
    if isinstance(head, ETFHead) and head.norm is not None:
        norm = head.norm
        factor = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
        bias = weight @ (norm.bias.detach() - factor * norm.running_mean)
        weight = weight * factor
    return LinearHead(weight, bias)


HOW = "by model.head_type in a recipe, by nc_hf.models.headed.replace_head in Python"


def check_head_for(loss: SupervisedLoss, head: nn.Module) -> None:
    """Refuse a loss whose formula holds for another kind of head only.

    Raises:
        ValueError: for LDAM without a cosine head of its scale, dot regression without an ETF head, or an ETF head
            with a loss that needs logits beyond [-1, 1].
    """
    found = type(head).__name__
    if loss.name == "ldam" and getattr(head, "scale", None) != loss.settings["scale"]:
        scale = f" of scale {head.scale}" if hasattr(head, "scale") else ""
        raise ValueError(
            f"`loss: ldam` needs a cosine head of its scale, {loss.settings['scale']}, and diverges on a linear one; "
            f"the head is {found}{scale}. Take a cosine head ({HOW}), or one scale for both."
        )
    if loss.name == "dot_regression" and not isinstance(head, ETFHead):
        raise ValueError(f"`loss: dot_regression` needs an ETF head; the head is {found}. Take one ({HOW}).")
    if isinstance(head, ETFHead) and loss.name not in ("dot_regression", "mse"):
        raise ValueError(
            f"the logits of an ETF head lie in [-1, 1], too narrow for `loss: {loss.name}`. Set loss: dot_regression, "
            "or the head to cosine."
        )
