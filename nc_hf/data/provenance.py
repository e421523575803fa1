"""Where the known data sets come from: names, Hub ids, licences and citations for cards."""

from __future__ import annotations

from typing import NamedTuple


class Provenance(NamedTuple):
    """What a card says of a data set; None where it is not known."""

    title: str
    hub_id: str | None
    license: str | None
    citation: str


_CIFAR = """@techreport{krizhevsky2009learning,
  title = {Learning Multiple Layers of Features from Tiny Images},
  author = {Krizhevsky, Alex},
  institution = {University of Toronto},
  year = {2009}
}"""
_LONG_TAILED_SETS = """@inproceedings{liu2019large,
  title = {Large-Scale Long-Tailed Recognition in an Open World},
  author = {Liu, Ziwei and Miao, Zhongqi and Zhan, Xiaohang and Wang, Jiayun and Gong, Boqing and Yu, Stella X.},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2019}
}"""

PROVENANCE = {
    "cifar10": Provenance("CIFAR-10", "uoft-cs/cifar10", None, _CIFAR),
    "cifar100": Provenance("CIFAR-100", "uoft-cs/cifar100", None, _CIFAR),
    "fashion_mnist": Provenance(
        "Fashion-MNIST",
        "zalando-datasets/fashion_mnist",
        "mit",
        """@article{xiao2017fashion,
  title = {Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms},
  author = {Xiao, Han and Rasul, Kashif and Vollgraf, Roland},
  journal = {arXiv:1708.07747},
  year = {2017}
}""",
    ),
    "digits": Provenance(
        "digits",
        None,
        "cc-by-4.0",
        """@misc{alpaydin1998optical,
  title = {Optical Recognition of Handwritten Digits},
  author = {Alpaydin, E. and Kaynak, C.},
  howpublished = {UCI Machine Learning Repository},
  year = {1998}
}""",
    ),
    "Caltech-101": Provenance(
        "Caltech-101",
        None,
        "cc-by-4.0",
        """@misc{li2022caltech,
  title = {Caltech 101},
  author = {Li, Fei-Fei and Andreeto, Marco and Ranzato, Marc'Aurelio and Perona, Pietro},
  publisher = {CaltechDATA},
  year = {2022}
}""",
    ),
    "imagenet_lt": Provenance("ImageNet-LT", None, None, _LONG_TAILED_SETS),
    "places_lt": Provenance("Places-LT", None, None, _LONG_TAILED_SETS),
    "inaturalist2018": Provenance(
        "iNaturalist 2018",
        None,
        None,
        """@inproceedings{vanhorn2018inaturalist,
  title = {The iNaturalist Species Classification and Detection Dataset},
  author = {Van Horn, Grant and others},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2018}
}""",
    ),
}

# The long-tailed protocol: class sizes by Cui et al., the draw by Cao et al.
LONG_TAIL_CITATION = """@inproceedings{cui2019class,
  title = {Class-Balanced Loss Based on Effective Number of Samples},
  author = {Cui, Yin and Jia, Menglin and Lin, Tsung-Yi and Song, Yang and Belongie, Serge},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year = {2019}
}

@inproceedings{cao2019learning,
  title = {Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss},
  author = {Cao, Kaidi and Wei, Colin and Gaidon, Adrien and Arechiga, Nikos and Ma, Tengyu},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2019}
}"""
