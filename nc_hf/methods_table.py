"""A table that the paper does not have: every method without and with the collapse terms, on one short schedule."""

from __future__ import annotations

from nc_hf.paper_tables import CIFAR10_LT, Row, Table

TERMS = ("--stage1.centers", "ema", "--stage1.feature_scale", "none")
TERMS += ("--stage1.within_weight", "0.01", "--stage1.between_weight", "0.1")  # as recipes/cifar10_lt/nc.yaml

# Printed name to recipe and head; heads of one recipe come from one run.
METHODS = {
    "CE": ("ce_crt", "base"),
    "CE-RS": ("ce_rs", "base"),
    "CE-RW": ("ce_rw", "base"),
    "CE-DRW": ("ce_drw_crt", "base"),
    "MSE": ("mse", "base"),
    "label smoothing": ("label_smoothing", "base"),
    "focal": ("focal", "base"),
    "class-balanced focal": ("class_balanced", "base"),
    "balanced softmax": ("balanced_softmax", "base"),
    "ARB-Loss": ("arb", "base"),
    "logit adjustment": ("logit_adjustment", "base"),
    "LDAM-DRW": ("ldam_drw", "base"),
    "ETF classifier+DR": ("etf_dr", "base"),
    "CutMix": ("cutmix", "base"),
    "AutoAugment": ("auto_augment", "base"),
    "BBN": ("bbn", "base"),
    "RIDE (3 experts)": ("ride", "base"),
    "cRT": ("ce_crt", "crt"),
    "LWS": ("ce_crt", "lws"),
    "tau-normalization": ("ce_crt", "tau_norm"),
    "nearest class mean": ("ce_crt", "ncm"),
    "least squares": ("ce_crt", "least_squares"),
    "logit adjustment, post hoc": ("ce_crt", "logit_adjusted"),
    "DRW-cRT": ("ce_drw_crt", "crt"),
    "MiSLAS": ("mislas", "lws"),
    "weight balancing": ("weight_balancing", "crt"),
    "FCL": ("fcl", "crt"),
    "KCL": ("kcl", "crt"),
    "TSC": ("tsc", "crt"),
}


def _rows() -> dict[str, Row]:
    rows = {}
    for name, (method, head) in METHODS.items():
        rows[name] = Row(method, head)
        rows[f"{name} + NC"] = Row(f"{method}_nc", head, recipe=method, overrides=TERMS)
    return rows


METHODS_TABLE = Table(
    "Every method, without and with the collapse terms",
    (CIFAR10_LT,),
    _rows(),
    {},
    {"accuracy_many": "many", "accuracy_medium": "medium", "accuracy": "all"},
    note="Class 'few' is empty in CIFAR-10-LT with r = 100, whose smallest class has 50 images.",
    epochs=30,
)
