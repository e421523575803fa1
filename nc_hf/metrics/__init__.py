"""Accuracy by class frequency, calibration, and the geometry of neural collapse."""

from __future__ import annotations

from typing import Any

from nc_hf.metrics.calibration import expected_calibration_error
from nc_hf.metrics.compute_metrics import compute_metrics_for
from nc_hf.metrics.geometry import best_angle, class_means, measure_geometry, pairwise_angles
from nc_hf.metrics.long_tail_accuracy import frequency_groups, long_tail_accuracy

EVALUATE_MODULES = ("CalibrationError", "LongTailAccuracy")  # `evaluate` takes long to import

__all__ = [
    *EVALUATE_MODULES,
    "best_angle",
    "class_means",
    "compute_metrics_for",
    "expected_calibration_error",
    "frequency_groups",
    "long_tail_accuracy",
    "measure_geometry",
    "pairwise_angles",
]


def __getattr__(name: str) -> Any:
    """What needs the library `evaluate`, imported at its first use."""
    if name in EVALUATE_MODULES:
        from nc_hf.metrics import evaluate_modules

        return getattr(evaluate_modules, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
