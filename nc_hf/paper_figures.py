"""The paper's figures as data, and more of the same kinds: which runs each shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nc_hf.methods_table import METHODS_TABLE, MIXUP, SHORT
from nc_hf.paper_tables import BALANCED, CIFAR10, CIFAR10_LT, NC_DRW, NC_DRW_CRT, Row, Setting


@dataclass(frozen=True)
class FigureSpec:
    """A figure: for each panel or line its setting and the rows that can stand for it, the first that was run.

    `kind` is `"angles"` or `"norms"` of class means, the `"collapse"` over training, or accuracy by `"classes"`.
    """

    title: str
    kind: str
    panels: Mapping[str, tuple[Setting, tuple[Row, ...]]]


_PLAIN, _NC = Row("ce"), (Row("nc"), NC_DRW)
_COMPARED = {
    "CE": (CIFAR10_LT, (_PLAIN,)),
    "CE-DRW": (CIFAR10_LT, (Row("ce_drw"), Row("ce_drw_crt"))),
    "NC-DRW": (CIFAR10_LT, (NC_DRW,)),
}
# On the short schedule plain training has not yet spread the rare classes by itself.
_SHORT = {name: (SHORT, (METHODS_TABLE.rows[name],)) for name in ("CE", "CE-RS", "CE-RW", "CE + NC")}
# On four times the images 8 epochs are about as many updates: 3128 beside 2910.
_EPOCHS_8 = ("--stage1.num_train_epochs", "8", "--stage1.warmup_epochs", "2")
_SHORT_BALANCED = Setting("CIFAR-10, 8 epochs", "cifar10", None, "cifar10_lt", (*BALANCED, *_EPOCHS_8), "8_epochs")
FIGURES = {
    "figure2": FigureSpec(
        "Figure 2: angles of the class means, CIFAR-10-LT, r = 100",
        "angles",
        {
            "plain": (CIFAR10_LT, (_PLAIN,)),
            "re-sampling": (CIFAR10_LT, (Row("ce_rs"),)),
            "re-weighting": (CIFAR10_LT, (Row("ce_rw"),)),
            "NC": (CIFAR10_LT, _NC),
        },
    ),
    "figure3": FigureSpec(
        "Figure 3: norms of the class means, CIFAR-10",
        "norms",
        {
            "balanced": (CIFAR10, (_PLAIN,)),
            "long-tailed": (CIFAR10_LT, (_PLAIN,)),
            "long-tailed, NC": (CIFAR10_LT, _NC),
        },
    ),
    "figure2_30_epochs": FigureSpec(
        "Figure 2 on the schedule of `methods`, CIFAR-10-LT, r = 100",
        "angles",
        {
            "plain": _SHORT["CE"],
            "re-sampling": _SHORT["CE-RS"],
            "re-weighting": _SHORT["CE-RW"],
            "NC": _SHORT["CE + NC"],
        },
    ),
    "figure3_30_epochs": FigureSpec(
        "Figure 3 on the schedule of `methods`, CIFAR-10",
        "norms",
        {
            "balanced": (_SHORT_BALANCED, (Row("ce", overrides=MIXUP),)),
            "long-tailed": _SHORT["CE"],
            "long-tailed, NC": _SHORT["CE + NC"],
        },
    ),
    "collapse": FigureSpec("NC1 to NC4 over training, CIFAR-10-LT, r = 100", "collapse", _COMPARED),
    "classes": FigureSpec(
        "Accuracy by class size, CIFAR-10-LT, r = 100",
        "classes",
        {**_COMPARED, "NC-DRW-cRT": (CIFAR10_LT, (NC_DRW_CRT,))},
    ),
}
