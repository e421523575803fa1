"""NC1-NC4 against recorded values of three libraries.

Recorded, but no quantity of ours: papyan's `LNC1`, `LNC23`, `Lperp` and `MSE_wd_features` and ncfeature's
`MSE_decom_L2_LNC1_LNC23_Lperp` split the MSE loss of a least-squares head, which is no distance from collapse of the
head at hand; `loss`, `accuracy`, `reg_loss`, `norm_M_avg`, `norm_W_avg` and `norm_W_std` are scales, not geometry;
library's `kernel_log` is a function of the angles, which are compared; `norms`, `var_norms`, `cos_similarities`,
`dot_similarities`, `distance_norms` and ncfeature's `M_W_dist_per_class` are one value a class or of the vectors
themselves, which `nc2_norm_cov` and `nc3_duality_gap` sum up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from nc_hf.metrics import class_means, measure_geometry, pairwise_angles


def stream(features: Tensor, labels: Tensor) -> Callable[[], Iterator]:
    return lambda: zip(features.split(7), labels.split(7), strict=True)


def measure(case: dict, **kwargs: object) -> dict[str, float]:
    features, weight, bias = (torch.tensor(case["inputs"][name], dtype=torch.float64) for name in ("H", "W", "b"))
    kwargs = {"head_bias": bias} | kwargs
    return measure_geometry(
        stream(features, torch.tensor(case["inputs"]["y"])), weight, num_classes=len(weight), **kwargs
    )


def inputs_of(case: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tuple(np.array(case["inputs"][name]) for name in ("H", "y", "W"))


def test_golden_papyan(golden: Callable) -> None:
    for case in golden("nc_metrics_papyan"):
        result, outputs = measure(case), case["outputs"]
        num_classes = case["settings"]["K"]
        assert result["nc1_variability"] * num_classes == pytest.approx(outputs["Sw_invSb"], rel=1e-9)
        assert result["nc2_norm_cov"] == pytest.approx(outputs["norm_M_CoV"], rel=1e-9)
        assert result["nc2_coherence"] == pytest.approx(outputs["cos_M"], rel=1e-9)
        assert result["nc3_duality_gap"] ** 2 == pytest.approx(outputs["W_M_dist"], rel=1e-9)
        assert result["nc3_head_norm_cov"] == pytest.approx(outputs["norm_W_CoV"], rel=1e-9)
        assert 1 - result["nc4_agreement"] == pytest.approx(outputs["NCC_mismatch"], abs=1e-12)


def test_golden_library(golden: Callable) -> None:
    for case in golden("nc_metrics_library"):
        result, outputs = measure(case, head_bias=None), case["outputs"]  # it ignores the bias
        assert result["nc1_variability"] == pytest.approx(outputs["nc1_pinv"], rel=1e-9)
        assert result["nc1_quotient"] == pytest.approx(outputs["nc1_quotient"], rel=1e-9)
        assert result["nc1_cdnv"] == pytest.approx(outputs["cdnv"], rel=1e-9)
        assert result["nc2_etf_error"] == pytest.approx(outputs["etf_error"], rel=1e-9)
        assert result["nc3_etf_error"] == pytest.approx(outputs["self_duality_error"], rel=1e-9)
        assert result["nc4_agreement"] == pytest.approx(outputs["ncc_agreement"])


def test_golden_library_means_and_angles(golden: Callable) -> None:
    for case in golden("nc_metrics_library"):
        features, labels, head = inputs_of(case)
        batches = stream(torch.tensor(features), torch.tensor(labels))()
        means, counts = class_means(batches, *head.shape)
        assert counts.tolist() == np.bincount(labels).tolist()
        np.testing.assert_allclose(means, case["outputs"]["means"], rtol=1e-9)
        # It takes distances of unit vectors where we take angles: |u - v| = 2 sin(angle / 2).
        first, second = torch.triu_indices(len(means), len(means), offset=1)
        distances = 2 * (pairwise_angles(means)[first, second].deg2rad() / 2).sin()
        mean_and_variance = [distances.mean().item(), distances.var(correction=0).item()]
        assert mean_and_variance == pytest.approx(case["outputs"]["kernel_dist"], rel=1e-9)


def test_golden_ncfeature(golden: Callable) -> None:
    for case in golden("nc_metrics_ncfeature"):
        result, outputs = measure(case), case["outputs"]
        cosine, angle = outputs["cls_margin_means"]
        assert result["nc2_min_angle"] == pytest.approx(angle, rel=1e-9)
        assert math.cos(math.radians(result["nc2_min_angle"])) == pytest.approx(cosine, rel=1e-9)
        assert result["nc3_duality_gap"] ** 2 == pytest.approx(outputs["M_W_dist"], rel=1e-9)
        assert result["nc2_coherence"] == pytest.approx(outputs["coherence_M"], rel=1e-9)
        head = torch.tensor(case["inputs"]["W"])
        angles = pairwise_angles(head, centered=False)[~torch.eye(len(head), dtype=torch.bool)]
        assert angles.min().item() == pytest.approx(outputs["cls_margin_W"][1], rel=1e-5)
        coherence = (angles.deg2rad().cos() + 1 / (len(head) - 1)).abs().mean().item()
        assert coherence == pytest.approx(outputs["coherence_W"], rel=1e-5)


def test_golden_my_nc1_is_ours_only_on_balanced_data(golden: Callable) -> None:
    for case in golden("nc_metrics_ncfeature"):
        features, labels, head = inputs_of(case)
        ours, theirs = measure(case)["nc1_variability"], case["outputs"]["myNC1"]
        counts = np.bincount(labels)
        if len(set(counts)) == 1:
            assert ours * len(head) ** 2 / len(labels) == pytest.approx(theirs, rel=1e-9)
        else:  # class sizes squared and the mean over images: no factor leads there
            assert ours * len(head) ** 2 / len(labels) != pytest.approx(theirs, rel=0.01)
