"""A table that the paper does not have: every method without and with the collapse terms, on one short schedule."""

from __future__ import annotations

from nc_hf.paper_tables import CIFAR10_LT, NC_DRW, NC_DRW_CRT, TABLES, Row, Table

TABLE5, TABLE7 = TABLES["table5"].rows, TABLES["table7"].rows
TERMS = ("--stage1.centers", "ema", "--stage1.feature_scale", "none")
TERMS += ("--stage1.within_weight", "0.01", "--stage1.between_weight", "0.1")  # as recipes/cifar10_lt/nc.yaml

# Heads of one recipe come from one run.
METHODS = {
    "CE": Row("ce_crt"),
    "CE-RS": Row("ce_rs"),
    **{
        f"CE-RS, {sampler} draws": Row(f"ce_rs_{sampler}", recipe="ce_rs", overrides=("--stage1.sampler", sampler))
        for sampler in ("square_root", "progressive", "class_aware")
    },
    "CE-RW": Row("ce_rw"),
    "CE-DRW": Row("ce_drw_crt"),
    "MSE": Row("mse"),
    "label smoothing": Row("label_smoothing"),
    "focal": Row("focal"),
    "class-balanced focal": Row("class_balanced"),
    "balanced softmax, logit adjustment": Row("logit_adjustment"),
    "ARB-Loss": Row("arb"),
    "LDAM-DRW": Row("ldam_drw"),
    "ETF classifier+DR": Row("etf_dr"),
    "CutMix": Row("cutmix"),
    "AutoAugment": Row("auto_augment"),
    "BBN": Row("bbn"),
    **{name: row for name, row in TABLE5.items() if name.startswith("RIDE (")},
    "cRT": Row("ce_crt", "crt"),
    "LWS": Row("ce_crt", "lws"),
    "tau-normalization": Row("ce_crt", "tau_norm"),
    "nearest class mean": Row("ce_crt", "ncm"),
    "least squares": Row("ce_crt", "least_squares"),
    "logit adjustment, post hoc": Row("ce_crt", "logit_adjusted"),
    "DRW-cRT": Row("ce_drw_crt", "crt"),
    "MiSLAS": Row("mislas", "lws"),
    "weight balancing": Row("weight_balancing", "crt"),
    "FCL": Row("fcl", "crt"),
    "KCL": Row("kcl", "crt"),
    "TSC": Row("tsc", "crt"),
}
# With the terms where that is a run of the paper's tables, whose results it shares.
WITH_NC = {
    "CE-DRW": NC_DRW,
    "DRW-cRT": NC_DRW_CRT,
    "LDAM-DRW": TABLE5["LDAM-DRW+NC"],
    "balanced softmax, logit adjustment": TABLE5["Logit Adjust+NC"],
    **{name: TABLE5[name.replace("RIDE", "RIDE+NC")] for name in METHODS if name.startswith("RIDE")},
}


def _rows() -> dict[str, Row]:
    rows = {}
    for name, row in METHODS.items():
        terms = Row(f"{row.method}_nc", row.head, recipe=row.recipe or row.method, overrides=(*row.overrides, *TERMS))
        rows |= {name: row, f"{name} + NC": WITH_NC.get(name, terms)}
    # Center loss stands in the place of L_W, and its recipe has the re-weighting of Table 7.
    rows["center loss, DRW"] = TABLE7["+Center Loss"]
    rows["center loss, DRW + L_B"] = TABLE7["+Center Loss & L_B"]
    return rows


METHODS_TABLE = Table(
    "Every method, without and with the collapse terms",
    (CIFAR10_LT,),
    _rows(),
    {},
    {"accuracy_many": "many", "accuracy_medium": "medium", "accuracy": "all"},
    note="Class 'few' is empty in CIFAR-10-LT with r = 100, whose smallest class has 50 images. "
    "Balanced softmax and logit adjustment with tau 1 are one loss, and one run. tau of tau-normalization and of "
    "post-hoc logit adjustment is 1: there is no validation split to choose it on.",
    epochs=30,
)
