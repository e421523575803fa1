"""The paper's tables as data: the printed numbers, and the recipe behind each row.

Numbers are those of "Inducing Neural Collapse in Deep Long-tailed Learning" (AISTATS 2023), top-1 accuracy in percent.
To reproduce one more row, add it to `rows` under its printed name with the name of its recipe.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

BALANCED = ("--data.imbalance_ratio", "null")
RATIO_10 = ("--data.imbalance_ratio", "10")
NOISE_STDS = (0, 0.1, 0.2, 0.3, 0.4)  # of Table 6

Cell = float | tuple[float | None, ...] | None


@dataclass(frozen=True)
class Setting:
    """A data set that a table has a column for.

    Attributes:
        title: for people.
        dataset: what `--dataset` calls it.
        ratio: imbalance ratio; None for data that are as they are.
        recipes: folder of its recipes.
        overrides: that make it from the data of these, as `load_recipe` takes them.
        variant: tells its results from others on the same data.
    """

    title: str
    dataset: str
    ratio: int | None = None
    recipes: str = ""
    overrides: tuple[str, ...] = ()
    variant: str = ""

    @property
    def folder(self) -> str:
        """Of its results."""
        ratio = "" if self.ratio is None else f"r{self.ratio}"
        return "_".join(filter(None, (self.dataset, ratio, self.variant)))

    @property
    def is_balanced(self) -> bool:
        """Whether a long-tailed set is taken whole."""
        return self.overrides == BALANCED


@dataclass(frozen=True)
class Row:
    """The run behind a row.

    Attributes:
        method: name of the folder of its results, and of its recipe where `recipe` is None.
        head: of the run.
        balanced: method on balanced data, where that is another one (Table 6).
        recipe: name of the recipe, where several methods share one and differ by `overrides`.
        overrides: as `load_recipe` takes them.
        on: further overrides on some data sets.
    """

    method: str
    head: str = "base"
    balanced: str | None = None
    recipe: str | None = None
    overrides: tuple[str, ...] = ()
    on: Mapping[Setting, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        title: for people.
        settings: its data sets.
        rows: runs by printed name.
        printed: by printed name one cell a setting: a number or, with several metrics, one number each; None for "-".
            Rows that the paper does not have are not in it.
        metrics: titles by key of a head in `results.json`, or by `"noise 0.1"` for accuracy under noise.
        order: what the paper claims, as names with `<` and `<=` between them.
        note: what a reader must know of the printed numbers.
    """

    title: str
    settings: tuple[Setting, ...]
    rows: Mapping[str, Row]
    printed: Mapping[str, tuple[Cell, ...]]
    metrics: Mapping[str, str] = field(default_factory=lambda: {"accuracy": "top-1"})
    order: tuple[str, ...] = ()
    note: str = ""


CIFAR10 = Setting("CIFAR-10", "cifar10", None, "cifar10_lt", BALANCED)
CIFAR100 = Setting("CIFAR-100", "cifar100", None, "cifar100_lt", BALANCED)
CIFAR10_LT = Setting("CIFAR-10-LT, r = 100", "cifar10_lt", 100, "cifar10_lt")
CIFAR10_LT_R10 = Setting("CIFAR-10-LT, r = 10", "cifar10_lt", 10, "cifar10_lt", RATIO_10)
CIFAR100_LT = Setting("CIFAR-100-LT, r = 100", "cifar100_lt", 100, "cifar100_lt")
CIFAR100_LT_R10 = Setting("CIFAR-100-LT, r = 10", "cifar100_lt", 10, "cifar100_lt", RATIO_10)
IMAGENET_LT = Setting("ImageNet-LT", "imagenet_lt", None, "imagenet_lt")
LONG_TAILED = (CIFAR10_LT, CIFAR10_LT_R10, CIFAR100_LT, CIFAR100_LT_R10)

NC_DRW, NC_DRW_CRT = Row("nc_drw_crt"), Row("nc_drw_crt", "crt")
ORDER = ("CE", "<", "CE-DRW", "<", "NC-DRW", "<=", "NC-DRW-cRT")


# MiSLAS's own settings at r = 10; those at r = 100 are in its recipes.
MISLAS_R10 = {
    CIFAR10_LT_R10: ("--stage2.loss_settings", "{head: 0.1, tail: 0.0}", "--stage2.lws_weight_factor", "0.2"),
    CIFAR100_LT_R10: ("--stage2.loss_settings", "{head: 0.2, tail: 0.0}", "--stage2.lws_weight_factor", "0.1"),
}


def _ride(method: str, experts: int) -> Row:
    overrides = ("--model.model_args", f"{{num_experts: {experts}}}")
    return Row(f"{method}_{experts}_experts", recipe=method, overrides=overrides)


def _resnet18(method: str) -> Row:
    return Row(f"{method}_resnet18", recipe=method, overrides=("--model.name", "resnet18_cifar"))


def _without_mixup(method: str) -> Row:
    overrides = ("--stage1.mixup_alpha", "0", "--stage2", "null")
    return Row(f"{method}_no_mixup", recipe=f"{method}_light_mixup", overrides=overrides)


TABLES = {
    "table2": Table(
        "Table 2: balanced data, ResNet-32",
        (CIFAR10, CIFAR100),
        {
            "CE": Row("ce"),
            "CE+NC": Row("nc"),
            "MSE": Row("mse"),
            "MSE+NC": Row("nc_mse", recipe="nc", overrides=("--stage1.loss", "mse")),
        },
        {"CE": (93.4, 71.8), "CE+NC": (93.3, 72.1), "MSE": (91.1, 70.7), "MSE+NC": (91.7, 71.9)},
    ),
    "table3": Table(
        "Table 3: long-tailed CIFAR, ResNet-32",
        LONG_TAILED,
        {
            "CE": Row("ce"),
            "CE-RS": Row("ce_rs"),
            "CE-RW": Row("ce_rw"),
            "CE-DRW": Row("ce_drw"),
            "CE-DRW-cRT": Row("ce_drw_crt", "crt"),
            "CE-DRW, mixup 0.2": Row("ce_light_mixup"),
            "CE-DRW-cRT, mixup 0.2": Row("ce_light_mixup", "crt"),
            "CE-DRW, mixup 0.2, ghost batches of 32": Row("ce_ghost_batches"),
            "CE-DRW-cRT, mixup 0.2, ghost batches of 32": Row("ce_ghost_batches", "crt"),
            "CE-DRW, no mixup": _without_mixup("ce"),
            "LDAM-DRW": Row("ldam_drw"),
            "BBN": Row("bbn"),
            "MiSLAS": Row("mislas", "lws", on=MISLAS_R10),
            "KCL": Row("kcl", "crt"),
            "TSC": Row("tsc", "crt"),
            "ETF classifier+DR": Row("etf_dr"),
            "ARB-Loss": Row("arb"),
            "NC-DRW": NC_DRW,
            "NC-DRW-cRT": NC_DRW_CRT,
            "NC-DRW, mixup 0.2": Row("nc_light_mixup"),
            "NC-DRW-cRT, mixup 0.2": Row("nc_light_mixup", "crt"),
            "NC-DRW, mixup 0.2, ghost batches of 32": Row("nc_ghost_batches"),
            "NC-DRW-cRT, mixup 0.2, ghost batches of 32": Row("nc_ghost_batches", "crt"),
            "NC-DRW, no mixup": _without_mixup("nc"),
            "NC-DRW, learned centers": Row("nc_learned"),
            "NC-DRW-cRT, learned centers": Row("nc_learned", "crt"),
        },
        {
            "CE": (70.4, 86.4, 38.4, 55.7),
            "CE-RS": (72.8, 87.8, 36.7, 57.7),
            "CE-RW": (74.4, 87.9, 32.5, 58.2),
            "CE-DRW": (75.1, 86.4, 42.5, 56.2),
            "LDAM-DRW": (77.0, 88.2, 43.5, 58.7),
            "BBN": (79.9, 88.4, 42.6, 59.2),
            "MiSLAS": (82.1, 90.0, 47.0, 63.2),
            "KCL": (77.6, 88.0, 42.8, 57.6),
            "TSC": (79.7, 88.7, 43.8, 59.0),
            "ETF classifier+DR": (76.5, 87.7, 45.3, None),
            "ARB-Loss": (83.3, 90.2, 47.2, 62.1),
            "NC-DRW": (81.9, 89.8, 48.6, 63.1),
            "NC-DRW-cRT": (82.6, 90.2, 48.7, 63.6),
        },
        order=ORDER,
        note="The authors copied all rows but the two of NC from other papers, whose protocols differ.",
    ),
    "table4": Table(
        "Table 4: ImageNet-LT, ResNeXt-50",
        (IMAGENET_LT,),
        {
            "CE": Row("ce"),
            "CE-RS": Row("ce_rs"),
            "CE-RW": Row("ce_rw"),
            "CE-DRW": Row("ce_drw"),
            "CE-cRT": Row("ce_crt", "crt"),
            "CE-LWS": Row("ce_crt", "lws"),
            "MiSLAS": Row("mislas", "lws"),
            "FCL": Row("fcl", "crt"),
            "KCL": Row("kcl", "crt"),
            "TSC": Row("tsc", "crt"),
            "ETF classifier+DR": Row("etf_dr"),
            "ARB-Loss": Row("arb"),
            "NC-DRW": NC_DRW,
            "NC-DRW-cRT": NC_DRW_CRT,
        },
        {
            "CE": ((68.2, 38.1, 5.82, 45.3),),
            "CE-RS": ((64.6, 42.6, 17.8, 47.8),),
            "CE-RW": ((52.0, 41.4, 19.8, 42.5),),
            "CE-DRW": ((52.6, 45.7, 31.5, 46.4),),
            "CE-cRT": ((58.8, 33.0, 26.1, 47.3),),
            "CE-LWS": ((57.1, 45.2, 29.3, 47.7),),
            "MiSLAS": ((61.7, 51.3, 35.8, 52.7),),
            "FCL": ((61.4, 47.0, 28.2, 49.8),),
            "KCL": ((62.4, 49.0, 29.5, 51.5),),
            "TSC": ((63.5, 49.7, 30.4, 52.4),),
            "ETF classifier+DR": ((None, None, None, 44.7),),
            "ARB-Loss": ((60.2, 51.8, 38.3, 52.8),),
            "NC-DRW": ((67.1, 49.7, 29.0, 53.6),),
            "NC-DRW-cRT": ((65.6, 51.2, 35.4, 54.2),),
        },
        {"accuracy_many": "many", "accuracy_medium": "medium", "accuracy_few": "few", "accuracy": "all"},
        order=ORDER,
        note="The printed groups of MiSLAS and ARB-Loss are MiSLAS's, by class index. The row CE-cRT does not add up.",
    ),
    "table5": Table(
        "Table 5: the collapse terms added to other methods",
        (CIFAR10_LT, CIFAR100_LT, IMAGENET_LT),
        {
            "LDAM-DRW": Row("ldam_drw"),
            "LDAM-DRW+NC": Row(
                "nc_ldam_drw",
                recipe="nc_drw_crt",
                overrides=("--stage1.loss", "ldam", "--model.head_type", "cosine", "--stage2", "null"),
            ),
            "Logit Adjust": Row("logit_adjustment"),
            "Logit Adjust+NC": Row(
                "nc_logit_adjustment", recipe="nc", overrides=("--stage1.loss", "logit_adjustment")
            ),
            "RIDE (2 experts)": _ride("ride", 2),
            "RIDE (3 experts)": _ride("ride", 3),
            "RIDE (4 experts)": _ride("ride", 4),
            "RIDE+NC (2 experts)": _ride("nc_ride", 2),
            "RIDE+NC (3 experts)": _ride("nc_ride", 3),
            "RIDE+NC (4 experts)": _ride("nc_ride", 4),
        },
        {
            "LDAM-DRW": (77.0, 42.0, 48.8),
            "LDAM-DRW+NC": (77.1, 43.2, 49.5),
            "Logit Adjust": (77.4, 43.9, 51.1),
            "Logit Adjust+NC": (78.8, 44.6, 53.2),
            "RIDE (2 experts)": (None, 46.5, 51.9),
            "RIDE (3 experts)": (None, 47.5, 54.2),
            "RIDE (4 experts)": (None, 48.8, 55.2),
            "RIDE+NC (2 experts)": (None, 46.8, 52.2),
            "RIDE+NC (3 experts)": (None, 48.1, 54.8),
            "RIDE+NC (4 experts)": (None, 49.1, 56.0),
        },
        note="The imbalance ratio of the CIFAR columns is not printed; the numbers are those of r = 100.",
    ),
    "table6": Table(
        "Table 6: Gaussian noise on the test images",
        (CIFAR10, CIFAR10_LT, CIFAR100, CIFAR100_LT),
        {
            "ResNet-32, CE": Row("ce_drw", balanced="ce"),
            "ResNet-32, CE+NC": Row("nc_drw_crt", balanced="nc"),
            "ResNet-18, CE": _resnet18("ce_drw"),
            "ResNet-18, CE+NC": _resnet18("nc_drw_crt"),
        },
        {
            "ResNet-32, CE": (
                (93.3, 89.4, 76.6, 54.7, 35.7),
                (77.0, 75.0, 62.3, 45.3, 32.5),
                (71.8, 60.2, 40.0, 23.9, 14.1),
                (42.5, 37.2, 25.4, 16.3, 10.2),
            ),
            "ResNet-32, CE+NC": (
                (93.1, 89.6, 76.6, 57.5, 39.0),
                (79.2, 75.5, 63.2, 47.8, 35.5),
                (72.3, 59.0, 39.7, 23.9, 15.1),
                (45.7, 39.0, 27.2, 16.8, 11.1),
            ),
            "ResNet-18, CE": (
                (94.9, 91.5, 79.2, 56.9, 35.9),
                (79.2, 75.7, 63.5, 47.2, 33.8),
                (78.2, 65.9, 44.2, 25.0, 14.3),
                (46.8, 41.1, 31.6, 23.6, 17.6),
            ),
            "ResNet-18, CE+NC": (
                (95.1, 91.8, 78.9, 57.1, 37.4),
                (81.0, 77.5, 66.5, 51.4, 37.9),
                (78.6, 67.8, 46.9, 28.2, 16.6),
                (47.2, 41.6, 31.6, 23.3, 16.3),
            ),
        },
        {f"noise {std:g}": f"std {std:g}" for std in NOISE_STDS},
        note="Long-tailed rows with DRW. The paper does not say where the noise is added; here it is where the "
        "network sees the image, after normalization. On pixels in [0, 1] accuracy falls to near chance at std 0.1.",
    ),
    "table7": Table(
        "Table 7: which term does what, ResNet-32 with DRW",
        LONG_TAILED,
        {
            "CE": Row("ce_drw"),
            "+Center Loss": Row("center_loss"),
            "+L_W": Row("nc_within"),
            "+L_B": Row("nc_between"),
            "+Center Loss & L_B": Row("center_loss_between"),
            "+L_W & L_B": NC_DRW,
        },
        {
            "CE": (75.1, 86.4, 42.4, 56.2),
            "+Center Loss": (78.7, 89.1, 46.3, 61.2),
            "+L_W": (79.1, 88.1, 46.9, 61.3),
            "+L_B": (80.1, 88.6, 47.6, 61.7),
            "+Center Loss & L_B": (77.5, 89.2, 46.5, 61.4),
            "+L_W & L_B": (81.9, 89.8, 48.6, 63.1),
        },
        note="The authors copied the row CE from other papers; their own run of it in Table 6 has 77.0 and 42.5 at "
        "r = 100, and +L_W & L_B 79.2 and 45.7.",
    ),
}
